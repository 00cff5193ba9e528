"""Time and memory of attention, of the encoder layer, of a training step and of greedy decoding, as Markdown tables.

    python tests/benchmark.py

Contestants run in turn, round after round, so that a slow moment of the machine slows all of them. A time is the
median of the rounds, ± half the range. The time of a gradient includes the forward pass. Memory is temporary memory, as
`memory_analysis` of the compiled program reports it. flax and torch take part if they are installed. On a GPU, sizes
are larger, there are tables in bfloat16 too, and cuDNN's attention takes part in them. A dash means that a program
needs most of the device's memory (on a CPU, more than 4 GB) and is not run.
"""

import functools
import importlib.metadata
import importlib.util
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

MODELS = {"base": (512, 8, 2048), "big": (1024, 16, 4096)}  # d_model, heads and d_ff, from Table 3 of the paper
DEVICE = jax.devices()[0]
CPU, CUDA = DEVICE.platform == "cpu", "cuda" in DEVICE.client.platform_version
CALLS = 1 if CPU else 50  # calls per measurement; on a GPU many, so that the next one is always queued
MEMORY = 0.8 * (DEVICE.memory_stats() or {}).get("bytes_limit", 5e9)  # leaves room for arguments and results


def installed(package):
    """Whether a package is installed and, if it is PyTorch, can use the device that JAX uses."""
    if not importlib.util.find_spec(package):
        return False
    return CPU or package != "torch" or importlib.import_module("torch").cuda.is_available()


def wait(result):
    """Waits for the result, because JAX, and PyTorch on a GPU, return before it is computed."""
    jax.block_until_ready(result)
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def race(contestants, rounds):
    """Median and half the range, in milliseconds, of each {name: function without arguments}, run in turn."""
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            wait(function())  # warm up: the first call after another contestant's is up to a fifth slower
            start = time.perf_counter()
            for _ in range(CALLS):
                result = function()
            wait(result)
            times[name].append((time.perf_counter() - start) / CALLS * 1e3)
    return {name: (statistics.median(values), (max(values) - min(values)) / 2) for name, values in times.items()}


def compiled(kind, function, arguments, argnums=0):
    """The forward pass, or value and gradient of its sum of squares, and its temporary memory in bytes, or None."""
    if kind == "gradient":
        forward = function
        function = jax.value_and_grad(lambda *arguments: jnp.square(forward(*arguments)).sum(), argnums)
    executable = jax.jit(function).lower(*arguments).compile()
    memory = getattr(executable.memory_analysis(), "temp_size_in_bytes", None)
    return functools.partial(executable, *arguments), memory


def torch_contestant(kind, function, leaves):
    """PyTorch's forward pass, or gradient of its sum of squares with respect to the leaves."""
    import torch

    # On a GPU, JAX multiplies float32 matrices in TF32 by default, so PyTorch does the same.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if kind == "forward":
        return torch.no_grad()(function)
    return lambda: torch.autograd.grad(function().square().sum(), leaves)


def table(header, rows):
    """Prints a Markdown table."""
    print(f"\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def milliseconds(median, spread):
    """A median and its spread, with about three significant digits."""
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:,.{digits}f} ± {spread:,.{digits}f} ms"


# ---- Attention -------------------------------------------------------------------------------------------------------


def jax_nn_attention(query, key, value, mask=None, *, causal=False, implementation=None):
    """`jax.nn.dot_product_attention`, which has positions before heads, as the `attention` of a layer."""
    if mask is not None:  # cuDNN does not broadcast masks over queries or keys
        mask = jnp.broadcast_to(mask, (*mask.shape[:-2], query.shape[-2], key.shape[-2]))
    swapped = (x.swapaxes(-2, -3) for x in (query, key, value))
    options = {"mask": mask, "is_causal": causal, "implementation": implementation}
    return jax.nn.dot_product_attention(*swapped, **options).swapaxes(-2, -3)


cudnn_attention = functools.partial(jax_nn_attention, implementation="cudnn")  # CUDA and half precision only


def attention_table(batch, lengths, dtype, rounds):
    """Causal attention of 8 heads of 64: forward, and gradient with respect to query, key and value."""
    rows = []
    for length in lengths:
        flash = functools.partial(flash_attention, block_size=512 if CPU else min(2048, length // 2))
        functions = {"plain": scaled_dot_product_attention, "flash": flash, "jax.nn": jax_nn_attention}
        if CUDA and dtype == "bfloat16":
            functions["cuDNN"] = cudnn_attention
        arguments = tuple(jax.random.normal(jax.random.key(0), (3, batch, 8, length, 64), dtype))
        for kind in ("forward", "gradient"):
            memory, contestants = {}, {}
            for name, function in functions.items():
                attend = functools.partial(function, causal=True)
                contestant, memory[name] = compiled(kind, attend, arguments, argnums=(0, 1, 2))
                if not memory[name] or memory[name] < MEMORY:
                    contestants[name] = contestant
            if installed("torch"):
                contestants["torch"] = torch_attention(kind, arguments)
            times = race(contestants, rounds)
            columns = [*functions, *(["torch"] if "torch" in contestants else [])]
            row = [f"n = {length:,}, {kind}"]
            for name in columns:
                size = f", {memory[name] / 1e6:,.0f} MB" if memory.get(name) else ""
                row.append((milliseconds(*times[name]) if name in times else "-") + size)
            rows.append(row)
    table([f"causal attention, {batch} x 8 heads of 64, {dtype}", *columns], rows)


def torch_attention(kind, arguments):
    """PyTorch's fused attention on the same inputs and device."""
    import torch

    tensors = [torch.from_dlpack(x).clone().requires_grad_() for x in arguments]
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, *tensors, is_causal=True)
    return torch_contestant(kind, attend, tensors)


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
    """(params, function) of the same layer in Flax."""
    from flax import linen

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x):
            attention = linen.MultiHeadDotProductAttention(heads, use_bias=False)
            x = linen.LayerNorm(epsilon=1e-5)(x + attention(x, x))
            hidden = linen.relu(linen.Dense(d_ff)(x))
            return linen.LayerNorm(epsilon=1e-5)(x + linen.Dense(d_model)(hidden))

    return jax.jit(Layer().init)(rng, x), Layer().apply


def torch_layer(kind, x, d_model, heads, d_ff):
    """PyTorch's own encoder layer, in training mode without dropout."""
    import torch

    x = torch.from_dlpack(x).clone()
    options = {"dropout": 0.0, "batch_first": True, "device": x.device, "dtype": x.dtype}
    layer = torch.nn.TransformerEncoderLayer(d_model, heads, d_ff, **options)
    return torch_contestant(kind, functools.partial(layer, x), list(layer.parameters()))


def layer_table(model, batch, length, dtype, rounds):
    """The encoder layer of a model and its peers: forward, and gradient with respect to the parameters."""
    rng, sizes = jax.random.key(0), MODELS[model]
    x = jax.random.normal(rng, (batch, length, sizes[0]), dtype)
    params = jax.jit(init_encoder_layer, static_argnums=(1, 2, 3))(rng, *sizes)
    layers = {"its matrix products": (params, matrix_products), "encoder_layer": (params, encoder_layer)}
    if CUDA and dtype == "bfloat16":
        layers["encoder_layer, cuDNN"] = params, functools.partial(encoder_layer, attention=cudnn_attention)
    if installed("flax"):
        layers["flax"] = flax_layer(rng, x, *sizes)
    rows = {}
    for kind in ("forward", "gradient"):
        contestants = {}
        for name, (parameters, function) in layers.items():
            parameters = jax.tree.map(lambda leaf: leaf.astype(dtype), parameters)
            contestants[name], _ = compiled(kind, function, (parameters, x))
        if installed("torch"):
            contestants["torch"] = torch_layer(kind, x, *sizes)
        times = race(contestants, rounds)
        for name, figures in times.items():
            ratio = figures[0] / times["its matrix products"][0]
            rows.setdefault(name, [name]).extend([milliseconds(*figures), f"{ratio:.2f}"])
    header = f"the layer of the {model} model, {batch} x {length:,} positions, {dtype}"
    table([header, "forward", "/ products", "gradient", "/ products"], rows.values())


# ---- The whole model -------------------------------------------------------------------------------------------------


def torch_model(source, target, layers, d_model, heads, d_ff):
    """PyTorch's training step and greedy decoding, with nn.Transformer and torch.optim.Adam."""
    import torch

    device = torch.from_dlpack(jnp.zeros(1)).device
    source, target = (torch.tensor(x.copy(), device=device) for x in (source, target))
    shifted = torch.roll(target, 1, dims=-1)
    shifted[:, 0] = program.START
    length, options = source.shape[-1], {"dropout": 0.0, "batch_first": True, "device": device}
    model = torch.nn.Transformer(d_model, heads, layers, layers, d_ff, **options)
    embedding = torch.nn.Embedding(len(program.SYMBOLS), d_model, device=device)
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
        written = torch.full_like(source[:, :1], program.START)
        for i in range(1, length + 1):
            x = model.decoder(embed(written), memory, tgt_mask=causal[:i, :i], tgt_is_causal=True)
            written = torch.cat([written, (x[:, -1:] @ embedding.weight.T).argmax(-1)], dim=1)
        return written[:, 1:]

    return train_step, decode


def model_table(batch, length, layers, d_model, heads, d_ff, rounds):
    """A training step and greedy decoding of encoder and decoder."""
    source = program.random_strings(np.random.default_rng(0), batch, length)
    target = program.task(source)
    sizes = len(program.SYMBOLS), layers, d_model, heads, d_ff
    params = jax.jit(lambda: program.init_model(jax.random.key(0), *sizes))()
    train, decode = jax.jit(program.train_step), jax.jit(program.generate)
    state = params, program.init_adam(params)
    steps = {"JAXformers": functools.partial(train, *state, 1, source, target, 400)}
    decodings = {"JAXformers": functools.partial(decode, params, source)}
    if installed("torch"):
        steps["torch"], decodings["torch"] = torch_model(source, target, layers, d_model, heads, d_ff)
    rows = [
        [name, *(milliseconds(*figures) for figures in race(contestants, rounds).values())]
        for name, contestants in (("training step", steps), ("greedy decoding", decodings))
    ]
    table([f"{layers} + {layers} layers, d_model {d_model}, {batch} x {length} tokens", *steps], rows)


def main():
    """Prints the tables."""
    start = time.perf_counter()
    versions = ["jax", "jaxlib", *(package for package in ("flax", "torch") if installed(package))]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in versions)
    device = f"{DEVICE.device_kind} ({os.cpu_count()} cores)" if CPU else DEVICE.device_kind
    print(f"On {device}, Python {sys.version.split()[0]}, {versions}.")
    if CPU:
        attention_table(1, [512, 4096], "float32", 5)
        layer_table("base", 8, 128, "float32", 9)
    else:
        for dtype in ("float32", "bfloat16"):
            attention_table(4, [2048, 4096], dtype, 5)
            attention_table(1, [16384], dtype, 5)
        layer_table("base", 64, 128, "float32", 9)
        layer_table("big", 16, 1024, "bfloat16", 9)
    model_table(16, 64, 3, 256, 4, 1024, 9)
    print(f"\nThis took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
