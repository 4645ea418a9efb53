"""Merge and adapt models in JAX: a merge method is a value that runs in memory, sharded, and streamed from disk."""

import typing

if typing.TYPE_CHECKING:
    from jaxmerge.api import *  # noqa: F403
else:
    # Importing the package loads nothing, so that its command line answers at once; the first name loads all of `api`.
    def __getattr__(name: str) -> typing.Any:
        public = _public()
        if name not in public:
            raise AttributeError(f"module 'jaxmerge' has no attribute {name!r}")
        globals().update(public)
        return public[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *_public()})

    def _public() -> dict[str, typing.Any]:
        import importlib

        names = vars(importlib.import_module("jaxmerge.api"))
        return {name: value for name, value in names.items() if not name.startswith("_")}


__version__ = "0.1.0"
