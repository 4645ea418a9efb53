"""Methods and keys as plain data, and back: what a manifest needs so that a merge can be made again.

Every coefficient is kept exactly. Only classes of this library are written and built; what comes from a file is not
trusted to name any other.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.checkpoints.layout import DTYPES
from jaxmerge.checkpoints.stored import StoredTensor
from jaxmerge.errors import CheckpointError, RecipeError
from jaxmerge.methods.coefficients import ByDepth, Table
from jaxmerge.methods.method import Method
from jaxmerge.methods.stages import Stage
from jaxmerge.streaming.fingerprint import digest
from jaxmerge.trees.paths import named_leaves


def method_as_data(method: Any) -> Any:
    """A method as plain data, from which `method_from_data` builds the same one: every coefficient is kept exactly.

    Statistics that lie in a file are told by its path, its state and their name there.

    Raises:
        RecipeError: something in it cannot be written down: a function, or a class that is not part of the library.
    """
    kind = type(method)
    if method is None or kind in (bool, int, str) or (kind is float and math.isfinite(method)):
        return method
    if kind is float:
        return {"is": "float", "text": repr(method)}
    if kind in (list, tuple):
        return [method_as_data(x) for x in method]
    if kind is dict:  # statistics, by the names of experts and tensors
        return {"is": "dict", "items": [[key, method_as_data(value)] for key, value in method.items()]}
    if isinstance(method, StoredTensor) and method.source.path is not None:
        state = digest(method.source.state())
        return {"is": "stored", "path": method.source.path, "tensor": method.name, "state": state}
    if isinstance(method, np.ndarray | np.generic | jax.Array) and (values := np.asarray(method)).dtype in _PLAIN:
        where = "jax" if isinstance(method, jax.Array) else "numpy"
        little = values.astype(values.dtype.newbyteorder("<"))
        return {"is": where, "dtype": values.dtype.name, "shape": list(values.shape), "bytes": little.tobytes().hex()}
    if _is_ours(kind):
        fields = {f.name: method_as_data(getattr(method, f.name)) for f in dataclasses.fields(method)}  # pyright: ignore[reportArgumentType]
        return {"is": kind.__name__, "fields": fields}
    raise RecipeError(f"{method!r:.200} cannot be written down as data, so a merge with it cannot be replayed")


def method_from_data(data: Any) -> Any:
    """The method that `method_as_data` has written down.

    Raises:
        CheckpointError: it is not one of this version of the library; or a file of statistics is missing or changed.
    """
    try:
        method = _built(data, {})
        leaves = jax.tree.leaves(method)
        if not isinstance(method, Method) or any(isinstance(x, str) for x in leaves):
            raise TypeError(f"{method!r:.100} is no method")
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"the method in the manifest cannot be built ({error!r:.200}); use the version of jaxmerge that wrote it"
        ) from None
    return method


def key_from_data(data: Any) -> Any:
    """The seed or PRNG key that is told in a manifest.

    Raises:
        CheckpointError: it is none.
    """
    if data is None or type(data) is int:
        return data
    try:
        values = _built(data["data"], {})
        return values if data["impl"] is None else jax.random.wrap_key_data(values, impl=data["impl"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the key in the manifest cannot be built ({error!r:.200}); merge again") from None


def key_as_data(key: Any) -> Any:
    """A seed or PRNG key as plain data.

    Raises:
        RecipeError: it is none of those, and cannot be written down.
    """
    if key is None:
        return None
    if isinstance(key, int | np.integer):
        return int(key)
    if isinstance(key, jax.Array) and jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
        return {"impl": str(jax.random.key_impl(key)), "data": method_as_data(jax.random.key_data(key))}
    return {"impl": None, "data": method_as_data(key)}


_PLAIN = frozenset(DTYPES.values())


def _is_ours(kind: type) -> bool:
    """Whether a class is one that methods are made of, and part of this library."""
    made_of = (Method, Stage, ByDepth, Table)
    return (
        kind.__module__.startswith("jaxmerge.methods.") and issubclass(kind, made_of) and dataclasses.is_dataclass(kind)
    )


def _classes() -> dict[str, type]:
    """What methods are made of, by name: the classes of this library."""
    import jaxmerge.methods.registry as _  # noqa: F401, so that all of them exist

    found: dict[str, type] = {}
    open_classes: list[type] = [Method, Stage, ByDepth, Table]
    while open_classes:
        cls = open_classes.pop()
        open_classes += cls.__subclasses__()
        if _is_ours(cls):
            found[cls.__name__] = cls
    return found


def _built(data: Any, opened: dict[str, dict[str, StoredTensor]]) -> Any:
    """What is told as data; `opened` collects the files of statistics, by path, with their tensors by name."""
    if isinstance(data, list):
        return tuple(_built(x, opened) for x in data)
    if not isinstance(data, dict):
        return data
    kind = data["is"]
    if kind == "float":
        return float(data["text"])
    if kind == "dict":
        return {str(key): _built(value, opened) for key, value in data["items"]}
    if kind == "stored":
        return _opened_again(data["path"], data["tensor"], data["state"], opened)
    if kind in ("jax", "numpy"):
        dtype = DTYPES[data["dtype"]]
        values = np.frombuffer(bytes.fromhex(data["bytes"]), dtype).reshape(data["shape"])
        return jax.numpy.asarray(values) if kind == "jax" else values[()]
    cls = _classes()[kind]
    fields = data["fields"]
    if fields.keys() != {f.name for f in dataclasses.fields(cls)}:
        raise ValueError(f"{kind} has other fields: {list(fields)}")
    return cls(**{name: _built(value, opened) for name, value in fields.items()})


def _opened_again(path: str, tensor: str, state: str, opened: dict[str, dict[str, StoredTensor]]) -> StoredTensor:
    """A tensor of a file of statistics."""
    if path not in opened:
        leaves = named_leaves(open_checkpoint(path).params).values()
        opened[path] = {leaf.name: leaf for leaf in leaves if isinstance(leaf, StoredTensor)}
    found = opened[path].get(tensor)
    if found is None or digest(found.source.state()) != state:
        raise CheckpointError(
            f"the statistics in {path} are not as they were when the merge was made: the header, or the size or time "
            "of change differs; put the former file back with its times, or merge anew"
        )
    return found
