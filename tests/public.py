"""The public surface of the package, for the tests that hold over all of it."""

import inspect

import jaxmerge.api


def public_names() -> dict[str, object]:
    """What `jaxmerge.X` offers, without the module that checking types adds while tests run."""
    public = vars(jaxmerge.api).items()
    return {name: value for name, value in public if not name.startswith("_") and not inspect.ismodule(value)}
