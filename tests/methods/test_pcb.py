"""PCB-Merging: what its shares promise."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from tests.methods.models import assert_same, make_models, on_device

FEW = settings(max_examples=4)
SEEDS = st.integers(0, 2**32 - 1)


@FEW
@given(seed=SEEDS)
def test_one_expert_keeps_less_than_its_share_and_moves_no_further_than_it(seed):
    base, experts = map(on_device, make_models(seed))
    zero = {name: jnp.zeros_like(x) for name, x in base.items()}
    delta = jm.task_vector(experts["math"], base)
    merged = jm.merge(jm.pcb(0.2), [delta], base=zero)
    size = sum(x.size for x in base.values())
    kept = {name: np.asarray(x) != 0 for name, x in merged.items()}
    assert sum(mask.sum() for mask in kept.values()) == int(0.2 * size) + (0.2 * size % 1 > 0) - 1
    for name, mask in kept.items():
        found, given = np.asarray(merged[name])[mask], np.asarray(delta[name])[mask]
        moved = ~np.isclose(found, given, rtol=1e-6)
        assert moved.sum() <= 1 and (np.abs(found) < np.abs(given))[moved].all()  # the largest entry is clamped


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_where_nothing_was_trained_nothing_moves(scope):
    base, experts = map(on_device, make_models())
    assert_same(jm.merge(jm.pcb(scope=scope), [base, base], base=base), base)
    constant = {name: x + 1 for name, x in base.items()}
    assert all(np.isfinite(x).all() for x in jm.merge(jm.pcb(scope=scope), [constant], base=base).values())


def test_the_cut_may_lie_among_negative_scores():
    """Two experts that disagree everywhere: one of them has no positive score."""
    base = {"w": jnp.zeros(8)}
    large, small = jnp.arange(2.0, 10.0), -jnp.arange(1.0, 9.0) / 10
    merged = jm.merge(jm.pcb(0.5, tails=0.0), [{"w": large}, {"w": small}], base=base)["w"]
    assert np.isfinite(merged).all() and (np.abs(merged) <= 9).all() and np.count_nonzero(merged) > 0
