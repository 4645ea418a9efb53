"""Tokenizer transplantation: orthogonal matching pursuit, and tables over another model's vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.methods.transplant import matching_pursuit, transplant_embeddings
from jaxmerge.trees.lazy import ArrayTensor
from jaxmerge.trees.vocabulary import Vocabulary


def reference(target: np.ndarray, candidates: np.ndarray, atoms: int) -> tuple[list[int], np.ndarray]:
    """In float64, with a least-squares fit from scratch after each step."""
    chosen: list[int] = []
    residual, coefficients = target, np.zeros(0)
    for _ in range(atoms):
        scores = np.abs(candidates @ residual)
        scores[chosen] = -1
        chosen.append(int(np.argmax(scores)))
        coefficients = np.linalg.lstsq(candidates[chosen].T, target)[0]
        residual = target - coefficients @ candidates[chosen]
    return chosen, coefficients


@pytest.fixture(scope="module")
def problem():
    """Targets, candidates, and what the pursuit of 6 atoms gives."""
    rng = np.random.default_rng(1)
    targets, candidates = rng.normal(size=(5, 12)), rng.normal(size=(30, 12))
    return targets, candidates, matching_pursuit(jnp.asarray(targets, "float32"), jnp.asarray(candidates, "float32"), 6)


def test_reference_in_float64(problem):
    targets, candidates, (indices, coefficients) = problem
    for target, chosen, found in zip(targets, indices, coefficients, strict=True):
        wanted, expected = reference(target, candidates, 6)
        assert chosen.tolist() == wanted
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_residual_is_orthogonal_to_the_atoms_and_shrinks(problem):
    targets, candidates, (indices, _) = problem
    before = np.linalg.norm(targets, axis=1)
    for atoms in (1, 3, 6):
        first, coefficients = matching_pursuit(
            jnp.asarray(targets, "float32"), jnp.asarray(candidates, "float32"), atoms
        )
        np.testing.assert_array_equal(first, indices[:, :atoms])
        taken = candidates[np.asarray(first)]
        residual = targets - np.einsum("ba,bad->bd", coefficients, taken)
        np.testing.assert_allclose(np.einsum("bad,bd->ba", taken, residual), 0, atol=2e-4)
        assert (np.linalg.norm(residual, axis=1) < before).all()
        before = np.linalg.norm(residual, axis=1)


def test_a_candidate_is_found_with_one_atom(problem):
    candidates = problem[1] / np.linalg.norm(problem[1], axis=1, keepdims=True)
    indices, coefficients = matching_pursuit(
        jnp.asarray(3 * candidates[7:9], "float32"), jnp.asarray(candidates, "float32"), 1
    )
    assert indices.tolist() == [[7], [8]]
    np.testing.assert_allclose(coefficients, 3, rtol=1e-5)


def test_more_atoms_than_dimensions_stay_finite_and_exact():
    rng = np.random.default_rng(2)
    candidates = rng.normal(size=(8, 3)).astype(np.float32)
    candidates[5:] = [candidates[0], 2 * candidates[0], 0 * candidates[0]]  # parallel ones and a zero
    targets = rng.normal(size=(4, 3)).astype(np.float32)
    indices, coefficients = matching_pursuit(jnp.asarray(targets), jnp.asarray(candidates), 8)
    assert (np.sort(indices, axis=1) == np.arange(8)).all()
    assert np.abs(coefficients).max() < 1e3
    combined = np.einsum("ba,bad->bd", coefficients, candidates[np.asarray(indices)])
    np.testing.assert_allclose(combined, targets, atol=1e-4)


def test_under_jit_vmap_and_grad(problem):
    targets, candidates, (indices, coefficients) = problem
    targets, candidates = jnp.asarray(targets, "float32"), jnp.asarray(candidates, "float32")
    both = jax.jit(jax.vmap(lambda t: matching_pursuit(t, candidates, 6)))(jnp.stack([targets, 2 * targets]))
    np.testing.assert_array_equal(both[0], np.stack([indices, indices]))
    np.testing.assert_allclose(both[1], np.stack([coefficients, 2 * coefficients]), rtol=1e-4, atol=1e-5)

    def norm(t):
        return jnp.sum(matching_pursuit(t, candidates, 6)[1] ** 2)

    slope = jax.grad(norm)(targets)  # quadratic in the targets while the atoms stay the same
    np.testing.assert_allclose(jnp.sum(slope * targets), 2 * norm(targets), rtol=1e-3)


def test_wrong_number_of_atoms(problem):
    for atoms in (0, 31):
        with pytest.raises(jm.RecipeError, match=f"atoms is {atoms}, expected 1 to 30"):
            matching_pursuit(jnp.ones((1, 12)), jnp.ones((30, 12)), atoms)


# Tables

OURS = Vocabulary({f"t{i}": i for i in range(10)})
THEIRS = Vocabulary({"n0": 0, **{f"t{i}": 10 - i for i in range(8)}, "n1": 12, "n2": 1})


def embeddings(rng, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A model's table, a donor's table that is a rotation of it, and the rows that new tokens should get."""
    table = rng.normal(size=(10, 6))
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    donor = np.zeros((13, 6))
    for token, i in THEIRS.ids.items():
        if token in OURS.ids:
            donor[i] = table[OURS.ids[token]] @ rotation
    new = np.stack([table[0] - 2 * table[3], table[5], 0.5 * table[1] + table[7]])
    donor[[0, 12, 1]] = new @ rotation
    return table.astype(dtype), donor.astype(dtype), new


@pytest.mark.parametrize("batch", [2, 128])
@pytest.mark.parametrize("lazy", [False, True])
def test_shared_tokens_are_copied_and_new_ones_follow_the_donor(rng, batch, lazy):
    table, donor, new = embeddings(rng)
    given = [ArrayTensor(x) if lazy else jnp.asarray(x) for x in (table, donor)]
    # With as many atoms as dimensions any target is reached, and in a rotated space so is its counterpart.
    found = np.asarray(transplant_embeddings(given[0], OURS, given[1], THEIRS, atoms=6, batch=batch))
    assert found.shape == (13, 6) and found.dtype == np.float32
    for token in OURS.ids.keys() & THEIRS.ids.keys():
        np.testing.assert_array_equal(found[THEIRS.ids[token]], table[OURS.ids[token]])
    np.testing.assert_allclose(found[[0, 12, 1]], new, rtol=1e-3, atol=1e-4)
    assert not found[11].any()  # no token


def test_half_precision_is_rounded_once(rng):
    table, donor, new = embeddings(rng, ml_dtypes.bfloat16)
    found = np.asarray(transplant_embeddings(table, OURS, donor, THEIRS, atoms=6))
    wide = transplant_embeddings(table.astype(np.float32), OURS, donor.astype(np.float32), THEIRS, atoms=6)
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, np.asarray(wide).astype(ml_dtypes.bfloat16))


def test_nothing_new_needs_no_atoms(rng):
    table = embeddings(rng)[0]
    np.testing.assert_array_equal(transplant_embeddings(table, OURS, table, OURS), table)


def test_transplant_mistakes(rng):
    table, donor, _ = embeddings(rng)
    with pytest.raises(jm.RecipeError, match="8 tokens are in both vocabularies, fewer than the 64"):
        transplant_embeddings(table, OURS, donor, THEIRS)
    with pytest.raises(jm.ShapeError, match="donor_table: found 12 rows, expected at least 13"):
        transplant_embeddings(table, OURS, donor[:12], THEIRS)
