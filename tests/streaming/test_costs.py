"""What `estimate_cost` says is what happens: bytes as read, operations as counted by hand, memory as compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.cli.main import main
from jaxmerge.streaming.costs import count_operations

SHAPES = {"layers.0.w.weight": (64, 32), "layers.1.w.weight": (64, 32), "norm.bias": (32,)}
ENTRIES = 2 * 64 * 32 + 32
K = 3
MESH = {"data": 4, "model": 2}


def abstract(dtype=jnp.bfloat16):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()}


def cost(method, **options):
    return jm.estimate_cost(method, [abstract()] * K, base=abstract(), **options)


def test_plain_arithmetic():
    found = cost(jm.task_arithmetic(0.3), mesh=MESH, processes=2)
    assert found.parameters == ENTRIES and found.model_bytes == found.written_bytes == 2 * ENTRIES
    assert found.read_bytes == (K + 1) * 2 * ENTRIES
    # K differences, K weights, K - 1 sums, the scale and the base; two to see whether the result is finite
    assert found.operations == pytest.approx((3 * K + 3) * ENTRIES, rel=0.01)
    assert found.collective_bytes == 0
    assert found.host_memory == 4 * 64 * 32 * 2 / 8  # four slices
    one = cost(jm.task_arithmetic(0.3))
    assert found.device_memory == pytest.approx(one.device_memory / 8, rel=0.1)


def test_measurements_and_factorisations():
    tensor, model = (cost(jm.ties(0.2, scope=scope), mesh=MESH) for scope in ("tensor", "model"))
    assert model.read_bytes == 2 * tensor.read_bytes == 2 * (K + 1) * 2 * ENTRIES
    rounds, counts = 16, K * 3 * 2 * 4
    assert tensor.collective_bytes == pytest.approx(2 * 7 / 8 * rounds * counts * len(SHAPES))
    spread = cost(jm.tsv_m(), mesh=MESH)
    # K + 1 matrices and the result, to and from each device, along both axes
    assert spread.collective_bytes == pytest.approx((K + 2) * (2 * 64 * 32) * (3 / 4 + 1 / 2))
    svd = 6 * 64 * 32**2 + 20 * 32**3
    assert spread.operations > 2 * K * svd
    assert spread.device_memory > tensor.device_memory


def test_operations():
    def count(function, *shapes):
        return count_operations(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr)

    assert count(lambda a, b: a @ b, (4, 5), (5, 6)) == 2 * 4 * 5 * 6
    assert count(lambda a: jnp.sum(a * a), (7, 9)) == 2 * 63
    assert count(lambda a: a.T.reshape(-1), (7, 9)) == 0
    assert count(lambda a: jax.lax.fori_loop(0, 5, lambda _, x: x + a, a), (8,)) == pytest.approx(5 * 8, abs=10)
    assert count(lambda a: jax.lax.cond(a[0] > 0, lambda: a * a * a, lambda: a), (8,)) == pytest.approx(16, abs=2)
    assert count(jnp.linalg.eigvalsh, (10, 10)) >= 9 * 1000


def test_bytes_are_those_that_are_read(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for name in ("base", "a", "b", "c"):
        paths.append(tmp_path / name)
        jm.save_checkpoint(paths[-1], {n: rng.standard_normal(s, np.float32) for n, s in SHAPES.items()})
    for method in (jm.linear(), jm.ties(0.2), jm.ties(0.2, scope="tensor"), jm.dare(0.5)):
        out = tmp_path / "out"
        report = jm.merge_checkpoint(method, paths[1:], base=paths[0], out=out, key=0, overwrite=True, progress=False)
        with jm.open_checkpoint(paths[0]) as base:
            experts = [jm.open_checkpoint(path) for path in paths[1:]]
            found = jm.estimate_cost(method, experts, base=base)
        read = sum(report.bytes_read.values())
        assert found.read_bytes == pytest.approx(read, rel=0.05), method  # which has the headers too
        assert found.written_bytes == report.bytes_written


def test_models_that_exist_nowhere_and_are_large():
    """More entries than an int32 holds, also where the density is traced."""
    large = {f"layers.{i}.w.weight": jax.ShapeDtypeStruct((1 << 15, 1 << 14), jnp.bfloat16) for i in range(8)}
    found = jm.estimate_cost(jm.ties(0.2), [large, large], base=large, mesh={"data": 16})
    assert found.parameters == 1 << 32
    jax.eval_shape(lambda d, x: jm.merge(jm.ties(d), [x, x], base=x), 0.2, large)
    assert "4,294,967,296" in repr(found)


def test_command(tmp_path, capsys):
    tree = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    for name in ("base", "a", "b"):
        jm.save_checkpoint(tmp_path / name, tree)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"method: ties\nbase: {tmp_path}/base\nexperts:\n  a: {tmp_path}/a\n  b: {tmp_path}/b\n")
    main(["plan", str(recipe), "--mesh", "data=4,model=2", "--processes", "2"])
    assert "each device receives" in capsys.readouterr().out
    for mesh in ("data=4,data=2", "4x2", "data=0", "=4"):
        with pytest.raises(SystemExit):
            main(["plan", str(recipe), "--mesh", mesh])
        assert "data=16,model=8" in capsys.readouterr().err


def test_bad_input():
    for devices, processes in ((0, 1), (2, 0), (1, 2)):
        with pytest.raises(jm.RecipeError, match="no more processes"):
            cost(jm.linear(), mesh={"data": devices}, processes=processes)
    with pytest.raises(jm.RecipeError, match="base="):
        jm.estimate_cost(jm.ties(), [abstract()])
