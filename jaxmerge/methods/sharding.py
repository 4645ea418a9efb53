"""What a mesh with explicit axes (`jax.make_mesh`'s default) asks for, where automatic axes leave it to the compiler.

Explicit shardings are part of an array's type: elementwise arithmetic and full reductions keep them, but sorting along
a sharded axis, mixing shardings and constraining a result are errors there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def with_sharding(array: Array, sharding: Any) -> Array:
    """The array with this sharding, inside a program."""
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def on_whole(function: Callable[[Array], Array], array: Array) -> Array:
    """`function(array)`, sharded as the array, for a function that keeps the shape and needs whole fibres."""
    sharding = explicit_sharding(array)
    if sharding is None:
        return function(array)
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.sharding.reshard(function(jax.sharding.reshard(array, replicated)), sharding)


def along_layers(tree: Any, like: Array) -> Any:
    """Arrays with a leading layer axis, which is sharded as the leading axis of `like` is: `vmap` maps over both."""
    sharding = explicit_sharding(like)
    if sharding is None:
        return tree
    layers = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    return jax.tree.map(lambda x: jax.sharding.reshard(x, layers), tree)


def explicit_sharding(array: Array) -> NamedSharding | None:
    """The sharding in an array's type, or None where the compiler decides."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
