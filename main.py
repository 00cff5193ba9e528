"""The Transformer as a whole: Figure 1 of "Attention Is All You Need", its training and its use.

    python main.py [TEXT]

shows the parameters, runs a jitted forward pass, trains the model to write strings backwards, lets it write TEXT
backwards, and draws what the decoder reads for each symbol. The first half of this file is the model, its training and
how it is spread over devices. The second half is the program. The axes, in shapes and einsum strings:

    ...  any leading (batch) axes        d  d_model
    m    source positions                h  heads
    n    target positions                s  symbols of the vocabulary
"""

import argparse
import math
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attention import attention_weights, scaled_dot_product_attention
from transformer_layer import decoder, decoder_layer, encoder, init_decoder, init_encoder

START = 0  # the token with which every target begins
SYMBOLS = "\0" + "".join(map(chr, range(32, 127)))  # a token is a position in this string: START, then printable ASCII
BETA1, BETA2, EPSILON = 0.9, 0.98, 1e-9  # section 5.3
WARMUP_STEPS = 600  # the paper: 4,000 of 100,000 steps; here the default 300 steps all lie in the warm-up
LABEL_SMOOTHING = 0.1  # section 5.4
AVERAGED_STEPS = 50  # section 6.1 averages the last checkpoints

# ---- The model: Figure 1, sections 3.4 and 3.5 -----------------------------------------------------------------------


def positional_encoding(length, d_model):
    """Section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos(the same).

    Returns (length, d_model). Raises ValueError for an odd d_model.
    """
    if d_model % 2:
        raise ValueError(f"d_model must be even, for sines and cosines come in pairs, got {d_model}")
    angle = jnp.arange(length)[:, None] / 10_000 ** (jnp.arange(0, d_model, 2) / d_model)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(length, d_model)


def init_model(rng, num_symbols, num_layers, d_model, num_heads, d_ff):
    """Figure 1: one embedding (s, d), and the parameters of encoder and decoder.

    The embedding is normal with standard deviation 0.02, as in GPT.
    """
    rngs = jax.random.split(rng, 3)
    return {
        "embedding": 0.02 * jax.random.normal(rngs[0], (num_symbols, d_model)),
        "encoder": init_encoder(rngs[1], num_layers, d_model, num_heads, d_ff),
        "decoder": init_decoder(rngs[2], num_layers, d_model, num_heads, d_ff),
    }


def embed(params, tokens):
    """Sections 3.4 and 3.5: Embedding(tokens) sqrt(d_model) + PE. tokens (..., n) integers -> (..., n, d)."""
    length, d_model = tokens.shape[-1], params["embedding"].shape[-1]
    return params["embedding"][tokens] * math.sqrt(d_model) + positional_encoding(length, d_model)


def model(params, source, target, mask=None, *, dropout_rng=None, **options):
    """Figure 1: tokens source (..., m) and target (..., n) -> logits (..., n, s): after each token, the next.

    mask (..., 1, 1, m), such as a `padding_mask`, hides positions of the source from both stacks. The options are those
    that `encoder` and `decoder` share: attention and dropout_rate. Unlike in section 5.4, embeddings have no dropout.
    """
    rngs = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
    memory = encoder(params["encoder"], embed(params, source), mask, dropout_rng=rngs[0], **options)
    x = embed(params, target)
    x = decoder(params["decoder"], x, memory, memory_mask=mask, dropout_rng=rngs[1], **options)
    return jnp.einsum("...nd,sd->...ns", x, params["embedding"])  # section 3.4: the embedding, transposed


def shift_right(target):
    """Section 3.1: the outputs, moved on by one position, so that a prediction depends on earlier tokens only.

    (..., n) -> (..., n): START, then all tokens of target but the last.
    """
    return jnp.roll(target, 1, axis=-1).at[..., 0].set(START)


def generate(params, source):
    """Write a target as long as source, token after token, each the likeliest one (greedy). (..., m) -> (..., m).

    The target has its full length from the start. What is not written yet does no harm: causality hides it.
    Each token takes a run of the whole model; exercise 9 saves that.
    """

    def write(i, target):
        logits = model(params, source, shift_right(target))[..., i, :]
        logits = logits.at[..., START].set(-jnp.inf)  # START itself is never written
        return target.at[..., i].set(logits.argmax(axis=-1))

    return jax.lax.fori_loop(0, source.shape[-1], write, jnp.zeros_like(source))


# ---- Training: sections 5.3, 5.4 and 6.1 -----------------------------------------------------------------------------


def loss(params, source, target):
    """Section 5.4: mean cross-entropy with label smoothing. Tokens (..., m) and (..., n) -> ().

    The wanted token should get 0.9 of the probability. 0.1 is spread evenly over all symbols, that one too. There is no
    dropout here: every batch is new, so there is nothing to overfit.
    """
    log_probabilities = jax.nn.log_softmax(model(params, source, shift_right(target)))
    wanted = jnp.take_along_axis(log_probabilities, target[..., None], axis=-1)
    return -((1 - LABEL_SMOOTHING) * wanted.mean() + LABEL_SMOOTHING * log_probabilities.mean())


def learning_rate(step, d_model, warmup_steps=WARMUP_STEPS):
    """Equation 3: d_model^-0.5 min(step^-0.5, step warmup_steps^-1.5), for step 1, 2, ..."""
    return d_model**-0.5 * jnp.minimum(step**-0.5, step * warmup_steps**-1.5)


def init_adam(params):
    """The running means of the gradient and of its square, zero and shaped like the parameters."""
    return {"mean": jax.tree.map(jnp.zeros_like, params), "square": jax.tree.map(jnp.zeros_like, params)}


def adam(params, moments, gradient, step, rate):
    """One step of Adam (arXiv 1412.6980, algorithm 1), for step 1, 2, ...: the new parameters and moments."""
    mean = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, moments["mean"], gradient)
    square = jax.tree.map(lambda s, g: BETA2 * s + (1 - BETA2) * g**2, moments["square"], gradient)

    def update(p, m, s):
        return p - rate * (m / (1 - BETA1**step)) / (jnp.sqrt(s / (1 - BETA2**step)) + EPSILON)

    return jax.tree.map(update, params, mean, square), {"mean": mean, "square": square}


def train_step(params, moments, step, source, target):
    """One step of training, for step 1, 2, ...: the new parameters and moments, and the loss before it, a number.

    params and moments are trees as `init_model` and `init_adam` make them; tokens source (..., m), target (..., n).
    """
    value, gradient = jax.value_and_grad(loss)(params, source, target)
    rate = learning_rate(step, params["embedding"].shape[-1])
    return *adam(params, moments, gradient, step, rate), value


def average(mean, params, count):
    """Section 6.1: the mean of count sets of parameters: params is the last set, mean is the mean of the others."""
    return jax.tree.map(lambda m, p: m + (p - m) / count, mean, params)


# ---- What the decoder reads ------------------------------------------------------------------------------------------


def cross_attention_weights(params, source, target):
    """The weights with which the last decoder layer attends to the source. (..., m), (..., n) -> (..., h, n, m)."""
    kept = []  # filled and read within one call, so the function is still pure

    def attention_that_keeps_its_weights(query, key, value, mask=None, *, causal=False):
        kept.append(attention_weights(query, key, mask, causal=causal))
        return scaled_dot_product_attention(query, key, value, mask, causal=causal)

    memory = encoder(params["encoder"], embed(params, source))
    # The last layer by itself, for nothing can be kept inside the scan over layers.
    others = jax.tree.map(lambda leaf: leaf[:-1], params["decoder"])
    last = jax.tree.map(lambda leaf: leaf[-1], params["decoder"])
    x = decoder(others, embed(params, shift_right(target)), memory)
    decoder_layer(last, x, memory, attention=attention_that_keeps_its_weights)
    return kept[1]  # kept[0] is the self-attention of the layer


# ---- More devices, more machines -------------------------------------------------------------------------------------

# The axis that is split over the devices, counted from the last: heads or d_ff (Megatron-LM, arXiv 1909.08053).
SPLIT_AXIS = {"query": -2, "key": -2, "value": -2, "output": -3, "w1": -1, "b1": -1, "w2": -2}


def partition_specs(params):
    """Heads and d_ff over the mesh axis "model", the rest replicated: a PartitionSpec for each leaf of the tree.

    Each device computes its own heads and hidden units; XLA adds one sum over the devices after each sub-layer. Takes
    any tree of this project (a layer, a stack, the model, Adam's moments), of arrays or of their shapes.
    """

    def spec(path, leaf):
        axis = SPLIT_AXIS.get(path[-1].key)
        return P() if axis is None else P(*[None] * (leaf.ndim + axis), "model")  # None for each axis before it

    return jax.tree.map_with_path(spec, params)


# ---- The task: strings, and the same backwards -----------------------------------------------------------------------


def random_strings(generator, batch_size, length):
    """Tokens (batch_size, length) of strings of at most 8 different symbols, by a random generator of NumPy.

    Symbols repeat, so that the model must look at positions: what stands before a symbol does not tell what follows.
    """
    symbols = generator.integers(START + 1, len(SYMBOLS), size=(batch_size, 8))
    return np.take_along_axis(symbols, generator.integers(8, size=(batch_size, length)), axis=1)


def task(strings):
    """What the model learns to write: the strings backwards. Tokens (..., n) -> (..., n)."""
    return strings[..., ::-1]


def as_text(tokens):
    """Tokens (n,) -> the string of their symbols."""
    return "".join(SYMBOLS[token] for token in tokens)


# ---- What the program shows ------------------------------------------------------------------------------------------


def show_parameters(params):
    """Part 1: the pytree as a table."""
    print("1. Parameters: a Transformer is a dict of dicts of arrays\n")
    for path, leaf in jax.tree.leaves_with_path(params):
        print(f"params{jax.tree_util.keystr(path):<44} {leaf.shape!s:>17} {leaf.size:>11,}")
    print(f"{'total':<68}{sum(leaf.size for leaf in jax.tree.leaves(params)):>12,}")


def show_forward_pass(params, source, target):
    """Part 2: the shapes of what goes in and comes out, and what `jax.jit` costs once and saves from then on."""
    print("\n2. Forward pass: TEXT and random strings, one batch\n")
    forward, seconds = jax.jit(model), []
    for _ in range(2):
        start = time.perf_counter()
        logits = jax.block_until_ready(forward(params, source, target))
        seconds.append(time.perf_counter() - start)
    print(f"source and target {source.shape!s:>16}\nlogits            {logits.shape!s:>16}")
    print(f"first call        {seconds[0] * 1e3:13.2f} ms  (compiles)\nsecond call       {seconds[1] * 1e3:13.2f} ms")


def show_attention(before, after, written, text):
    """Part 5: weights (h, n, m) before and after training as heat maps, a row for each symbol of what is written."""
    shades = " \u2591\u2592\u2593\u2588"  # from a blank to a full block
    if (sys.stdout.encoding or "ascii").lower().replace("-", "") != "utf8":
        shades = " .:*#"
    for heads in zip(before, after, strict=True):
        print(f"  {text}      {text}")
        # Numbers 0, ..., len(shades) - 1: the 0.01 is for the largest weight.
        maps = [(weights / weights.max() * (len(shades) - 0.01)).astype(int) for weights in heads]
        for symbol, *rows in zip(written, *maps, strict=True):
            print("    ".join(f"{symbol} {''.join(shades[cell] for cell in row)}" for row in rows).rstrip())


# ---- The program -----------------------------------------------------------------------------------------------------

FLAGS = {  # default, smallest value, meaning
    "--d-model": (64, 1, "width of the layers, an even number"),
    "--num-heads": (1, 1, "attention heads, a divisor of --d-model"),
    "--num-layers": (1, 1, "layers of the encoder, and of the decoder"),
    "--d-ff": (128, 1, "inner width of the feed-forward network"),
    "--batch-size": (32, 1, "strings in a training step"),
    "--steps": (300, 0, "training steps"),
    "--seed": (0, 0, "seed of all random numbers"),
    "--model-parallel": (1, 1, "devices that share one layer, a divisor of --num-heads and --d-ff"),
}


def refuse(message):
    """End the program with one sentence and exit status 2."""
    print(f"main.py: {message}", file=sys.stderr)
    sys.exit(2)


def parse_arguments():
    """The command line; wrong input ends the program."""
    parser = argparse.ArgumentParser(
        description="Initialize a Transformer, run it, train it to write strings backwards, and let it write TEXT."
    )
    parser.error = refuse
    text = "attention is all you need"
    parser.add_argument("text", metavar="TEXT", nargs="*", default=[text], help=f"what to reverse (default: {text})")
    for flag, (default, _, meaning) in FLAGS.items():
        parser.add_argument(flag, metavar="N", default=str(default), help=f"{meaning} (default: {default})")
    parser.add_argument("--distributed", action="store_true", help="join the processes that mpirun or srun started")
    arguments = parser.parse_args()
    for flag, (_, smallest, _) in FLAGS.items():
        name = flag.removeprefix("--").replace("-", "_")
        value = getattr(arguments, name)
        if not (value.isdecimal() and smallest <= int(value) < 2**31):
            refuse(f"{flag} must be an integer from {smallest} to 2^31 - 1, got {value!a}")
        setattr(arguments, name, int(value))
    if len(arguments.text) > 1:
        refuse(f'TEXT of several words needs quotes: python main.py "{" ".join(arguments.text)}"')
    arguments.text = arguments.text[0]
    if not arguments.text or set(arguments.text) - set(SYMBOLS[1:]):
        refuse(f"TEXT must be one or more printable ASCII symbols, got {arguments.text!a}")
    return arguments


def join_processes():
    """Meet the other processes that a launcher such as mpirun or srun started. Process 0 alone prints."""
    try:
        jax.distributed.initialize()
    except ValueError:
        refuse("--distributed needs a launcher that JAX knows, such as mpirun or srun")
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends


def make_mesh(arguments):
    """The devices of all processes as a mesh ("data", "model"). Sizes that do not divide are refused."""
    devices, parts = jax.device_count(), arguments.model_parallel
    sizes = {"the number of devices": devices, "--num-heads": arguments.num_heads, "--d-ff": arguments.d_ff}
    for name, size in sizes.items():
        if size % parts:
            refuse(f"--model-parallel must divide {name}, got {parts} and {size}")
    if arguments.batch_size % (devices // parts):
        refuse(f"--batch-size must be a multiple of {devices // parts} on this mesh, got {arguments.batch_size}")
    return jax.make_mesh((devices // parts, parts), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def main():
    """Parse the command line and print the five parts."""
    arguments = parse_arguments()
    if arguments.distributed:
        join_processes()
    text, steps, batch_size = arguments.text, arguments.steps, arguments.batch_size
    generator = np.random.default_rng(arguments.seed)
    held_out = random_strings(generator, batch_size, len(text))  # what the model is tested on: TEXT and other strings
    held_out[0] = [SYMBOLS.index(symbol) for symbol in text]

    def init():
        sizes = arguments.num_layers, arguments.d_model, arguments.num_heads, arguments.d_ff
        params = init_model(jax.random.key(arguments.seed), len(SYMBOLS), *sizes)
        return params, init_adam(params)

    try:
        shapes = jax.eval_shape(init)  # runs init on shapes alone: what does not fit shows before anything is computed
        jax.eval_shape(embed, shapes[0], held_out)
    except ValueError as error:
        refuse(error)

    # Parameters and moments lie as `partition_specs` says, a batch is split by rows, results are whole on each device.
    mesh = make_mesh(arguments)
    state = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(shapes))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    # Each of these is compiled when it is first called.
    one_step = jax.jit(train_step, out_shardings=(*state, whole))
    write = jax.jit(generate, out_shardings=whole)
    look = jax.jit(cross_attention_weights, out_shardings=whole)
    update_mean = jax.jit(average)

    source, target = jax.device_put((held_out, task(held_out)), rows)
    once = {"xla_backend_optimization_level": 0}  # what runs once need not be compiled well, only quickly
    params, moments = jax.jit(init, out_shardings=state, compiler_options=once)()
    show_parameters(params)
    show_forward_pass(params, source, target)

    print(f"\n3. Training: {steps} steps on random strings\n")
    averaged, shown = min(steps, AVERAGED_STEPS), {i * steps // 6 for i in range(1, 7)}
    untrained = mean = params
    for step in range(1, steps + 1):
        strings = random_strings(generator, batch_size, len(text))
        params, moments, value = one_step(params, moments, step, *jax.device_put((strings, task(strings)), rows))
        count = step - (steps - averaged)  # of the steps that are averaged, up to this one
        if count > 0:
            mean = update_mean(mean, params, count)
        if step in shown:
            written = np.asarray(write(params, source))
            right = (written == task(held_out)).mean()
            print(f"step {step:>5}  loss {value:7.4f}  right {right:7.2%}  {as_text(written[0])}", flush=True)

    print("\n4. Result: what the model makes of TEXT\n")
    last, written = (np.asarray(write(candidate, source)) for candidate in (params, mean))
    counts = [(tokens == task(held_out)).all(axis=1).sum() for tokens in (last, written)]
    print(f"read     {text}\nwritten  {as_text(written[0])}\nof {batch_size} strings, right to the letter: ", end="")
    print(f"last parameters {counts[0]}, mean of last {averaged} steps {counts[1]}")

    print(f"\n5. Attention over the source in decoder layer {arguments.num_layers}: before training | after")
    print("   row: the symbol to write, column: the symbol that is read, darkest: most\n")
    before, after = (np.asarray(look(candidate, source, target))[0] for candidate in (untrained, mean))
    show_attention(before, after, as_text(task(held_out[0])), text)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output, such as `head`, has left
        sys.stdout = None  # or else Python complains once more when it ends
