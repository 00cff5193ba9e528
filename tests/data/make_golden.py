"""Writes golden.npz: outputs and gradients of PyTorch's attention and Transformer layers, for ../test_pytorch.py.

    pip install torch==2.13.0
    python tests/data/make_golden.py

Nothing else in the project needs torch. On one machine, every run writes the same bytes. Names and conventions are
torch's:

    CASE/num_heads                 for example encoder_padded/num_heads
    CASE/inputs/ARGUMENT           the positional arguments of the module; for self-attention one array x
    CASE/masks/ARGUMENT            its keyword arguments; True = may NOT attend
    CASE/weights/PARAMETER         weight matrices are (out, in)
    CASE/output
    CASE/output_weights            random weights of the output
    CASE/gradients/NAME            of sum(output * output_weights), for each input and each weight

Everything is computed in float64. Inputs and weights are float32 numbers, so a computation in float32 starts from the
same values.
"""

from pathlib import Path

import numpy as np
import torch

GENERATOR = torch.Generator().manual_seed(20170612)


def normal(*shape, mean=0.0, scale=1.0):
    """Normal float32 numbers, as float64."""
    return (mean + scale * torch.randn(shape, generator=GENERATOR)).double()


def padding(lengths, max_length):
    """torch's key padding mask (batch, max_length): True from each length on."""
    return torch.arange(max_length) >= torch.tensor(lengths)[:, None]


def causal(length):
    """torch's causal mask (length, length): True above the diagonal."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def arbitrary(*shape):
    """A mask of four in ten keys, but never key 0, because torch gives NaN for fully masked queries."""
    mask = torch.rand(shape, generator=GENERATOR) < 0.4
    mask[..., 0] = False
    return mask


def randomize(module):
    """Replaces every weight by random numbers, because zeros and ones would not reveal a mistake.

    Except for attention biases, which become constant zeros: the paper has none, and `bias=False` would also remove the
    biases of a layer's feed-forward network and layer norms.
    """
    for name, weight in module.named_parameters():
        if name.endswith(("in_proj_bias", "out_proj.bias")):
            weight.requires_grad_(False).zero_()
        elif weight.ndim == 2:
            weight.data = normal(*weight.shape, scale=weight.shape[1] ** -0.5)
        else:
            is_scale = name.startswith("norm") and name.endswith("weight")
            weight.data = normal(*weight.shape, mean=1.0 if is_scale else 0.0, scale=0.5)


def record(case, module, num_heads, inputs, **masks):
    """The arrays of one case, by name. In training mode, torch takes no fast path."""
    randomize(module)
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    arguments = {name: x.requires_grad_() for name, x in inputs.items()}
    if isinstance(module, torch.nn.MultiheadAttention):
        query, key, value = arguments.values() if len(arguments) == 3 else [arguments["x"]] * 3
        output, _ = module(query, key, value, **masks)
    else:
        output = module(*arguments.values(), **masks)
    output_weights = normal(*output.shape)
    leaves = arguments | weights
    gradients = torch.autograd.grad((output * output_weights).sum(), list(leaves.values()))
    arrays = {"output": output, "output_weights": output_weights, "num_heads": torch.tensor(num_heads)}
    arrays |= {f"inputs/{name}": x for name, x in arguments.items()}
    arrays |= {f"masks/{name}": mask for name, mask in masks.items()}
    arrays |= {f"weights/{name}": weight for name, weight in weights.items()}
    arrays |= {f"gradients/{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {f"{case}/{name}": array.detach().numpy() for name, array in arrays.items()}


def attention(d_model, num_heads):
    """torch's multi-head attention, without bias as in the paper."""
    return torch.nn.MultiheadAttention(d_model, num_heads, bias=False, batch_first=True, dtype=torch.float64)


def layer(kind, d_model, num_heads, d_ff):
    """An encoder or decoder layer of torch, with post-norm and ReLU as in the paper."""
    options = {"activation": "relu", "norm_first": False, "layer_norm_eps": 1e-5, "dropout": 0.0}
    return kind(d_model, num_heads, d_ff, **options, batch_first=True, dtype=torch.float64)


def main():
    """Records each case. All sizes differ, so that swapped axes are detected."""
    torch.set_num_threads(1)  # otherwise the order of sums, and so the last digit, depends on the machine
    encoder, decoder = torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer

    inputs = {"x": normal(2, 7, 12)}
    masks = {"attn_mask": arbitrary(2 * 3, 7, 7)}  # one mask for each head of each sequence
    arrays = record("attention_self", attention(12, 3), 3, inputs, **masks)

    inputs = {"query": normal(2, 5, 16), "key": normal(2, 9, 16), "value": normal(2, 9, 16)}
    masks = {"attn_mask": arbitrary(5, 9), "key_padding_mask": padding([9, 4], 9)}
    arrays |= record("attention_cross", attention(16, 4), 4, inputs, **masks)

    inputs, masks = {"src": normal(3, 7, 16)}, {"src_key_padding_mask": padding([7, 4, 1], 7)}
    arrays |= record("encoder_padded", layer(encoder, 16, 4, 24), 4, inputs, **masks)

    inputs, masks = {"src": normal(2, 8, 10)}, {"src_mask": causal(8)}
    arrays |= record("encoder_one_head_causal", layer(encoder, 10, 1, 7), 1, inputs, **masks)

    inputs = {"tgt": normal(3, 7, 16), "memory": normal(3, 5, 16)}
    masks = {"tgt_key_padding_mask": padding([7, 2, 5], 7), "memory_key_padding_mask": padding([3, 5, 1], 5)}
    arrays |= record("decoder_padded", layer(decoder, 16, 4, 24), 4, inputs, tgt_mask=causal(7), **masks)

    inputs = {"tgt": normal(2, 4, 10), "memory": normal(2, 9, 10)}
    masks = {"tgt_key_padding_mask": padding([3, 4], 4), "memory_key_padding_mask": padding([9, 6], 9)}
    arrays |= record("decoder_one_head", layer(decoder, 10, 1, 14), 1, inputs, tgt_mask=causal(4), **masks)

    np.savez_compressed(Path(__file__).with_name("golden.npz"), **arrays)


if __name__ == "__main__":
    main()
