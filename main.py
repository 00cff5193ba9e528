"""A small Transformer from end to end: sections 3.4, 3.5 and 5.3 of "Attention Is All You Need" around the encoder.

    python main.py [TEXT]

shows the parameters, runs a jitted forward pass, trains the model to write its input backwards, and draws what its
attention has learned. The axes, in shapes: b strings of a batch, n positions, d d_model, h heads, and s symbols.
"""

import os
import signal
import sys

if __name__ == "__main__":  # before the imports that take a second, so that Ctrl-C is quiet from the start
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # at once: XLA's threads do not outlive an orderly exit
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python main.py | head` is no error
    sys.stdout.reconfigure(line_buffering=True)

import argparse
import functools
import itertools
import math
import random
import re
import threading
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attention import attention_weights
from transformer_layer import encoder, init_encoder

SYMBOLS = "".join(map(chr, range(32, 127)))  # printable ASCII: a token is a position in this string
BETA1, BETA2, EPSILON = 0.9, 0.98, 1e-9  # section 5.3
WARMUP_STEPS = 500  # the paper: 4,000 of 100,000; the default 300 steps of this program all lie in the warm-up

# ---- The model: sections 3.4 and 3.5 ---------------------------------------------------------------------------------


def positional_encoding(length, d_model):
    """Section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos(the same).

    Returns (length, d_model). Raises ValueError for an odd d_model.
    """
    if d_model % 2:
        raise ValueError(f"d_model must be even, for sines and cosines come in pairs, got {d_model}")
    angle = jnp.arange(length)[:, None] / 10_000 ** (jnp.arange(0, d_model, 2) / d_model)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(length, d_model)


def init_model(rng, num_symbols, num_layers, d_model, num_heads, d_ff):
    """embedding (s, d), normal with standard deviation 0.02 as in GPT, and the parameters of the encoder."""
    rng_embedding, rng_encoder = jax.random.split(rng)
    return {
        "embedding": 0.02 * jax.random.normal(rng_embedding, (num_symbols, d_model)),
        "encoder": init_encoder(rng_encoder, num_layers, d_model, num_heads, d_ff),
    }


def embed(params, tokens):
    """Sections 3.4 and 3.5: Embedding(tokens) sqrt(d_model) + PE. tokens (..., n) integers -> (..., n, d)."""
    length, d_model = tokens.shape[-1], params["embedding"].shape[-1]
    return params["embedding"][tokens] * math.sqrt(d_model) + positional_encoding(length, d_model)


def model(params, tokens, mask=None, **options):
    """Tokens (..., n) -> logits (..., n, s): `embed`, `encoder` with its mask and options, the embedding transposed.

    Dropout, if asked for, is in the sub-layers only; section 5.4 also has it on the sum of embedding and positions.
    """
    x = encoder(params["encoder"], embed(params, tokens), mask, **options)
    return jnp.einsum("...nd,sd->...ns", x, params["embedding"])  # section 3.4: the same matrix at both ends


# ---- Training: section 5.3 -------------------------------------------------------------------------------------------


def loss(params, tokens):
    """Mean cross-entropy of the logits against the string written backwards. tokens (..., n) -> ()."""
    log_probabilities = jax.nn.log_softmax(model(params, tokens))
    return -jnp.take_along_axis(log_probabilities, tokens[..., ::-1, None], axis=-1).mean()


def learning_rate(step, d_model, warmup_steps=WARMUP_STEPS):
    """Equation 3: d_model^-0.5 min(step^-0.5, step warmup_steps^-1.5), for step 1, 2, ..."""
    return d_model**-0.5 * jnp.minimum(step**-0.5, step * warmup_steps**-1.5)


def init_adam(params):
    """The running means of the gradient and of its square, zero like the parameters."""
    return {"mean": jax.tree.map(jnp.zeros_like, params), "square": jax.tree.map(jnp.zeros_like, params)}


def adam(params, moments, gradient, step, rate):
    """One step of Adam (arXiv 1412.6980, algorithm 1), for step 1, 2, ...: the new parameters and moments."""
    mean = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, moments["mean"], gradient)
    square = jax.tree.map(lambda s, g: BETA2 * s + (1 - BETA2) * g**2, moments["square"], gradient)

    def update(p, m, s):
        return p - rate * (m / (1 - BETA1**step)) / (jnp.sqrt(s / (1 - BETA2**step)) + EPSILON)

    return jax.tree.map(update, params, mean, square), {"mean": mean, "square": square}


def train(params, moments, rng, steps, shape, sharding=None):
    """Training steps steps[0], ..., steps[1] - 1 in one compiled loop, each on new random strings of the given shape.

    Steps count from 1. Returns the parameters, the moments and the loss of the last step before its update. The bounds
    of the loop are arrays, so any number of steps runs without compiling again. The sharding is that of the strings.
    """

    def one_step(step, state):
        params, moments, _ = state
        tokens = jax.random.randint(jax.random.fold_in(rng, step), shape, 0, len(SYMBOLS))
        if sharding is not None:
            tokens = jax.lax.with_sharding_constraint(tokens, sharding)
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        step = step.astype(jnp.float32)
        rate = learning_rate(step, params["embedding"].shape[-1])
        return *adam(params, moments, gradient, step, rate), value

    return jax.lax.fori_loop(steps[0], steps[1], one_step, (params, moments, jnp.float32(0)))


# ---- More devices, more machines -------------------------------------------------------------------------------------

# What is split over the devices, as an axis counted from the last: heads and d_ff (Megatron-LM, arXiv 1909.08053).
SPLIT_AXIS = {"query": -2, "key": -2, "value": -2, "output": -3, "w1": -1, "b1": -1, "w2": -2}


def partition_specs(params):
    """Heads and d_ff over the mesh axis "model", the rest replicated: a PartitionSpec for each leaf of the tree.

    Each device computes its own heads and hidden units; XLA adds one sum over the devices after each sub-layer. Takes
    any tree of this project (a layer, a stack, the model, Adam's moments), of arrays or of their shapes.
    """

    def spec(path, leaf):
        axis = SPLIT_AXIS.get(path[-1].key)
        return P() if axis is None else P(*[None] * (leaf.ndim + axis), "model")

    return jax.tree.map_with_path(spec, params)


def make_mesh(arguments):
    """The devices of all processes as a mesh ("data", "model"). A size that it does not divide is refused."""
    devices, parts = jax.device_count(), arguments.model_parallel
    sizes = {"the number of devices": devices, "--num-heads": arguments.num_heads, "--d-ff": arguments.d_ff}
    for name, size in sizes.items():
        if size % parts:
            refuse(f"--model-parallel must divide {name}, got {parts} and {size}")
    if arguments.batch_size % (devices // parts):
        refuse(f"--batch-size must be a multiple of {devices // parts} on this mesh, got {arguments.batch_size}")
    return jax.make_mesh((devices // parts, parts), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def connect(arguments):
    """Join the other processes, if there are any, or end this one after --timeout seconds."""
    if not arguments.distributed and arguments.coordinator is None:
        return
    place, timeout = (arguments.coordinator, arguments.num_processes, arguments.process_id), arguments.timeout
    # JAX ends a process that waits in vain, but some seconds later and by a C++ stack trace in place of a sentence.
    message = f"not all processes have met at {place[0] or 'the coordinator'} within {timeout} s"
    too_late = threading.Timer(timeout, stop, [message])
    too_late.start()
    try:
        jax.distributed.initialize(*place, initialization_timeout=timeout)
    except Exception as error:
        stop(f"cannot join the other processes: {error}")
    too_late.cancel()
    if jax.process_index():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # process 0 alone prints, and so do the C++ libraries


def stop(message):
    """End at once, with one sentence and exit status 1: an orderly exit would wait for the other processes."""
    print(f"main.py: {message.splitlines()[0]}", file=sys.stderr, flush=True)
    os._exit(1)


# ---- What the attention looks at -------------------------------------------------------------------------------------


def last_layer_attention(params, tokens):
    """The attention weights of the encoder's last layer. tokens (n,) -> (h, n, n)."""
    x = encoder(jax.tree.map(lambda leaf: leaf[:-1], params["encoder"]), embed(params, tokens))
    last = jax.tree.map(lambda leaf: leaf[-1], params["encoder"]["self_attention"])
    query, key = (jnp.einsum("nd,dhk->hnk", x, last[name]) for name in ("query", "key"))
    return attention_weights(query, key)


def heat_map(weights, text, shades, size=36):
    """Lines of text: a row for each query, a column for each key, the darkest shade for the largest weight.

    weights (n, n), text of n symbols. Above `size` positions, a cell is the largest weight of several neighbours.
    """
    weights, stride = weights.tolist(), math.ceil(len(text) / size)
    starts, largest = range(0, len(text), stride), max(map(max, weights))
    lines = ["  " + text[::stride]]
    for i in starts:
        cells = (max(w for row in weights[i : i + stride] for w in row[j : j + stride]) for j in starts)
        lines.append(text[i] + " " + "".join(shades[int(w / largest * (len(shades) - 0.01))] for w in cells))
    return lines


# ---- The program -----------------------------------------------------------------------------------------------------


def encode(strings):
    """Strings of one length -> tokens (b, n)."""
    return jnp.array([[SYMBOLS.index(symbol) for symbol in string] for string in strings])


def decode(logits):
    """Logits (b, n, s) -> the b strings of the likeliest symbols."""
    return ["".join(SYMBOLS[token] for token in tokens) for tokens in logits.argmax(axis=-1).tolist()]


def refuse(message):
    """End the program with one sentence and exit status 2."""
    print(f"main.py: {message}", file=sys.stderr)
    sys.exit(2)


def parse_arguments():
    """The command line; wrong input ends the program with one sentence and exit status 2."""

    def at_least(smallest):
        def integer(argument):
            if not argument.isdecimal() or not smallest <= int(argument) < 2**31:
                raise argparse.ArgumentTypeError(f"must be an integer from {smallest} to 2^31 - 1, got {argument!r}")
            return int(argument)

        return integer

    parser = argparse.ArgumentParser(
        description="Initialize a Transformer, run it, train it to write its input backwards, and draw its attention."
    )
    parser.error = refuse
    parser.add_argument(
        "text",
        metavar="TEXT",
        nargs="?",
        default="attention is all you need",
        help="what to reverse (default: %(default)s)",
    )
    for flag, smallest, default, meaning in (
        ("--length", 1, 32, "positions; TEXT is padded with spaces"),
        ("--d-model", 1, 64, "width of the layers, an even number"),
        ("--num-heads", 1, 1, "attention heads, a divisor of --d-model"),
        ("--num-layers", 1, 1, "encoder layers"),
        ("--d-ff", 1, 128, "inner width of the feed-forward network"),
        ("--batch-size", 1, 64, "strings in a training step"),
        ("--steps", 0, 300, "training steps"),
        ("--seed", 0, 0, "seed of all random numbers"),
        ("--model-parallel", 1, 1, "devices that share one layer"),
    ):
        parser.add_argument(
            flag, metavar="N", type=at_least(smallest), default=default, help=f"{meaning} (default: {default})"
        )
    several = parser.add_argument_group("several processes")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where the first one listens")
    several.add_argument("--num-processes", metavar="N", type=at_least(1), help="how many there are")
    several.add_argument("--process-id", metavar="N", type=at_least(0), help="which one this is, from 0")
    several.add_argument("--distributed", action="store_true", help="ask Slurm, Cloud TPU, ... for all three")
    several.add_argument(
        "--timeout", metavar="N", type=at_least(1), default=60, help="seconds to wait for the others (default: 60)"
    )
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.text) - set(SYMBOLS)):
        parser.error(f"TEXT must be printable ASCII, got {''.join(unknown)!a}")
    if len(arguments.text) > arguments.length:
        parser.error(f"TEXT must fit into --length {arguments.length}, got {len(arguments.text)} characters")
    if arguments.d_model % 2 or arguments.d_model % arguments.num_heads:
        parser.error(
            f"--d-model must be even and a multiple of --num-heads, got {arguments.d_model} and {arguments.num_heads}"
        )
    place = arguments.coordinator, arguments.num_processes, arguments.process_id
    if place != (None, None, None) and (None in place or arguments.distributed):
        parser.error("--coordinator, --num-processes and --process-id belong together, and without --distributed")
    if place[0] is not None and not re.fullmatch(r".+:\d{1,5}", place[0]):
        parser.error(f"--coordinator must be HOST:PORT, got {place[0]!a}")
    if place[0] is not None and place[2] >= place[1]:
        parser.error(f"--process-id must be below --num-processes, got {place[2]} and {place[1]}")
    return arguments


def show_parameters(params, mesh):
    """The pytree as a table, and how it is spread over the mesh."""
    print("1. Parameters: a Transformer is a dict of arrays\n")
    for path, leaf in jax.tree.leaves_with_path(params):
        print(f"params{jax.tree_util.keystr(path):<44} {leaf.shape!s:>17} {leaf.size:>11,}")
    leaves = jax.tree.leaves(params)
    total, megabytes = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves) / 1e6
    print(f"{f'total, in MB: {megabytes:.2f}':<68}{total:>12,}")
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves) / total
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"{f'mesh: {axes}; on each device':<68}{held:>12.1%}")


def timed(function, *arguments):
    """The function's result, and the milliseconds until it was there."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, (time.perf_counter() - start) * 1e3


def show_forward_pass(params, tokens):
    """The shapes of the stages, jit against no jit. Returns the compiled `model`."""
    print("\n2. Forward pass: TEXT and random strings, one batch\n")
    x = jax.eval_shape(embed, params, tokens)
    logits = jax.eval_shape(model, params, tokens)
    for stage, array in (("tokens", tokens), ("embedding + positions", x), ("encoder", x), ("logits", logits)):
        print(f"{stage:<24}{array.shape!s:>18}")
    readable = params["embedding"].sharding  # replicated: a logit that another process holds cannot be printed
    forward, compile_ms = timed(jax.jit(model, out_shardings=readable).lower(params, tokens).compile)
    timed(forward, params, tokens)  # the first run also allocates
    compiled_logits, run_ms = timed(forward, params, tokens)
    logits, eager_ms = timed(model, params, tokens)
    print(f"\ncompile, once           {compile_ms:10.2f} ms")
    print(f"run, compiled           {run_ms:10.2f} ms")
    print(f"run, without jit        {eager_ms:10.2f} ms (operation by operation)")
    print(f"largest difference      {abs(compiled_logits - logits).max():10.1e}")
    return forward


def show_training(arguments, params, forward, strings, tokens, rng):
    """Train, with a progress line: rewritten in place on a terminal, else a few plain lines. Returns the parameters."""
    print("\n3. Training: write the input backwards, learned from random strings\n")
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    places = places, {"mean": places, "square": places}
    moments = jax.jit(init_adam, out_shardings=places[1])(params)
    one_loop = functools.partial(train, shape=tokens.shape, sharding=tokens.sharding)
    compiled = jax.jit(one_loop, donate_argnames="moments", out_shardings=(*places, None))
    terminal = sys.stdout.isatty() and jax.process_count() == 1  # the processes take the same steps
    reports = min(arguments.steps, 50 if terminal else 6)
    bounds = [arguments.steps * i // max(reports, 1) for i in range(reports + 1)]
    for first, last in itertools.pairwise(bounds):
        params, moments, value = compiled(params, moments, rng, (first + 1, last + 1))
        written = decode(forward(params, tokens))
        right = sum(a == b for s, w in zip(strings, written, strict=True) for a, b in zip(s[::-1], w, strict=True))
        line = f"step {last:>5}  loss {value:7.4f}  accuracy on held-out strings {right / tokens.size:7.2%}"
        print(line, end="\r" if terminal and last < arguments.steps else "\n", flush=True)
    if not arguments.steps:
        print("no steps: the model stays untrained")
    return params


def show_attention(arguments, before, after, tokens):
    """The heat maps of the last layer's heads, before training beside after it."""
    try:
        " ░▒▓█".encode(sys.stdout.encoding or "ascii")
        shades = " ░▒▓█"
    except UnicodeEncodeError:
        shades = " .:*#"
    text = arguments.text.ljust(arguments.length)
    shown = min(arguments.num_heads, 4)
    print(f"\n5. Attention of layer {arguments.num_layers} of {arguments.num_layers}, ", end="")
    print(f"head{'s' * (shown > 1)} 1{f' to {shown}' * (shown > 1)} of {arguments.num_heads}: ", end="")
    print(f"before | after {arguments.steps} steps" if arguments.steps else "untrained")
    print("   row: the position that looks, column: what it looks at, darkest: most")
    compiled = jax.jit(last_layer_attention, out_shardings=before["embedding"].sharding)
    maps = [compiled(params, tokens) for params in ((before, after) if arguments.steps else (before,))]
    for head in range(shown):
        print()
        for lines in zip(*(heat_map(weights[head], text, shades) for weights in maps), strict=True):
            print("    ".join(lines).rstrip())


def main():
    """Parse the command line and print the five parts."""
    arguments = parse_arguments()
    connect(arguments)
    mesh = make_mesh(arguments)
    sizes = {name: getattr(arguments, name) for name in ("num_layers", "d_model", "num_heads", "d_ff")}
    rng_params, rng_train = jax.random.split(jax.random.key(arguments.seed))
    init = functools.partial(init_model, num_symbols=len(SYMBOLS), **sizes)
    specs = partition_specs(jax.eval_shape(init, rng_params))
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params = jax.jit(init, out_shardings=places)(rng_params)
    show_parameters(params, mesh)

    choices = random.Random(arguments.seed).choices
    strings = ["".join(choices(SYMBOLS, k=arguments.length)) for _ in range(arguments.batch_size)]
    strings[0] = arguments.text.ljust(arguments.length)
    shape, rows = (arguments.batch_size, arguments.length), NamedSharding(mesh, P("data"))
    tokens = jax.make_array_from_callback(shape, rows, lambda part: encode(strings[part[0]]))  # a device's own strings
    forward = show_forward_pass(params, tokens)
    trained = show_training(arguments, params, forward, strings, tokens, rng_train)

    print("\n4. Result: a text the model never saw\n")
    written = decode(forward(trained, tokens))[0]
    print(f"input   {arguments.text}\noutput  {written[arguments.length - len(arguments.text) :]}")
    show_attention(arguments, params, trained, tokens[0])


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if jax.process_count() == 1:
            raise
        stop(f"process {jax.process_index()} of {jax.process_count()} lost another one, or failed: {error}")
