"""Time and memory of the attention functions, of the layer and of its compilation, as Markdown tables for README.

    python tests/benchmark.py [--quick]

Contestants run in turn, round after round, so that a machine that slows down slows all of them; a figure is the median
of the rounds, followed by half the distance from the fastest to the slowest. Temporary memory is what XLA allocates
besides arguments and results (`memory_analysis`). A gradient is timed together with the value, as training takes both.
flax, equinox, dm-haiku and torch join where they are installed. On a GPU or TPU the sizes are larger, there are tables
in bfloat16 too, and cuDNN's attention joins in these. A dash is a figure that is not there: who needs most of the
device's memory (on a CPU, 4 GB) is not timed.
"""

import argparse
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

from attention import flash_attention, scaled_dot_product_attention
from transformer_layer import encoder, encoder_layer, init_encoder, init_encoder_layer

PEERS = {"flax": "flax", "equinox": "equinox", "dm-haiku": "haiku", "torch": "torch"}  # package: its module
MODELS = {"base": (512, 8, 2048), "big": (1024, 16, 4096)}  # d_model, heads and d_ff, from Table 3 of the paper
DEVICE = jax.devices()[0]
CPU, CUDA = DEVICE.platform == "cpu", "cuda" in DEVICE.client.platform_version
CALLS = 1 if CPU else 50  # between two waits, so that the device always has the next call at hand
MEMORY = 0.8 * (DEVICE.memory_stats() or {}).get("bytes_limit", 5e9)  # the rest is for arguments and results


def joins(package):
    """Whether a package is installed and, if it is PyTorch, can use the device that JAX uses."""
    if not importlib.util.find_spec(PEERS[package]):
        return False
    return CPU or package != "torch" or importlib.import_module("torch").cuda.is_available()


def progress(text):
    """On a terminal, show what is being done, in place."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def wait(result):
    """Until the result is there: JAX returns before it is, and so does PyTorch on a GPU."""
    jax.block_until_ready(result)
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def race(label, contestants, rounds):
    """Median and half the range, in milliseconds, of each {name: function without arguments}, run in turn."""
    times = {name: [] for name in contestants}
    for i in range(rounds):
        for name, function in contestants.items():
            progress(f"{label}: {name}, round {i + 1} of {rounds}")
            wait(function())  # not counted: the first after another contestant is up to a fifth slower
            start = time.perf_counter()
            for _ in range(CALLS):
                result = function()
            wait(result)
            times[name].append((time.perf_counter() - start) / CALLS * 1e3)
    progress("")
    return {name: (statistics.median(values), (max(values) - min(values)) / 2) for name, values in times.items()}


def compiled(kind, function, arguments, argnums=0):
    """The forward pass, or value and gradient of its sum of squares, and the bytes of temporary memory or None."""
    traced = function
    if kind == "gradient":
        traced = jax.value_and_grad(lambda *arguments: jnp.square(function(*arguments)).sum(), argnums)
    executable = jax.jit(traced).lower(*arguments).compile()
    memory = getattr(executable.memory_analysis(), "temp_size_in_bytes", None)
    return functools.partial(executable, *arguments), memory


def torch_contestant(kind, function, leaves):
    """PyTorch's forward pass, or gradient of its sum of squares with respect to the leaves."""
    import torch

    # On a GPU, JAX by default multiplies float32 matrices in TF32. So shall PyTorch.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if kind == "forward":
        return torch.no_grad()(function)
    return lambda: torch.autograd.grad(function().square().sum(), leaves)


def table(header, rows):
    """Print a Markdown table."""
    print(f"\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def milliseconds(median, spread):
    """A median and, unless it is of a single run, its spread, with three significant digits or more."""
    if median is None:
        return "-"
    digits = 0 if median >= 100 else 1 if median >= 10 else 2 if median >= 1 else 3
    return f"{median:,.{digits}f}" + (f" ± {spread:,.{digits}f}" if spread else "") + " ms"


def megabytes(memory):
    """The memory, or a dash where XLA does not say."""
    return "-" if memory is None else f"{memory / 1e6:,.0f} MB"


def ratio(a, b, digits):
    """a / b, or a dash where one of them is not there."""
    return f"{a / b:.{digits}f} x" if a and b else "-"


# ---- Attention over the length ---------------------------------------------------------------------------------------


def jax_nn_attention(query, key, value, mask=None, *, causal=False, implementation=None):
    """`jax.nn.dot_product_attention`, which has its heads after its positions, as the `attention` of a layer."""
    if mask is not None:  # cuDNN takes none that broadcasts over queries or keys
        mask = jnp.broadcast_to(mask, (*mask.shape[:-2], query.shape[-2], key.shape[-2]))
    swapped = (x.swapaxes(-2, -3) for x in (query, key, value))
    options = {"mask": mask, "is_causal": causal, "implementation": implementation}
    return jax.nn.dot_product_attention(*swapped, **options).swapaxes(-2, -3)


cudnn_attention = functools.partial(jax_nn_attention, implementation="cudnn")  # CUDA and half precision only


def attention_table(sizes, dtype):
    """Causal attention of 8 heads of 64, forward and gradient with respect to q, k and v. sizes: (b, n, rounds)."""
    rows = []
    for batch, length, rounds in sizes:
        flash = functools.partial(flash_attention, block_size=512 if CPU else min(2048, length // 2))
        functions = {"plain": scaled_dot_product_attention, "flash": flash, "jax.nn": jax_nn_attention}
        if CUDA and dtype == "bfloat16":
            functions["cuDNN"] = cudnn_attention
        arguments = tuple(jax.random.normal(jax.random.key(0), (3, batch, 8, length, 64), dtype))
        for kind in ("forward", "gradient"):
            label, memory, contestants = f"attention, n = {length}, {kind}", {}, {}
            for name, function in functions.items():
                progress(f"{label}: compiling {name}")
                forward = functools.partial(function, causal=True)
                contestant, memory[name] = compiled(kind, forward, arguments, argnums=(0, 1, 2))
                if not memory[name] or memory[name] < MEMORY:
                    contestants[name] = contestant
            if joins("torch"):
                contestants["torch"] = torch_attention(kind, arguments)
            times = dict.fromkeys(functions, (None, None)) | race(label, contestants, rounds)
            row = [f"{length:,}" if batch == 1 else f"{batch} x {length:,}", kind]
            row += [f"{milliseconds(*times[name])}, {megabytes(memory[name])}" for name in functions]
            row += [milliseconds(*times[name]) for name in times if name not in functions]
            faster = ratio(times["jax.nn"][0], times["flash"][0], 1)
            rows.append([*row, f"{faster}, {ratio(memory['jax.nn'], memory['flash'], 0)}"])
    blocks = "512" if CPU else "n / 2 and at most 2,048"
    print(f"\nCausal attention, 8 heads of 64, {dtype}, flash in blocks of {blocks}:")
    table(["n", "", *times, "jax.nn / flash: time, memory"], rows)


def torch_attention(kind, arguments):
    """PyTorch's hand-written kernel on the same numbers and device."""
    import torch

    tensors = [torch.from_dlpack(x).clone().requires_grad_() for x in arguments]
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, *tensors, is_causal=True)
    return torch_contestant(kind, attend, tensors)


# ---- The layer -------------------------------------------------------------------------------------------------------


def matrix_products(params, x):
    """The matrix products of the encoder layer and nothing else."""
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


def equinox_layer(rng, x, d_model, heads, d_ff):
    """(params, function) of the same layer in Equinox."""
    import equinox as eqx

    rngs = jax.random.split(rng, 3)
    params = {
        "attention": eqx.nn.MultiheadAttention(heads, d_model, key=rngs[0]),
        "norms": [eqx.nn.LayerNorm(d_model, eps=1e-5) for _ in range(2)],
        "linear": [eqx.nn.Linear(d_model, d_ff, key=rngs[1]), eqx.nn.Linear(d_ff, d_model, key=rngs[2])],
    }
    arrays, static = eqx.partition(params, eqx.is_array)

    def one(params, x):
        x = jax.vmap(params["norms"][0])(x + params["attention"](x, x, x))
        hidden = jax.nn.relu(jax.vmap(params["linear"][0])(x))
        return jax.vmap(params["norms"][1])(x + jax.vmap(params["linear"][1])(hidden))

    return arrays, lambda arrays, x: jax.vmap(lambda x: one(eqx.combine(arrays, static), x))(x)


def haiku_layer(rng, x, d_model, heads, d_ff):
    """(params, function) of the same layer in Haiku."""
    import haiku as hk

    def layer(x):
        attention = hk.MultiHeadAttention(
            heads, d_model // heads, w_init=hk.initializers.VarianceScaling(), with_bias=False
        )
        x = hk.LayerNorm(-1, True, True)(x + attention(x, x, x))
        hidden = jax.nn.relu(hk.Linear(d_ff)(x))
        return hk.LayerNorm(-1, True, True)(x + hk.Linear(d_model)(hidden))

    transformed = hk.without_apply_rng(hk.transform(layer))
    return jax.jit(transformed.init)(rng, x), transformed.apply


def torch_layer(kind, x, d_model, heads, d_ff):
    """PyTorch's own encoder layer, in training mode without dropout."""
    import torch

    x = torch.from_dlpack(x).clone()
    options = {"dropout": 0.0, "batch_first": True, "device": x.device, "dtype": x.dtype}
    layer = torch.nn.TransformerEncoderLayer(d_model, heads, d_ff, **options)
    return torch_contestant(kind, functools.partial(layer, x), list(layer.parameters()))


def layer_table(model, batch, length, dtype, rounds):
    """The encoder layer of a model, forward and gradient with respect to its parameters, and its peers."""
    rng, sizes = jax.random.key(0), MODELS[model]
    x = jax.random.normal(rng, (batch, length, sizes[0]), dtype)
    params = jax.jit(init_encoder_layer, static_argnums=(1, 2, 3))(rng, *sizes)
    layers = {"its matrix products": (params, matrix_products), "encoder_layer": (params, encoder_layer)}
    if CUDA and dtype == "bfloat16":
        layers["encoder_layer, cuDNN"] = params, functools.partial(encoder_layer, attention=cudnn_attention)
    for package, build in (("flax", flax_layer), ("equinox", equinox_layer), ("dm-haiku", haiku_layer)):
        if joins(package):
            layers[package] = build(rng, x, *sizes)
    rows = {}
    for kind in ("forward", "gradient"):
        contestants = {}
        for name, (parameters, function) in layers.items():
            progress(f"layer, {kind}: compiling {name}")
            parameters = jax.tree.map(lambda leaf: leaf.astype(dtype), parameters)
            contestants[name], _ = compiled(kind, function, (parameters, x))
        if joins("torch"):
            contestants["torch"] = torch_layer(kind, x, *sizes)
        times = race(f"layer, {kind}", contestants, rounds)
        bare = times["its matrix products"][0]
        for name, figures in times.items():
            rows.setdefault(name, [name]).extend([milliseconds(*figures), f"{bare / figures[0]:.2f}"])
    header = f"the layer of the {model} model, {batch} x {length:,} positions, {dtype}"
    table([header, "forward", "products / time", "gradient", "products / time"], rows.values())


# ---- Compilation over the depth --------------------------------------------------------------------------------------


def depth_table(depths):
    """Seconds to trace and compile the encoder of the base model: `jax.lax.scan` against a Python loop."""

    def loop(params, x):
        for i in range(len(params["feed_forward"]["b1"])):
            x = encoder_layer(jax.tree.map(lambda leaf, i=i: leaf[i], params), x)
        return x

    def seconds(function, depth):
        progress(f"compiling {depth} layers")
        params = jax.eval_shape(lambda: init_encoder(jax.random.key(0), depth, *MODELS["base"]))
        x = jax.ShapeDtypeStruct((8, 128, MODELS["base"][0]), jnp.float32)
        start = time.perf_counter()
        # A new function each time, so that JAX does not find the compiled one in its cache.
        jax.jit(lambda params, x: function(params, x)).lower(params, x).compile()
        return time.perf_counter() - start

    seconds(encoder, depths[0])  # not counted: the first time, JAX also loads and traces parts of its own
    rows = []
    for name, function in (("`jax.lax.scan`", encoder), ("Python loop", loop)):
        times = [seconds(function, depth) for depth in depths]
        rows.append([name, *(f"{duration:.2f} s" for duration in times), f"{times[-1] / times[0]:.1f} x"])
    progress("")
    table(["time to compile", *(f"{depth} layers" for depth in depths), "ratio"], rows)


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Print the benchmark's tables in Markdown.")
    parser.add_argument("--quick", action="store_true", help="small sizes and one round, to see that it works")
    quick = parser.parse_args().quick
    versions = ["jax", "jaxlib", *(package for package in PEERS if joins(package))]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in versions)
    device = f"{DEVICE.device_kind} ({os.cpu_count()} cores)" if CPU else DEVICE.device_kind
    print(f"On {device}, Python {sys.version.split()[0]}, {versions}.")
    print("Medians of runs in turn, ± half the range.")
    dtypes = "float32", "bfloat16"
    if quick:
        for dtype in dtypes:
            attention_table([(1, 64, 1)], dtype)
            layer_table("base", 1, 64, dtype, 1)
        depth_table([1, 2])
    elif CPU:
        attention_table([(1, 512, 9), (1, 1024, 5), (1, 4096, 3), (1, 8192, 1)], "float32")
        layer_table("base", 8, 128, "float32", 9)
        depth_table([6, 48])
    else:
        for dtype in dtypes:
            attention_table([(8, 2048, 5), (4, 4096, 5), (2, 8192, 5), (1, 16384, 5)], dtype)
        layer_table("base", 64, 128, "float32", 9)
        layer_table("big", 16, 1024, "bfloat16", 9)
        depth_table([6, 48])


if __name__ == "__main__":
    main()
