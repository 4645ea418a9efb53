"""What names and shapes say about tensors: layer, kind, input and output axes."""

import pytest

import jaxmerge as jm
from jaxmerge.trees.info import tensor_infos

KINDS = {
    "Dense_0/kernel": ((2, 3), "kernel"),
    "Dense_0/bias": ((3,), "bias"),
    "attn/in_proj_bias": ((3,), "bias"),
    "LayerNorm_0/scale": ((3,), "norm"),
    "model.norm.weight": ((3,), "norm"),
    "model.layers.0.input_layernorm.weight": ((3,), "norm"),
    "ln_f/scale": ((3,), "norm"),
    "Embed_0/embedding": ((5, 3), "embedding"),
    "model.embed_tokens.weight": ((5, 3), "embedding"),
    "transformer.wte.weight": ((5, 3), "embedding"),
    "pos_embed": ((1, 5, 3), "embedding"),
    "patch_embed.proj.weight": ((4, 3, 2, 2), "kernel"),
    "lm_head.weight": ((5, 3), "kernel"),
    "logit_scale": ((), "other"),
    "model.layers.0.mlp.down_proj.weight": ((2, 3), "kernel"),
}


@pytest.mark.parametrize(("name", "shape", "kind"), [(n, s, k) for n, (s, k) in KINDS.items()], ids=KINDS)
def test_kind(name, shape, kind):
    assert tensor_infos({name: shape})[name].kind == kind


AXES = {
    "Dense_0/kernel": ((2, 3), (0,), (1,)),
    "Conv_0/kernel": ((3, 3, 4, 8), (2,), (3,)),
    "attn/query/kernel": ((6, 2, 3), (0,), (1, 2)),
    "attn/out/kernel": ((2, 3, 6), (0, 1), (2,)),
    "mlp.up_proj.weight": ((2, 3), (1,), (0,)),
    "conv1.weight": ((8, 4, 3, 3), (1,), (0,)),
    "embed/embedding": ((5, 3), (0,), (1,)),
    "model.embed_tokens.weight": ((5, 3), (0,), (1,)),
    "Dense_0/bias": ((3,), (), ()),
    "scale": ((), (), ()),
}


@pytest.mark.parametrize(("name", "shape", "inputs", "outputs"), [(n, *x) for n, x in AXES.items()], ids=AXES)
def test_axes(name, shape, inputs, outputs):
    info = tensor_infos({name: shape})[name]
    assert (info.input_axes, info.output_axes) == (inputs, outputs)


def test_layout_may_be_given():
    shapes = {"w": (2, 3), "Dense_0/kernel": (2, 3)}
    flax = tensor_infos(shapes, jm.Rules(layout="flax"))
    torch = tensor_infos(shapes, jm.Rules(layout="huggingface"))
    assert [flax[name].input_axes for name in shapes] == [(0,), (0,)]
    assert [torch[name].input_axes for name in shapes] == [(1,), (1,)]


def layers(names, **rules):
    infos = tensor_infos(dict.fromkeys(names, (2,)), jm.Rules(**rules))
    return {name: (info.layer, info.num_layers) for name, info in infos.items()}


def test_layers_are_numbers_not_text():
    names = [f"layer_{i}/kernel" for i in range(11)]
    found = layers(names)
    assert found == {name: (i, 11) for i, name in enumerate(names)}
    infos = tensor_infos(dict.fromkeys(names, (2,)))
    assert (infos["layer_2/kernel"].depth, infos["layer_10/kernel"].depth) == (0.2, 1.0)


def test_layers_of_every_style():
    assert layers(["blocks/0/w", "blocks/2/w"]) == {"blocks/0/w": (0, 3), "blocks/2/w": (2, 3)}
    assert layers(["model.layers.0.mlp.0.weight", "model.layers.1.mlp.3.weight"]) == {
        "model.layers.0.mlp.0.weight": (0, 2),
        "model.layers.1.mlp.3.weight": (1, 2),
    }
    assert layers(["embed", "head/kernel"]) == {"embed": (None, 0), "head/kernel": (None, 0)}


def test_stacks_are_counted_apart():
    found = layers(["encoder/layer_0/w", "encoder/layer_3/w", "decoder/layer_0/w", "decoder/layer_1/w"])
    assert found["encoder/layer_0/w"] == (0, 4)
    assert found["decoder/layer_1/w"] == (1, 2)


def test_a_single_layer_has_no_depth():
    info = tensor_infos({"blocks/0/w": (2,)})["blocks/0/w"]
    assert (info.layer, info.num_layers, info.depth) == (0, 1, None)


def test_layer_pattern():
    names = ["stage1/unit3/w", "stage1/unit0/w", "stem"]
    assert layers(names, layer=r"unit(\d+)") == {names[0]: (3, 4), names[1]: (0, 4), "stem": (None, 0)}


def test_stacked_leaves_describe_one_layer():
    info = tensor_infos({"layers/mlp/kernel": (12, 4, 6), "embed": (5, 4)}, jm.Rules(stacked=("layers/.*",)))
    kernel = info["layers/mlp/kernel"]
    assert (kernel.shape, kernel.layer, kernel.num_layers, kernel.input_axes) == ((4, 6), None, 12, (0,))
    assert info["embed"].num_layers == 0


def test_program_part_is_the_same_for_all_layers():
    infos = tensor_infos({f"layers/{i}/kernel": (4, 6) for i in range(3)})
    assert len({info.for_program() for info in infos.values()}) == 1
