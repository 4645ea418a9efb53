"""ComPEFT: what is ternary, and the compact form bit for bit."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from tests.methods.models import assert_same, make_models, on_device

FEW = settings(max_examples=5)


@FEW
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0.01, 1.0))
def test_a_compressed_task_vector_has_three_values_and_packs_exactly(seed, density):
    base, experts = map(on_device, make_models(seed))
    zero = {name: jnp.zeros_like(x) for name, x in base.items()}
    vector = jm.merge(jm.compeft(density), [jm.task_vector(experts["math"], base)], base=zero)
    values = np.unique(np.concatenate([np.asarray(x).ravel() for x in vector.values()]))
    assert values.size <= 3 and set(values) == set(-values)
    packed = jm.pack_ternary(vector)
    assert_same(jm.unpack_ternary(packed), vector)
    entries, kept = (sum(int(f(x)) for x in vector.values()) for f in (np.size, np.count_nonzero))
    bits = sum(x.nbytes for name, x in packed.items() if name.endswith((":mask", ":signs")))
    assert bits <= (entries + kept) / 8 + 2 * len(vector)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 5), (2, 3, 4)])
def test_any_shape_and_dtype_survives(dtype, shape, rng, tmp_path):
    signs = rng.integers(-1, 2, shape)
    vector = {"layers/0/w": (signs * dtype(0.3)).astype(dtype)}
    jm.save_checkpoint(tmp_path / "small.npz", jm.pack_ternary(vector))
    read = {name: np.asarray(leaf) for name, leaf in jm.open_checkpoint(tmp_path / "small.npz").params.items()}
    assert_same(jm.unpack_ternary(read), vector)


def test_what_cannot_be_packed_or_unpacked_is_told():
    with pytest.raises(jm.MergeError, match="'w': found several magnitudes"):
        jm.pack_ternary({"w": np.array([1.0, -2.0])})
    packed = jm.pack_ternary({"w": np.ones((3, 5), np.float32)})
    with pytest.raises(jm.MergeError, match="do not fit the shape"):
        jm.unpack_ternary(packed | {"w:signs": packed["w:signs"][:1]})
    with pytest.raises(jm.MergeError, match="w:shape is not there"):
        jm.unpack_ternary({name: x for name, x in packed.items() if name != "w:shape"})
