"""The rules of `jm.naming`, by family: patterns on Hugging Face names, Flax names, order of axes.

Parts of names are separated by dots on both sides. What lies in a group is the same on both sides.
"""

from __future__ import annotations

from typing import Any

Rule = tuple[Any, ...]

_LINEAR = (1, 0)  # (out, in) to (in, out)
_CONVOLUTION = (2, 3, 1, 0)  # (out, in, height, width) to (height, width, in, out)

# A model without a head is saved without the prefix of the model inside the one with a head.
_LAYER = r"(?:model\.)?layers\.\d+"


def _decoder(*norms: str, biases: str, head_norms: bool = False) -> tuple[Rule, ...]:
    """The rules of a decoder with separate query, key and value and a gated feed-forward network.

    Args:
        norms: the norms of a layer.
        biases: a pattern of the linear layers that may have a bias.
        head_norms: whether there are norms of queries and keys.
    """
    of_heads = ((rf"({_LAYER}\.self_attn\.[qk]_norm\.weight)", r"\1"),) * head_norms
    return (
        # The table comes before the head: tied, both are one tensor, and the table is what stays.
        (r"((?:model\.)?embed_tokens)\.weight", r"\1.embedding"),
        (rf"({_LAYER}\.self_attn\.[qkvo]_proj)\.weight", r"\1.kernel", _LINEAR),
        (rf"({_LAYER}\.mlp\.(?:gate|up|down)_proj)\.weight", r"\1.kernel", _LINEAR),
        (rf"({_LAYER}\.{biases}\.bias)", r"\1"),
        *of_heads,
        (rf"({_LAYER}\.(?:{'|'.join(norms)})_layernorm\.weight)", r"\1"),
        (r"((?:model\.)?norm\.weight)", r"\1"),
        (r"(lm_head)\.weight", r"\1.kernel", _LINEAR),
        # Frequencies of rotary positions, which old checkpoints hold: transformers computes them too.
        (rf"{_LAYER}\.self_attn\.rotary_emb\.inv_freq", None),
    )


_DECODER_STACKS = ("model.layers", "layers")
_ATTENTION = r"self_attn\.[qkvo]_proj"
_AROUND_BOTH = ("input", "post_attention", "pre_feedforward", "post_feedforward")

_VIT_LAYER = r"(?:vit\.)?encoder\.layer\.\d+"
_VIT_LINEAR = r"(?:attention\.attention\.(?:query|key|value)|(?:attention\.output|intermediate|output)\.dense)"
_VIT_NORM = r"layernorm_(?:before|after)"
_VIT_HEAD = r"(?:(?:vit\.)?pooler\.dense|classifier)"
_VIT = (
    (r"((?:vit\.)?embeddings\.(?:cls_token|mask_token|position_embeddings))", r"\1"),
    (r"((?:vit\.)?embeddings\.patch_embeddings\.projection)\.weight", r"\1.kernel", _CONVOLUTION),
    (r"((?:vit\.)?embeddings\.patch_embeddings\.projection\.bias)", r"\1"),
    (rf"({_VIT_LAYER}\.{_VIT_LINEAR})\.weight", r"\1.kernel", _LINEAR),
    (rf"({_VIT_LAYER}\.{_VIT_NORM})\.weight", r"\1.scale"),
    (rf"({_VIT_LAYER}\.(?:{_VIT_LINEAR}|{_VIT_NORM})\.bias)", r"\1"),
    (r"((?:vit\.)?layernorm)\.weight", r"\1.scale"),
    (r"((?:vit\.)?layernorm\.bias)", r"\1"),
    (rf"({_VIT_HEAD})\.weight", r"\1.kernel", _LINEAR),
    (rf"({_VIT_HEAD}\.bias)", r"\1"),
)

FAMILIES: dict[str, tuple[tuple[Rule, ...], tuple[str, ...]]] = {
    "llama": (
        _decoder("input", "post_attention", biases=rf"(?:{_ATTENTION}|mlp\.(?:gate|up|down)_proj)"),
        _DECODER_STACKS,
    ),
    "qwen2": (_decoder("input", "post_attention", biases=r"self_attn\.[qkv]_proj"), _DECODER_STACKS),
    "qwen3": (_decoder("input", "post_attention", biases=_ATTENTION, head_norms=True), _DECODER_STACKS),
    "gemma": (_decoder("input", "post_attention", biases=_ATTENTION), _DECODER_STACKS),
    "gemma2": (_decoder(*_AROUND_BOTH, biases=_ATTENTION), _DECODER_STACKS),
    "gemma3": (_decoder(*_AROUND_BOTH, biases=_ATTENTION, head_norms=True), _DECODER_STACKS),
    "vit": (_VIT, ("vit.encoder.layer", "encoder.layer")),
}
"""Family → its rules, and what comes before the layer number in its names."""

MODEL_TYPES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "vit": "vit",
}
"""`model_type` of a config.json → family."""
