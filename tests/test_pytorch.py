"""PyTorch as reference: multi-head attention and the two layers give torch.nn's outputs and gradients, in float64.

data/make_golden.py wrote the reference data, golden.npz, with torch's names and conventions; torch is not needed here.
This file converts weights, masks and gradients to the conventions of this project, and compares.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import transformer_layer as tl
from attention import flash_attention, scaled_dot_product_attention


def golden(case):
    """The arrays of a case: num_heads, output, output_weights, and dicts of inputs, weights, masks and gradients."""
    data = {"inputs": {}, "weights": {}, "masks": {}, "gradients": {}}
    with np.load(Path(__file__).parent / "data" / "golden.npz") as file:
        for path in file:
            if path.startswith(case + "/"):
                *kind, name = path.split("/")[1:]
                (data[kind[0]] if kind else data)[name] = file[path]
    return data


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


def encoder_layer_params(torch, num_heads):
    """The parameters of torch.nn.TransformerEncoderLayer. torch numbers the norms by sub-layer."""
    norms = [{"scale": torch[f"norm{i}.weight"], "bias": torch[f"norm{i}.bias"]} for i in (1, 2)]
    return {
        "self_attention": attention_params(torch, num_heads, "self_attn."),
        "self_attention_norm": norms[0],
        "feed_forward": feed_forward_params(torch),
        "feed_forward_norm": norms[1],
    }


def decoder_layer_params(torch, num_heads):
    """The parameters of torch.nn.TransformerDecoderLayer, whose second sub-layer is cross-attention."""
    params = encoder_layer_params(torch, num_heads)
    return {
        **params,
        "cross_attention": attention_params(torch, num_heads, "multihead_attn."),
        "cross_attention_norm": params["feed_forward_norm"],
        "feed_forward_norm": {"scale": torch["norm3.weight"], "bias": torch["norm3.bias"]},
    }


def unpadded(key_padding_mask):
    """torch's mask (batch, m), True for padding -> (batch, 1, 1, m), True for "may attend"."""
    return ~key_padding_mask[:, None, None, :]


def multi_head_attention(params, masks, *inputs, attention):
    """torch.nn.MultiheadAttention: self-attention with a mask per head, or cross-attention with padding."""
    mask, num_heads = ~masks["attn_mask"], params["query"].shape[1]
    if mask.ndim == 3:  # (batch * h, n, m) in torch, (batch, h, n, m) here
        mask = mask.reshape(-1, num_heads, *mask.shape[1:])
    if "key_padding_mask" in masks:
        mask = mask & unpadded(masks["key_padding_mask"])
    query, key, value = inputs * 3 if len(inputs) == 1 else inputs
    return tl.multi_head_attention(params, query, key, value, mask, attention=attention)


def encoder_layer(params, masks, x, attention):
    """torch.nn.TransformerEncoderLayer: with padding, or with a causal mask."""
    if "src_mask" in masks:
        return tl.encoder_layer(params, x, causal=True, attention=attention)
    return tl.encoder_layer(params, x, unpadded(masks["src_key_padding_mask"]), attention=attention)


def decoder_layer(params, masks, x, memory, attention):
    """torch.nn.TransformerDecoderLayer, with a causal mask and padding. Padded targets agree, too."""
    padding = unpadded(masks["tgt_key_padding_mask"]), unpadded(masks["memory_key_padding_mask"])
    return tl.decoder_layer(params, x, memory, *padding, attention=attention)


# With blocks of at most 3 positions there are several, and most lengths need padding.
@pytest.mark.parametrize("attention", [scaled_dot_product_attention, functools.partial(flash_attention, block_size=3)])
@pytest.mark.parametrize(
    ("case", "params_from_torch", "function"),
    [
        ("attention_self", attention_params, multi_head_attention),
        ("attention_cross", attention_params, multi_head_attention),
        ("encoder_padded", encoder_layer_params, encoder_layer),
        ("encoder_one_head_causal", encoder_layer_params, encoder_layer),
        ("decoder_padded", decoder_layer_params, decoder_layer),
        ("decoder_one_head", decoder_layer_params, decoder_layer),
    ],
)
def test_agrees_with_pytorch(case, params_from_torch, function, attention):
    """Outputs agree to 1e-10, and so do the gradients of sum(output * output_weights) for all inputs and weights."""
    data = golden(case)

    def params_and_inputs(arrays):
        return params_from_torch(arrays, int(data["num_heads"])), [arrays[name] for name in data["inputs"]]

    @jax.jit
    def output_and_gradients(params, inputs, output_weights):
        def forward(params, inputs):
            return function(params, data["masks"], *inputs, attention=attention)

        output, gradients = jax.vjp(forward, params, inputs)
        return output, gradients(output_weights)

    with jax.enable_x64(True):
        arguments = *params_and_inputs(data["inputs"] | data["weights"]), data["output_weights"]
        actual = output_and_gradients(*jax.tree.map(lambda x: x.astype(np.float64), arguments))

    def assert_close(path, actual, expected):
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10, err_msg=jax.tree_util.keystr(path))

    expected = data["output"], params_and_inputs(data["gradients"])
    jax.tree.map_with_path(assert_close, actual, expected)
