"""One of several processes that load a merged model together: what `test_load_merged.py` starts.

    python -m tests.streaming.loading_process RANK COUNT PORT FOLDER

It answers with a file `RANK.json` in the folder: by scenario, what was read, or the error.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge.checkpoints.stored import StoredTensor
from jaxmerge.errors import CheckpointError
from jaxmerge.trees.lazy import StackedTensor

METHODS = {"linear": jm.linear(), "ties": jm.ties(0.3), "tsv_m": jm.tsv_m(0.7), "dare": jm.dare(0.4)}
FOUR = ("linear", "ties")  # what four processes try, in one core's time
ROWS = {".*": P("x")}


def as_stack(tree: dict[str, Any]) -> dict[str, Any]:
    kernels = [tree[f"blocks/{layer}/kernel"].T for layer in range(2)]
    return {"kernel": StackedTensor(kernels), "scale": tree["norm/scale"]}


def failing_read(self: StoredTensor, box: object) -> np.ndarray:
    raise CheckpointError(f"cannot read {self.label}: the disk is broken")


def run(rank: int, count: int, folder: Path) -> dict[str, object]:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    models = {name: folder / f"{name}.safetensors" for name in ("base", "math", "code")}
    experts = [models["math"], models["code"]]
    answers: dict[str, object] = {}

    def load(method: jm.Method, paths: Any = experts, **options: Any) -> Any:
        options = {"base": models["base"], "mesh": mesh, "partition": ROWS, "key": 7, "return_report": True} | options
        return jm.load_merged(method, paths, **options)

    def error_of(function: Any, *args: Any, **options: Any) -> str:
        try:
            function(*args, **options)
        except jm.MergeError as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    for name, method in METHODS.items():
        if count > 2 and name not in FOUR:
            continue
        merged, report = load(method)
        answers[name] = dict(report.bytes_read)
        jm.save_checkpoint(folder / f"{name}.orbax", merged, format="orbax", metadata={"method": name})
    if count > 2:
        return answers
    columns = {"kernel": P(None, "x"), ".*": P("x")}
    stacked = load(METHODS["linear"], names=as_stack, partition=columns, return_report=False)
    jm.save_checkpoint(folder / "stacked.orbax", stacked, format="orbax")
    answers["conflict"] = error_of(jm.save_checkpoint, folder / "ties.orbax", merged, format="orbax")
    jm.save_checkpoint(folder / "replaced.orbax", merged, format="orbax", overwrite=True)
    answers["safetensors"] = error_of(jm.save_checkpoint, folder / "all.safetensors", merged)

    away = [*experts[:1], folder / f"{'code' if rank == 0 else 'nowhere'}.safetensors"]
    answers["missing"] = error_of(load, METHODS["linear"], away)
    answers["differing"] = error_of(load, jm.linear([1.0, 1.0 + rank]))
    answers["nonfinite"] = error_of(load, METHODS["linear"], [*experts, folder / "bad.safetensors"])
    columns = {"shardings": NamedSharding(mesh, P(None, "x")), "mesh": None, "partition": None}
    answers["columns"] = error_of(load, METHODS["linear"], **columns)
    # Each process by itself: its own devices are nobody else's business.
    own = jax.sharding.Mesh(jax.local_devices(), ("x",))
    merged, report = load(METHODS["linear"], mesh=own)
    answers["own"] = dict(report.bytes_read)
    if rank == 1:
        StoredTensor.read = failing_read
    answers["unreadable"] = error_of(load, METHODS["linear"])
    return answers


if __name__ == "__main__":
    rank, count, port = map(int, sys.argv[1:4])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4 // count)
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=rank)
    answers = run(rank, count, Path(sys.argv[4]))
    Path(sys.argv[4], f"{rank}.json").write_text(json.dumps(answers))
    jax.distributed.shutdown()
