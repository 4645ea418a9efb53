"""Lazy tensors onto devices: each device's part is read on its own, merged where it lies, and nothing else is held.

A merged tensor is had by placing its inputs in the sharding that it is to have and running the program of `jm.merge` on
them. Measurements are then sums over devices, and the result is that of `jm.merge` on sharded parameters. What a naming
has turned or stacked is read as it lies in the files, and turned or stacked on the devices.

The host holds at most `AT_ONCE` slices, each the part of one input that one device holds (JAX may let go of one a
moment later than it could); the devices hold the inputs of one tensor beside what is finished.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Shaped

from jaxmerge.errors import NonFiniteError
from jaxmerge.methods.assignment import TensorTask
from jaxmerge.methods.lazy import CHUNK, LazyMerge, MergedTensor, as_lazy, nonfinite_message
from jaxmerge.methods.programs import Batch, finite_inputs, merge_whole
from jaxmerge.methods.sharding import with_sharding
from jaxmerge.streaming.engine import AllWorkers, Workers
from jaxmerge.streaming.plan import Plan, merges_within
from jaxmerge.streaming.processes import ALONE, Processes
from jaxmerge.streaming.progress import Progress
from jaxmerge.trees.lazy import Box, CastTensor, LazyTensor, StackedTensor, TransposedTensor, normalize_index

AT_ONCE = 4
"""How many slices are on the host at one time, at most: being read, or on the way to their devices."""

Placed = Callable[[], Any]
"""Waits for an array that is being read, and returns it."""


class Placer:
    """Reads lazy tensors into arrays with given shardings. A context manager, which ends its threads.

    A program over the devices of several processes waits for all of them, so a process that left with an error of its
    own would leave the others waiting. It goes on without reading, with NaN in place of what it could not read, until
    all have come to `settle`.

    Attributes:
        host_peak: bytes of the slices that were on the host at one time, at most.
    """

    def __init__(self, processes: Processes = ALONE):
        self.host_peak = 0
        self._processes, self._alive, self._lock = processes, 0, threading.Lock()
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._error: Exception | None = None
        self._placed: dict[tuple[int, Any], tuple[LazyTensor, Array]] = {}
        self._waiting: dict[Any, list[MergedTensor]] = {}
        self._ahead: dict[tuple[int, Any], Array] = {}

    def __enter__(self) -> Placer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def expect(self, leaf: Any, sharding: Sharding | None) -> None:
        """Announces a tensor that will be placed, in the order of placing.

        Tensors that a method needs each in one place are merged together with those that are to come, each on a device
        of its own, as `jm.merge` does it.
        """
        for merged, where in _in_one_place(leaf, sharding):
            group = self._waiting.setdefault((_likeness(merged), where), [])
            if merged not in group:
                group.append(merged)

    def measure(self, leaf: Any, progress: Progress) -> None:
        """Takes the measurements over the model that a tensor needs, each process in its share of all entries."""
        for merged in merges_within(leaf):
            if "model" in merged.task.method.passes:
                share = Plan(workers=AT_ONCE, chunk=CHUNK, shared=[], alone=[], to_read=0, to_write=0, memory=0)
                workers = Workers(AT_ONCE, CHUNK)
                merged.merge.stats(merged.task, AllWorkers(workers, progress, [share], self._processes))

    def place(self, leaf: Any, sharding: Sharding | None) -> Array:
        """The tensor in a sharding that fits it; None is the default device. A leaf that is tied is placed once.

        Raises:
            CheckpointError: a file cannot be read.
            NonFiniteError: an input of a merge holds NaN or infinity.
            StructureError: a tensor that is to be copied is not the same everywhere.
        """
        key = (id(leaf), sharding)
        if key not in self._placed:
            array = self._begin(as_lazy(leaf), sharding)()
            if sharding is not None and array.sharding != sharding:  # equivalent, but written in another way
                array = jax.device_put(array, sharding)
            self._placed[key] = leaf, array
        return self._placed[key][1]

    def settle(self) -> None:
        """Raises what any process could not read. All come here at the same time."""
        if self._error is not None:
            raise self._error
        self._processes.exchange("fine", b"")

    def _attempt(self, function: Callable[[], Any], instead: Callable[[], Any]) -> Any:
        """What a function gives that reads; `instead` if it fails here alone."""
        if self._processes.count == 1:
            return function()
        if self._error is None:
            try:
                return function()
            except Exception as error:
                self._error = error
        return instead()

    def _begin(self, leaf: LazyTensor, sharding: Sharding | None) -> Placed:
        """Begins to read a tensor."""
        if isinstance(leaf, MergedTensor):
            return lambda: self._merged(leaf, sharding)
        if isinstance(leaf, CastTensor):
            source, dtype = self._begin(leaf.source, sharding), jax.dtypes.canonicalize_dtype(leaf.dtype)
            return lambda: _cast(source(), dtype)
        if isinstance(sharding, NamedSharding | SingleDeviceSharding | None):  # others are about these very axes
            if isinstance(leaf, TransposedTensor):
                turned = self._begin(leaf.source, _of_source(sharding, leaf.axes))
                return lambda: _transposed(turned(), leaf.axes, sharding)
            if isinstance(leaf, StackedTensor):
                return lambda: self._stack(leaf, sharding)
        return self._read(leaf, sharding)

    def _begin_layers(self, leaves: Sequence[LazyTensor], sharding: NamedSharding) -> Placed:
        """Begins to read tensors along a new leading axis, each of which lies on devices of its own.

        They are handled as one where they are alike, and otherwise read (and merged) on the host.
        """
        first = leaves[0]
        if isinstance(first, MergedTensor) and len({_likeness(leaf) for leaf in leaves}) == 1:
            return lambda: self._merged_together(leaves, sharding, "vmap")
        if isinstance(first, CastTensor) and all(isinstance(x, CastTensor) and x.dtype == first.dtype for x in leaves):
            source = self._begin_layers([x.source for x in leaves], sharding)  # pyright: ignore
            return lambda: _cast(source(), jax.dtypes.canonicalize_dtype(first.dtype))
        if isinstance(first, TransposedTensor) and all(
            isinstance(x, TransposedTensor) and x.axes == first.axes for x in leaves
        ):
            axes = (0, *(axis + 1 for axis in first.axes))
            turned = self._begin_layers([x.source for x in leaves], _of_source(sharding, axes))  # pyright: ignore
            return lambda: _transposed(turned(), axes, sharding)
        return self._read(StackedTensor(leaves), sharding)

    def _stack(self, stack: StackedTensor, sharding: Any) -> Array:
        """A stack, layer by layer; where layers lie on different devices, one layer of each device at a time."""
        parts = _parts(sharding)
        rounds = len(stack.sources) // parts
        result = jnp.zeros(stack.shape, jax.dtypes.canonicalize_dtype(stack.dtype), device=sharding)
        for at in range(rounds):
            layers = stack.sources[at::rounds]
            begun = self._begin(layers[0], _of_layer(sharding)) if parts == 1 else self._begin_layers(layers, sharding)
            result = _with_layer(result, begun(), jax.device_put(np.int32(at)), sharding=sharding)
            jax.block_until_ready(result)
        return result

    def _merged(self, tensor: MergedTensor, sharding: Any) -> Array:
        """A merged tensor, maybe together with others that are to come."""
        key = (id(tensor), sharding)
        if key in self._ahead:
            return self._ahead.pop(key)
        group = self._waiting.get((_likeness(tensor), sharding), [])
        if tensor not in group:
            return self._merged_together([tensor], sharding, None)
        at = group.index(tensor)
        together = group[at : at + sharding.mesh.size]
        del group[at : at + len(together)]
        if len(together) == 1:
            return self._merged_together(together, sharding, None)
        stacked = _with_spec(sharding, lambda spec: (None, *spec))
        results = jnp.unstack(self._merged_together(together, stacked, "spread"))
        self._ahead.update({(id(x), sharding): result for x, result in zip(together, results, strict=True)})
        return self._ahead.pop(key)

    def _merged_together(self, tensors: Sequence[Any], sharding: Any, batch: Batch | None) -> Array:
        """A merged tensor, or several that are alike along a new leading axis."""
        merge, tasks = tensors[0].merge, [tensor.task for tensor in tensors]
        task = tasks[0]
        stats = merge.stats(task) if "model" in task.method.passes else ()
        known = {number: stats[number] for number, scope in enumerate(task.method.passes) if scope == "model"}

        def begin(leaves: Sequence[LazyTensor]) -> Placed:
            if batch == "vmap":
                return self._begin_layers(leaves, sharding)
            return self._begin(leaves[0] if batch is None else StackedTensor(leaves), sharding)

        rows = [task.experts if task.base is None else [task.base, *task.experts] for task in tasks]
        pending = [begin(leaves) for leaves in zip(*rows, strict=True)]
        inputs = [placed() for placed in pending]
        base, experts = (None, inputs) if task.base is None else (inputs[0], inputs[1:])

        def operand(*values: Any) -> Any:
            if isinstance(values[0], LazyTensor):
                return self._statistic(values, task.info.shape, begin)
            arrays = [_as_array(x) for x in values]
            return jax.device_put(arrays[0] if batch is None else np.stack(arrays))

        method, info = jax.tree.map(operand, *((x.method, x.info.for_program()) for x in tasks))
        several = sharding is not None and len(sharding.device_set) > 1
        merged, finite, _ = merge_whole(
            method, base, experts, info, known, batch=batch, sharding=sharding if several else None
        )
        # Waits: afterwards the inputs are not needed, and on CPU devices the collectives of two programs may deadlock.
        if not jax.device_get(jax.block_until_ready((merged, finite))[1]).all():
            self.settle()  # what another process could not read came as NaN
            flags = jax.block_until_ready(_finite_inputs(base, experts, batch is not None))
            self._check_finite(merge, tasks, jax.device_get(flags))
        return merged

    def _statistic(
        self, values: Sequence[LazyTensor], shape: tuple[int, ...], begin: Callable[[Sequence[LazyTensor]], Placed]
    ) -> Any:
        """Statistics of tensors. One that is like its tensor lies as that does; others are on every device."""
        first, several = values[0], len(values) > 1
        if first.shape == shape:
            array = begin(values)()
        else:
            array = self._attempt(
                lambda: np.stack([x[...] for x in values]) if several else first[...],
                lambda: np.zeros((len(values),) * several + first.shape, first.dtype),
            )
        if not jax.device_get(jax.block_until_ready(_all_finite(array))):
            self.settle()
            raise NonFiniteError(f"{first.label}: found NaN or infinity in a statistic, expected finite numbers")
        return array

    def _check_finite(self, merge: LazyMerge, tasks: Sequence[TensorTask], finite: Any) -> None:
        if merge.allow_nonfinite or finite.all():
            return
        for task, flags in zip(tasks, finite.reshape(len(tasks), -1), strict=True):
            if not flags.all():
                raise NonFiniteError(nonfinite_message(merge.job.source_name(int(np.argmin(flags))), task.info.name))

    def _read(self, leaf: LazyTensor, sharding: Sharding | None) -> Placed:
        """Begins to read the part of each device; devices that hold the same part share one read."""
        parts: dict[str, tuple[Box, list[Any]]] = {}
        if sharding is None:
            parts[""] = tuple(slice(0, n) for n in leaf.shape), [None]
        else:
            for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
                box, _ = normalize_index(index or (), leaf.shape, leaf.label)
                parts.setdefault(str(box), (box, []))[1].append(device)
        wide = jnp.result_type(float) == jnp.float64  # x64 may be on for the calling thread only
        futures = [self._pool.submit(self._put, leaf, box, devices, wide) for box, devices in parts.values()]

        def unread() -> list[Any]:
            fill = np.nan if jnp.issubdtype(leaf.dtype, np.floating) else 0
            blanks = [
                np.full([piece.stop - piece.start for piece in box], fill, leaf.dtype) for box, _ in parts.values()
            ]
            return [
                jax.device_put(blank, x)
                for blank, (_, devices) in zip(blanks, parts.values(), strict=True)
                for x in devices
            ]

        def placed() -> Array:
            arrays = self._attempt(lambda: [x for future in futures for x in future.result()], unread)
            if sharding is None:
                return arrays[0]
            return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)

        return placed

    def _put(self, leaf: LazyTensor, box: Box, devices: Sequence[Any], wide: bool) -> list[Array]:
        """Reads a slice and puts it on devices. The memory is used once: JAX may keep what it is given."""
        nbytes = math.prod(piece.stop - piece.start for piece in box) * leaf.dtype.itemsize
        with self._lock:
            self._alive += nbytes
            self.host_peak = max(self.host_peak, self._alive)
        try:
            with jax.enable_x64(wide):
                return jax.block_until_ready(_put_on(leaf.read(box), devices))
        finally:
            with self._lock:
                self._alive -= nbytes


def _put_on(value: Any, devices: Sequence[Any]) -> list[Array]:
    return [jax.device_put(value, device) for device in devices]


def _likeness(leaf: LazyTensor) -> Any:
    """What merged tensors have in common that one program can merge together."""
    if not isinstance(leaf, MergedTensor):
        return None
    task = leaf.task
    structure = jax.tree.structure((task.method, task.info.for_program()))
    return id(leaf.merge), task.group, structure, leaf.shape, leaf.dtype


def _in_one_place(leaf: Any, sharding: Any) -> Iterator[tuple[MergedTensor, Any]]:
    """The merged tensors below a leaf that are best merged one on each device, with their shardings."""
    if isinstance(leaf, CastTensor):
        yield from _in_one_place(leaf.source, sharding)
    elif isinstance(leaf, TransposedTensor):
        yield from _in_one_place(leaf.source, _of_source(sharding, leaf.axes))
    elif isinstance(leaf, StackedTensor) and _parts(sharding) == 1:
        for source in leaf.sources:
            yield from _in_one_place(source, _of_layer(sharding))
    elif isinstance(leaf, MergedTensor) and isinstance(sharding, NamedSharding):
        spreads = sharding.mesh.size > 1 and len(set(sharding.mesh.axis_types)) == 1
        if leaf.task.method.in_one_place and leaf.ndim > 1 and spreads:
            yield leaf, sharding


def _parts(sharding: Any) -> int:
    """Into how many parts the first axis is cut."""
    entry = sharding.spec[0] if isinstance(sharding, NamedSharding) and len(sharding.spec) else None
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def _of_layer(sharding: Any) -> Any:
    """The sharding of each layer of a stack, whose layers are whole."""
    return _with_spec(sharding, lambda spec: spec[1:])


def _of_source(sharding: Any, axes: tuple[int, ...]) -> Any:
    """The sharding of the source of a tensor, axis i of which is axis `axes[i]` of the source."""

    def permuted(spec: tuple[Any, ...]) -> list[Any]:
        entries = dict(zip(axes, spec, strict=False))
        return [entries.get(axis) for axis in range(len(axes))]

    return _with_spec(sharding, permuted)


def _with_spec(sharding: Any, change: Callable[[tuple[Any, ...]], Sequence[Any]]) -> Any:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = PartitionSpec(*change(tuple(sharding.spec)))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _as_array(value: Any) -> Any:
    """A coefficient as an array: plain numbers are float32, or integers of their own kind."""
    if isinstance(value, jax.Array):
        return jax.device_get(value)
    return np.asarray(value, None if isinstance(value, int) or hasattr(value, "dtype") else np.float32)


@functools.partial(jax.jit, static_argnames=("axes", "sharding"))
def _transposed(array: Array, axes: tuple[int, ...], sharding: Any) -> Array:
    turned = jnp.transpose(array, axes)
    return with_sharding(turned, sharding) if isinstance(sharding, NamedSharding) else turned


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(array: Array, dtype: Any) -> Array:
    return array.astype(dtype)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnums=0)
def _with_layer(stack: Array, layer: Array, at: Any, *, sharding: Any) -> Array:
    """The stack with one layer set in each device's part; `layer` has a leading axis where devices differ in theirs."""

    def update(stack: Array, layer: Array, at: Any) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(stack, layer.reshape(1, *stack.shape[1:]), at, 0)

    if not isinstance(sharding, NamedSharding):
        return update(stack, layer, at)
    specs = (sharding.spec, sharding.spec if layer.ndim == stack.ndim else _of_layer(sharding).spec, PartitionSpec())
    return jax.shard_map(update, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)(stack, layer, at)


@jax.jit
def _all_finite(array: Shaped[Any, "..."]) -> Array:
    return jnp.all(jnp.isfinite(array))


@functools.partial(jax.jit, static_argnames="batch")
def _finite_inputs(base: Any, experts: list[Any], batch: bool) -> Array:
    return jax.vmap(finite_inputs)(base, experts) if batch else finite_inputs(base, experts)
