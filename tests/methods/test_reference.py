"""Every deterministic method against its formula in NumPy and float64, and in the dtypes that there are."""

import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
from tests.methods.everything import DETERMINISTIC, EVERYTHING, KEY, ONE_OF_EACH, each
from tests.methods.models import NAMES, SHAPES, WITH_EMBEDDING, make_models, on_device


@each(DETERMINISTIC)
def test_method_gives_its_formula(entry):
    check_formula(entry, np.float32, WITH_EMBEDDING)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@each({name: DETERMINISTIC[name] for name in ONE_OF_EACH if name in DETERMINISTIC})
def test_method_gives_its_formula_in_half_precision(entry, dtype):
    """A method sees float32 and never the dtype of a model, so a few show it for all."""
    check_formula(entry, dtype, SHAPES)


def check_formula(entry, dtype, shapes):
    base, experts = make_models(dtype=dtype, shapes=shapes)
    chosen = {name: experts[name] for name in NAMES[: entry.experts]}
    merged = jm.merge(entry.method, on_device(chosen), base=on_device(base))
    wide = [{n: x.astype(np.float64) for n, x in model.items()} for model in (base, *chosen.values())]
    wanted = entry.reference(wide[0], wide[1:])
    eps = float(ml_dtypes.finfo(dtype).eps)
    for name, value in wanted.items():
        assert merged[name].dtype == dtype
        assert merged[name].shape == base[name].shape
        found = np.asarray(merged[name]).astype(np.float64)
        # One rounding to the dtype, and a few to float32 before it.
        np.testing.assert_allclose(found, value, rtol=0.51 * eps + 1e-6, atol=2e-6, err_msg=name)


KERNELS = {name: shape for name, shape in SHAPES.items() if name.endswith("kernel")}


@each({name: entry for name, entry in EVERYTHING.items() if name in ONE_OF_EACH or not entry.differentiates})
def test_float64_is_merged_in_float64(entry, x64):
    """The others where they are differentiated, in float64 too."""
    base, experts = make_models(dtype=np.float64, shapes=KERNELS)
    chosen = {name: experts[name] for name in NAMES[: entry.experts]}
    merged = jm.merge(entry.method, on_device(chosen), base=on_device(base), key=KEY)
    assert all(x.dtype == np.float64 for x in merged.values())
    if entry.reference:
        wanted = entry.reference(base, list(chosen.values()))
        for name, value in wanted.items():  # coefficients may have been rounded to float32 on their way
            np.testing.assert_allclose(merged[name], value, rtol=1e-7, atol=1e-7, err_msg=name)
