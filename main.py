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
import itertools
import math
import random
import time

import jax
import jax.numpy as jnp

from attention import attention_weights
from transformer_layer import encoder, init_encoder

SYMBOLS = "".join(map(chr, range(32, 127)))  # printable ASCII: a token is a position in this string
BETA1, BETA2, EPSILON = 0.9, 0.98, 1e-9  # section 5.3
WARMUP_STEPS = 500  # the paper takes 4,000 of 100,000 steps

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
    """Tokens (..., n) -> logits (..., n, s): `embed`, `encoder` with its mask and options, the embedding transposed."""
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


def train(params, moments, rng, steps, shape):
    """Training steps steps[0], ..., steps[1] - 1 in one compiled loop, each on new random strings of the given shape.

    Steps count from 1. Returns the parameters, the moments and the loss of the last step before its update. The bounds
    of the loop are arrays, so any number of steps runs without compiling again.
    """

    def one_step(step, state):
        params, moments, _ = state
        tokens = jax.random.randint(jax.random.fold_in(rng, step), shape, 0, len(SYMBOLS))
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        step = step.astype(jnp.float32)
        rate = learning_rate(step, params["embedding"].shape[-1])
        return *adam(params, moments, gradient, step, rate), value

    return jax.lax.fori_loop(steps[0], steps[1], one_step, (params, moments, jnp.float32(0)))


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


def parse_arguments():
    """The command line; wrong input ends the program with one sentence and exit status 2."""

    def at_least(smallest):
        def integer(argument):
            if not argument.isdecimal() or not smallest <= int(argument) < 2**31:
                raise argparse.ArgumentTypeError(f"must be an integer from {smallest} to 2^31 - 1, got {argument!r}")
            return int(argument)

        return integer

    parser = argparse.ArgumentParser(
        description="Initialize a Transformer, run it, train it to write its input backwards, and draw its attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"main.py: {message}\n")
    parser.add_argument("text", metavar="TEXT", nargs="?", default="attention is all you need", help="what to reverse")
    parser.add_argument("--length", type=at_least(1), default=32, help="positions; TEXT is padded with spaces")
    parser.add_argument("--d-model", type=at_least(1), default=64, help="width of the layers, an even number")
    parser.add_argument("--num-heads", type=at_least(1), default=1, help="attention heads, a divisor of --d-model")
    parser.add_argument("--num-layers", type=at_least(1), default=1, help="encoder layers")
    parser.add_argument("--d-ff", type=at_least(1), default=128, help="inner width of the feed-forward network")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="strings in a training step")
    parser.add_argument("--steps", type=at_least(0), default=300, help="training steps")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of all random numbers")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.text) - set(SYMBOLS)):
        parser.error(f"TEXT must be printable ASCII, got {''.join(unknown)!a}")
    if len(arguments.text) > arguments.length:
        parser.error(f"TEXT must fit into --length {arguments.length}, got {len(arguments.text)} characters")
    if arguments.d_model % 2 or arguments.d_model % arguments.num_heads:
        parser.error(
            f"--d-model must be even and a multiple of --num-heads, got {arguments.d_model} and {arguments.num_heads}"
        )
    return arguments


def show_parameters(params):
    """The pytree as a table."""
    print("1. Parameters: a Transformer is a dict of arrays\n")
    for path, leaf in jax.tree.leaves_with_path(params):
        print(f"params{jax.tree_util.keystr(path):<44} {leaf.shape!s:>17} {leaf.size:>11,}")
    leaves = jax.tree.leaves(params)
    print(
        f"{'total, in MB: ' + format(sum(a.nbytes for a in leaves) / 1e6, '.2f'):<68}{sum(a.size for a in leaves):>12,}"
    )


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
    forward, compile_ms = timed(jax.jit(model).lower(params, tokens).compile)
    timed(forward, params, tokens)  # the first run also allocates
    compiled_logits, run_ms = timed(forward, params, tokens)
    logits, eager_ms = timed(model, params, tokens)
    print(f"\ncompile, once           {compile_ms:10.2f} ms")
    print(f"run, compiled           {run_ms:10.2f} ms")
    print(f"run, without jit        {eager_ms:10.2f} ms (operation by operation)")
    print(f"largest difference      {abs(compiled_logits - logits).max():10.1e}")
    return forward


def show_training(arguments, params, forward, strings, rng):
    """Train, with a progress line: rewritten in place on a terminal, else a few plain lines. Returns the parameters."""
    print("\n3. Training: write the input backwards, learned from random strings\n")
    tokens, moments = encode(strings), jax.jit(init_adam)(params)
    compiled = jax.jit(train, static_argnames="shape", donate_argnames="moments")
    terminal = sys.stdout.isatty()
    reports = min(arguments.steps, 50 if terminal else 6)
    bounds = [arguments.steps * i // max(reports, 1) for i in range(reports + 1)]
    for first, last in itertools.pairwise(bounds):
        params, moments, value = compiled(params, moments, rng, (first + 1, last + 1), shape=tokens.shape)
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
    compiled = jax.jit(last_layer_attention)
    maps = [compiled(params, tokens) for params in ((before, after) if arguments.steps else (before,))]
    for head in range(shown):
        print()
        for lines in zip(*(heat_map(weights[head], text, shades) for weights in maps), strict=True):
            print("    ".join(lines).rstrip())


def main():
    """Parse the command line and print the five parts."""
    arguments = parse_arguments()
    sizes = len(SYMBOLS), arguments.num_layers, arguments.d_model, arguments.num_heads, arguments.d_ff
    rng_params, rng_train = jax.random.split(jax.random.key(arguments.seed))
    params = jax.jit(init_model, static_argnums=range(1, 6))(rng_params, *sizes)
    show_parameters(params)

    choices = random.Random(arguments.seed).choices
    strings = ["".join(choices(SYMBOLS, k=arguments.length)) for _ in range(arguments.batch_size)]
    strings[0] = arguments.text.ljust(arguments.length)
    tokens = encode(strings)
    forward = show_forward_pass(params, tokens)
    trained = show_training(arguments, params, forward, strings, rng_train)

    print("\n4. Result: a text the model never saw\n")
    written = decode(forward(trained, tokens))[0]
    print(f"input   {arguments.text}\noutput  {written[arguments.length - len(arguments.text) :]}")
    show_attention(arguments, params, trained, tokens[0])


if __name__ == "__main__":
    main()
