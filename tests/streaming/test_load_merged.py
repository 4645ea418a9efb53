"""Merging while loading gives what `jm.merge` gives on loaded, sharded parameters, and reads no more than it needs."""

import gc
import json
import re
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge.checkpoints.stored import StoredTensor
from jaxmerge.streaming.load_merged import load_merged
from jaxmerge.streaming.placing import AT_ONCE
from jaxmerge.trees.lazy import LazyTensor, StackedTensor
from tests.methods.models import NAMES, assert_close, assert_same, make_models
from tests.streaming.loading_process import FOUR, METHODS

MESHES = {
    "auto": jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)),
    "explicit": jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Explicit)),
}
SHAPES = {"blocks/0/kernel": (8, 16), "blocks/1/kernel": (8, 16), "blocks/1/bias": (16,), "norm/scale": (16,)}
RULES = {".*kernel": P("data", "model"), ".*bias": P("data"), ".*": P()}
LAYERS = {f"layers.{i}.up.weight": (16, 8) for i in range(8)}
ROOT = Path(__file__).resolve().parents[2]
LAYER_RULES = jm.Rules(layout="huggingface")


def saved(folder, base, experts):
    """Checkpoints of models, by name; the base is called so."""
    paths = {name: folder / f"{name}.safetensors" for name in ("base", *experts)}
    for name, model in {"base": base, **experts}.items():
        jm.save_checkpoint(paths[name], model)
    return paths.pop("base"), paths


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base, experts = make_models(shapes=SHAPES)
    for model in (base, *experts.values()):
        model["step"] = np.arange(4, dtype=np.int32)
    return base, experts, *saved(tmp_path_factory.mktemp("models"), base, experts)


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    base, experts = make_models(shapes=LAYERS)
    return base, experts, *saved(tmp_path_factory.mktemp("layered"), base, experts)


def assert_floats_close(found, wanted):
    (ints, floats), (wanted_ints, wanted_floats) = (
        [{name: x for name, x in model.items() if (name == "step") == are_ints} for are_ints in (True, False)]
        for model in (found, wanted)
    )
    assert_same(ints, wanted_ints)
    assert_close(floats, wanted_floats)


def put(model, shardings):
    return {name: jax.device_put(x, shardings[name]) for name, x in model.items()}


@pytest.mark.parametrize(
    ("method", "axes"),
    [
        (jm.linear(), "auto"),
        (jm.task_arithmetic(jm.by_depth([0.1, 0.9]), weights=[1.0, 2.0, 3.0]), "explicit"),
        (jm.dare(0.4), "explicit"),
        (jm.ties(0.3), "auto"),
        (jm.ties(0.3), "explicit"),
        (jm.lines(beta=0.8), "auto"),
        (jm.tsv_m(0.7), "auto"),
    ],
    ids=["linear", "by_depth", "dare", "ties-auto", "ties-explicit", "lines", "tsv_m"],
)
def test_it_is_the_merge_of_sharded_parameters(models, method, axes):
    base, experts, base_path, paths = models
    mesh = MESHES[axes]
    found, report = load_merged(method, paths, base=base_path, mesh=mesh, partition=RULES, key=7, return_report=True)
    shardings = jm.partition_shardings(base, mesh, RULES)
    wanted = jm.merge(method, {n: put(x, shardings) for n, x in experts.items()}, base=put(base, shardings), key=7)
    if "model" in method.passes:  # measured on the host, in another order
        assert_floats_close(found, wanted)
    else:
        assert_same(found, wanted)
    assert {name: x.sharding for name, x in found.items()} == shardings
    passes = 2 if "model" in method.passes else 1
    size = sum(x.nbytes for x in base.values())
    step = base["step"].nbytes
    assert report.bytes_read == dict.fromkeys(("the base", *NAMES), passes * (size - step) + step)
    assert (report.tensors, report.copied, report.nbytes) == (5, 1, size)
    assert "3.188" not in str(report) and "merged, 1 copied" in str(report)


def as_stack(tree):
    """A scanned model's names: the layers turned and stacked."""
    return {"layers": {"up": {"kernel": StackedTensor([x.T for x in tree.values()])}}}


BY_LAYER, BY_ENTRY = P("data", None, "model"), P(None, "data", "model")


@pytest.mark.parametrize(
    ("method", "spec", "axes"),
    [
        (jm.task_arithmetic(jm.by_depth([0.1, 0.9])), BY_LAYER, "auto"),
        (jm.task_arithmetic(jm.by_depth([0.1, 0.9])), BY_ENTRY, "explicit"),
        (jm.ties(0.3), BY_LAYER, "explicit"),
        (jm.ties(0.3), BY_ENTRY, "auto"),
        (jm.dare(0.4), BY_LAYER, "auto"),
        (jm.tsv_m(0.7), BY_LAYER, "auto"),
        (jm.tsv_m(0.7), BY_ENTRY, "explicit"),  # eight at a time, each on a device
    ],
    ids=[
        "by_depth-layers",
        "by_depth-entries",
        "ties-layers",
        "ties-entries",
        "dare-layers",
        "tsv-layers",
        "tsv-entries",
    ],
)
def test_turned_and_stacked(layered, method, spec, axes):
    base, experts, base_path, paths = layered
    sharding = NamedSharding(MESHES[axes], spec)
    options = {"key": 7, "rules": LAYER_RULES}
    found, report = load_merged(
        method, paths, base=base_path, names=as_stack, shardings=sharding, return_report=True, **options
    )
    found = found["layers"]["up"]["kernel"]
    merged = jm.merge(method, experts, base=base, **options)
    wanted = np.stack([np.asarray(x).T for x in merged.values()])
    assert found.sharding == sharding
    assert_close({"kernel": found}, {"kernel": wanted}, ulps=4)
    if "model" not in method.passes:
        assert report.bytes_read == dict.fromkeys(("the base", *NAMES), wanted.nbytes)


def test_layers_that_are_merged_in_different_ways_can_be_stacked(layered):
    base, experts, base_path, paths = layered
    method = jm.partition({"a": jm.linear(), "b": jm.ties(0.3, scope="tensor")}, {r".*\.[0-3]\..*": "a", ".*": "b"})
    merged = jm.merge(method, experts, base=base, rules=LAYER_RULES)
    for spec in (P("data"), P()):
        found = load_merged(
            method,
            paths,
            base=base_path,
            names=as_stack,
            shardings=NamedSharding(MESHES["auto"], spec),
            rules=LAYER_RULES,
        )
        wanted = np.stack([np.asarray(x).T for x in merged.values()])
        assert_close({"kernel": found["layers"]["up"]["kernel"]}, {"kernel": wanted})


def test_experts_may_be_merges_themselves(models):
    base, experts, base_path, paths = models
    with jm.open_checkpoint(base_path) as opened, jm.open_checkpoint(paths["code"]) as code:
        inner = jm.merge(jm.linear(), [opened.params, code.params])
        found = load_merged(
            jm.task_arithmetic(0.5), [inner, paths["math"]], base=base_path, mesh=MESHES["auto"], partition=RULES
        )
    inner = jm.merge(jm.linear(), [base, experts["code"]])
    wanted = jm.merge(jm.task_arithmetic(0.5), [inner, experts["math"]], base=base)
    assert_floats_close(found, wanted)


def test_statistics_are_read_where_they_are_needed(models, tmp_path):
    base, experts, base_path, paths = models
    floats = {name: x for name, x in base.items() if name != "step"}
    fishers = {expert: {n: np.abs(x) + 1 for n, x in floats.items()} for expert in NAMES}
    _, fisher_paths = saved(tmp_path, floats, fishers)
    opened = {name: jm.open_checkpoint(path) for name, path in fisher_paths.items()}
    lazily = jm.fisher_merge({name: x.params for name, x in opened.items()})
    found = load_merged(lazily, paths, mesh=MESHES["auto"], partition=RULES)
    assert_floats_close(found, jm.merge(jm.fisher_merge(fishers), experts))
    assert all(x.bytes_read == x.nbytes for x in opened.values())


def test_on_one_device_and_by_default(models):
    base, experts, base_path, paths = models
    wanted = jm.merge(jm.linear(), experts)
    one = SingleDeviceSharding(jax.devices()[3])
    for sharding in (None, one):
        found = load_merged(jm.linear(), paths, shardings=sharding)
        assert_same(found, wanted)
        assert all(x.devices() == {jax.devices()[0 if sharding is None else 3]} for x in found.values())


def test_each_slice_is_read_once_and_nothing_else(models, monkeypatch):
    _, _, base_path, paths = models
    read = []
    original = StoredTensor.read

    def counting(self, box):
        read.append((self.label, str(box)))
        return original(self, box)

    monkeypatch.setattr(StoredTensor, "read", counting)
    load_merged(jm.task_arithmetic(), [paths["math"]], base=base_path, mesh=MESHES["auto"], partition=RULES)
    assert len(read) == len(set(read))
    kernels = {box for label, box in read if label.endswith("blocks/0/kernel")}
    assert kernels == {str((slice(i, i + 2, None), slice(j, j + 8, None))) for i in range(0, 8, 2) for j in (0, 8)}
    assert len([label for label, _ in read if label == "math.safetensors: blocks/1/bias"]) == 4
    assert len([label for label, _ in read if label == "math.safetensors: norm/scale"]) == 1


class Watched(LazyTensor):
    """Knows how many bytes of it are in memory, beside what JAX has taken a copy of."""

    alive, peak, lock = 0, 0, threading.Lock()

    def __init__(self, shape):
        self.shape, self.dtype, self.label = shape, np.dtype(np.float32), "watched"

    def read(self, box):
        shape = [piece.stop - piece.start for piece in box]
        memory = np.zeros(int(np.prod(shape)) * 4 + 1, np.uint8)  # JAX copies what is not aligned
        with Watched.lock:
            Watched.alive += memory.nbytes
            Watched.peak = max(Watched.peak, Watched.alive)
        weakref.finalize(memory, self.gone, memory.nbytes)
        return memory[1:].view(np.float32).reshape(shape)

    @staticmethod
    def gone(n):
        with Watched.lock:
            Watched.alive -= n


def test_the_host_holds_a_few_slices():
    gc.collect()
    trees = [{f"{i}/kernel": Watched((64, 256)) for i in range(3)} for _ in range(6)]
    sharding = NamedSharding(MESHES["auto"], P("data", "model"))
    _, report = load_merged(jm.linear(), trees, shardings=sharding, return_report=True)
    slice_bytes = 64 * 256 * 4 // 8
    assert slice_bytes <= report.host_peak <= AT_ONCE * slice_bytes
    assert Watched.peak <= 2 * AT_ONCE * (slice_bytes + 1)  # JAX lets go of what it was given a moment later
    gc.collect()
    assert Watched.alive == 0


class Model(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(8, 16, rngs=nnx.Rngs(0))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
        return nn.Dense(16, kernel_init=init, name="up")(x)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    experts = make_models(shapes={"up.weight": (16, 8), "up.bias": (16,)})[1]
    for name, model in experts.items():
        jm.save_checkpoint(folder / name, model)
    return experts, [folder / name for name in experts]


def flax_names(tree):
    return {"up": {"kernel": tree["up.weight"].T, "bias": tree["up.bias"]}}


def test_flax_models_are_filled(small):
    experts, paths = small
    merged = jm.merge(jm.linear(), experts)
    kernel, bias = np.asarray(merged["up.weight"]).T, merged["up.bias"]
    mesh = MESHES["auto"]

    state = nnx.state(nnx.eval_shape(Model), nnx.Param)
    found = load_merged(jm.linear(), paths, names=flax_names, target=state, mesh=mesh, partition={".*": P("data")})
    assert isinstance(found, nnx.State)
    assert_same(jm.named_leaves(found), {"up/bias": bias, "up/kernel": kernel})
    model = Model()
    nnx.update(model, found)
    assert model.up.kernel.get_value().sharding == NamedSharding(mesh, P("data"))

    # Boxes keep their names of axes, and the shardings that Flax gets from them are as good as rules.
    boxed = jax.eval_shape(LinenModel().init, jax.random.key(0), jnp.zeros((1, 8)))
    shardings = nn.get_sharding(boxed, mesh)
    linen = load_merged(
        jm.linear(), paths, names=lambda tree: {"params": flax_names(tree)}, target=boxed, shardings=shardings
    )
    assert linen["params"]["up"]["kernel"].names == ("data", "model")
    assert_same(jm.named_leaves(linen), {"params/up/bias": bias, "params/up/kernel": kernel})
    assert linen["params"]["up"]["kernel"].value.sharding == NamedSharding(mesh, P("data", "model"))

    # A target that knows its shardings needs no others; the dtype is cast on the devices.
    placed = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "model")))
    target = {"up": {"kernel": placed, "bias": jax.ShapeDtypeStruct((16,), jnp.bfloat16)}}
    found = load_merged(jm.linear(), paths, names=flax_names, target=target, dtype="bfloat16")
    assert found["up"]["kernel"].sharding == placed.sharding and found["up"]["bias"].sharding.spec == P()
    assert_same(
        jm.named_leaves(found), {"up/bias": bias.astype(jnp.bfloat16), "up/kernel": kernel.astype(jnp.bfloat16)}
    )


def test_what_does_not_fit_the_target(small):
    _, paths = small
    state = nnx.state(nnx.eval_shape(Model), nnx.Param)
    target = {
        "up": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32), "bias": jax.ShapeDtypeStruct((16,), jnp.float32)}
    }

    def load(target, **options):
        load_merged(jm.linear(), paths, target=target, **options)

    with pytest.raises(
        jm.StructureError, match=r"merged model lacks 'up/bias', 'up/kernel' and has 'up.*weight' besides"
    ):
        load(state)
    target["up"]["kernel"] = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    with pytest.raises(jm.ShapeError, match=r"'up/kernel': found shape \(8, 16\), expected \(16, 8\) as in the target"):
        load(target, names=flax_names)
    target["up"]["kernel"] = jax.ShapeDtypeStruct((8, 16), jnp.float16)
    with pytest.raises(jm.DTypeError, match="'up/kernel': found dtype float32, expected float16.*pass dtype="):
        load(target, names=flax_names)


def test_bad_input(models, tmp_path):
    base, experts, base_path, paths = models
    mesh = MESHES["auto"]
    with pytest.raises(jm.RecipeError, match="mesh and partition belong together"):
        load_merged(jm.linear(), paths, mesh=mesh)
    with pytest.raises(jm.RecipeError, match="given twice"):
        load_merged(jm.linear(), paths, mesh=mesh, partition=RULES, shardings=NamedSharding(mesh, P()))
    with pytest.raises(jm.RecipeError, match="'blocks/1/bias'.* dimensions"):
        load_merged(jm.linear(), paths, shardings=NamedSharding(mesh, P(None, "model")))
    with pytest.raises(jm.StructureError, match="lacks .*'blocks/1/kernel'"):
        load_merged(jm.linear(), paths, shardings={"blocks/0/kernel": NamedSharding(mesh, P())})

    bad = {name: x.copy() for name, x in experts["code"].items()}
    bad["blocks/1/kernel"][3, 3] = np.inf
    jm.save_checkpoint(tmp_path / "bad", bad)
    for method in (jm.linear(), jm.ties(0.3)):
        options = {"base": base_path, "mesh": mesh, "partition": RULES}
        with pytest.raises(jm.NonFiniteError, match="expert 'bad', tensor 'blocks/1/kernel': found NaN or infinity"):
            load_merged(method, {"math": paths["math"], "bad": tmp_path / "bad"}, **options)
    found = load_merged(jm.linear(), [tmp_path / "bad"], allow_nonfinite=True, mesh=mesh, partition=RULES)
    assert np.isinf(found["blocks/1/kernel"]).sum() == 1
    jm.save_checkpoint(tmp_path / "other", experts["code"] | {"step": np.ones(4, np.int32)})
    with pytest.raises(jm.StructureError, match="expert 'expert_1', tensor 'step': found other values"):
        load_merged(jm.linear(), [paths["math"], tmp_path / "other"], mesh=mesh, partition=RULES)


def answers_of(count, folder):
    """What so many processes answer that load together, on four devices in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.streaming.loading_process"]
    children = []
    for rank in range(count):
        with (folder / f"{rank}.log").open("w") as log:
            arguments = [*command, str(rank), str(count), str(port), str(folder)]
            children.append(subprocess.Popen(arguments, stdout=log, stderr=log, cwd=ROOT))
    try:
        codes = [child.wait(300) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert codes == [0] * count, [(folder / f"{rank}.log").read_text()[-4000:] for rank in range(count)]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def test_four_processes_load_a_model_together(tmp_path):
    base, experts = make_models(shapes={"blocks/0/kernel": (8, 16), "blocks/1/kernel": (8, 16), "norm/scale": (16,)})
    saved(tmp_path, base, {name: experts[name] for name in ("math", "code")})
    answers = answers_of(4, tmp_path)
    size = sum(x.nbytes for x in base.values())
    assert all(set(answer["linear"].values()) == {size // 4} for answer in answers)
    for name in FOUR:
        method = METHODS[name]
        found = jm.named_leaves(jm.open_checkpoint(tmp_path / f"{name}.orbax").params)
        wanted = jm.merge(method, [experts["math"], experts["code"]], base=base, key=7)
        assert_close({n: x[...] for n, x in found.items()}, wanted, ulps=4)


def test_two_processes_load_a_model_together(tmp_path):
    """One launch for all scenarios: starting a process takes longer than most of them."""
    shapes = {"blocks/0/kernel": (8, 16), "blocks/1/kernel": (8, 16), "norm/scale": (16,)}
    base, experts = make_models(shapes=shapes)
    bad = {name: x.copy() for name, x in experts["code"].items()}
    bad["norm/scale"][9] = np.nan
    saved(tmp_path, base, {"math": experts["math"], "code": experts["code"], "bad": bad})
    jm.save_checkpoint(tmp_path / "replaced.orbax", base, format="orbax")
    one, other = answers_of(2, tmp_path)

    size = sum(x.nbytes for x in base.values())
    names = ("the base", "expert_0", "expert_1")
    for method in ("linear", "tsv_m", "dare"):  # nothing is replicated: each reads its half
        assert one[method] == other[method] == dict.fromkeys(names, size // 2)
    assert [one["ties"][name] + other["ties"][name] for name in names] == [2 * size] * 3
    assert one["own"] == other["own"] == dict.fromkeys(names, size)
    tuned, found = [experts["math"], experts["code"]], {}
    for name, method in METHODS.items():
        opened = jm.open_checkpoint(tmp_path / f"{name}.orbax")
        assert opened.metadata == {"method": name}
        found = {n: x[...] for n, x in jm.named_leaves(opened.params).items()}
        assert_close(found, jm.merge(method, tuned, base=base, key=7), ulps=4)
    merged = jm.merge(METHODS["linear"], tuned, base=base)
    stacked = jm.open_checkpoint(tmp_path / "stacked.orbax").params
    kernels = [np.asarray(merged[f"blocks/{layer}/kernel"]).T for layer in range(2)]
    assert_same({n: x[...] for n, x in stacked.items()}, {"kernel": np.stack(kernels), "scale": merged["norm/scale"]})
    replaced = jm.named_leaves(jm.open_checkpoint(tmp_path / "replaced.orbax").params)
    assert_same({n: x[...] for n, x in replaced.items()}, found)  # the last one

    for scenario, told in {
        "conflict": "^ConflictError: .*ties.orbax exists already",
        "safetensors": "^CheckpointError: .*blocks/0/kernel lies on the devices of several processes",
        "missing": "^CheckpointError: .*nowhere.safetensors",
        "differing": "^RecipeError: process 1 of 2 differs from process 0 in what is merged",
        "nonfinite": "^NonFiniteError: .*expert 'expert_2', tensor 'norm/scale'",
        "columns": "^RecipeError: .*'norm/scale' of shape .* 2 entries for 1 dimensions",
        "unreadable": "^CheckpointError: .*cannot read .*: the disk is broken",
    }.items():
        assert re.search(told, one[scenario]) and re.search(told, other[scenario]), (one[scenario], other[scenario])
    for scenario in ("missing", "unreadable"):
        assert "process 1 of 2" in one[scenario]
