"""Derivatives against finite differences, in float64."""

import functools

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

import main
import transformer_layer as tl
from attention import attention_weights, flash_attention, scaled_dot_product_attention
from common import arrays, random_params

N, M, D, H, F = 3, 4, 4, 2, 6
MASK = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 1]], bool)  # row 1 is fully masked
FLASH = functools.partial(flash_attention, block_size=2)
SOURCES, TARGETS = np.array([[1, 2, 3], [4, 0, 0]]), np.array([[3, 2, 0], [1, 0, 0]])  # 0 is END


def cases():
    """name -> (function, its differentiable arguments)."""
    x, memory, query, key, value, scale, bias = arrays((N, D), (M, D), (N, 2), (M, 2), (M, 3), (D,), (D,))
    return {
        "attention_weights": (lambda *qk: attention_weights(*qk, MASK), (query, key)),
        "scaled_dot_product_attention": (lambda *qkv: scaled_dot_product_attention(*qkv, MASK), (query, key, value)),
        "flash_attention": (lambda *qkv: FLASH(*qkv, MASK), (query, key, value)),
        "flash_attention, causal": (lambda q, kv: FLASH(q, kv, kv, causal=True), (x, np.flip(x))),
        "multi_head_attention": (
            lambda p, x, m: tl.multi_head_attention(p, x, m, m, MASK),
            (random_params(tl.init_multi_head_attention, D, H), x, memory),
        ),
        "feed_forward": (tl.feed_forward, (random_params(tl.init_feed_forward, D, F, seed=3), x)),
        "layer_norm": (tl.layer_norm, ({"scale": scale, "bias": bias}, x)),
        "dropout": (lambda x: tl.dropout(jax.random.key(1), x, 0.5), (x,)),
        "decoder": (
            lambda p, x, m: tl.decoder(p, x, m, memory_mask=MASK),
            (random_params(tl.init_decoder, 2, D, H, F, seed=3), x, memory),
        ),
        # The whole model, with padding. The gradient of the embedding comes from both inputs and from the logits.
        "loss": (lambda p: main.loss(p, SOURCES, TARGETS), (random_params(main.init_model, 5, 2, D, H, F, seed=3),)),
    }


@pytest.mark.parametrize("name", cases())
def test_derivatives(name):
    """First and second derivatives, in forward and reverse mode (flash_attention: only reverse; see test_flash.py)."""
    with jax.enable_x64(True):
        function, arguments = cases()[name]
        function, arguments = jax.jit(function), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), arguments)
        order, modes = (1, ["rev"]) if name.startswith("flash_attention") else (2, ["fwd", "rev"])
        order = 1 if name == "loss" else order  # second derivatives of its parts are above
        # With a step of 1e-4, the error is its square times third derivatives of up to 100.
        for mode in modes:
            check_grads(function, arguments, order=order, modes=(mode,), atol=2e-5, rtol=2e-5, eps=1e-4)
