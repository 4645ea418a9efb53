"""A step of layer-wise AdaMerging in PyTorch: the process that `adamerging_step.py` asks for steps.

It runs under the Python that has PyTorch and FusionBench and knows nothing of jaxmerge:
`python _adamerging_peer.py FOLDER BATCH.npz`. Every line on the standard input is a step, every line on the standard
output its seconds, loss and coefficients, as JSON. Merged model and loss are FusionBench's; the loop is the one that
its algorithm runs, written out here because the algorithm wants data loaders and a configuration.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
import time
import typing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typing_extensions
from safetensors.torch import load_file
from torch import nn

if not hasattr(typing, "override"):  # FusionBench imports it from where Python 3.12 has it
    typing.override = typing_extensions.override  # pyright: ignore[reportAttributeAccessIssue]


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Any) -> Any:
        b, n, d = x.shape
        q, k, v = (layer(x).view(b, n, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Any) -> Any:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, hidden)

    def forward(self, x: Any) -> Any:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class VisionTransformer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        dim, self.patch = config["dim"], config["patch"]
        self.side = config["image"] // self.patch
        self.patch_embed = nn.Linear(self.patch**2, dim)
        self.cls_token = nn.Parameter(torch.zeros(dim))
        self.pos_embed = nn.Parameter(torch.zeros(self.side**2 + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, config["heads"], config["mlp"]) for _ in range(config["depth"]))
        self.ln_post = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, config["embed"], bias=False)

    def forward(self, images: Any) -> Any:
        x = (images / 127.5 - 1).view(-1, self.side, self.patch, self.side, self.patch).transpose(2, 3)
        x = self.patch_embed(x.reshape(len(images), self.side**2, self.patch**2))
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.proj(self.ln_post(x[:, 0])), dim=-1)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    from fusion_bench.method.adamerging.entropy_loss import entropy_loss
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel, get_layer_wise_weights

    folder = Path(sys.argv[1])
    with np.load(sys.argv[2]) as arrays:
        batch = {task: torch.from_numpy(images).float() for task, images in arrays.items()}
    config = json.loads((folder / "config.json").read_text())
    heads = load_file(folder / "heads.safetensors")

    def model(name: str) -> VisionTransformer:
        network = VisionTransformer(config)
        network.load_state_dict(load_file(folder / f"{name}.safetensors"))
        return network

    base, experts = model("base"), [model(task) for task in batch]
    names = [name for name, _ in base.named_parameters()]
    weights = get_layer_wise_weights(len(experts), len(names), 0.3)
    merged = LayerWiseMergedModel(weights, base, experts, clamp_weights=False, tie_weights=True, strict=False)
    optimizer = torch.optim.Adam([merged.merge_weight], lr=1e-3)
    merged.train()
    merged.merge_weights()
    for _ in sys.stdin:
        start, busy, total = time.perf_counter(), time.process_time(), 0.0
        for task, images in batch.items():
            loss = entropy_loss(config["scale"] * merged(images) @ heads[task].T)
            loss.backward(retain_graph=True)
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        merged.merge_weights()
        seconds = {"seconds": time.perf_counter() - start, "processor": time.process_time() - busy, "loss": total}
        learned = merged.merge_weight.detach().T.tolist()
        found = {"coefficients": dict(zip(names, learned, strict=True)), "threads": torch.get_num_threads()}
        print(json.dumps(seconds | found), file=answers, flush=True)


if __name__ == "__main__":
    main()
