"""Published merge functions on tensors in memory: the process that `operators.py` asks for seconds.

It runs under the Python that has the other libraries, needs NumPy and PyTorch beside them, and knows nothing of
jaxmerge: `python _peers.py FOLDER`. The folder holds the inputs. Every line on the standard input is a call, every line
on the standard output an answer, both JSON. Whatever the libraries print goes to the null device.

A function gets the base and the experts as `{name: (out, in) weight}`, and answers merged weights by name.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Weights = dict[str, Any]  # torch.Tensor, which may not be installed where types are checked
DISTRIBUTIONS = ("mergekit", "peft", "fusion-bench")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for line in sys.stdin:
        try:
            answer = answered(json.loads(line), Path(sys.argv[1]))
        except Exception as error:  # a library that is not there, or that has another interface
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


@functools.cache
def load(path: Path) -> list[Weights]:
    """Every model of the file, transposed from (in, out) to (out, in) as the libraries hold weights."""
    import torch

    models: dict[str, Weights] = {}
    with np.load(path) as arrays:
        for key, array in arrays.items():
            model, _, name = key.partition("/")
            models.setdefault(model, {})[name] = torch.from_numpy(np.ascontiguousarray(array.T))
    return list(models.values())


def answered(call: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs a call; `{"versions": true}` asks what is installed."""
    import torch

    if "versions" in call:
        found = {"torch": torch.__version__, "torch threads": torch.get_num_threads()}
        for distribution in DISTRIBUTIONS:
            try:
                found[distribution] = version(distribution)
            except ModuleNotFoundError:
                found[distribution] = "missing"
        return found
    function = prepared(call["library"], call["function"])
    base, *experts = load(folder / "inputs.npz")
    with torch.no_grad():
        start = time.perf_counter()
        merged = function(base, experts[: call["experts"]], **call["parameters"])
        seconds = time.perf_counter() - start
    if call["save"]:
        saved: Weights = {name: np.asarray(weight).T for name, weight in merged.items()}
        np.savez(folder / "merged.npz", **saved)
    return {"seconds": seconds}


@functools.cache
def prepared(library: str, function: str) -> Callable[..., Weights]:
    """A function of a library, imported before the clock starts."""
    return LIBRARIES[library](function)


def mergekit(name: str) -> Callable[..., Weights]:
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    method = registry.get(name)

    def run(base: Weights, experts: list[Weights], with_base: bool = True, **parameters: Any) -> Weights:
        merged = {}
        for weight in base:
            tensors = [expert[weight] for expert in experts]
            if with_base:
                group = TensorGroup.from_tensors([base[weight], *tensors], base_index=0)
            else:
                group = TensorGroup.from_tensors(tensors)
            (merged[weight],) = method([group], parameters=parameters)
        return merged

    return run


def peft(name: str) -> Callable[..., Weights]:
    import torch
    from peft.utils import merge_utils

    function = getattr(merge_utils, name)

    def run(base: Weights, experts: list[Weights], weight: float = 1.0, **parameters: Any) -> Weights:
        weights = torch.full((len(experts),), weight)
        return {
            key: origin + function([expert[key] - origin for expert in experts], weights, **parameters)
            for key, origin in base.items()
        }

    return run


def fusion_bench(name: str) -> Callable[..., Weights]:
    return FUSION_BENCH[name]()


def task_vectors(base: Weights, experts: list[Weights]) -> list[Weights]:
    return [{key: expert[key] - origin for key, origin in base.items()} for expert in experts]


def added(base: Weights, vector: Weights) -> Weights:
    return {key: origin + vector[key].detach() for key, origin in base.items()}


def fusion_bench_average() -> Callable[..., Weights]:
    from fusion_bench.utils.state_dict_arithmetic import state_dict_avg

    return lambda base, experts: state_dict_avg(experts)


def fusion_bench_slerp() -> Callable[..., Weights]:
    from fusion_bench.method.slerp.slerp_utils import slerp

    return lambda base, experts, t: {key: slerp(t, origin, experts[0][key]) for key, origin in base.items()}


def fusion_bench_ties() -> Callable[..., Weights]:
    import torch
    from fusion_bench.method.ties_merging import ties_merging_utils as utils

    def run(base: Weights, experts: list[Weights], threshold: float, merge_func: str) -> Weights:
        origin = utils.state_dict_to_vector(base)
        flat = torch.stack([utils.state_dict_to_vector(expert) for expert in experts])
        merged = utils.ties_merging(flat - origin, reset_thresh=threshold, merge_func=merge_func)
        return utils.vector_to_state_dict(origin + merged, base)

    return run


def fusion_bench_emr() -> Callable[..., Weights]:
    from fusion_bench.method.emr_merging.utils import emr_merge

    return lambda base, experts: added(base, emr_merge(task_vectors(base, experts))[0])


def fusion_bench_tall_masks() -> Callable[..., Weights]:
    import torch
    from fusion_bench.method.tall_mask.utils import generate_task_masks

    def run(base: Weights, experts: list[Weights], threshold: float) -> Weights:
        """Where each expert needs the sum; answered is in how many experts an entry is needed."""
        merged = {}
        for key, origin in base.items():
            flat = torch.stack([expert[key].reshape(-1) for expert in experts])
            start = origin.reshape(-1)
            masks = generate_task_masks(flat - start, flat, start, tall_mask_lambda=threshold)
            merged[key] = masks.sum(dim=0).reshape(origin.shape)
        return merged

    return run


def fusion_bench_tsv_m() -> Callable[..., Weights]:
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    merge = TSVM_utils.compute_and_sum_svd_mem_reduction
    return lambda base, experts: added(base, merge(task_vectors(base, experts), accelerator="cpu"))


def fusion_bench_isotropic(name: str) -> Callable[..., Weights]:
    from fusion_bench.method.isotropic_merging import iso_utils

    merge = getattr(iso_utils, name)
    return lambda base, experts, **parameters: added(
        base, merge(task_vectors(base, experts), accelerator="cpu", **parameters)
    )


def fusion_bench_wudi() -> Callable[..., Weights]:
    import torch
    from fusion_bench.method.wudi.wudi import wudi_merging

    def run(base: Weights, experts: list[Weights], steps: int) -> Weights:
        with torch.enable_grad():
            return added(base, wudi_merging(task_vectors(base, experts), accelerator="cpu", iter_num=steps))

    return run


def fusion_bench_doge() -> Callable[..., Weights]:
    from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm
    from torch import nn

    def model(weights: Weights) -> Any:
        """A module whose weights have names that the algorithm merges."""
        module, encoder = nn.Module(), nn.Module()
        module.add_module("encoder", encoder)
        for key, weight in weights.items():
            layer = nn.Module()
            layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            encoder.add_module(key, layer)
        return module

    def run(base: Weights, experts: list[Weights], **parameters: Any) -> Weights:
        models = {"_pretrained_": model({key: weight.clone() for key, weight in base.items()})}  # it is overwritten
        models |= {f"expert_{i}": model(expert) for i, expert in enumerate(experts)}
        merged = DOGE_TA_Algorithm(**parameters).run(models).state_dict()
        return {key: merged[f"encoder.{key}.weight"] for key in base}

    return run


FUSION_BENCH: dict[str, Callable[[], Callable[..., Weights]]] = {
    "state_dict_avg": fusion_bench_average,
    "slerp": fusion_bench_slerp,
    "ties_merging": fusion_bench_ties,
    "emr_merge": fusion_bench_emr,
    "generate_task_masks": fusion_bench_tall_masks,
    "compute_and_sum_svd_mem_reduction": fusion_bench_tsv_m,
    "iso_c": functools.partial(fusion_bench_isotropic, "iso_c"),
    "iso_cts": functools.partial(fusion_bench_isotropic, "iso_cts"),
    "wudi_merging": fusion_bench_wudi,
    "DOGE_TA_Algorithm": fusion_bench_doge,
}
LIBRARIES: dict[str, Callable[[str], Callable[..., Weights]]] = {
    "mergekit": mergekit,
    "PEFT": peft,
    "FusionBench": fusion_bench,
}

if __name__ == "__main__":
    main()
