"""The programs that lazily merged tensors run, on one chunk at a time.

The invariant: a program depends on a tensor only as far as the method does. Tensors of all shapes are read in chunks of
few lengths, and where a method does not look at the shape they share one compiled program.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Num

from jaxmerge.methods.measurements import Measurement
from jaxmerge.methods.method import Method
from jaxmerge.methods.programs import finite_inputs, widened
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.task_vectors import accumulation_dtype


class SharedProgram:
    """A function that is compiled once for all arguments for which it does the same.

    `jax.jit` compiles anew for every shape, kind and axes that an `info` tells of, although few methods look at them.
    Here each new kind of arguments is lowered, which takes a tenth of the time of compiling, and compiled only when
    that gives a program that is not known yet. The leaves of the arguments are NumPy arrays; threads may share it.
    """

    def __init__(self, function: Callable[..., Any]):
        self.__doc__ = function.__doc__
        self._function = function
        self._by_arguments: dict[Any, jax.stages.Compiled] = {}
        self._by_text: dict[Any, jax.stages.Compiled] = {}
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        return self._program(leaves, structure)(*leaves)

    def memory(self, *arguments: Any) -> int:
        """Bytes that a call takes beside its arguments, for results and while it runs. Arguments may be abstract."""
        sizes: Any = self._program(*jax.tree.flatten(arguments)).memory_analysis()
        return sizes.output_size_in_bytes + sizes.temp_size_in_bytes

    def shape(self, *arguments: Any) -> Any:
        """The result with `jax.ShapeDtypeStruct` leaves. Arguments may be abstract."""
        return jax.eval_shape(self._function, *arguments)

    def _program(self, leaves: list[Any], structure: Any) -> jax.stages.Compiled:
        key = (structure, jnp.result_type(float), *((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._by_arguments:
            with self._lock:
                if key not in self._by_arguments:
                    self._by_arguments[key] = self._compiled(leaves, structure)
        return self._by_arguments[key]

    def _compiled(self, leaves: list[Any], structure: Any) -> jax.stages.Compiled:
        def flat(*leaves: Any) -> Any:
            return self._function(*jax.tree.unflatten(structure, leaves))

        # Unused arguments must show in the text: programs that use different ones of equal shape are different.
        lowered = jax.jit(flat, keep_unused=True).lower(*leaves)
        text = (lowered.as_text(), lowered.out_tree)
        if text not in self._by_text:
            self._by_text[text] = lowered.compile()
        return self._by_text[text]


def _merge(method: Method, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
    wide = widened(method, base, experts)
    return wide[0].merge_tensor(wide[1], wide[2], info, stats).astype(experts[0].dtype)


@SharedProgram
def merge_chunk(
    method: Method,
    base: Num[Any, "..."] | None,
    experts: list[Num[Any, "..."]],
    info: TensorInfo,
    stats: tuple[Any, ...],
) -> tuple[Num[Array, "..."], Bool[Any, ""]]:
    """Merges a chunk of a tensor whose measurements are all known.

    Returns:
        The merged chunk in the inputs' dtype, and True.
    """
    return _merge(method, base, experts, info, stats), jnp.asarray(True)


@SharedProgram
def merge_checked_chunk(
    method: Method,
    base: Num[Any, "..."] | None,
    experts: list[Num[Any, "..."]],
    info: TensorInfo,
    stats: tuple[Any, ...],
) -> tuple[Num[Array, "..."], Bool[Any, ""]]:
    """Like `merge_chunk`, and tells whether the result is finite, which it is not where an input is not.

    A reduction over every input takes XLA:CPU as long as the arithmetic of most methods. So entries with an input that
    is not finite become NaN on the way, and only the result is reduced. (In memory that would round otherwise.)
    """
    merged = _merge(method, base, experts, info, stats)
    inputs = [x for x in (base, *experts) if x is not None]
    finite = functools.reduce(jnp.logical_and, [jnp.isfinite(x) for x in inputs])
    merged = jnp.where(finite, merged, jnp.nan)
    # 0 * x is 0 or NaN; a sum is vectorised, a logical reduction is not.
    return merged, jnp.sum(0 * merged.astype(accumulation_dtype(merged.dtype))) == 0


@SharedProgram
def measure_chunk(
    method: Method,
    base: Num[Any, "..."] | None,
    experts: list[Num[Any, "..."]],
    info: TensorInfo,
    stats: tuple[Any, ...],
) -> tuple[Measurement, Bool[Array, " inputs"]]:
    """Measurement number `len(stats)` of a chunk, and whether base (first) and experts are finite."""
    wide = widened(method, base, experts)
    return wide[0].measure(wide[1], wide[2], info, stats), finite_inputs(base, experts)
