"""PyTorch as reference: multi-head attention and the two layers give torch.nn's outputs and gradients.

data/make_golden.py wrote the reference data, golden.npz, with torch's names and conventions; torch is not needed here.
This file converts weights and gradients to the conventions of this project, and compares the output and every gradient
in float32 and float64, with plain and flash attention.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import transformer_layer as tl
from attention import flash_attention, scaled_dot_product_attention

# Both are absolute and relative: |actual - expected| <= tolerance * (1 + |expected|).
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


@functools.cache
def golden(case):
    """The arrays of a case: num_heads, output, output_weights, and dicts of inputs, weights, masks and gradients."""
    data = {"inputs": {}, "weights": {}, "masks": {}, "gradients": {}}
    with np.load(Path(__file__).parent / "data" / "golden.npz") as file:
        for path in file:
            if path.startswith(case + "/"):
                *kind, name = path.split("/")[1:]
                (data[kind[0]] if kind else data)[name] = file[path]
    return data


# ---- From torch's conventions to this project's ----------------------------------------------------------------------


def attention_params(torch, num_heads, prefix=""):
    """torch stacks W^Q, W^K and W^V, each (out, in), as the rows of one (3 d, d) matrix, head by head."""
    output = torch[prefix + "out_proj.weight"].T
    stacked = torch[prefix + "in_proj_weight"].reshape(3, num_heads, -1, len(output))
    query, key, value = np.einsum("phkd->pdhk", stacked)
    return {"query": query, "key": key, "value": value, "output": output.reshape(num_heads, -1, len(output))}


def feed_forward_params(torch):
    """torch's linear1 and linear2 are the two linear maps of Equation 2, (out, in)."""
    w1, w2 = torch["linear1.weight"].T, torch["linear2.weight"].T
    return {"w1": w1, "b1": torch["linear1.bias"], "w2": w2, "b2": torch["linear2.bias"]}


def norm_params(torch, name):
    """torch calls the scale of a layer norm its weight, and numbers the norms by sub-layer."""
    return {"scale": torch[f"{name}.weight"], "bias": torch[f"{name}.bias"]}


def encoder_layer_params(torch, num_heads):
    """The parameters of torch.nn.TransformerEncoderLayer, for encoder_layer."""
    return {
        "self_attention": attention_params(torch, num_heads, "self_attn."),
        "self_attention_norm": norm_params(torch, "norm1"),
        "feed_forward": feed_forward_params(torch),
        "feed_forward_norm": norm_params(torch, "norm2"),
    }


def decoder_layer_params(torch, num_heads):
    """The parameters of torch.nn.TransformerDecoderLayer, for decoder_layer."""
    return {
        "self_attention": attention_params(torch, num_heads, "self_attn."),
        "self_attention_norm": norm_params(torch, "norm1"),
        "cross_attention": attention_params(torch, num_heads, "multihead_attn."),
        "cross_attention_norm": norm_params(torch, "norm2"),
        "feed_forward": feed_forward_params(torch),
        "feed_forward_norm": norm_params(torch, "norm3"),
    }


def unpadded(key_padding_mask):
    """torch's mask (batch, m), True for padding -> (batch, 1, 1, m), True for "may attend"."""
    return ~key_padding_mask[:, None, None, :]


# ---- The comparison --------------------------------------------------------------------------------------------------


def assert_agrees(case, dtype, params_from_torch, function):
    """function(params, *inputs) has the golden output, and sum(output * output_weights) the golden gradients."""
    data = golden(case)

    def params_and_inputs(arrays):
        return params_from_torch(arrays, int(data["num_heads"])), [arrays[name] for name in data["inputs"]]

    @jax.jit
    def output_and_gradients(params, inputs, output_weights):
        output, gradients = jax.vjp(lambda params, inputs: function(params, *inputs), params, inputs)
        return {"output": output, "gradients": gradients(output_weights)}

    with jax.enable_x64(dtype == "float64"):
        arguments = *params_and_inputs(data["inputs"] | data["weights"]), data["output_weights"]
        actual = output_and_gradients(*jax.tree.map(lambda x: x.astype(dtype), arguments))
        actual = jax.tree.map(np.asarray, actual)
    expected = {"output": data["output"], "gradients": params_and_inputs(data["gradients"])}

    def assert_close(path, actual, expected):
        name, tolerance = jax.tree_util.keystr(path), TOLERANCE[dtype]
        assert actual.dtype == dtype, name
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, err_msg=name)

    jax.tree_util.tree_map_with_path(assert_close, actual, expected)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("attention_cross", "float32"), ("attention_cross", "float64"), ("attention_self", "float64")],
)
def test_multi_head_attention_agrees_with_pytorch(case, dtype):
    """multi_head_attention equals torch.nn.MultiheadAttention: self and cross, one mask, or one for each head."""
    masks, num_heads = golden(case)["masks"], golden(case)["num_heads"]
    mask = ~masks["attn_mask"]
    if mask.ndim == 3:  # one for each head: (batch * h, n, m) in torch, (batch, h, n, m) here
        mask = mask.reshape(-1, num_heads, *mask.shape[1:])
    if "key_padding_mask" in masks:
        mask = mask & unpadded(masks["key_padding_mask"])

    def function(params, *inputs):
        query, key, value = inputs * 3 if len(inputs) == 1 else inputs
        return tl.multi_head_attention(params, query, key, value, mask)

    assert_agrees(case, dtype, attention_params, function)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("encoder_padded", "float32"), ("encoder_padded", "float64"), ("encoder_one_head_causal", "float64")],
)
def test_encoder_layer_agrees_with_pytorch(case, dtype):
    """encoder_layer equals torch.nn.TransformerEncoderLayer: with padding, and causal with one head."""
    masks = golden(case)["masks"]
    causal = "src_mask" in masks  # the only such mask in the data
    mask = unpadded(masks["src_key_padding_mask"]) if "src_key_padding_mask" in masks else None

    def function(params, x):
        return tl.encoder_layer(params, x, mask, causal=causal)

    assert_agrees(case, dtype, encoder_layer_params, function)


@pytest.mark.parametrize(
    ("case", "dtype", "attention"),
    [
        ("decoder_padded", "float32", scaled_dot_product_attention),
        ("decoder_padded", "float64", scaled_dot_product_attention),
        ("decoder_padded", "float64", functools.partial(flash_attention, block_size=3)),
        ("decoder_one_head", "float64", scaled_dot_product_attention),
    ],
)
def test_decoder_layer_agrees_with_pytorch(case, dtype, attention):
    """decoder_layer equals torch.nn.TransformerDecoderLayer with a causal mask and padding.

    Padded targets agree, too. With blocks of 3 positions, there are several blocks, and the last one is padded.
    """
    masks = golden(case)["masks"]
    mask, memory_mask = unpadded(masks["tgt_key_padding_mask"]), unpadded(masks["memory_key_padding_mask"])

    def function(params, x, memory):
        return tl.decoder_layer(params, x, memory, mask, memory_mask, attention=attention)

    assert_agrees(case, dtype, decoder_layer_params, function)
