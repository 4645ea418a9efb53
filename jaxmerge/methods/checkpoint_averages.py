r"""Averages over the checkpoints of a training run: running averages, and weights that come from a metric.

One rule gives all of them. A checkpoint of weight $w$ moves the mean by its share of the weights so far,

$$W \leftarrow d\,W + w, \qquad \bar\theta \leftarrow \bar\theta + \frac wW\,(\theta - \bar\theta),$$

which is the exact weighted mean for decay $d = 1$ and an exponential moving average, whose weights are geometric and
sum to one from the start, for $d < 1$.

The mean is held as a float32 number and what its rounding left over, another float32 number. One alone would lose the
last of many checkpoints: after ten thousand, a checkpoint moves the mean by a ten-thousandth of its distance, which is
soon less than half a unit in the last place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Num

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import check_range
from jaxmerge.trees.checks import check_same_tensors, is_mergeable
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import Params, named_leaves, with_leaves
from jaxmerge.trees.task_vectors import accumulation_dtype


def weights_from_metric(
    metrics: Sequence[Any] | Mapping[str, Any] | jax.Array,
    kind: str = "loss",
    *,
    penalty: Any = 1.0,
) -> Any:
    r"""Weights for the checkpoints of a run from a number that each has: metrics-weighted averaging (MWA).

    $w_i = s_i^p / \sum_j s_j^p$ with $s = 1 / \mathrm{metric}$ for a loss and $s = \mathrm{metric}$ otherwise.

    Args:
        metrics: a number per checkpoint, in order or by name. Losses are positive; steps and scores are not negative
            and one is positive.
        kind: `"loss"`, where lower is better, `"step"`, where later is, or `"score"`, where higher is.
        penalty: $p \ge 0$: 0 weighs all alike, infinity takes the best (or all that are equally good).

    Returns:
        Weights that sum to 1, for `jm.linear`: by name if the metrics are, and an array if they, or $p$, are traced or
        JAX arrays, otherwise a list of numbers.

    Raises:
        RecipeError: there are no metrics, one is not a number of the kind, or the penalty is negative.

    Source: arXiv 2504.18580, for averaging by loss or step with one penalty factor; its abstract gives no formula and
    there is no public code, so this parametrisation is ours.
    """
    check_range("penalty", penalty, 0, float("inf"))
    if kind not in ("loss", "step", "score"):
        raise RecipeError(f"kind is {kind!r}, expected 'loss', 'step' or 'score'")
    names = tuple(metrics) if isinstance(metrics, Mapping) else None
    values = list(metrics.values()) if isinstance(metrics, Mapping) else metrics
    on_device = any(isinstance(x, jax.Array) for x in jax.tree.leaves((values, penalty)))
    numbers: Any = jnp.asarray(values) if on_device else np.asarray(values, np.float64)
    if not isinstance(numbers, Tracer):
        _check_metrics(numbers, names, kind)
    # Relative to the best, so that no power overflows and the largest weight is 1 before it is normalised.
    best = numbers.min() if kind == "loss" else numbers.max()
    powers = (best / numbers if kind == "loss" else numbers / best) ** penalty
    weights = powers / powers.sum()
    weights = weights if on_device else weights.tolist()
    return weights if names is None else dict(zip(names, weights, strict=True))


def _check_metrics(numbers: Any, names: tuple[str, ...] | None, kind: str) -> None:
    values = np.asarray(numbers)
    if values.ndim != 1 or not values.size:
        raise RecipeError(f"metrics have the shape {list(values.shape)}, expected one number per checkpoint")
    allowed = np.isfinite(values) & (values > 0 if kind == "loss" else values >= 0)
    for i in np.flatnonzero(~allowed):
        raise RecipeError(
            f"the {kind} of checkpoint {i if names is None else repr(names[i])} is {values[i]}, expected a finite "
            f"{'positive number' if kind == 'loss' else 'number that is not negative'}; leave that checkpoint out, or "
            "map the metrics to such numbers first"
        )
    if not values.any():
        raise RecipeError(f"every {kind} is 0, which tells no checkpoint from another; expected one that is positive")


@dataclasses.dataclass(frozen=True)
class RunningAverage:
    """An average of parameters that grows one by one: made by `running_average`, a pytree like any parameters.

    Attributes:
        mean: the average so far, in float32 (float64 for float64 parameters); leaves that are not floating point are
            those of the last parameters taken.
        rest: what rounding has left over of it, or None.
        weight: $W$, the decayed sum of the weights.
        count: how many times `update` was called.
        decay: $d$.
        start: calls of `update` that are passed over at first.
        every: of those after them, one in so many is taken.
        dtypes: of the parameters, in the order of their names.
    """

    mean: Params
    rest: Any
    weight: Any
    count: Any
    decay: Any
    start: int = dataclasses.field(metadata={"static": True})
    every: int = dataclasses.field(metadata={"static": True})
    dtypes: tuple[Any, ...] = dataclasses.field(metadata={"static": True})

    def update(self, params: Params, weight: Any = 1.0) -> RunningAverage:
        """The average with one more set of parameters.

        Args:
            params: like those that the average was made for; lazy leaves are read.
            weight: not negative.

        Returns:
            A new state; this one stays as it is. Under `jax.jit` with `donate_argnums` the new one takes its memory.

        Raises:
            StructureError, ShapeError, DTypeError: these are parameters of another model.
            RecipeError: the weight is negative.
        """
        check_range("weight", weight, 0, float("inf"))
        held, leaves = named_leaves(self.mean), named_leaves(params)
        expected = {n: jax.ShapeDtypeStruct(x.shape, d) for (n, x), d in zip(held.items(), self.dtypes, strict=True)}
        check_same_tensors(expected, {"params": leaves}, "the average")
        given = {name: _placed_like(leaves[name], mean) for name, mean in held.items()}
        return _updated(self, given, jnp.asarray(weight, self.weight.dtype))

    def params(self) -> Params:
        """The average, in the container and the dtypes of the parameters.

        Raises:
            RecipeError: nothing was taken yet.
        """
        if not isinstance(self.weight, Tracer) and not self.weight > 0:
            raise RecipeError(
                f"the average has taken no parameters in {int(self.count)} updates (start={self.start}, "
                f"every={self.every}); update it before params() is asked for"
            )
        held = named_leaves(self.mean).items()
        cast = [(n, x.astype(d) if is_mergeable(x) else x) for (n, x), d in zip(held, self.dtypes, strict=True)]
        return with_leaves(self.mean, dict(cast))

    def restored(self, params: Params) -> RunningAverage:
        """The state with the numbers of a saved one.

        Args:
            params: what `jm.open_checkpoint(path).load()` gives where such a state was saved.

        Raises:
            StructureError, ShapeError, DTypeError: it is the average of another model, or of another kind.
        """
        leaves = named_leaves(params)
        check_same_tensors(named_leaves(self), {"the saved average": leaves}, "this one")
        return with_leaves(self, leaves)


jax.tree_util.register_dataclass(RunningAverage)


def running_average(
    params: Params, *, decay: Any = 1.0, start: int = 0, every: int = 1, compensated: bool = True
) -> RunningAverage:
    """An average over parameters that come one by one, before the first has come.

    Args:
        params: what is to be averaged: structure, dtypes and shardings, but not the numbers, which count when they are
            given to `update`. `jax.ShapeDtypeStruct` leaves will do.
        decay: 1 for the mean; below 1 for an exponential moving average over about `1 / (1 - decay)` updates.
        start: pass over so many updates first.
        every: then take one update in so many, beginning with the next. Mean, `start` and `every` together are
            stochastic weight averaging.
        compensated: keep what rounding leaves over, which takes as much memory as the mean. Without it a mean of
            thousands of checkpoints is good to about three digits of their spread.

    Returns:
        A state with `update(params)` and `params()`. NaN and infinity are not looked for: they would stay.

    Raises:
        RecipeError: a number is out of range.

    Source: stochastic weight averaging, arXiv 1803.05407, which averages along a run with a constant or cyclic learning
    rate; exponential moving averages are as old as Polyak and Juditsky's averaging (1992) and have no one source.
    """
    check_range("decay", decay, 0, 1, open_low=True)
    if start < 0 or every < 1:
        raise RecipeError(f"start={start} and every={every}, expected start of at least 0 and every of at least 1")
    leaves = named_leaves(params)
    means = {name: _empty(leaf) for name, leaf in leaves.items()}
    # The rests have a tree of their own: two leaves that are one array could not both be donated.
    rest = {name: _empty(leaf) for name, leaf in leaves.items() if is_mergeable(leaf)} if compensated else None
    return RunningAverage(
        mean=with_leaves(params, means),
        rest=rest,
        weight=jnp.zeros(()),
        count=jnp.zeros((), jnp.int32),
        decay=jnp.asarray(decay, jnp.zeros(()).dtype),
        start=start,
        every=every,
        dtypes=tuple(leaf.dtype for leaf in leaves.values()),
    )


@jax.jit
def _updated(state: RunningAverage, leaves: dict[str, Any], weight: Float[Array, ""]) -> RunningAverage:
    def take(state: RunningAverage) -> RunningAverage:
        total = state.decay * state.weight + weight
        rate = weight / jnp.where(total > 0, total, 1)
        means, rests = {}, {}
        for name, mean in named_leaves(state.mean).items():
            if is_mergeable(mean):
                rest = None if state.rest is None else state.rest[name]
                means[name], rests[name] = moved(mean, rest, leaves[name], rate)
            else:
                means[name] = leaves[name]
        rest = None if state.rest is None else rests
        return dataclasses.replace(state, mean=with_leaves(state.mean, means), rest=rest, weight=total)

    if state.start == 0 and state.every == 1:
        taken = take(state)
    else:
        since = state.count - state.start
        taken = jax.lax.cond((since >= 0) & (since % state.every == 0), take, lambda state: state, state)
    return dataclasses.replace(taken, count=state.count + 1)


def moved(
    mean: Float[Array, "..."],
    rest: Float[Array, "..."] | None,
    value: Num[Array, "..."],
    rate: Float[Array, ""],
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """A mean that a value has moved by a share of its distance.

    Args:
        mean: the mean so far.
        rest: what its rounding has left over: the mean is the sum of both; None to forget it.
        value: of any floating-point dtype.
        rate: the share; 1 for the first value.

    Returns:
        The new mean and the new rest.
    """
    value, rate = value.astype(mean.dtype), rate.astype(mean.dtype)
    if rest is None:
        return mean + rate * (value - mean), None
    step = rate * ((value - mean) - rest) + rest
    total = mean + step
    added = total - mean
    return total, (mean - (total - added)) + (step - added)  # what `total` lacks, exactly (Knuth's two-sum)


def _empty(leaf: Any) -> Any:
    """A new array of zeros in the arithmetic dtype, where the leaf lies; what is not floating point as it is."""
    if not is_mergeable(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    dtype = jax.dtypes.canonicalize_dtype(accumulation_dtype(leaf.dtype))
    if isinstance(leaf, jax.Array):
        return jnp.zeros_like(leaf, dtype=dtype)
    return jnp.zeros(leaf.shape, dtype, device=getattr(leaf, "sharding", None))


def _placed_like(leaf: Any, mean: Any) -> Any:
    """A leaf as an array, on the devices of the mean."""
    if isinstance(leaf, LazyTensor):
        leaf = leaf[...]
    if isinstance(leaf, Tracer) or isinstance(mean, Tracer) or not isinstance(mean, jax.Array):
        return leaf
    alone = len(mean.sharding.device_set) == 1
    return leaf if alone or getattr(leaf, "sharding", None) == mean.sharding else jax.device_put(leaf, mean.sharding)
