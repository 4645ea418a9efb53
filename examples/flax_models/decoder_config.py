"""What tells Llama, Mistral, Qwen 2 and 3 and Gemma 1 to 3 from each other, read from a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_NO_WINDOW = 2**30


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What tells one decoder from another.

    Attributes:
        windows: how many positions each layer sees, its own included.
        frequencies: each layer's angle per position, for every pair of entries of a head.
        gemma: norms multiply by one plus their weight, embeddings by the square root of the width.
        norms_after: a layer's attention and feed-forward network are followed by a norm too, before they are added.
        head_norms: queries and keys are normalised per head.
        attention_softcap, logit_softcap: limits of attention scores and logits, or None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int, ...]
    frequencies: tuple[tuple[float, ...], ...]
    activation: str = "silu"
    norm_eps: float = 1e-6
    query_scale: float = 1.0
    gemma: bool = False
    norms_after: bool = False
    head_norms: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in a Hugging Face config.json, as transformers writes it now or wrote it before version 5."""
    kind, layers, heads = config["model_type"], config["num_hidden_layers"], config["num_attention_heads"]
    gemma = kind.startswith("gemma")
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    bias = bool(config.get("attention_bias", False))
    types = _layer_types(config)
    frequencies = {t: tuple(_frequencies(head_dim, _rope(config, t)).tolist()) for t in set(types)}
    window = config.get("sliding_window") or _NO_WINDOW
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        windows=tuple(window if t == "sliding_attention" else _NO_WINDOW for t in types[:layers]),
        frequencies=tuple(frequencies[t] for t in types[:layers]),
        activation="gelu_pytorch_tanh" if gemma else config.get("hidden_act", "silu"),
        norm_eps=config["rms_norm_eps"],
        query_scale=config.get("query_pre_attn_scalar", head_dim) ** -0.5,
        gemma=gemma,
        norms_after=kind in ("gemma2", "gemma3_text"),
        head_norms=kind in ("qwen3", "gemma3_text"),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        tied=config.get("tie_word_embeddings", gemma),
        attention_softcap=config.get("attn_logit_softcapping"),
        logit_softcap=config.get("final_logit_softcapping"),
    )


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    """Whether each layer attends to everything before it or to a window."""
    kind, layers = config["model_type"], range(config["num_hidden_layers"])
    if config.get("layer_types"):
        return config["layer_types"]
    if kind in ("gemma2", "gemma3_text"):
        every = 2 if kind == "gemma2" else config.get("sliding_window_pattern", 6)
        slides = [(i + 1) % every != 0 for i in layers]
    elif kind in ("qwen2", "qwen3"):
        slides = [bool(config.get("use_sliding_window")) and i >= config.get("max_window_layers", 28) for i in layers]
    else:
        slides = [kind == "mistral" and config.get("sliding_window") is not None for _ in layers]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _rope(config: Mapping[str, Any], layer_type: str) -> Mapping[str, Any]:
    """The rotary positions of a type of layer: `rope_theta`, `rope_type` and what belongs to it."""
    rope = config.get("rope_parameters")
    if rope is not None:
        return rope.get(layer_type, rope)
    if layer_type == "sliding_attention" and config["model_type"] == "gemma3_text":
        return {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    default = 1e6 if config["model_type"] == "gemma3_text" else 1e4
    return {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta", default)}


def _frequencies(head_dim: int, rope: Mapping[str, Any]) -> np.ndarray:
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind != "llama3":
        raise ValueError(
            f"rotary positions of the type {kind!r} are not implemented; there are default, linear, llama3"
        )
    # Llama 3.1: waves that are long against the former context are slowed down, with a ramp in between.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / rope["factor"])
