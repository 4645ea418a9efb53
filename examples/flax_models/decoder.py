"""Llama, Mistral, Qwen 2 and 3 and Gemma 1 to 3 (the language model) as one plain Flax NNX decoder.

Its parameters have the names and axes that `jm.naming` gives to Hugging Face checkpoints, so they go in as they are:

    config = decoder_config(json.loads(Path(folder, "config.json").read_text()))
    model = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    nnx.update(model, jm.materialize(jm.naming_for(folder)(jm.open_checkpoint(folder).params)))
    logits = model(tokens)

With `stacked=True`, here and in the naming, the layers are one module that is scanned over: compiled once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from examples.flax_models.decoder_config import DecoderConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": jax.nn.gelu}


class RMSNorm(nnx.Module):
    """Divides by the root of the mean square of the entries, in float32."""

    def __init__(self, size: int, config: DecoderConfig):
        self.weight = nnx.Param(jnp.zeros(size) if config.gemma else jnp.ones(size))
        self.eps, self.plus_one = config.norm_eps, config.gemma

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = jnp.expand_dims(self.weight[...], range(x.ndim - 1))
        if self.plus_one:
            return (wide * (1 + weight.astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * weight


class Attention(nnx.Module):
    """Causal attention with rotary positions; groups of query heads share a key and a value head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c = self.config = config
        queries, keys = c.num_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nnx.Linear(c.hidden_size, queries, use_bias=c.qkv_bias, rngs=rngs)
        self.k_proj = nnx.Linear(c.hidden_size, keys, use_bias=c.qkv_bias, rngs=rngs)
        self.v_proj = nnx.Linear(c.hidden_size, keys, use_bias=c.qkv_bias, rngs=rngs)
        self.o_proj = nnx.Linear(queries, c.hidden_size, use_bias=c.output_bias, rngs=rngs)
        if c.head_norms:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c), RMSNorm(c.head_dim, c)

    def __call__(
        self, x: Float[Array, "batch n dim"], window: Int[Array, ""], frequencies: Float[Array, " half"]
    ) -> Float[Array, "batch n dim"]:
        c, (batch, n, _) = self.config, x.shape
        query, key, value = (p(x).reshape(batch, n, -1, c.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if c.head_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = _rotated(query, frequencies), _rotated(key, frequencies)
        query = query.reshape(batch, n, c.num_key_value_heads, -1, c.head_dim)
        scores = jnp.einsum("bikgd,bjkd->bkgij", query, key) * c.query_scale
        if c.attention_softcap is not None:
            scores = c.attention_softcap * jnp.tanh(scores / c.attention_softcap)
        back = jnp.arange(n)[:, None] - jnp.arange(n)[None, :]
        seen = ((back >= 0) & (back < window))[None, None, None]
        scores = jnp.where(seen, scores.astype(jnp.float32), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return self.o_proj(jnp.einsum("bkgij,bjkd->bikgd", weights, value).reshape(batch, n, -1))


def _rotated(x: Float[Array, "batch n heads size"], frequencies: Float[Array, " half"]) -> Array:
    """Turns entry i and entry i + size / 2 of each head as a pair, by the position times the frequency."""
    angles = (jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies[None, :])[None, :, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class FeedForward(nnx.Module):
    """SwiGLU or GeGLU: one projection, activated, gates another."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        inner, bias = config.intermediate_size, config.mlp_bias
        self.gate_proj = nnx.Linear(config.hidden_size, inner, use_bias=bias, rngs=rngs)
        self.up_proj = nnx.Linear(config.hidden_size, inner, use_bias=bias, rngs=rngs)
        self.down_proj = nnx.Linear(inner, config.hidden_size, use_bias=bias, rngs=rngs)
        self.activation = _ACTIVATIONS[config.activation]

    def __call__(self, x: Float[Array, "batch n dim"]) -> Float[Array, "batch n dim"]:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention and feed-forward network. Gemma 2 and 3 have norms after both as well."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.self_attn, self.mlp = Attention(config, rngs), FeedForward(config, rngs)
        self.norms_after = config.norms_after
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        if config.norms_after:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config)

    def __call__(self, x: Array, window: Int[Array, ""], frequencies: Float[Array, " half"]) -> Array:
        attended = self.self_attn(self.input_layernorm(x), window, frequencies)
        if not self.norms_after:  # then the norm called `post_attention` is the one before the feed-forward network
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Backbone(nnx.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, stacked: bool):
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        if stacked:
            self.layers = nnx.vmap(lambda r: Layer(config, r))(rngs.fork(split=len(config.windows)))
        else:
            self.layers = nnx.List([Layer(config, rngs) for _ in config.windows])
        self.norm = RMSNorm(config.hidden_size, config)

    def __call__(self, tokens: Int[Array, "batch n"]) -> Float[Array, "batch n dim"]:
        x = self.embed_tokens(tokens)
        if self.config.gemma:
            x = x * jnp.asarray(math.sqrt(self.config.hidden_size), x.dtype)
        windows, frequencies = jnp.array(self.config.windows), jnp.array(self.config.frequencies, jnp.float32)
        if isinstance(self.layers, Layer):
            scan = nnx.scan(lambda x, layer, w, f: layer(x, w, f), in_axes=(nnx.Carry, 0, 0, 0), out_axes=nnx.Carry)
            return self.norm(scan(x, self.layers, windows, frequencies))
        for layer, window, of_layer in zip(self.layers, windows, frequencies, strict=True):
            x = layer(x, window, of_layer)
        return self.norm(x)


class Decoder(nnx.Module):
    """A causal language model: tokens to logits of the next token, without a cache."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, stacked: bool = False):
        self.config = config
        self.model = Backbone(config, rngs, stacked)
        if not config.tied:
            self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch n"]) -> Float[Array, "batch n vocabulary"]:
        x = self.model(tokens)
        logits = self.model.embed_tokens.attend(x) if self.config.tied else self.lm_head(x)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
