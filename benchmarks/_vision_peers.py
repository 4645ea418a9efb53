"""Published implementations on real experts: the process that `vision_suite.py` asks for merged weights.

It runs under the Python that has PyTorch, FusionBench and mergekit and knows nothing of jaxmerge:
`python _vision_peers.py FOLDER` with the folder of the experts. Every line on the standard input is a call, every line
on the standard output its seconds, both JSON; merged weights are written to the file that the call names, as `TENSOR`,
or as `TASK/TENSOR` where every task has weights of its own. Accuracy is measured by who asked.

Where a library's algorithm wants its own data loaders and configuration, the loop is written out here around the
library's functions: for Fisher, RegMean and AdaMerging.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _adamerging_peer import VisionTransformer
from _peers import added, prepared, task_vectors
from safetensors.torch import load_file


class Models:
    """The base, the experts and the heads."""

    def __init__(self, folder: Path, tasks: list[str]):
        self.config = json.loads((folder / "config.json").read_text())
        self.heads = load_file(folder / "heads.safetensors")
        self.base, *self.experts = (load_file(folder / f"{name}.safetensors") for name in ("base", *tasks))
        self.tasks = tasks

    def network(self, weights: dict[str, Any]) -> VisionTransformer:
        network = VisionTransformer(self.config)
        network.load_state_dict(weights)
        return network

    def logits(self, network: Any, images: Any, task: str) -> Any:
        return self.config["scale"] * network(images) @ self.heads[task].T


def function_of(library: str, name: str) -> Callable[..., Any]:
    """A function on tensors, as `_peers.py` has it; what it finds is scaled afterwards."""

    def run(models: Models, inputs: Any, scale: float = 1.0, **parameters: Any) -> Any:
        merged = prepared(library, name)(models.base, models.experts, **parameters)
        return {key: start + scale * (merged[key] - start) for key, start in models.base.items()}

    return run


def task_arithmetic(models: Models, inputs: Any, scale: float) -> Any:
    """The arithmetic of state dictionaries that FusionBench's algorithm is made of."""
    from fusion_bench.utils import state_dict_arithmetic as arithmetic

    vectors = [arithmetic.state_dict_sub(weights, models.base) for weights in models.experts]
    total = arithmetic.state_dict_mul(arithmetic.state_dict_sum(vectors), scale)
    return arithmetic.state_dict_add(models.base, total)


def consensus(models: Models, inputs: Any, scale: float, threshold: float) -> Any:
    """Masks by FusionBench; that entries which two tasks need are kept is written out here."""
    needed = prepared("FusionBench", "generate_task_masks")(models.base, models.experts, threshold=threshold)
    vectors = task_vectors(models.base, models.experts)
    return {
        key: start + scale * sum(vector[key] for vector in vectors) * (needed[key] >= 2)
        for key, start in models.base.items()
    }


def emr(models: Models, inputs: Any) -> Any:
    from fusion_bench.method.emr_merging.utils import emr_merge

    unified, masks, rescalers = emr_merge(task_vectors(models.base, models.experts))
    return {
        f"{task}/{key}": start + rescalers[i] * masks[key][i] * unified[key]
        for i, task in enumerate(models.tasks)
        for key, start in models.base.items()
    }


def doge(models: Models, inputs: Any, **parameters: Any) -> Any:
    """The algorithm is given matrices alone: it factorises whatever it is given. Its names may hold no dots."""
    all_weights = (models.base, *models.experts)
    matrices = [{key.replace(".", "/"): x for key, x in weights.items() if x.ndim == 2} for weights in all_weights]
    merged = prepared("FusionBench", "DOGE_TA_Algorithm")(matrices[0], matrices[1:], **parameters)
    return models.base | {key.replace("/", "."): x for key, x in merged.items()}


def fisher(models: Models, inputs: Any, batch: int, normalize: bool, floor: float) -> Any:
    from fusion_bench.method.fisher_merging import fisher_merging as published

    names, fishers = list(models.base), []
    for task, weights in zip(models.tasks, models.experts, strict=True):
        network, images = models.network(weights), torch.from_numpy(inputs[task]).float()
        total = dict.fromkeys(names, 0.0)
        with torch.enable_grad():
            for start in range(0, len(images), batch):
                log_p = torch.log_softmax(models.logits(network, images[start : start + batch], task), dim=-1)
                network.zero_grad()
                (log_p.exp().detach().sqrt() * log_p).sum().backward()
                found = published.get_param_squared_gradients(network, names)
                total = {name: total[name] + found[name] for name in names}
        fishers.append({name: x / len(images) for name, x in total.items()})
    stacked = {name: [weights[name] for weights in models.experts] for name in names}
    even = torch.full((len(fishers),), 1 / len(fishers))
    return published.merging_with_fisher_weights(stacked, fishers, even, normalize, floor)


def regmean(models: Models, inputs: Any, off_diagonal: float) -> Any:
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    grams: list[dict[str, Any]] = []
    for task, weights in zip(models.tasks, models.experts, strict=True):
        network, found = models.network(weights), {}

        def hook(module: Any, given: Any, output: Any, *, name: str, found: dict[str, Any]) -> None:
            rows = given[0].reshape(-1, given[0].shape[-1])
            found[name] = rows.T @ rows / len(rows)

        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(partial(hook, name=name, found=found))
        models.logits(network, torch.from_numpy(inputs[task]).float(), task)
        grams.append(found)
    stacked = {name: [weights[name] for weights in models.experts] for name in models.base}
    return merging_with_regmean_weights(stacked, grams, off_diagonal)


def adamerging(models: Models, inputs: Any, start: float, rate: float) -> Any:
    from fusion_bench.method.adamerging.entropy_loss import entropy_loss
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel, get_layer_wise_weights

    base, experts = models.network(models.base), [models.network(weights) for weights in models.experts]
    weights = get_layer_wise_weights(len(experts), len(list(base.parameters())), start)
    merged = LayerWiseMergedModel(weights, base, experts, clamp_weights=False, tie_weights=True, strict=False)
    optimizer = torch.optim.Adam([merged.merge_weight], lr=rate)
    images = {task: torch.from_numpy(inputs[task]) for task in models.tasks}
    orders = [inputs[f"{task}/order"] for task in models.tasks]
    merged.train()
    with torch.enable_grad():
        merged.merge_weights()
        for rows in zip(*orders, strict=True):
            for task, chosen in zip(models.tasks, rows, strict=True):
                loss = entropy_loss(models.logits(merged, images[task][chosen].float(), task))
                loss.backward(retain_graph=True)
            optimizer.step()
            optimizer.zero_grad()
            merged.merge_weights()
    return {key: x.detach() for key, x in merged.merge_and_unload().state_dict().items()}


def wudi(models: Models, inputs: Any, **parameters: Any) -> Any:
    from fusion_bench.method.wudi.wudi import wudi_merging

    with torch.enable_grad():
        vector = wudi_merging(task_vectors(models.base, models.experts), accelerator="cpu", **parameters)
    return added(models.base, vector)


CALLS: dict[str, Callable[..., Any]] = {
    "average": function_of("FusionBench", "state_dict_avg"),
    "task_arithmetic": task_arithmetic,
    "ties": function_of("FusionBench", "ties_merging"),
    "breadcrumbs": function_of("mergekit", "breadcrumbs"),
    "sce": function_of("mergekit", "sce"),
    "model_stock": function_of("mergekit", "model_stock"),
    "consensus": consensus,
    "emr": emr,
    "tsv_m": function_of("FusionBench", "compute_and_sum_svd_mem_reduction"),
    "iso_c": function_of("FusionBench", "iso_c"),
    "iso_cts": function_of("FusionBench", "iso_cts"),
    "wudi": wudi,
    "doge": doge,
    "fisher": fisher,
    "regmean": regmean,
    "adamerging": adamerging,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            models = Models(Path(sys.argv[1]), call["tasks"])
            inputs: dict[str, Any] = {}
            if call["inputs"]:
                with np.load(call["inputs"]) as arrays:
                    inputs = dict(arrays)
            start = time.perf_counter()
            with torch.no_grad():
                merged = CALLS[call["name"]](models, inputs, **call["parameters"])
            answer = {"seconds": time.perf_counter() - start}
            np.savez(call["out"], **{name: x.detach().numpy() for name, x in merged.items()})
        except Exception as error:  # a library that is not there, or that has another interface
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
