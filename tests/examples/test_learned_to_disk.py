"""Learned coefficients merge from disk to disk as in memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxmerge as jm
from examples import learned_to_disk
from examples.digits.train import CHUNK


@pytest.fixture(scope="module")
def problem() -> learned_to_disk.Problem:
    """The smallest network, which other tests compile too."""
    return learned_to_disk.digits(dim=16, depth=2, heads=2, pretraining=CHUNK, tuning=CHUNK, size=4)


def test_what_is_learned_is_what_is_streamed(problem, tmp_path):
    learned = learned_to_disk.learn(problem, steps=3, rate=0.1)
    rows = learned.coefficients
    assert set(rows) == set(jm.named_leaves(problem.base))
    assert all(set(row) == set(problem.experts) for row in rows.values())
    assert np.ptp([list(row.values()) for row in rows.values()]) > 0.1  # other than where they started

    in_memory = jm.merge(learned.method, problem.experts, base=problem.base)
    on_disk = learned_to_disk.to_disk(problem, learned.method, tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), on_disk, in_memory)
    plain = jm.merge(jm.task_arithmetic(0.3), problem.experts, base=problem.base)
    assert problem.accuracy(on_disk) == problem.accuracy(in_memory) != problem.accuracy(plain)


def test_batches_depend_on_the_step_alone(problem):
    first, again, other = problem.batch(3), problem.batch(3), problem.batch(4)
    for task in problem.experts:
        assert first[task].shape == (4, 8, 8)
        assert len(np.unique(first[task], axis=0)) == 4
        np.testing.assert_array_equal(first[task], again[task])
        assert not np.array_equal(first[task], other[task])
