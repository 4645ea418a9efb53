"""Every deterministic method against its formula in NumPy and float64, and every method for what it keeps."""

import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
from tests.methods.everything import DETERMINISTIC, EVERYTHING, KEY, each
from tests.methods.models import NAMES, SHAPES, make_models, on_device

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@each(DETERMINISTIC)
def test_method_gives_its_formula(entry, dtype):
    check_formula(entry, dtype)


@each({name: EVERYTHING[name] for name in ("linear", "slerp", "ties", "widen")})  # one of each granularity
def test_method_gives_its_formula_in_float16(entry):
    check_formula(entry, np.float16)


def check_formula(entry, dtype):
    base, experts = make_models(dtype=dtype)
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


@each(EVERYTHING)
def test_float64_is_merged_in_float64(entry, x64):
    base, experts = make_models(dtype=np.float64, shapes=KERNELS)
    chosen = {name: experts[name] for name in NAMES[: entry.experts]}
    merged = jm.merge(entry.method, on_device(chosen), base=on_device(base), key=KEY)
    assert all(x.dtype == np.float64 for x in merged.values())
    if entry.reference:
        wanted = entry.reference(base, list(chosen.values()))
        for name, value in wanted.items():  # coefficients may have been rounded to float32 on their way
            np.testing.assert_allclose(merged[name], value, rtol=1e-7, atol=1e-7, err_msg=name)
