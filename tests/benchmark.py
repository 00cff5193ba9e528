"""Time and memory of attention, of the encoder layer, of a training step and of greedy decoding.

    python tests/benchmark.py

Contestants take turns in every round, so that a slow moment of the machine slows all of them. For each one, a row
shows the median time ± half the range, the ratio to the first contestant's time, and the temporary memory that XLA
plans. The time of a gradient includes the forward pass. flax, torch and Hugging Face's transformers take part if they
are installed. On a GPU, sizes are larger, and bfloat16 and cuDNN's attention are measured, too. A program that needs
most of the device's memory (on a CPU, more than 4 GB) is not run.

On two CPU cores with nothing else running, in milliseconds (jax 0.10.2, flax 0.12.8, torch 2.13.0, transformers 5.24.0;
d_k = 64):

    float32                                 plain         flash        jax.nn         torch
    causal, n = 1,024, 8 heads           29 +-  5       9 +-  4      32 +-   4       9 +-  1
    its gradient                         91 +- 16      33 +-  5     123 +-  17      33 +-  2
    causal, n = 4,096, 8 heads          418 +- 73      79 +-  8     477 +-  25     108 +-  5
    its gradient                      1,740 +- 319    272 +- 12   3,133 +- 518     381 +- 16

    float32                                  here          flax         torch          BART
    base model's encoder layer         17.5 +- 1.5   17.7 +- 1.7   34.7 +- 1.9
    its gradient                         76 +- 10      74 +-  4      99 +-  9
    training step, 3 layers, d_model 256 191 +-  7                  219 +-  7
    greedy decoding                     120 +- 12                 1,509 +- 43     224 +- 18

PyTorch decodes without a KV cache. `JAX_SOFTMAX_CUSTOM_JVP=1` selects JAX's newer derivative of the softmax: the
gradient of plain attention at n = 4,096 then takes 0.6 of the time.
"""

import functools
import importlib.metadata
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

import main as program
from attention import flash_attention, scaled_dot_product_attention
from transformer_layer import encoder_layer, init_encoder_layer

try:
    import torch
except ImportError:
    torch = None
try:
    from flax import linen
except ImportError:
    linen = None
try:
    import transformers
except ImportError:
    transformers = None

VOCAB_SIZE = 96  # END and printable ASCII, as in main.py
DEVICE = jax.devices()[0]
CPU, CUDA = DEVICE.platform == "cpu", "cuda" in DEVICE.client.platform_version
CALLS = 1 if CPU else 50  # calls per measurement; on a GPU many, so that the next one is always queued
MEMORY = 0.8 * (DEVICE.memory_stats() or {}).get("bytes_limit", 5e9)  # leaves room for arguments and results

if torch and not CPU and not torch.cuda.is_available():
    torch = None  # it cannot use the device that JAX uses
if torch:
    # On a GPU, JAX multiplies float32 matrices in TF32 by default, so PyTorch does the same.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def wait(result):
    """Waits for the result, because JAX, and PyTorch on a GPU, return before it is computed."""
    jax.block_until_ready(result)
    if torch and not CPU:
        torch.cuda.synchronize()


def race(title, contestants, rounds):
    """Runs {name: (function without arguments, bytes of memory or None)} in turn, and prints their times and memory."""
    times = {name: [] for name, (_, memory) in contestants.items() if (memory or 0) < MEMORY}
    for _ in range(rounds):
        for name, milliseconds in times.items():
            function, _ = contestants[name]
            wait(function())  # warm up: the first call after another contestant's is up to a fifth slower
            start = time.perf_counter()
            for _ in range(CALLS):
                result = function()
            wait(result)
            milliseconds.append((time.perf_counter() - start) / CALLS * 1e3)
    medians = {name: statistics.median(milliseconds) for name, milliseconds in times.items()}
    print(f"\n{title}")
    for name, (_, memory) in contestants.items():
        row = "not run"
        if name in times:
            spread = (max(times[name]) - min(times[name])) / 2
            row = f"{medians[name]:9,.2f} ± {spread:6,.2f} ms  {medians[name] / next(iter(medians.values())):5.2f}"
        print(f"  {name:<22}{row}{f'{memory / 1e6:8,.0f} MB' if memory else ''}", flush=True)


def compiled(function, *arguments):
    """The compiled function with these arguments, and its temporary memory in bytes."""
    executable = jax.jit(function).lower(*arguments).compile()
    return functools.partial(executable, *arguments), executable.memory_analysis().temp_size_in_bytes


def race_forward_and_gradient(title, contestants, torch_contestant, rounds):
    """Races the forward passes of {name: (function, *arguments)}, then gradients with respect to the first argument.

    Differentiates the sum of squares. `torch_contestant()` returns a function of PyTorch without arguments, and the
    tensors to differentiate with respect to.
    """
    forward, gradient = {}, {}
    for name, (function, *arguments) in contestants.items():
        square = lambda *arguments, function=function: jnp.square(function(*arguments)).sum()  # noqa: E731
        forward[name] = compiled(function, *arguments)
        gradient[name] = compiled(jax.value_and_grad(square), *arguments)
    if torch:
        function, leaves = torch_contestant()
        forward["torch"] = torch.no_grad()(function), None
        gradient["torch"] = lambda: torch.autograd.grad(function().square().sum(), leaves), None
    race(f"{title}, forward", forward, rounds)
    race(f"{title}, gradient", gradient, rounds)


# ---- Attention -------------------------------------------------------------------------------------------------------


def jax_nn_attention(query, key, value, mask=None, *, causal=False, implementation=None):
    """`jax.nn.dot_product_attention`, as the `attention` of a layer."""
    if mask is not None:  # cuDNN does not broadcast masks over queries or keys
        mask = jnp.broadcast_to(mask, (*mask.shape[:-2], query.shape[-2], key.shape[-2]))
    swapped = (x.swapaxes(-2, -3) for x in (query, key, value))  # it has positions before heads
    options = {"mask": mask, "is_causal": causal, "implementation": implementation}
    return jax.nn.dot_product_attention(*swapped, **options).swapaxes(-2, -3)


# For GPUs, in half precision.
cudnn_attention = functools.partial(jax_nn_attention, implementation="cudnn")


def race_attention(batch, heads, length, dtype, rounds):
    """Causal attention with d_k = 64. The gradient is with respect to query, key and value."""
    inputs = tuple(jax.random.normal(jax.random.key(0), (3, batch, heads, length, 64), dtype))
    flash = functools.partial(flash_attention, block_size=512 if CPU else min(2048, length // 2))
    functions = {"plain": scaled_dot_product_attention, "flash": flash, "jax.nn": jax_nn_attention}
    if CUDA and dtype == "bfloat16":
        functions["cuDNN"] = cudnn_attention
    contestants = {
        name: (lambda qkv, function=function: function(*qkv, causal=True), inputs)
        for name, function in functions.items()
    }

    def torch_attention():
        tensors = [torch.from_dlpack(x).clone().requires_grad_() for x in inputs]
        attention = torch.nn.functional.scaled_dot_product_attention
        return functools.partial(attention, *tensors, is_causal=True), tensors

    title = f"Causal attention, n = {length:,}, {batch} x {heads} heads of 64, {dtype}"
    race_forward_and_gradient(title, contestants, torch_attention, rounds)


# ---- The encoder layer -----------------------------------------------------------------------------------------------


def matrix_products(params, x):
    """Only the matrix products of the encoder layer."""
    attention, feed_forward = params["self_attention"], params["feed_forward"]
    query, key, value = (jnp.einsum("...nd,dhk->...hnk", x, attention[name]) for name in ("query", "key", "value"))
    scores = jnp.einsum("...nk,...mk->...nm", query, key)
    heads = jnp.einsum("...nm,...mv->...nv", scores, value)
    x = jnp.einsum("...hnv,hvd->...nd", heads, attention["output"])
    return x @ feed_forward["w1"] @ feed_forward["w2"]


def flax_layer(rng, x, d_model, heads, d_ff):
    """The same layer in Flax: function and parameters."""

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x):
            attention = linen.MultiHeadDotProductAttention(heads, use_bias=False)
            x = linen.LayerNorm(epsilon=1e-5)(x + attention(x, x))
            hidden = linen.relu(linen.Dense(d_ff)(x))
            return linen.LayerNorm(epsilon=1e-5)(x + linen.Dense(d_model)(hidden))

    return Layer().apply, jax.jit(Layer().init)(rng, x)


def race_layer(batch, length, d_model, heads, d_ff, dtype, rounds):
    """The encoder layer and its peers. The gradient is with respect to the parameters."""
    rng, sizes = jax.random.key(0), (d_model, heads, d_ff)
    x = jax.random.normal(rng, (batch, length, d_model), dtype)
    params = jax.jit(init_encoder_layer, static_argnums=(1, 2, 3))(rng, *sizes)
    layers = {"its matrix products": (matrix_products, params), "encoder_layer": (encoder_layer, params)}
    if CUDA and dtype == "bfloat16":
        layers["encoder_layer, cuDNN"] = functools.partial(encoder_layer, attention=cudnn_attention), params
    if linen:
        layers["flax"] = flax_layer(rng, x, *sizes)
    contestants = {
        name: (function, jax.tree.map(lambda leaf: leaf.astype(dtype), params), x)
        for name, (function, params) in layers.items()
    }

    def torch_layer():
        tensor = torch.from_dlpack(x).clone()
        options = {"dropout": 0.0, "batch_first": True, "device": tensor.device, "dtype": tensor.dtype}
        layer = torch.nn.TransformerEncoderLayer(*sizes, **options)  # in training mode, but without dropout
        return functools.partial(layer, tensor), list(layer.parameters())

    title = f"Encoder layer {sizes}, {batch} x {length:,} positions, {dtype}"
    race_forward_and_gradient(title, contestants, torch_layer, rounds)


# ---- The whole model -------------------------------------------------------------------------------------------------


def torch_model(source, target, layers, d_model, heads, d_ff):
    """PyTorch's training step and greedy decoding, with nn.Transformer and torch.optim.Adam."""
    device = torch.from_dlpack(jnp.zeros(1)).device
    source, target = (torch.tensor(x.copy(), device=device) for x in (source, target))
    shifted = torch.roll(target, 1, dims=-1)
    shifted[:, 0] = program.END
    length, options = source.shape[-1], {"dropout": 0.0, "batch_first": True, "device": device}
    model = torch.nn.Transformer(d_model, heads, layers, layers, d_ff, **options)
    embedding = torch.nn.Embedding(VOCAB_SIZE, d_model, device=device)
    positions = torch.tensor(np.asarray(program.positional_encoding(length, d_model)), device=device)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(length, device=device)
    optimizer = torch.optim.Adam([*model.parameters(), *embedding.parameters()], 1e-4, betas=(0.9, 0.98), eps=1e-9)
    cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=program.LABEL_SMOOTHING)

    def embed(tokens):
        return embedding(tokens) * d_model**0.5 + positions[: tokens.shape[-1]]

    def train_step():
        optimizer.zero_grad()
        x = model(embed(source), embed(shifted), tgt_mask=causal, tgt_is_causal=True)
        loss = cross_entropy((x @ embedding.weight.T).flatten(0, 1), target.flatten())
        loss.backward()
        optimizer.step()
        return loss

    @torch.no_grad()
    def decode():
        memory = model.encoder(embed(source))
        written = torch.full_like(source[:, :1], program.END)
        for i in range(1, length + 1):
            x = model.decoder(embed(written), memory, tgt_mask=causal[:i, :i], tgt_is_causal=True)
            written = torch.cat([written, (x[:, -1:] @ embedding.weight.T).argmax(-1)], dim=1)
        return written[:, 1:]

    return train_step, decode


def bart_decoding(source, layers, d_model, heads, d_ff):
    """Greedy decoding of a model of the same size, with random weights and a KV cache: Hugging Face's BART."""
    source = torch.tensor(source, device=torch.from_dlpack(jnp.zeros(1)).device)
    length = source.shape[-1]
    config = transformers.BartConfig(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=length + 1,
        d_model=d_model,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=d_ff,
        decoder_ffn_dim=d_ff,
        pad_token_id=program.END,
        bos_token_id=program.END,
        eos_token_id=program.END,
        decoder_start_token_id=program.END,
        forced_eos_token_id=None,
    )
    model = transformers.BartForConditionalGeneration(config).to(source.device).eval()
    options = {"do_sample": False, "num_beams": 1, "use_cache": True}
    # As many tokens as here, where no output ends early either.
    options |= {"min_new_tokens": length, "max_new_tokens": length}
    return functools.partial(model.generate, source, attention_mask=torch.ones_like(source), **options)


def race_model(batch, length, layers, d_model, heads, d_ff, rounds):
    """A training step, and greedy decoding."""
    source = np.random.default_rng(0).integers(1, VOCAB_SIZE, (batch, length))  # without END: no padding
    target, sizes = source[:, ::-1], (layers, d_model, heads, d_ff)
    params = jax.jit(lambda: program.init_model(jax.random.key(0), VOCAB_SIZE, *sizes))()
    step = compiled(program.train_step, params, program.init_adam(params), 1, source, target, 400)
    decode = compiled(functools.partial(program.generate, length=length), params, source)
    steps, decodings = {"JAXformers": step}, {"JAXformers": decode}
    if torch:
        train_step, decode = torch_model(source, target, *sizes)
        steps["torch"], decodings["torch, no KV cache"] = (train_step, None), (decode, None)
    if torch and transformers:
        decodings["BART"] = bart_decoding(source, *sizes), None
    model = f"{layers} + {layers} layers {sizes[1:]}, {batch} x {length} tokens, float32"
    race(f"Training step, {model}", steps, rounds)
    race(f"Greedy decoding, {model}", decodings, rounds)


def main():
    """Runs all races."""
    start = time.perf_counter()
    peers = {"flax": linen, "torch": torch, "transformers": transformers}
    versions = ["jax", "jaxlib", *(name for name, module in peers.items() if module)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in versions)
    print(f"On {DEVICE.device_kind} ({os.cpu_count()} cores), Python {sys.version.split()[0]}, {versions}.")
    for batch, heads, length in [(16, 4, 64), (8, 8, 128), (1, 8, 1024)]:
        race_attention(batch, heads, length, "float32", 15)
    for dtype in ["float32"] if CPU else ["float32", "bfloat16"]:
        for batch, length in [(1, 512), (1, 4096)] if CPU else [(4, 2048), (4, 4096), (1, 16384)]:
            race_attention(batch, 8, length, dtype, 5)
        race_layer(8 if CPU else 64, 128, 512, 8, 2048, dtype, 9)  # the paper's base model, Table 3
    race_model(16, 64, 3, 256, 4, 1024, 9)
    print(f"\nThis took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
