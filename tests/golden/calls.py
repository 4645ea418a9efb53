"""The table: which call of ours a recorded call of a published implementation corresponds to.

A row is (family, implementation, pattern of the call) → a function of the recorded parameters, with the reference's own
defaults, that gives a `Call` of ours. Nothing here looks at the name of a case. A parameter or a value that a function
does not know is an error, never ignored: a new family, reference or parameter needs a row, a name or a value here.

Families with calls of another kind have their rows in files of their own; `table` joins them.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxmerge as jm
from jaxmerge.methods.stages import Chain
from jaxmerge.trees.info import tensor_infos
from jaxmerge.trees.lazy import ArrayTensor
from tests.golden.golden_set import Case, Tensors

SEED = 20240229


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge of a bundle's experts.

    Methods that see a tensor in chunks run over lazy leaves, where one program serves every shape, and over the first
    tensor in memory too.

    Attributes:
        method: our method.
        experts: how many of the bundle's experts take part, the first ones; None for all.
        with_base: whether the base takes part as the base.
        base_first: the base takes part as the first expert.
    """

    method: jm.Method
    experts: int | None = None
    with_base: bool = True
    base_first: bool = False

    def outputs(self, case: Case) -> Tensors:
        if self.method.granularity is jm.Granularity.TENSOR:  # only what was recorded: each shape is a program
            case = case.with_inputs(case.wanted)
        merged = self._merge(case.base, case.experts)
        if not case.half_precision:
            return merged
        wide = self._merge(upcast(case.base), [upcast(expert) for expert in case.experts])
        for name, value in merged.items():
            np.testing.assert_array_equal(
                value, wide[name].astype(value.dtype), err_msg=f"{name}: accumulated in half precision"
            )
        return merged | {f"f32acc/{name}": value for name, value in wide.items()}

    def _merge(self, base: Tensors, experts: list[Tensors]) -> Tensors:
        experts = [base, *experts] if self.base_first else experts[: self.experts]
        if self.method.whole_tensor:
            return self._in_memory(base, experts)
        merged = jm.merge(
            self.method, [lazy(x) for x in experts], base=lazy(base) if self.with_base else None, key=SEED
        )
        result = {name: read(tensor) for name, tensor in merged.items()}
        if self.method.granularity is not jm.Granularity.MODEL:
            first = next(iter(base))
            alone = self._in_memory({first: base[first]}, [{first: x[first]} for x in experts])
            # Sums taken in another order differ by a unit in the last place, and their ratios by a little more.
            near = 2 * np.spacing(np.abs(result[first]).max())
            assert (np.abs(alone[first] - result[first]) <= near).all(), "in memory and lazily differ"
        return result

    def _in_memory(self, base: Tensors, experts: list[Tensors]) -> Tensors:
        merged = jm.merge(self.method, on_device(experts), base=on_device(base) if self.with_base else None, key=SEED)
        return jax.device_get(merged)


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What stages leave of each expert's task vector, as outputs `e<i>/<tensor>`."""

    stages: tuple[jm.Stage, ...]

    def outputs(self, case: Case) -> Tensors:
        pruned = {}
        for i, expert in enumerate(case.experts):
            deltas = {name: value - case.base[name] for name, value in expert.items()}
            left = jm.merge(self._method, [on_device(deltas)], base=on_device(zeros_like(deltas)), key=SEED)
            pruned |= {f"e{i}/{name}": value for name, value in jax.device_get(left).items()}
        return pruned

    @property
    def _method(self) -> Chain:
        return jm.chain(*self.stages, jm.total())


@dataclasses.dataclass(frozen=True)
class KeepProbability:
    """Keep probabilities of a dropping stage for one expert's task vector, and what survives if nothing is dropped."""

    stage: Any
    expert: int
    prefixed: bool

    def outputs(self, case: Case) -> Tensors:
        infos = tensor_infos({name: value.shape for name, value in case.base.items()})
        result = {}
        for name, info in infos.items():
            delta = case.experts[self.expert][name] - case.base[name]
            stage = self.stage.at(info, ("expert",))
            keep_probability = jax.jit(lambda delta, stage=stage, info=info: stage.keep_probability(delta, 0, info))
            probability = np.asarray(keep_probability(delta))
            result[f"prob/{name}" if self.prefixed else name] = probability
            result[f"allkept/{name}"] = delta / probability
        return result


@dataclasses.dataclass(frozen=True)
class Draws:
    """Statistics of many draws of stages on one tensor of one expert's task vector."""

    stages: tuple[jm.Stage, ...]
    expert: int
    tensor: str
    count: int

    def outputs(self, case: Case) -> Tensors:
        delta = case.experts[self.expert][self.tensor] - case.base[self.tensor]
        method = jm.chain(*self.stages, jm.total())
        base = {self.tensor: jnp.zeros_like(delta)}

        @jax.jit
        @jax.vmap
        def draw(key: jax.Array) -> jax.Array:
            return jm.merge(method, [{self.tensor: jnp.asarray(delta)}], base=base, key=key)[self.tensor]

        drawn = np.asarray(draw(jax.random.split(jax.random.key(SEED), self.count)), np.float64)
        norms = np.abs(drawn).sum(axis=(1, 2))
        return {
            "mean": drawn.mean(axis=0),
            "stderr": drawn.std(axis=0, ddof=1) / np.sqrt(self.count),
            "keep_rate": (drawn != 0).mean(axis=0),
            "l1_mean": norms.mean(),
            "l1_std": norms.std(ddof=1),
            "l1_input": np.abs(delta).sum(),
        }


@dataclasses.dataclass(frozen=True)
class OfTaskVector:
    """A method applied to a case's own inputs, which are one task vector."""

    method: jm.Method

    def outputs(self, case: Case) -> Tensors:
        return jax.device_get(jm.merge(self.method, [on_device(case.given)], base=on_device(zeros_like(case.given))))


@dataclasses.dataclass(frozen=True)
class Masks:
    """The masks of every expert, as outputs `mask_e<i>/<tensor>`, or where at least `minimum` of them agree.

    Attributes:
        held: masks the experts, given as a list, and the base.
        minimum: None for the masks themselves.
    """

    held: Callable[..., jm.MaskedExperts]
    minimum: int | None = None

    def outputs(self, case: Case) -> Tensors:
        held = self.held(on_device(case.experts), base=on_device(case.base))
        masks = [jax.device_get(held.mask(expert)) for expert in held.names]
        if self.minimum is not None:
            return {name: np.sum([mask[name] for mask in masks], axis=0) >= self.minimum for name in masks[0]}
        unified = {f"unified/{name}": value for name, value in jax.device_get(held.unified).items()}
        named = {f"mask_e{i}/{name}": value for i, mask in enumerate(masks) for name, value in mask.items()}
        return {**unified, **named, "rescalers": np.asarray(held.rescalers)}


@dataclasses.dataclass(frozen=True)
class Flattened:
    """Outputs of a call, those by tensor joined into one vector in a given order."""

    call: Masks
    order: Sequence[str]

    def outputs(self, case: Case) -> Tensors:
        found = self.call.outputs(case)
        joined = np.concatenate([found[f"unified/{name}"].ravel() for name in self.order])
        return {"unified": joined, "rescalers": found["rescalers"]}


@dataclasses.dataclass(frozen=True)
class MergedTaskVector:
    """The merged task vector of a bundle's first experts, by tensor or joined in an order as output `merged_tv`.

    Attributes:
        method: our method.
        experts: how many of the bundle's experts take part; None for all.
        without: a tensor that does not take part.
        order: of the tensors that are joined.
    """

    method: jm.Method
    experts: int | None = None
    without: str | None = None
    order: Sequence[str] | None = None

    def outputs(self, case: Case) -> Tensors:
        names = [name for name in case.base if name != self.without]
        deltas = [{name: expert[name] - case.base[name] for name in names} for expert in case.experts[: self.experts]]
        base = zeros_like(deltas[0])
        if self.method.whole_tensor:
            merged = jax.device_get(jm.merge(self.method, on_device(deltas), base=on_device(base)))
        else:  # one program serves every shape
            lazily = jm.merge(self.method, [lazy(delta) for delta in deltas], base=lazy(base))
            merged = {name: read(tensor) for name, tensor in lazily.items()}
        return {"merged_tv": np.concatenate([merged[n].ravel() for n in self.order])} if self.order else merged


Call = Merge | Pruned | KeepProbability | Draws | OfTaskVector | Masks | Flattened | MergedTaskVector


def on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def lazy(tensors: Tensors) -> dict[str, jm.LazyTensor]:
    return {name: ArrayTensor(value) for name, value in tensors.items()}


def read(tensor: jm.LazyTensor) -> np.ndarray:
    out = np.empty(tensor.size, tensor.dtype)
    tensor.read_flat(0, out)
    return out.reshape(tensor.shape)


def zeros_like(tensors: Tensors) -> Tensors:
    return {name: np.zeros_like(value) for name, value in tensors.items()}


def upcast(tensors: Tensors) -> Tensors:
    return {n: x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x for n, x in tensors.items()}


def expert_number(text: str) -> int:
    """2 of `e2`."""
    found = re.fullmatch(r"e(\d+)", text)
    assert found, f"{text!r} names no expert"
    return int(found[1])


def expert_of_delta(text: str) -> int:
    """2 of `e2 - base`."""
    expert, base = text.split(" - ")
    assert base == "base", f"{text!r} is no task vector"
    return expert_number(expert)


# mergekit


def mergekit_sce(select_topk: float) -> Call:
    return Merge(jm.sce(select_topk, min_energy=1e-6))


def mergekit_arcee_fusion(pair: Sequence[str]) -> Call:
    return between(jm.arcee_fusion(axis=-1), pair)


def mergekit_linear(weights: list[float], normalize: bool = True) -> Call:
    return Merge(jm.linear(weights, normalize=normalize), len(weights), with_base=False)


def mergekit_slerp(t: float, pair: Sequence[str] = ("base", "e0")) -> Call:
    return between(jm.slerp(t), pair)


def mergekit_nuslerp(
    weights: list[float], flatten: bool, row_wise: bool, pair: Sequence[str] = ("e0", "e1"), **taking: Any
) -> Call:
    assert list(pair) == ["e0", "e1"], f"unknown pair {pair}"
    return Merge(jm.nuslerp(weights, axis=None if flatten else 0 if row_wise else -1), 2, **taking)


def mergekit_multislerp(
    weights: list[float], with_base: bool = False, normalize_weights: bool = True, base_first: bool = False
) -> Call:
    method = jm.multislerp(weights, normalize=normalize_weights)
    return Merge(method, len(weights), with_base=with_base, base_first=base_first)


def mergekit_karcher(
    max_iter: int,
    tol: float,  # it stops earlier when a step is shorter than this
    base_first: bool = False,
) -> Call:
    return Merge(jm.karcher(iterations=max_iter), with_base=False, base_first=base_first)


def mergekit_nearswap(t: float, pair: Sequence[str] = ("base", "e0")) -> Call:
    return between(jm.nearswap(t), pair)


def between(method: jm.Method, pair: Sequence[str]) -> Call:
    assert list(pair) == ["base", "e0"], f"unknown pair {pair}"
    return Merge(method, 1)


def mergekit_passthrough(scale: float = 1.0) -> Call:
    return Merge(jm.passthrough(scale), 1, with_base=False)


def mergekit_model_stock(filter_wise: bool = False) -> Call:
    return Merge(jm.model_stock(axis=-1 if filter_wise else None))


def mergekit_task_arithmetic(weights: list[float], normalize: bool = False, lambda_: float = 1.0) -> Call:
    return Merge(jm.task_arithmetic(lambda_, weights=weights, normalize=normalize), len(weights))


def mergekit_consensus(
    prune: list[jm.Stage], weights: list[float], normalize: bool, lambda_: float, elect: str = "total"
) -> Call:
    by: Any = {"total": "total", "frequency": "count"}[elect]
    combine = jm.disjoint_mean() if normalize else jm.disjoint_sum()
    return Merge(jm.chain(*prune, jm.weigh(weights), jm.elect_sign(by), combine, jm.scale(lambda_)), len(weights))


def mergekit_ties(
    weights: list[float],
    density: float,
    normalize: bool = True,
    majority_sign: str = "total",
    lambda_: float = 1.0,
    rescale: bool = False,
    int8_mask: bool = False,  # how the reference stores its masks; the result is the same
) -> Call:
    prune = [jm.trim(density, scope="tensor"), *([jm.rescale()] if rescale else [])]
    return mergekit_consensus(prune, weights, normalize, lambda_, majority_sign)


def mergekit_breadcrumbs(
    weights: list[float], density: float, gamma: float = 0.01, normalize: bool = False, lambda_: float = 1.0
) -> Call:
    method = jm.breadcrumbs(density, gamma=gamma, scale=lambda_, weights=weights, normalize=normalize)
    return Merge(method, len(weights))


def mergekit_breadcrumbs_ties(
    weights: list[float], density: float, gamma: float = 0.01, normalize: bool = False, lambda_: float = 1.0
) -> Call:
    method = jm.breadcrumbs_ties(density, gamma=gamma, scale=lambda_, weights=weights, normalize=normalize)
    return Merge(method, len(weights))


def undropped(make: Callable[..., jm.Method], normalize_default: bool, **chosen: Any) -> Callable[..., Call]:
    """A dropping method at density 1, where nothing is drawn; other densities are recorded as statistics."""

    def call(
        weights: list[float], density: float, normalize: bool = normalize_default, lambda_: float = 1.0, **given: Any
    ) -> Call:
        assert density == 1, "single draws cannot be compared between generators"
        method = make(density, scale=lambda_, weights=weights, normalize=normalize, restore="l1", **chosen, **given)
        return Merge(method, len(weights))

    return call


def mergekit_magprune_probability(density: float, epsilon: float, delta: str) -> Call:
    stage = jm.magprune(density, epsilon=epsilon, axis=1)
    return KeepProbability(stage, expert_of_delta(delta), prefixed=False)


def mergekit_bernoulli(density: float, delta: str, draws: int, rescale: str | None) -> Call:
    return draws_of(jm.drop(density, restore=False), delta, draws, rescale)


def mergekit_magprune(density: float, epsilon: float, delta: str, draws: int, rescale: str | None) -> Call:
    return draws_of(jm.magprune(density, epsilon=epsilon, restore=False, axis=1), delta, draws, rescale)


def draws_of(stage: jm.Stage, delta: str, draws: int, rescale: str | None) -> Call:
    after = {None: (), "l1": (jm.rescale(),)}[rescale]
    of, tensor = delta.split(", tensor ")
    return Draws((stage, *after), expert_of_delta(of), tensor, draws)


# FusionBench


def fusion_bench_simple_average() -> Call:
    return Merge(jm.linear(), with_base=False)


def fusion_bench_weighted_average(weights: list[float], normalize: bool) -> Call:
    return Merge(jm.linear(weights, normalize=normalize), len(weights), with_base=False)


def fusion_bench_task_arithmetic(scaling_factor: float) -> Call:
    return Merge(jm.task_arithmetic(scaling_factor))


def fusion_bench_slerp(t: float, pair: Sequence[str]) -> Call:
    return between(jm.slerp(t), pair)


def fusion_bench_ties(
    threshold_percent: float, merge_func: str, scaling_factor: float, trim_scope: str = "whole model"
) -> Call:
    assert trim_scope == "whole model", f"unknown scope {trim_scope!r}"
    combine = {"mean": jm.disjoint_mean, "sum": jm.disjoint_sum, "max": jm.disjoint_max}[merge_func]()
    density = threshold_percent / 100 if threshold_percent > 1 else threshold_percent
    trimmed = jm.trim(density, scope="model", inclusive=True)
    return Merge(jm.chain(trimmed, jm.elect_sign(zero="majority"), combine, jm.scale(scaling_factor)))


def fusion_bench_model_stock() -> Call:
    return Merge(jm.model_stock(average="angle"))


def fusion_bench_tall_masks(lambda_: float) -> Call:
    return Masks(functools.partial(jm.tall_experts, threshold=lambda_))


def fusion_bench_consensus_mask(lambda_: float, prun_thre_k: int) -> Call:
    return Masks(functools.partial(jm.tall_experts, threshold=lambda_), minimum=prun_thre_k)


def emr() -> Call:
    return Masks(jm.emr_experts)


def emr_flat(flatten_order: Sequence[str]) -> Call:
    return Flattened(Masks(functools.partial(jm.emr_experts, average="model")), flatten_order)


def fusion_bench_dare(drop_rate: float, delta: str, draws: int) -> Call:
    return draws_of(jm.drop(1 - drop_rate), delta, draws, None)


# Authors' repositories


def merge_llm_ties(param_value_mask_rate: float, scaling_coefficient: float) -> Call:
    trimmed = jm.trim(1 - param_value_mask_rate, scope="tensor", inclusive=True, count="dropped")
    elected = jm.elect_sign(zero="majority", scope="tensor")
    return Merge(jm.chain(trimmed, elected, jm.disjoint_mean(), jm.scale(scaling_coefficient)))


def merge_llm_breadcrumbs(param_density: float, param_value_mask_rate: float, scaling_coefficient: float) -> Call:
    gamma = 1 - param_density - param_value_mask_rate
    middle = jm.keep_middle(param_density, gamma=gamma, inclusive=True, count="dropped")
    return Merge(jm.chain(middle, jm.total(), jm.scale(scaling_coefficient)))


def merge_llm_model_stock() -> Call:
    return Merge(jm.model_stock())


def lines(alpha: float, beta: float, num_blocks: int) -> Call:
    return OfTaskVector(jm.lines(alpha=alpha, beta=beta, num_layers=num_blocks))


def pcb(ratio: float, flatten_order: Sequence[str], clamp: float) -> Call:
    return MergedTaskVector(jm.pcb(ratio, tails=clamp), order=flatten_order)


def pcb_vision(ratio: float, flatten_order: Sequence[str], clamp: float, lambda_: float) -> Call:
    method = jm.pcb(ratio, weights=lambda_, agreement="normalized", tails=clamp)
    return MergedTaskVector(method, order=flatten_order)


def merge_llm_widen(above_average_value_ratio: float, score_calibration_value: float) -> Call:
    return Merge(jm.widen(above_average_value_ratio, calibration=score_calibration_value))


def original_compeft(k_percent: float, replace_factor: float, input: str) -> Call:
    found = re.fullmatch(r"e0 - base, whole model without tensor (\w+)", input)
    assert found, f"unknown input {input!r}"
    left = [jm.trim(k_percent / 100, inclusive=True)]
    if replace_factor != PRUNE_ONLY:
        left.append(jm.ternarize(1.0 if replace_factor == SIGNED_MEAN else replace_factor))
    return MergedTaskVector(jm.chain(*left, jm.total()), 1, found[1])


def original_breadcrumbs(top_k_keep: float, top_k_remove: float, remove_first: bool) -> Call:
    order = "outliers_first" if remove_first else "small_first"
    return Pruned((jm.keep_middle(top_k_keep, gamma=top_k_remove, axis=-1, order=order),))


def original_della(density: float, epsilon: float, window_size: float, delta: str) -> Call:
    assert np.isclose(window_size, 2 * epsilon), "the window is twice epsilon in every published call"
    stage = jm.magprune(density, epsilon=epsilon, axis=1)
    return KeepProbability(stage, expert_of_delta(delta), prefixed=True)


PRUNE_ONLY, SIGNED_MEAN = -1, -2  # factors that the reference gives another meaning

MERGEKIT, FUSION_BENCH, MERGE_LLM = "arcee-ai/mergekit", "tanganke/fusion_bench", "yule-BUAA/MergeLLM"

ROWS: dict[tuple[str, str, str], Callable[..., Call]] = {
    ("linear", MERGEKIT, r"registry 'linear'.*"): mergekit_linear,
    ("linear", FUSION_BENCH, r"SimpleAverageAlgorithm\.run"): fusion_bench_simple_average,
    ("linear", FUSION_BENCH, r"WeightedAverageAlgorithm\.run"): fusion_bench_weighted_average,
    ("slerp", MERGEKIT, r"registry 'slerp'.*"): mergekit_slerp,
    ("slerp", FUSION_BENCH, r"SlerpMergeAlgorithm\.run"): fusion_bench_slerp,
    ("nuslerp", MERGEKIT, r"registry 'nuslerp' with base.*"): mergekit_nuslerp,
    ("nuslerp", MERGEKIT, r"registry 'nuslerp' without base"): functools.partial(mergekit_nuslerp, with_base=False),
    ("nuslerp", MERGEKIT, r"registry 'nuslerp' on \[base, e0\]"): functools.partial(
        mergekit_nuslerp, with_base=False, base_first=True
    ),
    ("multislerp", MERGEKIT, r"multislerp\(\) called directly.*"): mergekit_multislerp,
    ("multislerp", MERGEKIT, r"multislerp\(\) direct"): functools.partial(mergekit_multislerp, base_first=True),
    ("karcher", MERGEKIT, r"registry 'karcher' \(equal weights\)"): mergekit_karcher,
    ("karcher", MERGEKIT, r"registry 'karcher'"): functools.partial(mergekit_karcher, base_first=True),
    ("nearswap", MERGEKIT, r"registry 'nearswap'.*"): mergekit_nearswap,
    ("passthrough", MERGEKIT, r"registry 'passthrough'.*"): mergekit_passthrough,
    ("model_stock", MERGEKIT, r"registry 'model_stock'.*"): mergekit_model_stock,
    ("model_stock", FUSION_BENCH, r"ModelStock\.run"): fusion_bench_model_stock,
    ("model_stock", MERGE_LLM, r"MergingMethod\.stock_merging"): merge_llm_model_stock,
    ("task_arithmetic", MERGEKIT, r"registry 'task_arithmetic'.*"): mergekit_task_arithmetic,
    ("task_arithmetic", FUSION_BENCH, r"TaskArithmeticAlgorithm\.run"): fusion_bench_task_arithmetic,
    ("ties", MERGEKIT, r"registry 'ties'.*"): mergekit_ties,
    ("ties", MERGEKIT, r"GeneralizedTaskArithmeticMerge\(consensus=\w+, sparsification=magnitude\)"): mergekit_ties,
    ("ties", FUSION_BENCH, r"TiesMergingAlgorithm\.run"): fusion_bench_ties,
    ("ties", MERGE_LLM, r"MergingMethod\.ties_merging"): merge_llm_ties,
    ("breadcrumbs", MERGEKIT, r"registry 'breadcrumbs'.*"): mergekit_breadcrumbs,
    ("breadcrumbs", MERGEKIT, r"registry 'breadcrumbs_ties'.*"): mergekit_breadcrumbs_ties,
    ("breadcrumbs", MERGE_LLM, r"MergingMethod\.breadcrumbs_merging"): merge_llm_breadcrumbs,
    ("breadcrumbs", "rezazzr/breadcrumbs", r"TaskVectorMiddleKeep\(vector=\.\.\.\)"): original_breadcrumbs,
    ("dare_della", MERGEKIT, r"registry 'dare_linear'.*"): undropped(jm.dare, False),
    ("dare_della", MERGEKIT, r"registry 'dare_ties'.*"): undropped(jm.dare_ties, False),
    ("dare_della", MERGEKIT, r"registry 'della'.*"): undropped(jm.della, True, axis=1),
    ("dare_della", MERGEKIT, r"registry 'della_linear'.*"): undropped(jm.della_linear, False, axis=1),
    ("dare_della", MERGEKIT, r"sparsify\.della_magprune with .* recorder"): mergekit_magprune_probability,
    ("dare_della", MERGEKIT, r"sparsify\.bernoulli\(rescale_norm=\w+\)"): mergekit_bernoulli,
    ("dare_della", MERGEKIT, r"sparsify\.della_magprune\(rescale_norm=\w+\)"): mergekit_magprune,
    ("dare_della", FUSION_BENCH, r"dare\.utils\.param_random_drop_\(rescale=True\)"): fusion_bench_dare,
    ("dare_della", "declare-lab/della", r"sparsify\.rank_magnitude with .* recorder"): original_della,
    ("arcee_fusion", MERGEKIT, r"registry 'arcee_fusion'"): mergekit_arcee_fusion,
    ("pcb", "duguodong7/pcb-merging", r"pcb-merging\.py: PCB_merge.*"): pcb,
    ("pcb", "duguodong7/pcb-merging", r"vision_source_code/pcb\.py main block"): pcb_vision,
    ("widen", MERGE_LLM, r"MergingMethod\.widen_merging"): merge_llm_widen,
    ("lora", "prateeky2806/ComPEFT", r"t5_eval\.compress_and_update_t5_parms.*"): original_compeft,
    ("sce", MERGEKIT, r"registry 'sce'"): mergekit_sce,
    ("tall_emr", FUSION_BENCH, r"tall_mask\.utils\.generate_task_masks"): fusion_bench_tall_masks,
    ("tall_emr", FUSION_BENCH, r"tall_mask\.utils\.construct_consensus_mask .*"): fusion_bench_consensus_mask,
    ("tall_emr", FUSION_BENCH, r"emr_merge"): emr,
    ("tall_emr", "harveyhuang18/EMR_Merging", r"main_emr_merging\.py: emr_merge"): emr,
    ("tall_emr", "harveyhuang18/EMR_Merging", r"main_emr_30_vits\.py: emr_merge \(flat\)"): emr_flat,
    ("lines", "wang-kee/LiNeS", r"src/eval/eval\.py: LiNeS_scaling"): lines,
}

"""Families of methods that the library does not have yet; of some families, those of one implementation."""
