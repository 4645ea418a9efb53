"""`compare`: norms, cosines and sparsity per layer, against NumPy, in chunks, and what is wrong."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.cli import comparing
from jaxmerge.cli.comparing import compare

SHAPES = {"embed": (7, 3), "h.0.w": (5, 4), "h.0.b": (4,), "h.2.w": (5, 4), "h.10.w": (5, 4), "empty": (0, 3)}


def save(folder, name: str, tensors) -> str:
    path = folder / f"{name}.safetensors"
    jm.save_checkpoint(path, tensors)
    return str(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_numbers_are_those_of_numpy(tmp_path, rng, monkeypatch, dtype, chunk):
    monkeypatch.setattr(comparing, "CHUNK", chunk)
    models = {
        name: {key: np.asarray(rng.normal(size=shape)).astype(dtype) for key, shape in SHAPES.items()}
        for name in ("base", "a", "b")
    }
    for tensors in models.values():
        tensors["step"] = np.arange(3)
    for key in SHAPES:  # half of one expert's entries are the base's
        models["a"][key] = np.where(rng.random(SHAPES[key]) < 0.5, models["base"][key], models["a"][key])
    paths = {name: save(tmp_path, name, tensors) for name, tensors in models.items()}
    layers = compare(paths["base"], {"a": paths["a"], "b": paths["b"]})
    assert [layer.name for layer in layers] == ["embed", "empty", "h.0", "h.2", "h.10"]
    for layer in layers:
        parts = [key for key in SHAPES if key == layer.name or key.startswith(layer.name + ".")]
        flat = [np.concatenate([tensors[part].reshape(-1) for part in parts]) for tensors in models.values()]
        base, a, b = (vector.astype(np.float64) for vector in flat)
        deltas = np.stack([a - base, b - base])
        norms = np.linalg.norm(deltas, axis=1)
        assert layer.size == base.size
        np.testing.assert_allclose(layer.base_norm, np.linalg.norm(base), 1e-6)
        np.testing.assert_allclose(layer.norms, norms, 1e-6)
        np.testing.assert_array_equal(layer.zeros, (deltas == 0).sum(axis=1))
        if layer.size:
            np.testing.assert_allclose(layer.cosines, deltas @ deltas.T / np.outer(norms, norms), 1e-5, 1e-6)
        else:
            assert np.isnan(layer.cosines).all() and (layer.sparsity == 0).all()


def test_memory_does_not_grow_with_the_tensors(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(comparing, "CHUNK", 1 << 12)
    peaks = []
    for size in (1 << 14, 1 << 20):
        tensor = rng.normal(size=size).astype(np.float32)
        paths = [save(tmp_path, f"{name}{size}", {"w": tensor + i}) for i, name in enumerate(("base", "a", "b"))]
        tracemalloc.start()
        compare(paths[0], {"a": paths[1], "b": paths[2]})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 16)


def test_other_tensors_are_an_error(tmp_path):
    base = save(tmp_path, "base", {"w": np.ones(3, np.float32)})
    other = save(tmp_path, "other", {"v": np.ones(3, np.float32)})
    with pytest.raises(jm.StructureError, match="expert 'x' lacks 'w'"):
        compare(base, {"x": other})


@pytest.mark.parametrize("guilty", ["base", "a"])
def test_nan_is_an_error_that_names_the_file(tmp_path, guilty):
    values = {"base": np.ones(3, np.float32), "a": np.zeros(3, np.float32)}
    values[guilty][1] = np.nan
    paths = {name: save(tmp_path, name, {"w": value}) for name, value in values.items()}
    with pytest.raises(jm.NonFiniteError, match=rf"{guilty}\.safetensors: w"):
        compare(paths["base"], {"a": paths["a"]})


def test_difference_too_large_to_square_is_an_error(tmp_path):
    paths = [save(tmp_path, str(x), {"w": np.full(3, x, np.float32)}) for x in (0.0, 1e30)]
    with pytest.raises(jm.NonFiniteError, match="too large"):
        compare(paths[0], {"a": paths[1]})
