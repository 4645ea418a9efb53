"""Merge and adapt models in JAX: a merge method is a value that runs in memory, sharded, and streamed from disk."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmerge.api import *  # noqa: F403

__version__ = "0.1.0"


# Importing the package loads nothing, so that its command line answers at once; the first name loads all of `api`.
def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    api = importlib.import_module("jaxmerge.api")
    public = {key: value for key, value in vars(api).items() if not key.startswith("_")}
    if name not in public:
        raise AttributeError(f"module 'jaxmerge' has no attribute {name!r}")
    globals().update(public)
    return public[name]


def __dir__() -> list[str]:
    api = importlib.import_module("jaxmerge.api")
    return sorted({*globals(), *(name for name in vars(api) if not name.startswith("_"))})
