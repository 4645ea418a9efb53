import ml_dtypes
import numpy as np
import pytest

FLOATS = [
    np.dtype(name)
    for name in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
]
DTYPES = [*FLOATS, *map(np.dtype, ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"])]


@pytest.fixture
def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A flat checkpoint with every dtype, a scalar, an odd number of bytes and a name that is not ASCII."""
    result = {f"model.{dtype.name}.weight": rng.normal(0, 9, (7, 5)).astype(dtype) for dtype in DTYPES}
    result["scalar"] = np.asarray(2.5, np.float32)
    result["größe"] = np.arange(3, dtype=np.int8)
    return result
