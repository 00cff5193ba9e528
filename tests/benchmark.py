"""Time and memory of the attention functions, of the layer and of its compilation, as Markdown tables for README.

    python tests/benchmark.py [--quick]

Contestants run in turn, round after round, so that a machine that slows down slows all of them; a figure is the median
of the rounds, followed by half the distance from the fastest to the slowest. Temporary memory is what XLA allocates
besides arguments and results (`memory_analysis`). A gradient is timed together with the value, as training takes both.
flax, equinox, dm-haiku and torch join where they are installed.
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

PEERS = ("flax", "equinox", "dm-haiku", "torch")


def progress(text):
    """On a terminal, show what is being done, in place."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def race(label, contestants, rounds):
    """Median and half the range, in milliseconds, of each {name: function without arguments}, run in turn."""
    times = {name: [] for name in contestants}
    for i in range(rounds):
        for name, function in contestants.items():
            progress(f"{label}: {name}, round {i + 1} of {rounds}")
            jax.block_until_ready(function())  # not counted: the first after another contestant is up to a fifth slower
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append((time.perf_counter() - start) * 1e3)
    progress("")
    return {name: (statistics.median(values), (max(values) - min(values)) / 2) for name, values in times.items()}


def table(header, rows):
    """Print a Markdown table."""
    print(f"\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def milliseconds(median, spread):
    """A median and, unless it is of a single run, its spread, with three significant digits or more."""
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:,.{digits}f}" + (f" ± {spread:,.{digits}f}" if spread else "")


# ---- Attention over the length ---------------------------------------------------------------------------------------


def jax_nn_attention(query, key, value, causal):
    """`jax.nn.dot_product_attention`, which has its heads after its positions."""
    swapped = (x.swapaxes(-2, -3) for x in (query, key, value))
    return jax.nn.dot_product_attention(*swapped, is_causal=causal).swapaxes(-2, -3)


def attention_table(lengths, rounds):
    """Causal attention, batch 1, 8 heads of 64, float32: forward, and gradient with respect to q, k and v."""
    functions = {
        "plain": scaled_dot_product_attention,
        "flash": flash_attention,
        "jax.nn": jax_nn_attention,
    }
    rows = []
    for length, count in zip(lengths, rounds, strict=True):
        query, key, value, weight = jax.random.normal(jax.random.key(0), (4, 1, 8, length, 64))
        for kind in ("forward", "gradient"):
            memory, contestants = {}, {}
            for name, function in functions.items():
                forward = functools.partial(function, causal=True)
                if kind == "gradient":

                    def loss(query, key, value, weight, forward=forward):
                        return jnp.vdot(forward(query, key, value), weight)

                    arguments, traced = (query, key, value, weight), jax.value_and_grad(loss, argnums=(0, 1, 2))
                else:
                    arguments, traced = (query, key, value), forward
                progress(f"attention, n = {length}, {kind}: compiling {name}")
                compiled = jax.jit(traced).lower(*arguments).compile()
                memory[name] = compiled.memory_analysis().temp_size_in_bytes
                contestants[name] = functools.partial(compiled, *arguments)
            if importlib.util.find_spec("torch"):
                contestants["torch"] = torch_attention(arguments, kind)
            times = race(f"attention, n = {length}, {kind}", contestants, count)
            rows.append(
                [f"{length:,}", kind]
                + [f"{milliseconds(*times[name])} ms, {memory[name] / 1e6:,.0f} MB" for name in functions]
                + [f"{milliseconds(*times[name])} ms" for name in times if name not in functions]
                + [f"{times['jax.nn'][0] / times['flash'][0]:.1f} x, {memory['jax.nn'] / memory['flash']:.0f} x"]
            )
    peers = [name for name in times if name not in functions]
    table(["n", "", *functions, *peers, "jax.nn / flash: time, memory"], rows)


def torch_attention(arguments, kind):
    """PyTorch's hand-written CPU kernel on the same numbers."""
    import torch

    tensors = [torch.from_dlpack(x).clone() for x in arguments]
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    if kind == "forward":
        return lambda: attend(*tensors).numpy()
    leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
    return lambda: [x.numpy() for x in torch.autograd.grad(torch.sum(attend(*leaves) * tensors[3]), leaves)]


# ---- The layer at base size ------------------------------------------------------------------------------------------

D_MODEL, HEADS, D_FF = 512, 8, 2048


def matrix_products(params, x):
    """The matrix products of the encoder layer and nothing else."""
    attention, feed_forward = params["self_attention"], params["feed_forward"]
    query, key, value = (jnp.einsum("...nd,dhk->...hnk", x, attention[name]) for name in ("query", "key", "value"))
    scores = jnp.einsum("...nk,...mk->...nm", query, key)
    heads = jnp.einsum("...nm,...mv->...nv", scores, value)
    x = jnp.einsum("...hnv,hvd->...nd", heads, attention["output"])
    return x @ feed_forward["w1"] @ feed_forward["w2"]


def flax_layer(rng, x):
    """(params, function) of the same layer in Flax."""
    from flax import linen

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x):
            attention = linen.MultiHeadDotProductAttention(HEADS, use_bias=False)
            x = linen.LayerNorm(epsilon=1e-5)(x + attention(x, x))
            hidden = linen.relu(linen.Dense(D_FF)(x))
            return linen.LayerNorm(epsilon=1e-5)(x + linen.Dense(D_MODEL)(hidden))

    return jax.jit(Layer().init)(rng, x), Layer().apply


def equinox_layer(rng, x):
    """(params, function) of the same layer in Equinox."""
    import equinox as eqx

    rngs = jax.random.split(rng, 3)
    params = {
        "attention": eqx.nn.MultiheadAttention(HEADS, D_MODEL, key=rngs[0]),
        "norms": [eqx.nn.LayerNorm(D_MODEL, eps=1e-5) for _ in range(2)],
        "linear": [eqx.nn.Linear(D_MODEL, D_FF, key=rngs[1]), eqx.nn.Linear(D_FF, D_MODEL, key=rngs[2])],
    }
    arrays, static = eqx.partition(params, eqx.is_array)

    def one(params, x):
        x = jax.vmap(params["norms"][0])(x + params["attention"](x, x, x))
        hidden = jax.nn.relu(jax.vmap(params["linear"][0])(x))
        return jax.vmap(params["norms"][1])(x + jax.vmap(params["linear"][1])(hidden))

    return arrays, lambda arrays, x: jax.vmap(lambda x: one(eqx.combine(arrays, static), x))(x)


def haiku_layer(rng, x):
    """(params, function) of the same layer in Haiku."""
    import haiku as hk

    def layer(x):
        attention = hk.MultiHeadAttention(
            HEADS, D_MODEL // HEADS, w_init=hk.initializers.VarianceScaling(), with_bias=False
        )
        x = hk.LayerNorm(-1, True, True)(x + attention(x, x, x))
        hidden = jax.nn.relu(hk.Linear(D_FF)(x))
        return hk.LayerNorm(-1, True, True)(x + hk.Linear(D_MODEL)(hidden))

    transformed = hk.without_apply_rng(hk.transform(layer))
    return jax.jit(transformed.init)(rng, x), transformed.apply


def torch_layer(x, kind):
    """PyTorch's own encoder layer, in training mode without dropout."""
    import torch

    layer = torch.nn.TransformerEncoderLayer(D_MODEL, HEADS, D_FF, dropout=0.0, batch_first=True)
    x = torch.from_dlpack(x).clone()
    if kind == "forward":

        def forward():
            with torch.no_grad():
                return layer(x).numpy()

        return forward
    parameters = list(layer.parameters())
    return lambda: [g.numpy() for g in torch.autograd.grad(torch.sum(layer(x) ** 2), parameters)]


def layer_table(batch, length, rounds):
    """The encoder layer of the base model, forward and gradient with respect to its parameters, and its peers."""
    rng = jax.random.key(0)
    x = jax.random.normal(rng, (batch, length, D_MODEL))
    params = jax.jit(init_encoder_layer, static_argnums=(1, 2, 3))(rng, D_MODEL, HEADS, D_FF)
    layers = {"its matrix products": (params, matrix_products), "encoder_layer": (params, encoder_layer)}
    for package, module, build in (
        ("flax", "flax", flax_layer),
        ("equinox", "equinox", equinox_layer),
        ("dm-haiku", "haiku", haiku_layer),
    ):
        if importlib.util.find_spec(module):
            layers[package] = build(rng, x)
    rows = {}
    for kind in ("forward", "gradient"):
        contestants = {}
        for name, (parameters, function) in layers.items():

            def loss(parameters, x, function=function):
                return jnp.square(function(parameters, x)).sum()

            progress(f"layer, {kind}: compiling {name}")
            traced = jax.value_and_grad(loss) if kind == "gradient" else function
            compiled = jax.jit(traced).lower(parameters, x).compile()
            contestants[name] = functools.partial(compiled, parameters, x)
        if importlib.util.find_spec("torch"):
            contestants["torch"] = torch_layer(x, kind)
        times = race(f"layer, {kind}", contestants, rounds)
        bare = times["its matrix products"][0]
        for name, figures in times.items():
            rows.setdefault(name, [name]).extend([f"{milliseconds(*figures)} ms", f"{bare / figures[0]:.2f}"])
    header = [f"the layer of the base model, {batch} x {length} positions"]
    table([*header, "forward", "products / time", "gradient", "products / time"], rows.values())


# ---- Compilation over the depth --------------------------------------------------------------------------------------


def depth_table(depths):
    """Seconds to trace and compile the encoder of the base model: `jax.lax.scan` against a Python loop."""

    def loop(params, x):
        for i in range(len(params["feed_forward"]["b1"])):
            x = encoder_layer(jax.tree.map(lambda leaf, i=i: leaf[i], params), x)
        return x

    def seconds(function, depth):
        progress(f"compiling {depth} layers")
        params = jax.eval_shape(lambda: init_encoder(jax.random.key(0), depth, D_MODEL, HEADS, D_FF))
        x = jax.ShapeDtypeStruct((8, 128, D_MODEL), jnp.float32)
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
    packages = [name for name in ("jax", "jaxlib", *PEERS) if importlib.util.find_spec(name.removeprefix("dm-"))]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"On {jax.devices()[0].device_kind} ({os.cpu_count()} cores), Python {sys.version.split()[0]}, {versions}.")
    print("Medians of runs in turn, ± half the range.")
    if quick:
        attention_table([64], [1])
        layer_table(1, 8, 1)
        depth_table([1, 2])
    else:
        attention_table([512, 1024, 2048, 4096, 8192], [9, 7, 5, 5, 1])
        layer_table(8, 128, 15)
        depth_table([6, 48])


if __name__ == "__main__":
    main()
