"""Tokenizer transplantation by orthogonal matching pursuit (arXiv 2506.06607): a model gets another's tokens."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmerge.errors import RecipeError, ShapeError
from jaxmerge.trees.task_vectors import accumulation_dtype
from jaxmerge.trees.vocabulary import Vocabulary


def matching_pursuit(
    targets: Float[Any, "B D"], candidates: Float[Any, "N D"], atoms: int
) -> tuple[Int[Array, "B atoms"], Float[Array, "B atoms"]]:
    r"""Writes vectors as sparse combinations of candidates, by orthogonal matching pursuit.

    Each step takes the candidate $c_j$ with the largest $|\langle r, c_j \rangle|$, for $r$ what is left of the target,
    and makes $r$ orthogonal to all taken so far. Candidates are not normalised, so long ones are preferred.

    Args:
        targets: `[B, D]`, the vectors.
        candidates: `[N, D]`, of which they are made.
        atoms: how many candidates each target gets, from 1 to N.

    Returns:
        Indices `[B, atoms]` in the order of selection, and coefficients `[B, atoms]` of the least-squares combination,
        in float32 (float64 for float64 targets). A candidate that lies in the span of those before it gets 0.

    Raises:
        RecipeError: there are fewer candidates than atoms.

    It runs under `jit`, `vmap` and `grad` (of the coefficients). Source: arXiv 2506.06607; mergekit's `tokensurgeon`
    selects the same candidates.
    """
    if not 1 <= atoms <= candidates.shape[0]:
        raise RecipeError(f"atoms is {atoms}, expected 1 to {candidates.shape[0]}, the number of candidates")
    dtype = accumulation_dtype(targets.dtype)
    return _pursue(jnp.asarray(targets).astype(dtype), jnp.asarray(candidates).astype(dtype), atoms)


@functools.partial(jax.jit, static_argnames="atoms")
def _pursue(targets: Any, candidates: Any, atoms: int) -> tuple[Any, Any]:
    # Products in half precision, as accelerators do by default, would pick other candidates.
    with jax.default_matmul_precision("highest"):
        return jax.vmap(lambda target: _pursue_one(target, candidates, atoms))(targets)


def _pursue_one(target: Any, candidates: Any, atoms: int) -> tuple[Any, Any]:
    def step(t: Any, state: Any) -> Any:
        residual, basis, triangle, along, taken, free = state
        best = jnp.argmax(jnp.where(free, jnp.abs(candidates @ residual), -1))
        atom = candidates[best]
        # Gram-Schmidt twice: once loses orthogonality where atoms are nearly parallel.
        first = basis @ atom
        left = atom - first @ basis
        second = basis @ left
        left = left - second @ basis
        length, of_atom = jnp.sqrt(_positive(left @ left)), jnp.sqrt(_positive(atom @ atom))
        independent = length > 1e-6 * of_atom
        new = jnp.where(independent, left / length, 0)
        amount = new @ residual
        column = (first + second).at[t].set(jnp.where(independent, length, 1))
        return (
            residual - amount * new,
            basis.at[t].set(new),
            triangle.at[:, t].set(column),
            along.at[t].set(amount),
            taken.at[t].set(best.astype(jnp.int32)),
            free.at[best].set(False),
        )

    start = (
        target,
        jnp.zeros((atoms, target.shape[0]), target.dtype),
        jnp.zeros((atoms, atoms), target.dtype),
        jnp.zeros(atoms, target.dtype),
        jnp.zeros(atoms, jnp.int32),
        jnp.ones(candidates.shape[0], bool),
    )
    _, _, triangle, along, taken, _ = jax.lax.fori_loop(0, atoms, step, start)
    return taken, jax.scipy.linalg.solve_triangular(triangle, along)


def _positive(square: Any) -> Any:
    """A square that has a derivative under a root."""
    return jnp.maximum(square, jnp.finfo(square.dtype).tiny)


def transplant_embeddings(
    table: Float[Any, "V d"],
    vocabulary: Vocabulary,
    donor_table: Float[Any, "W D"],
    donor_vocabulary: Vocabulary,
    *,
    atoms: int = 64,
    batch: int = 128,
) -> Float[Array, "W d"]:
    """A model's embedding table over another model's vocabulary, so that the model can use that model's tokenizer.

    Rows of tokens that both have are copied. Any other token is written in the donor's space as a sparse combination of
    the tokens that both have (`matching_pursuit`), and gets the same combination of the model's own rows.

    Args:
        table: `[V, d]`, the model's embeddings, or its head; transplant each by itself.
        vocabulary: the model's.
        donor_table: `[W, D]`, the same table of the model whose tokenizer is wanted.
        donor_vocabulary: that model's.
        atoms: how many tokens are combined; 64 as in the paper.
        batch: how many tokens are done at a time; memory grows with it times the number of shared tokens.

    Returns:
        `[W, d]`, in the table's dtype. Rows without a token are zero.

    Raises:
        RecipeError: fewer tokens than `atoms` are in both vocabularies.
        ShapeError: an id lies beyond its table.

    Shared are tokens that are spelled alike; mergekit's `tokensurgeon` also matches bytes and prefixes of words. Both
    tables may be lazy; they are read. Source: arXiv 2506.06607.
    """
    for what, known, rows in (("table", vocabulary, table), ("donor_table", donor_vocabulary, donor_table)):
        if known.size > rows.shape[0]:
            raise ShapeError(
                f"{what}: found {rows.shape[0]} rows, expected at least {known.size}, since its vocabulary has ids up "
                f"to {known.size - 1}; vocabulary.within(rows) leaves such added tokens out"
            )
    wanted = sorted(donor_vocabulary.ids, key=donor_vocabulary.ids.__getitem__)
    shared = [token for token in wanted if token in vocabulary.ids]
    absent = np.array([donor_vocabulary.ids[token] for token in wanted if token not in vocabulary.ids], np.int64)
    here = np.array([vocabulary.ids[token] for token in shared], np.int64)
    there = np.array([donor_vocabulary.ids[token] for token in shared], np.int64)
    if absent.size and len(shared) < atoms:
        raise RecipeError(
            f"{len(shared)} tokens are in both vocabularies, fewer than the {atoms} that each new one is made of; "
            "lower atoms, or choose a donor with a vocabulary more alike"
        )
    own, donor = (x if isinstance(x, jax.Array) else np.asarray(x) for x in (table, donor_table))
    dtype = accumulation_dtype(own.dtype)
    result = np.zeros((donor.shape[0], own.shape[1]), own.dtype)
    result[there] = np.asarray(own[here])
    candidates, ours = jnp.asarray(donor[there]), jnp.asarray(own[here]).astype(dtype)
    for at in range(0, absent.size, batch):
        ids = absent[at : at + batch]
        padded = np.resize(ids, batch) if absent.size > batch else ids  # one program for every batch
        indices, coefficients = matching_pursuit(jnp.asarray(donor[padded]), candidates, atoms)
        rows = jnp.einsum("ba,bad->bd", coefficients.astype(dtype), ours[indices], precision="highest")
        result[ids] = np.asarray(rows[: len(ids)].astype(own.dtype))
    return jnp.array(result)
