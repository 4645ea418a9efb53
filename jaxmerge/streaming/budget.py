r"""Which blocks of which experts are worth reading, when not all of them may be: the planner.

The idea is MergePipe's (arXiv 2602.13273; access sets and the bound are named in the abstract of arXiv 2605.29489): of
all that a merge of K experts reads, only the experts' bytes grow with K, so a budget is put on those. The plan is made
before anything is read, and holds by construction. Published code chooses blocks by a hash of their names
(`"uniform_hash"` here); that the largest task vectors are read first (`"greedy_value"`) is our own.

Where a merge is a sum, $\theta = \theta_0 + \sum_k \lambda_k \Delta_k$, and $A_b$ are the experts that are read in
block b, what is left out changes the result by at most
$\lVert \theta - \theta' \rVert \le (\sum_b (\sum_{k \notin A_b} |\lambda_k| \lVert \Delta_{kb} \rVert)^2)^{1/2}$.

Everything here is arithmetic on statistics: no checkpoint is opened.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmerge.errors import BudgetError, CheckpointError, RecipeError
from jaxmerge.streaming.fingerprint import digest
from jaxmerge.streaming.sizes import format_bytes

POLICIES = ("greedy_value", "uniform_hash", "full")
"""How blocks are chosen; see `plan_access`."""

_VERSION = 1
_ESTIMATES = ("bound", "expected", "merged_norm", "kept")


@dataclasses.dataclass(frozen=True)
class TensorBlocks:
    """One tensor of K experts, as the planner sees it.

    Attributes:
        name: its name.
        size: number of entries.
        block: entries per block.
        norms: `[K, B]` L2 norms of the blocks of the task vectors.
        touched: `[K, B]` whether a block differs from the base's at all.
        costs: `[K, B]` bytes that reading it fetches.
        weights: `[K]` the coefficients of the sum that the merge is; None for a method that is none, whose experts
            belong together: a block is then read from all of them or from none.
        merged_square: the squared norm of the full merged task vector, maybe estimated; None where it is unknown.
    """

    name: str
    size: int
    block: int
    norms: Float[np.ndarray, "K B"]
    touched: Bool[np.ndarray, "K B"]
    costs: Int[np.ndarray, "K B"]
    weights: Float[np.ndarray, " K"] | None
    merged_square: float | None = None


@dataclasses.dataclass(frozen=True)
class AccessPlan:
    """The blocks that a merge reads from its experts; everywhere else the base stands in for them.

    Attributes:
        policy: how they were chosen.
        budget: bytes that may be fetched from the experts; None without a limit.
        floors: blocks of each expert, and of each tensor, that were chosen before all others.
        base: content hash of the base.
        experts: name → content hash.
        method: the method and its coefficients, as plain data.
        blocks: tensor → its number of entries, and of entries per block.
        chosen: expert → tensor → `[B]`, whether each block is read.
        planned: expert → bytes that are fetched.
        full: expert → bytes that would be fetched without a budget.
        bound: the L2 norm of what is left out of the merged model, at most; None for a method that is no sum.
        expected: what it is if the task vectors are orthogonal to each other; None like `bound`.
        merged_norm: estimate, from sketches, of the L2 norm of the full merged task vector; None like `bound`.
        kept: share of the value (sum of squared norms, times squared coefficients) that is read.
        ranks: expert → tensor → `[B]`, the place of each block in the order of choice, from 0; -1 if it has none.
        ratios: expert → tensor → `[B]`, value per byte of what is chosen as one: the block of one expert, or of all.
    """

    policy: str
    budget: int | None
    floors: tuple[int, int]
    base: str
    experts: Mapping[str, str]
    method: Any
    blocks: Mapping[str, tuple[int, int]]
    chosen: Mapping[str, Mapping[str, Bool[np.ndarray, " _"]]]
    planned: Mapping[str, int]
    full: Mapping[str, int]
    bound: float | None
    expected: float | None
    merged_norm: float | None
    kept: float
    ranks: Mapping[str, Mapping[str, Int[np.ndarray, " _"]]]
    ratios: Mapping[str, Mapping[str, Float[np.ndarray, " _"]]]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the plan. Models count by their contents: names, paths, times and estimates are not part of it."""
        return digest(self._decided())

    def _decided(self) -> dict[str, Any]:
        order = sorted(self.experts, key=lambda name: (self.experts[name], name))
        return {
            "version": _VERSION,
            "policy": self.policy,
            "budget": self.budget,
            "floors": list(self.floors),
            "base": self.base,
            "experts": [self.experts[name] for name in order],
            "method": self.method,
            "blocks": {name: list(cut) for name, cut in self.blocks.items()},
            "access": [{name: _as_hex(bits) for name, bits in self.chosen[expert].items()} for expert in order],
            "planned": [self.planned[name] for name in order],
        }

    def rows(self) -> list[tuple[str, str]]:
        """A table: what, how much."""
        total, full = sum(self.planned.values()), sum(self.full.values())
        limit = "none" if self.budget is None else format_bytes(self.budget)
        rows = [("policy", self.policy), ("I/O budget", f"{limit}, of {format_bytes(full)} in all experts")]
        for name, n in self.planned.items():
            count = sum(int(bits.sum()) for bits in self.chosen[name].values())
            rows.append(
                (f"planned from {name}", f"{format_bytes(n)} of {format_bytes(self.full[name])}, {count} blocks")
            )
        rows.append(("planned from all", f"{format_bytes(total)} ({total / max(full, 1):.1%})"))
        rows.append(("value kept", f"{self.kept:.2%}"))
        if self.bound is None:
            rows.append(("error", "no bound is known: the method is no sum over the experts"))
        else:
            rows.append(("error, at most", f"{self.bound:.4g}{self._relative(self.bound)}"))
            if self.expected is not None:
                rows.append(("error of orthogonal experts", f"{self.expected:.4g}{self._relative(self.expected)}"))
        rows.append(("digest", self.digest[:16]))
        return rows

    def _relative(self, error: float) -> str:
        if not self.merged_norm:
            return ""
        return f", {error / self.merged_norm:.2%} of the merged task vector (about {self.merged_norm:.4g})"

    def explain(self, expert: str, tensor: str, block: int) -> str:
        """Why a block is read from an expert, or is not.

        Args:
            expert: name of the expert.
            tensor: name of the tensor.
            block: number of the block, from 0.

        Raises:
            RecipeError: there is no such expert, tensor or block.
        """
        if expert not in self.chosen or tensor not in self.chosen[expert]:
            raise RecipeError(f"the plan has no tensor {tensor!r} of an expert {expert!r}; it has {list(self.experts)}")
        chosen, rank = self.chosen[expert][tensor], self.ranks[expert][tensor]
        if not 0 <= block < len(chosen):
            raise RecipeError(f"tensor {tensor!r} has {len(chosen)} blocks, and {block} is none of them")
        what = f"block {block} of {tensor} from {expert}"
        if rank[block] < 0:
            return f"{what}: not read, because it equals the base's"
        ranked = max(int(r.max(initial=-1)) for each in self.ranks.values() for r in each.values()) + 1
        read = [self.ratios[e][t][bits] for e, each in self.chosen.items() for t, bits in each.items()]
        cut = min((float(ratios.min()) for ratios in read if len(ratios)), default=None)
        verdict = "read" if chosen[block] else "left out"
        order = "by hash" if self.policy == "uniform_hash" else "by value per byte"
        return (
            f"{what}: {verdict}; it is number {rank[block] + 1} of {ranked} {order}, and its value per byte is "
            f"{self.ratios[expert][tensor][block]:.4g}; "
            + ("nothing was read" if cut is None else f"the least of what was read has {cut:.4g}")
        )

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON.

        Args:
            path: a file, which is replaced.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.as_data()), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{path}: the plan cannot be written: {error.strerror}; check the path") from error

    @classmethod
    def load(cls, path: str | Path) -> AccessPlan:
        """Reads a plan that was saved.

        Args:
            path: the file.

        Raises:
            CheckpointError: the file cannot be read, is no plan, or was changed since it was written.
        """
        try:
            return cls.from_data(json.loads(Path(path).read_text(encoding="utf-8")))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is no access plan: {error!r:.200}; make it again") from None

    def as_data(self) -> dict[str, Any]:
        """The plan as plain data, from which `from_data` makes the same one."""
        return {
            **self._decided(),
            "digest": self.digest,
            "names": sorted(self.experts, key=lambda name: (self.experts[name], name)),
            "order": list(self.experts),
            "full": dict(self.full),
            **{name: getattr(self, name) for name in _ESTIMATES},
            "ranks": _packed(self.ranks, np.int32),
            "ratios": _packed(self.ratios, np.float64),
        }

    @classmethod
    def from_data(cls, told: Any) -> AccessPlan:
        """The plan that `as_data` has written down.

        Raises:
            CheckpointError: it does not have the digest that it names.
            ValueError, LookupError, TypeError, AttributeError: it is no plan.
        """
        names, blocks = told["names"], {name: (size, block) for name, (size, block) in told["blocks"].items()}
        order = told["order"]
        by_name = {
            name: {tensor: _from_hex(bits, *blocks[tensor]) for tensor, bits in access.items()}
            for name, access in zip(names, told["access"], strict=True)
        }
        contents, planned = (dict(zip(names, told[key], strict=True)) for key in ("experts", "planned"))
        per_expert, per_tensor = told["floors"]
        ranks, ratios = _unpacked(told["ranks"], np.int32), _unpacked(told["ratios"], np.float64)
        for name, tensor in ((name, tensor) for name in names for tensor in blocks):
            if not len(by_name[name][tensor]) == len(ranks[name][tensor]) == len(ratios[name][tensor]):
                raise ValueError(f"tensor {tensor!r} of {name!r} has blocks without a rank")
        plain: dict[str, Any] = {name: told[name] for name in ("policy", "base", "method")}
        plain |= {name: None if told[name] is None else float(told[name]) for name in _ESTIMATES}
        plan = cls(
            **plain,
            budget=None if told["budget"] is None else int(told["budget"]),
            full={name: int(n) for name, n in told["full"].items()},
            floors=(per_expert, per_tensor),
            experts={name: contents[name] for name in order},
            blocks=blocks,
            chosen={name: by_name[name] for name in order},
            planned={name: int(planned[name]) for name in order},
            ranks=ranks,
            ratios=ratios,
        )
        if told["version"] != _VERSION or plan.digest != told["digest"]:
            raise CheckpointError("the plan does not have the digest that it names; make it again")
        return plan

    def __str__(self) -> str:
        width = max(len(what) for what, _ in self.rows())
        return "\n".join(f"{what:<{width}}  {how_much}" for what, how_much in self.rows())

    def __repr__(self) -> str:
        total = format_bytes(sum(self.planned.values()))
        return f"AccessPlan({self.policy}, {total} from {len(self.experts)} experts, {self.digest[:16]})"


def plan_access(
    tensors: Sequence[TensorBlocks],
    experts: Mapping[str, str],
    *,
    base: str,
    method: Any = None,
    budget: int | None = None,
    policy: str = "greedy_value",
    floors: tuple[int, int] = (0, 0),
) -> AccessPlan:
    """Chooses the blocks that are read.

    Args:
        tensors: what is known about each tensor; their K experts are those of `experts`, in its order.
        experts: name → content hash.
        base: content hash of the base.
        method: plain data that tells the method and its coefficients, for the digest.
        budget: bytes that may be fetched from the experts; None for no limit.
        policy: `"greedy_value"` reads what has the most value per byte, `"uniform_hash"` blocks by a hash of their
            names, the same of every expert, `"full"` everything.
        floors: how many blocks of each expert, and of each tensor, are chosen before all others.

    Returns:
        The plan. It is the same for every order of experts and tensors: equal values are ordered by the experts'
        content hashes, the tensors' names and the numbers of the blocks. A block that equals the base's is not read.

    Raises:
        BudgetError: the floors, or all blocks with the policy `"full"`, take more than the budget.
        RecipeError: there is no such policy.
    """
    if policy not in POLICIES:
        raise RecipeError(f"there is no policy {policy!r}; choose {', '.join(POLICIES)}")
    names = list(experts)
    order = sorted(range(len(names)), key=lambda i: (experts[names[i]], names[i]))
    tensors = sorted(tensors, key=lambda tensor: tensor.name)
    items = _items(tensors, order, together=policy == "uniform_hash")
    total = int(items.costs.sum())
    fits = budget is None or total <= budget
    if policy == "full" and not fits:
        raise BudgetError(
            f"reading all blocks takes {format_bytes(total)}, and the I/O budget is {format_bytes(budget or 0)}; "
            "raise io_budget, or choose the policy 'greedy_value'"
        )
    ranking = _ranking(items, tensors, policy)
    taken = np.ones(len(items.costs), bool) if fits or budget is None else _taken(items, ranking, budget, floors)
    return _as_plan(tensors, experts, order, items, ranking, taken, base, method, budget, policy, floors)


@dataclasses.dataclass(frozen=True)
class _Items:
    """What can be chosen: a block of one expert, or of all experts together (expert -1). Only what differs from base.

    `experts` are places in the order by content.
    """

    experts: Int[np.ndarray, " n"]
    tensors: Int[np.ndarray, " n"]
    blocks: Int[np.ndarray, " n"]
    costs: Int[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]


def _items(tensors: Sequence[TensorBlocks], order: Sequence[int], together: bool) -> _Items:
    empty = np.empty(0, np.int64)
    parts: list[tuple[Any, ...]] = [(empty, empty, empty, empty, empty.astype(np.float64))]
    for number, tensor in enumerate(tensors):
        touched, costs, values = tensor.touched[order], tensor.costs[order], _values(tensor)[order]
        if tensor.weights is None or together:
            (blocks,) = np.nonzero(touched.any(axis=0))
            ranks = np.full(len(blocks), -1)
            each = np.where(touched, costs, 0).sum(axis=0)[blocks], values.sum(axis=0)[blocks]
        else:
            ranks, blocks = np.nonzero(touched)
            each = costs[ranks, blocks], values[ranks, blocks]
        parts.append((ranks, np.full(len(blocks), number), blocks, *each))
    return _Items(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _values(tensor: TensorBlocks) -> Float[np.ndarray, "K B"]:
    weights = np.ones(len(tensor.norms)) if tensor.weights is None else np.abs(tensor.weights)
    return (weights[:, None] * tensor.norms) ** 2


def _ranking(items: _Items, tensors: Sequence[TensorBlocks], policy: str) -> Int[np.ndarray, " n"]:
    """The order of choice."""
    if policy == "uniform_hash":
        seeds = [hashlib.sha256(tensor.name.encode()).digest()[:8] for tensor in tensors]
        words = np.frombuffer(b"".join(seeds), "<u8").astype(np.uint64)[items.tensors]
        first = _mixed(words + items.blocks.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    else:
        first = -items.values / items.costs
    # Items come by tensor, expert and block; equal ones are to be ordered by expert, tensor and block.
    by_expert = np.argsort(items.experts.astype(np.int16), kind="stable")
    return by_expert[np.argsort(first[by_expert], kind="stable")]


def _mixed(words: Any) -> Any:
    """Uniformly distributed 64-bit words."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words


def _taken(
    items: _Items, ranking: Int[np.ndarray, " n"], budget: int, floors: tuple[int, int]
) -> Bool[np.ndarray, " n"]:
    """The items that fit into a budget that does not hold all of them."""
    # What has no value (a coefficient of 0) is never worth a byte.
    ranking = ranking[items.values[ranking] > 0]
    reserved = _first_of_each(items.experts[ranking], floors[0]) | _first_of_each(items.tensors[ranking], floors[1])
    taken = np.zeros(len(items.costs), bool)
    taken[ranking[reserved]] = True
    room = budget - int(items.costs[taken].sum())
    if room < 0:
        raise BudgetError(
            f"the floors of {floors[0]} blocks per expert and {floors[1]} per tensor take "
            f"{format_bytes(budget - room)}, and the I/O budget is {format_bytes(budget)}; raise it, or lower them"
        )
    rest = ranking[~reserved]
    fitting = _fitting(items.costs[rest], room)
    alone = np.where(items.costs[rest] <= room, items.values[rest], -1)
    if alone.max(initial=-1) > items.values[rest][fitting].sum():  # or greed may be arbitrarily far from the best
        best = int(alone.argmax())
        fitting = np.zeros_like(fitting)
        fitting[best] = True
        left = np.flatnonzero(~fitting)
        fitting[left] = _fitting(items.costs[rest[left]], room - int(items.costs[rest[best]]))
    taken[rest[fitting]] = True
    return taken


def _first_of_each(groups: Int[np.ndarray, " n"], count: int) -> Bool[np.ndarray, " n"]:
    """The first `count` members of each group."""
    by_group = np.argsort(groups, kind="stable")
    _, starts, sizes = np.unique(groups[by_group], return_index=True, return_counts=True)
    result = np.zeros(len(groups), bool)
    result[by_group] = np.arange(len(groups)) - np.repeat(starts, sizes) < count
    return result


def _fitting(costs: Int[np.ndarray, " n"], room: int) -> Bool[np.ndarray, " n"]:
    """One after the other, whatever still fits."""
    taken = np.zeros(len(costs), bool)
    left = np.flatnonzero(costs <= room)
    while left.size:
        sums = np.cumsum(costs[left])
        n = int(np.searchsorted(sums, room, side="right"))
        taken[left[:n]] = True
        room -= int(sums[n - 1]) if n else 0
        left = left[n:]
        left = left[costs[left] <= room]
    return taken


def _as_plan(
    tensors: Sequence[TensorBlocks],
    experts: Mapping[str, str],
    order: Sequence[int],
    items: _Items,
    ranking: Int[np.ndarray, " n"],
    taken: Bool[np.ndarray, " n"],
    base: str,
    method: Any,
    budget: int | None,
    policy: str,
    floors: tuple[int, int],
) -> AccessPlan:
    place = np.empty(len(ranking), np.int32)
    place[ranking] = np.arange(len(ranking), dtype=np.int32)
    names = [list(experts)[i] for i in order]
    chosen, ranks, ratios = ({name: {} for name in experts} for _ in range(3))
    planned, full = dict.fromkeys(experts, 0), dict.fromkeys(experts, 0)
    bound = expected = merged = value = kept = 0.0
    known, estimated = True, True
    bounds = np.searchsorted(items.tensors, np.arange(len(tensors) + 1))
    for number, tensor in enumerate(tensors):
        these = slice(bounds[number], bounds[number + 1])
        rows, columns, shape = items.experts[these], items.blocks[these], tensor.norms.shape
        bits, rank, ratio = np.zeros(shape, bool), np.full(shape, -1, np.int32), np.zeros(shape)
        where = np.index_exp[:, columns] if len(rows) and rows[0] < 0 else np.index_exp[rows, columns]
        bits[where], rank[where] = taken[these], place[these]
        ratio[where] = items.values[these] / items.costs[these]
        touched, costs, values = (x[order] for x in (tensor.touched, tensor.costs, _values(tensor)))
        bits, rank = bits & touched, np.where(touched, rank, -1)
        for k, name in enumerate(names):
            chosen[name][tensor.name], ranks[name][tensor.name] = bits[k], rank[k]
            ratios[name][tensor.name] = np.where(touched[k], ratio[k], 0)
            planned[name] += int(costs[k][bits[k]].sum())
            full[name] += int(costs[k].sum())
        omitted = touched & ~bits
        value += float(values[touched].sum())
        kept += float(values[bits].sum())
        if tensor.weights is None:
            known = known and not omitted.any()
        else:
            bound += float((np.where(omitted, np.sqrt(values), 0).sum(axis=0) ** 2).sum())
            expected += float(values[omitted].sum())
        estimated = estimated and tensor.merged_square is not None
        merged += tensor.merged_square or 0.0
    return AccessPlan(
        policy,
        budget,
        floors,
        base,
        dict(experts),
        method,
        {tensor.name: (tensor.size, tensor.block) for tensor in tensors},
        chosen,
        planned,
        full,
        float(np.sqrt(bound)) if known else None,
        float(np.sqrt(expected)) if known else None,
        float(np.sqrt(max(merged, 0.0))) if known and estimated else None,
        kept / value if value else 1.0,
        ranks,
        ratios,
    )


def _as_hex(bits: Bool[np.ndarray, " B"]) -> str:
    return np.packbits(bits).tobytes().hex()


def _from_hex(text: str, size: int, block: int) -> Bool[np.ndarray, " B"]:
    packed, count = np.frombuffer(bytes.fromhex(text), np.uint8), -(-size // max(block, 1))
    if len(packed) != -(-count // 8):
        raise ValueError(f"{8 * len(packed)} bits for {count} blocks")
    return np.unpackbits(packed, count=count).astype(bool)


def _packed(arrays: Mapping[str, Mapping[str, np.ndarray]], dtype: Any) -> dict[str, dict[str, str]]:
    return {
        expert: {name: base64.b64encode(np.ascontiguousarray(x, dtype).tobytes()).decode() for name, x in each.items()}
        for expert, each in arrays.items()
    }


def _unpacked(texts: Mapping[str, Mapping[str, str]], dtype: Any) -> dict[str, dict[str, np.ndarray]]:
    return {
        expert: {name: np.frombuffer(base64.b64decode(text), dtype) for name, text in each.items()}
        for expert, each in texts.items()
    }
