"""Llama-shaped checkpoints for benchmarks, and the float64 reference that a merge of them is checked against.

Everything here works on one chunk or one tensor at a time and needs NumPy and `ml_dtypes` alone, so that neither
making the files nor checking a result depends on the code that is measured.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Bool, Float64

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CHUNK = 1 << 20  # entries
NOISE = (1 << 23) + 9  # entries of the block of normal draws that every tensor takes its slices from


@dataclass(frozen=True)
class Shape:
    """The size of a Llama-shaped model: two embeddings (not tied) and `layers` equal blocks."""

    layers: int = 16
    hidden: int = 1024
    intermediate: int = 2816
    heads: int = 16
    vocabulary: int = 32000

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by its Hugging Face name, with its (out, in) shape."""
        h, m = self.hidden, self.intermediate
        block = {
            "input_layernorm": (h,),
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (h, h),
            "self_attn.v_proj": (h, h),
            "self_attn.o_proj": (h, h),
            "post_attention_layernorm": (h,),
            "mlp.gate_proj": (m, h),
            "mlp.up_proj": (m, h),
            "mlp.down_proj": (h, m),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for i in range(self.layers):
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
        return shapes | {"model.norm.weight": (h,), "lm_head.weight": (self.vocabulary, h)}

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.tensors().values()))

    def config(self) -> dict[str, object]:
        """What `config.json` has to say for other tools to recognise the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocabulary,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


def make_models(folder: Path, shape: Shape, experts: int, seed: int = 0) -> None:
    """Writes `base` and `expert_0` ... into `folder`, each a folder with `model.safetensors` and `config.json`.

    Base weights are normal with the usual scale of 0.02 (norms: around one). An expert is the base plus normal noise
    whose scale, 3e-4 to 3e-3, differs by expert and tensor. Drawing two thousand million normals would take minutes,
    so all noise is cut from one block of draws, at an offset that is drawn anew for every chunk of every tensor.
    """
    rng = np.random.default_rng(seed)
    block = rng.standard_normal(NOISE, dtype=np.float32)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dims in shape.tensors().items():
        size = math.prod(dims) * BFLOAT16.itemsize
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def noise(n: int) -> np.ndarray:
        start = rng.integers(NOISE - n + 1)
        return block[start : start + n]

    with contextlib.ExitStack() as stack:
        files = []
        for name in ["base", *(f"expert_{i}" for i in range(experts))]:
            (folder / name).mkdir(parents=True)
            (folder / name / "config.json").write_text(json.dumps(shape.config(), indent=2))
            files.append(stack.enter_context(open(folder / name / "model.safetensors", "wb")))
            files[-1].write(struct.pack("<Q", len(text)) + text)
        for dims in shape.tensors().values():
            mean, std = (1.0, 0.1) if len(dims) == 1 else (0.0, 0.02)
            scales = 1e-3 * 10 ** rng.uniform(-0.5, 0.5, experts).astype(np.float32)
            for start in range(0, math.prod(dims), CHUNK):
                n = min(CHUNK, math.prod(dims) - start)
                base = (mean + np.float32(std) * noise(n)).astype(BFLOAT16)
                files[0].write(base.tobytes())
                base = base.astype(np.float32)
                for file, scale in zip(files[1:], scales, strict=True):
                    file.write((base + scale * noise(n)).astype(BFLOAT16).tobytes())


def open_tensors(folder: Path) -> dict[str, BFloat16[np.ndarray, " n"]]:
    """The bfloat16 tensors of every safetensors file in `folder`, flattened and memory-mapped, by name."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{path}: {name} has dtype {entry['dtype']}, expected BF16")
            n = math.prod(entry["shape"])
            tensors[name] = np.memmap(path, BFLOAT16, "r", 8 + length + entry["data_offsets"][0], (n,))
    return tensors


# A reference takes the flattened inputs of one tensor (base first, where the method has one), the entries to compute,
# and the parameters of the recipe. It answers the merged values there, in float64, and which of them are decided:
# where magnitudes are tied at the cut of a trim, which of the tied survive is each implementation's choice.

Inputs = Sequence["BFloat16[np.ndarray, ' n']"]
Answer = tuple["Float64[np.ndarray, ' m']", "Bool[np.ndarray, ' m']"]


def linear(inputs: Inputs, at: slice, weight: float) -> Answer:
    """Weighted mean (the weights are equal here, so they cancel)."""
    values = np.sum([weight * x[at].astype(np.float64) for x in inputs], axis=0) / (weight * len(inputs))
    return values, np.ones(values.shape, bool)


def task_arithmetic(inputs: Inputs, at: slice, weight: float) -> Answer:
    """Base plus the weighted sum of task vectors (arXiv:2212.04089)."""
    base, *experts = (x[at].astype(np.float64) for x in inputs)
    values = base + np.sum([weight * (x - base) for x in experts], axis=0)
    return values, np.ones(values.shape, bool)


def ties(inputs: Inputs, at: slice, weight: float, density: float) -> Answer:
    """TIES per tensor (arXiv:2306.01708): trim to `int(density * n)`, elect by weighted sum (zero: positive), mean."""
    base = inputs[0][at].astype(np.float64)
    keep = max(1, int(density * inputs[0].size))
    decided, trimmed = np.ones(base.shape, bool), []
    for expert in inputs[1:]:
        magnitude = np.abs(expert.astype(np.float64) - inputs[0].astype(np.float64))
        cut = np.partition(magnitude, -keep)[-keep]
        tied = np.count_nonzero(magnitude >= cut) > keep
        delta = expert[at].astype(np.float64) - base
        if tied:
            decided &= np.abs(delta) != cut
        trimmed.append(weight * np.where(np.abs(delta) >= cut, delta, 0.0))
    sign = np.where(np.sum(trimmed, axis=0) >= 0, 1.0, -1.0)
    agrees = np.sign(trimmed) == sign
    total, weights = np.sum(np.where(agrees, trimmed, 0.0), axis=0), weight * np.sum(agrees, axis=0)
    return base + total / np.where(weights == 0, 1.0, weights), decided


REFERENCES = {"linear": linear, "task_arithmetic": task_arithmetic, "ties": ties}


@dataclass
class Error:
    """How far a merged checkpoint is from the float64 reference, over the decided entries of the sample.

    Attributes:
        largest: largest absolute difference.
        rms: root of the mean squared difference.
        beyond_ulp: share of entries farther away than one unit in the last place of bfloat16.
        undecided: share of the sampled entries that were left out.
        rounding_rms: `rms` of the reference itself rounded to bfloat16: the best that any output can do.
    """

    largest: float
    rms: float
    beyond_ulp: float
    undecided: float
    rounding_rms: float


def measure_error(
    folders: Sequence[Path], merged: Path, method: str, parameters: dict[str, float], sample: int = 1 << 19
) -> Error:
    """The error of the checkpoint `merged` of the inputs `folders`.

    Looked at are all tensors of the first block, the final norm and the output embedding, in each of them about
    `sample` entries spread evenly; the cuts of a trim are taken from the whole tensor.
    """
    inputs, output = [open_tensors(folder) for folder in folders], open_tensors(merged)
    if set(output) != set(inputs[0]):
        raise SystemExit(f"{merged}: other tensors than the inputs: {sorted(set(output) ^ set(inputs[0]))[:5]}")
    largest, squares, rounding, beyond, count, seen = 0.0, 0.0, 0.0, 0, 0, 0
    for name in [n for n in output if n.startswith(("model.layers.0.", "model.norm.", "lm_head."))]:
        at = slice(None, None, max(1, output[name].size // sample))
        expected, decided = REFERENCES[method]([tensors[name] for tensors in inputs], at, **parameters)
        expected, found = expected[decided], output[name][at][decided].astype(np.float64)
        difference = np.abs(found - expected)
        ulp = np.ldexp(1.0, np.frexp(expected)[1] - 8)  # 8 bits of significand
        largest = max(largest, float(difference.max(initial=0.0)))
        squares += float(np.sum(difference**2))
        rounding += float(np.sum((expected.astype(BFLOAT16).astype(np.float64) - expected) ** 2))
        beyond += np.count_nonzero(difference > ulp)
        count, seen = count + expected.size, seen + decided.size
    return Error(largest, math.sqrt(squares / count), beyond / count, 1 - count / seen, math.sqrt(rounding / count))
