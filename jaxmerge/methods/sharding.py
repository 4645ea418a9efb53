"""What sharded arrays ask for: care on explicit axes, and tensors spread over devices where each is needed whole.

On a mesh with explicit axes (`jax.make_mesh`'s default) shardings are part of an array's type: elementwise arithmetic
and full reductions keep them, but sorting along a sharded axis, mixing shardings and constraining a result are errors.
Automatic axes leave all of that to the compiler. But no compiler factorises or sorts a sharded matrix: every device
would be sent all of it and do all of the work. `spread` has each device do some of the matrices instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
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


def spreading_mesh(array: Any) -> AbstractMesh | None:
    """The mesh over whose devices tensors like this one can be spread; None where there is none that is known.

    Inside a trace it is known of sharded arguments, and of what is computed from those or under `jax.set_mesh`.
    """
    mesh = jax.typeof(array).sharding.mesh
    alike = len(set(mesh.axis_types)) == 1 and mesh.axis_types[0] in (AxisType.Auto, AxisType.Explicit)
    return mesh if alike and mesh.size > 1 else None


def spread(function: Callable[..., Any], stacked: Any, known: Any, like: Array) -> Any:
    """`function` of each of several tensors, on one device each, for as many tensors at a time as there are devices.

    A device is sent a tensor, whole, and sends back the result. Each way takes one all-to-all for each axis of the
    mesh: asked to move along all axes at once, the compiler gathers everything on every device. Axes are taken from the
    last to the first, because where several shard one axis of a tensor the last is innermost.

    Args:
        function: of one tensor's part of `stacked`, and of `known`.
        stacked: a pytree of arrays with one row per tensor. Rows are not sharded.
        known: a pytree of arrays that all tensors share.
        like: of `stacked`, the array whose sharding results of its shape take.

    Returns:
        What the function returns, with one row per tensor.
    """
    mesh, count = spreading_mesh(like), like.shape[0]
    assert mesh is not None
    axes = mesh.axis_names[::-1]
    explicit = AxisType.Explicit in mesh.axis_types

    def place(x: Any, rows: Any, rest: Any) -> Any:
        return with_sharding(x, NamedSharding(mesh, PartitionSpec(rows or None, *rest)))

    def steps(x: Any) -> list[tuple[Any, Any]]:
        """The axes that rows are sharded over, and what that leaves for other axes: from no axis of the mesh to all."""
        if explicit:
            spec = jax.typeof(x).sharding.spec[1:]
            rest = [[_without(entry, axes[:moved]) for entry in spec] for moved in range(len(axes) + 1)]
        else:
            rest = [[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)] * len(axes) + [[None] * (x.ndim - 1)]
        return [(axes[:moved], left) for moved, left in enumerate(rest)]

    def to_devices(x: Any) -> Any:
        for rows, rest in steps(x):
            x = place(x, rows, rest)
        return x

    def back(x: Any, like: Any) -> Any:
        if x.shape != like.shape:
            return with_sharding(x, NamedSharding(mesh, PartitionSpec()))
        for rows, rest in reversed(steps(like)):
            x = place(x, rows, rest)
        # The choice is none: it has a compiler that shards as it likes treat both alike.
        return x if explicit else place(jnp.where(True, x, like), *steps(like)[0])

    def on_device(stacked: Any, known: Any) -> Any:
        result = function(*jax.tree.map(lambda x: x[0], stacked), known)
        # A result that does not depend on the tensors, such as a count, would not compile without the barrier.
        return jax.tree.map(lambda x: x[None], jax.lax.optimization_barrier((result, stacked))[0])

    # Unchecked, because loops inside of methods begin with constants, which vary over devices only later.
    rows = PartitionSpec(axes)
    each = jax.shard_map(on_device, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)

    def one_round(part: Any) -> Any:
        stacked, like = part
        return jax.tree.map(lambda x: back(x, like), each(jax.tree.map(to_devices, stacked), known))

    known = jax.tree.map(lambda x: with_sharding(x, NamedSharding(mesh, PartitionSpec())), known)
    rounds = -(-count // mesh.size)

    def in_rounds(x: Any) -> Any:
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (rounds * mesh.size - count, *x.shape[1:]))])
        return x.reshape(rounds, mesh.size, *x.shape[1:])

    results = jax.lax.map(one_round, jax.tree.map(in_rounds, (stacked, like)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], results)


def _without(entry: Any, axes: tuple[Any, ...]) -> Any:
    """What is left of one entry of a partition spec when these axes of the mesh are used elsewhere."""
    names = entry if isinstance(entry, tuple) else (entry,)
    return tuple(name for name in names if name is not None and name not in axes) or None
