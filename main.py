"""The whole Transformer of "Attention Is All You Need" (Figure 1): the model, its training and a program to run it.

    python main.py [TEXT]

prints the parameters, runs a jitted forward pass, trains the model to reverse strings, reverses TEXT, and draws the
attention of the decoder. The model and its training come first, then the program. The axes, in shapes and einsum
strings:

    ...  any leading (batch) axes        d  d_model
    m    source positions                h  heads
    n    target positions                s  vocab_size
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

from attention import at_least_float32, attention_weights, scaled_dot_product_attention
from transformer_layer import decoder, decoder_layer, encoder, init_decoder, init_encoder

START = 0  # the first token of the decoder's input
SYMBOLS = "\0" + "".join(map(chr, range(32, 127)))  # token i is SYMBOLS[i]: START, then printable ASCII
BETA1, BETA2, EPSILON = 0.9, 0.98, 1e-9  # section 5.3
LABEL_SMOOTHING = 0.1  # section 5.4
AVERAGED_STEPS = 75  # section 6.1: average the parameters of the last steps

# ---- The model: Figure 1, sections 3.4 and 3.5 -----------------------------------------------------------------------


def positional_encoding(length, d_model):
    """Section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos(pos / 10000^(2i / d_model)).

    Returns (length, d_model). Raises ValueError if d_model is odd.
    """
    if d_model % 2:
        raise ValueError(f"d_model must be even (sines and cosines come in pairs), got {d_model}")
    angle = jnp.arange(length)[:, None] / 10_000 ** (jnp.arange(0, d_model, 2) / d_model)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(length, d_model)


def init_model(rng, vocab_size, num_layers, d_model, num_heads, d_ff):
    """The parameters of Figure 1: one embedding (s, d), the encoder and the decoder.

    The embedding is normal with standard deviation 0.02, as in GPT. Raises ValueError for sizes that do not match.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
    rngs = jax.random.split(rng, 3)
    return {
        "embedding": 0.02 * jax.random.normal(rngs[0], (vocab_size, d_model)),
        "encoder": init_encoder(rngs[1], num_layers, d_model, num_heads, d_ff),
        "decoder": init_decoder(rngs[2], num_layers, d_model, num_heads, d_ff),
    }


def embed(params, tokens):
    """Sections 3.4 and 3.5: Embedding(tokens) sqrt(d_model) + PE. tokens (..., n) integers -> (..., n, d).

    Tokens outside the vocabulary raise no error: JAX clamps large ones and counts negative ones from the end.
    """
    embedding, tokens = jnp.asarray(params["embedding"]), jnp.asarray(tokens)
    length, d_model = tokens.shape[-1], embedding.shape[-1]
    return embedding[tokens] * math.sqrt(d_model) + positional_encoding(length, d_model).astype(embedding.dtype)


def model(params, source, target, mask=None, *, dropout_rng=None, **options):
    """Figure 1: source (..., m) and target (..., n) tokens -> logits (..., n, s).

    Position i scores the token that follows target tokens 0 to i; for training, `shift_right` makes such a target.
    mask (..., 1, 1, m), such as a `padding_mask`, masks source positions in both stacks. Options are attention and
    dropout_rate, as in `encoder_layer`. Unlike in section 5.4, embeddings have no dropout.
    """
    rngs = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
    memory = encoder(params["encoder"], embed(params, source), mask, dropout_rng=rngs[0], **options)
    x = embed(params, target)
    x = decoder(params["decoder"], x, memory, memory_mask=mask, dropout_rng=rngs[1], **options)
    return jnp.einsum("...nd,sd->...ns", x, params["embedding"])  # section 3.4: the transposed embedding


def shift_right(target):
    """Section 3.1: shifts the targets right by one: START, then all tokens but the last. (..., n) -> (..., n)."""
    target = jnp.asarray(target)
    return jnp.concatenate([jnp.full_like(target[..., :1], START), target[..., :-1]], axis=-1)


def generate(params, source):
    """Greedy decoding: each token is the most likely one, given the tokens before it. (..., m) -> target (..., m).

    The encoder runs once. Each step decodes one position; its self-attention reads earlier keys and values from a KV
    cache. Use it under `jax.jit`; outside, every call compiles it again.
    """
    source = jnp.asarray(source)
    memory = encoder(params["encoder"], embed(params, source))
    num_layers, _, num_heads, d_k = params["decoder"]["self_attention"]["query"].shape
    length = source.shape[-1]
    cache = jnp.zeros((num_layers, 2, *source.shape[:-1], num_heads, length, d_k), memory.dtype)  # 2: keys and values

    def step(i, target_and_cache):
        target, cache = target_and_cache

        def layer(x, params_and_cache):
            layer_params, layer_cache = params_and_cache

            # `attention` is an argument: this one also keeps the keys and values of earlier positions.
            def cached_attention(query, key, value, mask=None, *, causal=False):
                nonlocal layer_cache
                if causal:  # self-attention; query, key and value belong to position i
                    layer_cache = layer_cache.at[..., i, :].set(jnp.stack([key, value])[..., 0, :])
                    key, value = layer_cache
                    mask = jnp.arange(length) <= i
                return scaled_dot_product_attention(query, key, value, mask)

            x = decoder_layer(layer_params, x, memory, attention=cached_attention)
            return x, layer_cache

        x = embed(params, shift_right(target))[..., i, None, :]
        x, cache = jax.lax.scan(layer, x, (params["decoder"], cache))
        logits = jnp.einsum("...d,sd->...s", x[..., 0, :], params["embedding"])
        token = logits.at[..., START].set(-jnp.inf).argmax(axis=-1)  # never generate START
        return target.at[..., i].set(token.astype(target.dtype)), cache

    return jax.lax.fori_loop(0, length, step, (jnp.zeros_like(source), cache))[0]


def cross_attention_weights(params, source, target):
    """The cross-attention weights of the last decoder layer. (..., m), (..., n) tokens -> (..., h, n, m)."""
    memory = encoder(params["encoder"], embed(params, source))

    def layer(x, layer_params):
        recorded = []  # filled while tracing; from outside, the function is pure

        def recording_attention(query, key, value, mask=None, *, causal=False):
            recorded.append(attention_weights(query, key, mask, causal=causal))
            return scaled_dot_product_attention(query, key, value, mask, causal=causal)

        x = decoder_layer(layer_params, x, memory, attention=recording_attention)
        return x, recorded[-1]  # cross-attention comes last; scan stacks the weights of all layers

    return jax.lax.scan(layer, embed(params, shift_right(target)), params["decoder"])[1][-1]


# ---- Training: sections 5.3, 5.4 and 6.1 -----------------------------------------------------------------------------


def loss(params, source, target):
    """Section 5.4: mean cross-entropy with label smoothing. Tokens (..., m) and (..., n) -> ().

    The smoothed labels put 0.9 on the correct token and spread 0.1 uniformly over the whole vocabulary. Dropout is not
    needed here: every batch is new, so the model cannot overfit.
    """
    log_probabilities = jax.nn.log_softmax(model(params, source, shift_right(target)))
    correct = jnp.take_along_axis(log_probabilities, jnp.asarray(target)[..., None], axis=-1)
    return -((1 - LABEL_SMOOTHING) * correct.mean() + LABEL_SMOOTHING * log_probabilities.mean())


def learning_rate(step, d_model, warmup_steps):
    """Equation 3: d_model^-0.5 min(step^-0.5, step warmup_steps^-1.5), for step 1, 2, ..."""
    return d_model**-0.5 * jnp.minimum(step**-0.5, step * warmup_steps**-1.5)


def init_adam(params):
    """Adam's first and second moments m and v, zero and shaped like the parameters."""
    return {"m": jax.tree.map(jnp.zeros_like, params), "v": jax.tree.map(jnp.zeros_like, params)}


def adam(params, moments, gradient, step, rate):
    """One step of Adam (arXiv 1412.6980, algorithm 1). Steps count from 1. Returns the new parameters and moments.

    All keep their dtypes. float16 is not supported: EPSILON underflows in it.
    """
    m = jax.tree.map(lambda m, g: (BETA1 * m + (1 - BETA1) * g).astype(m.dtype), moments["m"], gradient)
    v = jax.tree.map(lambda v, g: (BETA2 * v + (1 - BETA2) * g**2).astype(v.dtype), moments["v"], gradient)

    def update(p, m, v):
        return (p - rate * (m / (1 - BETA1**step)) / (jnp.sqrt(v / (1 - BETA2**step)) + EPSILON)).astype(p.dtype)

    return jax.tree.map(update, params, m, v), {"m": m, "v": v}


def train_step(params, moments, step, source, target, warmup_steps):
    """One training step. Steps count from 1. Returns the new parameters and moments, and the loss before the step.

    params from `init_model`, moments from `init_adam`; source (..., m) and target (..., n) tokens.
    """
    value, gradient = jax.value_and_grad(loss)(params, source, target)
    rate = learning_rate(step, params["embedding"].shape[-1], warmup_steps)
    return *adam(params, moments, gradient, step, rate), value


def average(mean, params, count):
    """Section 6.1: the running mean. Updates the mean of count - 1 sets of parameters with the count-th set.

    Returns at least float32. The mean of 0 sets may be any pytree like params.
    """

    def update(m, p):
        m = m.astype(at_least_float32(m, p))
        return m + (p - m) / count

    return jax.tree.map(update, mean, params)


# ---- Many devices ----------------------------------------------------------------------------------------------------


def partition_specs(params):
    """Splits heads and d_ff over the mesh axis "model", as Megatron-LM does (arXiv 1909.08053); the rest is replicated.

    Returns a PartitionSpec for each leaf. Each device computes its own heads and hidden units, and XLA adds a sum over
    devices after each sub-layer. Works for any pytree in which the parameters have their names: a layer, a stack, the
    model, optimizer state. Leaves with other names, or with too few axes for their name, are replicated.
    """
    # Of a single layer: the axis to split, and the number of axes.
    axes = {"query": (1, 3), "key": (1, 3), "value": (1, 3), "output": (0, 3), "w1": (1, 2), "b1": (0, 1), "w2": (0, 2)}

    def spec(path, leaf):
        axis, num_axes = axes.get(jax.tree_util.keystr(path[-1:], simple=True), (0, math.inf))
        leading = np.ndim(leaf) - num_axes  # the axes of layers
        return P(*[None] * (leading + axis), "model") if leading >= 0 else P()

    return jax.tree.map_with_path(spec, params)


# ---- The task: reversing strings -------------------------------------------------------------------------------------


def random_strings(generator, batch_size, length):
    """Random strings of at most 8 different symbols. Returns tokens (batch_size, length).

    Symbols repeat, so the previous symbol does not determine the next, and the model must look at positions.
    generator: a `numpy.random.Generator`.
    """
    symbols = generator.integers(START + 1, len(SYMBOLS), size=(batch_size, 8))
    return np.take_along_axis(symbols, generator.integers(8, size=(batch_size, length)), axis=1)


def task(strings):
    """The targets: the reversed strings. Tokens (..., n) -> (..., n)."""
    return strings[..., ::-1]


def as_text(tokens):
    """Tokens (n,) -> string."""
    return "".join(SYMBOLS[token] for token in tokens)


# ---- The program -----------------------------------------------------------------------------------------------------


def parse_arguments():
    """Parses the command line, joins the other processes, and returns the arguments and the mesh of all devices."""
    parser = argparse.ArgumentParser(
        description="Initialize a Transformer, run it, train it to reverse strings, then reverse TEXT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("TEXT", nargs="*", default=["attention is all you need"], help="text to reverse, in quotes")
    parser.add_argument("--num-layers", type=int, default=2, help="number N of encoder layers, and of decoder layers")
    parser.add_argument("--num-heads", type=int, default=4, help="number h of attention heads (must divide --d-model)")
    parser.add_argument("--d-model", type=int, default=64, help="dimension of the model (must be even)")
    parser.add_argument("--d-ff", type=int, default=128, help="inner dimension of the feed-forward network")
    parser.add_argument("--batch-size", type=int, default=16, help="strings per training step")
    parser.add_argument("--steps", type=int, default=320, help="number of training steps")
    parser.add_argument("--warmup-steps", type=int, default=400, help="steps of learning rate warm-up (Equation 3)")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--model-parallel", type=int, default=1, help="number of devices that share heads and d_ff")
    parser.add_argument("--distributed", action="store_true", help="join the processes started by mpirun or srun")
    arguments = parser.parse_args()

    def require(condition, message):
        if not condition:
            parser.error(message)

    for name, value in vars(arguments).items():
        if type(value) is int:
            least, flag = int(name not in ("steps", "seed")), f"--{name.replace('_', '-')}"
            require(least <= value < 2**31, f"{flag} must be from {least} to 2^31 - 1, got {value}")
    text, d_model, num_heads = arguments.TEXT, arguments.d_model, arguments.num_heads
    require(len(text) == 1, f'put TEXT in quotes if it has several words: "{" ".join(text)}"')
    arguments.text = text = text[0]
    require(1 <= len(text) <= 100, f"TEXT must have 1 to 100 characters, got {len(text)}")
    require(set(text) <= set(SYMBOLS[1:]), f"TEXT must be printable ASCII, got {text!a}")
    require(d_model % 2 == 0, f"--d-model must be even (sines and cosines come in pairs), got {d_model}")
    require(d_model % num_heads == 0, f"--num-heads must divide --d-model, got {num_heads} and {d_model}")
    if arguments.distributed:
        try:
            jax.distributed.initialize()
        except ValueError:
            parser.error("--distributed: JAX found no launcher; use srun, or mpirun of Open MPI 4")
    devices, model_parallel, batch_size = jax.device_count(), arguments.model_parallel, arguments.batch_size
    for name, size in (("the number of devices", devices), ("--num-heads", num_heads), ("--d-ff", arguments.d_ff)):
        require(size % model_parallel == 0, f"--model-parallel must divide {name}, got {model_parallel} and {size}")
    data_parallel = devices // model_parallel
    message = f"--batch-size must be a multiple of {data_parallel} (devices / --model-parallel), got {batch_size}"
    require(batch_size % data_parallel == 0, message)
    mesh = jax.make_mesh((data_parallel, model_parallel), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return arguments, mesh


def show_attention(before, after, text, output):
    """Prints attention weights (n, m) before and after training, side by side if they fit in 80 columns."""
    shades = " ░▒▓█" if "utf" in (sys.stdout.encoding or "").lower() else " .:*#"
    maps = []
    for title, weights in (("before training", before), ("after training", after)):
        levels = (weights / weights.max() * (len(shades) - 0.01)).astype(int)  # 0, ..., len(shades) - 1
        rows = ["".join(shades[level] for level in row) for row in levels]
        maps.append([title, f"  {text}", *(f"{symbol} {row}" for symbol, row in zip(output, rows, strict=True))])
    width = max(len(text) + 2, len("before training")) + 4
    together = zip(*maps, strict=True) if 2 * width - 4 <= 80 else ((line, "") for lines in maps for line in lines)
    for left, right in together:
        print(f"{left:<{width}}{right}".rstrip())


def main():
    """Runs the program: prints its five parts."""
    arguments, mesh = parse_arguments()
    if jax.process_index():  # process 0 alone prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    text, steps, batch_size = arguments.text, arguments.steps, arguments.batch_size
    generator = np.random.default_rng(arguments.seed)
    held_out = random_strings(generator, batch_size, len(text))  # test strings; the first is TEXT
    held_out[0] = [SYMBOLS.index(symbol) for symbol in text]
    answers = task(held_out)

    def init():
        sizes = arguments.num_layers, arguments.d_model, arguments.num_heads, arguments.d_ff
        params = init_model(jax.random.key(arguments.seed), len(SYMBOLS), *sizes)
        return params, init_adam(params)

    replicated, batch_split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    state_shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(jax.eval_shape(init)))
    train = jax.jit(train_step, out_shardings=(*state_shardings, replicated))
    write = jax.jit(generate, out_shardings=replicated)
    fast_compilation = {"xla_backend_optimization_level": 0}  # these programs run briefly: favor compile time
    update_mean = jax.jit(average, compiler_options=fast_compilation)
    weights_of = jax.jit(cross_attention_weights, out_shardings=replicated, compiler_options=fast_compilation)
    params, moments = jax.jit(init, out_shardings=state_shardings, compiler_options=fast_compilation)()
    source, target = jax.device_put((held_out, answers), batch_split)

    print("1. Parameters: a Transformer is a dict of dicts of arrays\n")
    for path, leaf in jax.tree.leaves_with_path(params):
        print(f"params{jax.tree_util.keystr(path):<44} {leaf.shape!s:>17} {leaf.size:>11,}")
    print(f"{'total':<68}{sum(leaf.size for leaf in jax.tree.leaves(params)):>12,}")

    print("\n2. Forward pass: one batch, TEXT and random strings\n")
    print(f"source and target {source.shape!s:>16}\nlogits            {(*target.shape, len(SYMBOLS))!s:>16}")
    print(f"devices           {tuple(mesh.shape.values())!s:>16}  (data, model)")
    forward = jax.jit(model)
    for call in ("first call", "second call"):
        start = time.perf_counter()
        jax.block_until_ready(forward(params, source, target))
        print(f"{call:<17} {(time.perf_counter() - start) * 1e3:13.2f} ms{'  (compiles)' * (call == 'first call')}")

    print("\n3. Training:", f"{steps} steps on random strings\n" if steps else "skipped (--steps 0)")
    averaged = min(steps, AVERAGED_STEPS)
    printed = {i * steps // 6 for i in range(1, 7)}
    untrained = mean = params
    for step in range(1, steps + 1):
        strings = random_strings(generator, batch_size, len(text))
        batch = jax.device_put((strings, task(strings)), batch_split)
        params, moments, value = train(params, moments, step, *batch, arguments.warmup_steps)
        if step > steps - averaged:
            mean = update_mean(mean, params, step - (steps - averaged))
        if step in printed:
            written = np.asarray(write(params, source))
            accuracy = (written == answers).mean()
            print(f'step {step:>5}  loss {value:7.4f}  accuracy {accuracy:7.2%}  "{as_text(written[0])}"', flush=True)

    print("\n4. Result: TEXT reversed by the model\n")
    final, written = (np.asarray(write(candidate, source)) for candidate in (params, mean))
    print(f'input   "{text}"\noutput  "{as_text(written[0])}"')
    exact = [f"{(tokens == answers).all(axis=1).sum()}/{batch_size}" for tokens in (final, written)]
    print(f"exact matches: {exact[0]} (final parameters)", end="")
    print(f", {exact[1]} (average of the last {averaged} steps)" if averaged > 1 else "")

    print("\n5. Attention: cross-attention of the last decoder layer, mean of its heads")
    print("   rows: output, columns: input; a fuller block means more attention\n")
    before, after = (np.asarray(weights_of(candidate, source, target))[0] for candidate in (untrained, mean))
    show_attention(before.mean(axis=0), after.mean(axis=0), text, as_text(answers[0]))


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (e.g. `head`) closed the pipe
        sys.stdout = None  # silences the error at exit
