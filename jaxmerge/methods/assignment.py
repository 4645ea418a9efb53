"""Who merges what: the tensors of a merge, each with its inputs and its method, decided before anything is computed.

An `Assignment` is what merging in memory, merging lazily and streaming have in common: names and structure are checked
here, methods are chosen and resolved per tensor, and random draws get their seeds.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import RecipeError
from jaxmerge.methods.method import Method
from jaxmerge.trees.checks import check_same_tensors, is_mergeable, name_experts
from jaxmerge.trees.info import Rules, TensorInfo, tensor_infos
from jaxmerge.trees.paths import Params, match_rules, named_leaves

ExpertTrees = Sequence[Params] | Mapping[str, Params]


@dataclasses.dataclass(frozen=True)
class TensorTask:
    """One tensor to be merged.

    Attributes:
        info: what is known about it (about one layer, for a stacked leaf), with seeds if the method draws.
        method: resolved for it; coefficients have a leading layer axis for a stacked leaf.
        group: number of the group of tensors that share a method, and so its measurements over the model.
        base: the base's leaf, or None.
        experts: the experts' leaves.
        stacked: axis 0 of the leaves holds one tensor per layer.
    """

    info: TensorInfo
    method: Method
    group: int
    base: Any
    experts: list[Any]
    stacked: bool


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A merge, decided but not computed.

    Attributes:
        reference: the parameters that the result looks like: the base, or the first expert.
        experts: names of the experts.
        has_base: whether there is a base.
        tasks: tensor name → what merges it; floating-point tensors only.
        copied: tensor name → the reference's leaf and the experts' leaves, which must agree with it.
    """

    reference: Params
    experts: tuple[str, ...]
    has_base: bool
    tasks: dict[str, TensorTask]
    copied: dict[str, tuple[Any, list[Any]]]

    def leaves(self) -> list[Any]:
        """Every input leaf."""
        merged = [x for task in self.tasks.values() for x in (task.base, *task.experts) if x is not None]
        return merged + [x for reference, others in self.copied.values() for x in (reference, *others)]

    def source_name(self, index: int) -> str:
        """What input number `index` of a task is called, counting the base first if there is one."""
        if self.has_base and index == 0:
            return "the base"
        return f"expert {self.experts[index - self.has_base]!r}"


def assign(method: Method, experts: ExpertTrees, base: Params | None, key: Any, rules: Rules) -> Assignment:
    """Decides a merge.

    Args:
        method: the method.
        experts: list of parameter trees, or dict of them by name.
        base: the base's parameters, or None.
        key: a PRNG key or an integer seed for methods that draw, or None.
        rules: how names are read.

    Raises:
        StructureError, ShapeError, DTypeError: experts and base differ.
        RecipeError: the method does not fit these experts, needs a base or a key, or a rule matches nothing.
    """
    if not isinstance(method, Method):
        raise RecipeError(f"{method!r} is no merge method; a single stage becomes one with jm.chain")
    trees = name_experts(experts)
    names = tuple(trees)
    leaves = {name: named_leaves(tree) for name, tree in trees.items()}
    reference = next(iter(trees.values())) if base is None else base
    targets = leaves[names[0]] if base is None else named_leaves(base)
    check_same_tensors(targets, leaves, f"expert {names[0]!r}" if base is None else "the base")

    mergeable = {name: leaf for name, leaf in targets.items() if is_mergeable(leaf)}
    copied = {n: (leaf, [leaves[e][n] for e in names]) for n, leaf in targets.items() if n not in mergeable}
    method.check(names, base is not None, list(mergeable))
    infos = tensor_infos({name: tuple(leaf.shape) for name, leaf in mergeable.items()}, rules)
    stacked = {name for name, rule in match_rules(rules.stacked, mergeable).items() if rule is not None}

    chosen = {name: method.for_tensor(info) for name, info in infos.items()}
    groups: dict[int, list[str]] = {}
    for name, chosen_method in chosen.items():
        groups.setdefault(id(chosen_method), []).append(name)
    group_of = {name: number for number, members in enumerate(groups.values()) for name in members}
    sizes = [sum(mergeable[name].size for name in members) for members in groups.values()]

    drawing = [name for name in mergeable if chosen[name].draws]
    if drawing and key is None:
        raise RecipeError(f"{method!r} draws random numbers; pass key=jax.random.key(seed)")
    seeds = _seeds(key, drawing, names, {n: mergeable[n].shape[0] if n in stacked else None for n in drawing})

    tasks = {}
    for name, info in infos.items():
        info = dataclasses.replace(info, group_size=sizes[group_of[name]], seeds=seeds.get(name))
        resolved = _resolved(chosen[name], info, names, name in stacked)
        base_leaf = None if base is None else targets[name]
        expert_leaves = [leaves[expert][name] for expert in names]
        tasks[name] = TensorTask(info, resolved, group_of[name], base_leaf, expert_leaves, name in stacked)
    return Assignment(reference, names, base is not None, tasks, copied)


def _resolved(method: Method, info: TensorInfo, experts: tuple[str, ...], stacked: bool) -> Method:
    if not stacked:
        return method.at(info, experts)
    layers = [method.at(dataclasses.replace(info, layer=layer), experts) for layer in range(info.num_layers)]
    return jax.tree.map(lambda *values: jnp.stack([jnp.asarray(v) for v in values]), *layers)


def _seeds(
    key: Any, tensors: Sequence[str], experts: tuple[str, ...], layers: Mapping[str, int | None]
) -> dict[str, Any]:
    """`[K, 2]` uint32 per tensor (`[L, K, 2]` for stacked ones): a hash of key, tensor name, layer and expert name."""
    if not tensors:
        return {}
    if isinstance(key, int | np.integer):
        key = jax.random.key(int(key))
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    of_experts = np.stack([_words(expert) for expert in experts])
    seeds = {}
    for name in tensors:
        count = layers[name]
        named = [_words(name)] if count is None else [_words(f"{name}/{layer}") for layer in range(count)]
        mixed = np.stack(named)[:, None] ^ (of_experts * np.uint32(0x9E3779B1))
        seed = _mix_words(jax.device_put(mixed), words.reshape(-1)[:2])
        seeds[name] = seed[0] if count is None else seed
    return seeds


@jax.jit
def _mix_words(names: Any, key: Any) -> Any:
    low = (names[..., 0] ^ key[0]) * jnp.uint32(0x85EBCA6B)
    high = (names[..., 1] + key[1]) * jnp.uint32(0xC2B2AE35)
    return jnp.stack([low ^ (high >> 15), high ^ (low >> 13)], axis=-1)


def _words(name: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], "<u4")
