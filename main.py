"""The whole Transformer of "Attention Is All You Need" (Figure 1): the model, its training and a program to run it.

    python main.py [TEXT] [--pairs FILE]

prints the parameters, runs a jitted forward pass, trains the model on reversed strings or on the pairs of FILE, writes
its output for TEXT, and draws the attention of the decoder. The axes, in shapes and einsum strings:

    ...  any leading (batch) axes        d  d_model
    m    source positions                h  heads
    n    target positions                k  d_k = d_model / h, the dimension of queries and keys
    l    layers                          v  d_v = d_k, the dimension of values
    s    vocab_size
"""

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends the program without a traceback, also during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attention import at_least_float32, attention_weights, padding_mask, scaled_dot_product_attention
from transformer_layer import decoder, decoder_layer, dropout, encoder, init_decoder, init_encoder, split_rng

END = 0  # the token that ends a target, pads sources and targets, and is the decoder's first input
BETA1, BETA2, EPSILON = 0.9, 0.98, 1e-9  # section 5.3
LABEL_SMOOTHING = 0.1  # section 5.4
MAX_NORM = 0.3  # of the gradient; see `clip`
AVERAGED_STEPS = 75  # section 6.1: average the parameters of the last steps
MAX_LENGTH = 100  # characters of a string

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
    return (embedding[tokens] * math.sqrt(d_model) + positional_encoding(length, d_model)).astype(embedding.dtype)


def lengths(tokens):
    """The number of tokens before the first END, or all if there is none. (..., n) -> (...,).

    The first END and all tokens after it are padding.
    """
    return (jnp.asarray(tokens) != END).cumprod(axis=-1).sum(axis=-1)


def pad_after_end(tokens):
    """Sets all tokens after the first END to END. (..., n) -> (..., n)."""
    tokens = jnp.asarray(tokens)
    return jnp.where(jnp.arange(tokens.shape[-1]) < lengths(tokens)[..., None], tokens, END)


def encode(params, source, *, dropout_rng=None, dropout_rate=0.1, **options):
    """Figure 1, left: source (..., m) tokens -> memory (..., m, d), and the mask (..., 1, 1, m) of its padding.

    Sources of different lengths, padded with END, fit in one batch.
    """
    source = jnp.asarray(source)
    rngs = split_rng(dropout_rng, 2)
    mask = padding_mask(lengths(source), source.shape[-1])
    x = dropout(rngs[0], embed(params, source), dropout_rate)
    return encoder(params["encoder"], x, mask, dropout_rng=rngs[1], dropout_rate=dropout_rate, **options), mask


def model(params, source, target, *, dropout_rng=None, dropout_rate=0.1, **options):
    """Figure 1: source (..., m) and target (..., n) tokens -> logits (..., n, s).

    Position i scores the token that follows target tokens 0 to i; for training, `shift_right` makes such a target.
    Dropout as in section 5.4: on the output of each sub-layer, and on both sums of embeddings and positional encodings.
    Padding in source is masked; padding in target comes last, and attention is causal. Option: `attention`.
    """
    rngs = split_rng(dropout_rng, 3)
    options["dropout_rate"] = dropout_rate
    memory, mask = encode(params, source, dropout_rng=rngs[0], **options)
    x = dropout(rngs[1], embed(params, target), dropout_rate)
    x = decoder(params["decoder"], x, memory, memory_mask=mask, dropout_rng=rngs[2], **options)
    return jnp.einsum("...nd,sd->...ns", x, params["embedding"])  # section 3.4: the transposed embedding


def shift_right(target):
    """Section 3.1: shifts the targets right by one: END, then all tokens but the last. (..., n) -> (..., n)."""
    target = jnp.asarray(target)
    return jnp.concatenate([jnp.full_like(target[..., :1], END), target[..., :-1]], axis=-1)


def cross_attention_weights(params, source, target):
    """The cross-attention weights of the last decoder layer. (..., m), (..., n) tokens -> (..., h, n, m)."""
    memory, memory_mask = encode(params, source)
    target = pad_after_end(target)

    def layer(x, layer_params):
        recorded = []  # filled while tracing; from outside, the function is pure

        def recording_attention(query, key, value, mask=None, *, causal=False):
            recorded.append(attention_weights(query, key, mask, causal=causal))
            return scaled_dot_product_attention(query, key, value, mask, causal=causal)

        x = decoder_layer(layer_params, x, memory, memory_mask=memory_mask, attention=recording_attention)
        _, cross_attention = recorded  # self-attention comes first
        return x, cross_attention

    x = embed(params, shift_right(target))
    _, weights = jax.lax.scan(layer, x, params["decoder"])  # stacks the weights of all layers
    return weights[-1]


# ---- Training: sections 5.3, 5.4 and 6.1 -----------------------------------------------------------------------------


def loss(params, source, target, **options):
    """Section 5.4: mean cross-entropy with label smoothing. Tokens (..., m) and (..., n) -> ().

    The smoothed labels put 0.9 on the correct token and spread 0.1 uniformly over the whole vocabulary. The mean is
    over all target tokens up to and including the first END. Options are as in `model`. Target tokens outside the
    vocabulary raise no error: large ones give NaN, and JAX counts negative ones from the end.
    """
    target = jnp.asarray(target)
    logits = model(params, source, shift_right(target), **options)
    log_probabilities = jax.nn.log_softmax(logits.astype(at_least_float32(logits)))
    correct = jnp.take_along_axis(log_probabilities, target[..., None], axis=-1)[..., 0]
    cross_entropy = -((1 - LABEL_SMOOTHING) * correct + LABEL_SMOOTHING * log_probabilities.mean(axis=-1))
    up_to_end = jnp.arange(target.shape[-1]) <= lengths(target)[..., None]
    return cross_entropy.mean(where=up_to_end)


def learning_rate(step, d_model, warmup_steps):
    """Equation 3: d_model^-0.5 min(step^-0.5, step warmup_steps^-1.5), for step 1, 2, ..."""
    return d_model**-0.5 * jnp.minimum(step**-0.5, step * warmup_steps**-1.5)


def clip(gradient):
    """Scales the gradient to a global norm of at most MAX_NORM (arXiv 1211.5063). Its leaves keep their dtypes.

    The paper does not mention clipping. Without it, some steps are so large that the model loses what it has learned,
    while the loss hardly changes.
    """
    squares = [jnp.square(leaf.astype(at_least_float32(leaf))).sum() for leaf in jax.tree.leaves(gradient)]
    norm = jnp.sqrt(sum(squares))
    factor = MAX_NORM / jnp.maximum(norm, MAX_NORM)
    return jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), gradient)


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


def train_step(params, moments, step, source, target, warmup_steps, **options):
    """One training step. Steps count from 1. Returns the new parameters and moments, and the loss before the step.

    params from `init_model`, moments from `init_adam`; source (..., m) and target (..., n) tokens; options of `loss`.
    """
    value, gradient = jax.value_and_grad(loss)(params, source, target, **options)
    rate = learning_rate(step, params["embedding"].shape[-1], warmup_steps)
    params, moments = adam(params, moments, clip(gradient), step, rate)
    return params, moments, value


def average(mean, params, count):
    """Section 6.1: the running mean of parameters, in at least float32.

    mean is over the `count - 1` earlier steps; the result also includes params. A count of 1 gives params.
    """
    return jax.tree.map(lambda m, p: m + (p - m.astype(at_least_float32(m, p))) / count, mean, params)


# ---- Decoding with a KV cache ----------------------------------------------------------------------------------------

# The model above is complete: `generate` only needs the three lines in its docstring. The rest is efficiency. When a
# token is decoded, the keys and values of all earlier positions, and of memory, are the same as before: store them.


def init_cache(params, memory, length):
    """The KV cache of all layers, for a target of this length: a dict of arrays with a leading layer axis l.

    key (l, ..., h, length, k) and value (l, ..., h, length, v), for self-attention, are zeros that decoding replaces.
    memory_key (l, ..., h, m, k) and memory_value (l, ..., h, m, v), for cross-attention, are computed here, once.
    """
    self_attention, cross_attention = params["decoder"]["self_attention"], params["decoder"]["cross_attention"]

    def zeros(weight):
        num_layers, _, num_heads, d_k = weight.shape
        shape = (num_layers, *memory.shape[:-2], num_heads, length, d_k)
        # `jnp.zeros_like(memory)` is split over devices like memory, also inside `jax.shard_map`; `jnp.zeros` is not.
        return jnp.zeros_like(memory, jnp.result_type(memory, weight), shape=shape)

    return {
        "key": zeros(self_attention["key"]),
        "value": zeros(self_attention["value"]),
        "memory_key": jnp.einsum("...md,ldhk->l...hmk", memory, cross_attention["key"]),
        "memory_value": jnp.einsum("...md,ldhv->l...hmv", memory, cross_attention["value"]),
    }


def cached_decoder_layer(params, x, cache, layer, position, memory, memory_mask):
    """`decoder_layer` number `layer` at one position: x (..., 1, d) -> (..., 1, d), and the new cache.

    Writes this position's key and value to the cache, and attends to those of positions up to and including this one.
    """
    cache = dict(cache)

    def cached_attention(query, key, value, mask=None, *, causal=False):
        if not causal:  # cross-attention; XLA omits the projections of memory, because nothing uses them
            return scaled_dot_product_attention(query, cache["memory_key"][layer], cache["memory_value"][layer], mask)
        cache["key"] = cache["key"].at[layer, ..., position, :].set(key[..., 0, :])
        cache["value"] = cache["value"].at[layer, ..., position, :].set(value[..., 0, :])
        key, value = cache["key"][layer], cache["value"][layer]
        return scaled_dot_product_attention(query, key, value, jnp.arange(key.shape[-2]) <= position)

    x = decoder_layer(params, x, memory, memory_mask=memory_mask, attention=cached_attention)
    return x, cache


def generate(params, source, length):
    """Greedy decoding: each token is the most likely one, given the tokens before it. (..., m) -> target (..., length).

    This is the same algorithm without a cache:

        for i in range(length):
            logits = model(params, source, shift_right(target))
            target = target.at[..., i].set(logits[..., i, :].argmax(axis=-1))

    Tokens after the first END are then set to END. Here, the encoder runs once, and each step decodes one position. Use
    it under `jax.jit` with a static length; outside, every call compiles it again. Raises ValueError if length is not a
    Python int of at least 1.
    """
    if type(length) is not int or length < 1:
        raise ValueError(f"length must be a Python int of at least 1 (under jax.jit: static), got {length!r}")
    memory, memory_mask = encode(params, source)
    target = jnp.zeros_like(memory, int, shape=(*memory.shape[:-2], length))
    cache = init_cache(params, memory, length)
    layer_numbers = jnp.arange(len(cache["key"]))

    def step(i, target_and_cache):
        target, cache = target_and_cache

        def layer(x_and_cache, params_and_number):
            layer_params, number = params_and_number
            return cached_decoder_layer(layer_params, *x_and_cache, number, i, memory, memory_mask), None

        x = embed(params, shift_right(target))[..., i, None, :]
        (x, cache), _ = jax.lax.scan(layer, (x, cache), (params["decoder"], layer_numbers))
        logits = jnp.einsum("...nd,sd->...ns", x, params["embedding"])
        return target.at[..., i].set(logits[..., 0, :].argmax(axis=-1)), cache

    target, _ = jax.lax.fori_loop(0, length, step, (target, cache))
    return pad_after_end(target)


# ---- Many devices ----------------------------------------------------------------------------------------------------


def partition_specs(params):
    """Splits heads and d_ff over the mesh axis "model", as Megatron-LM does (arXiv 1909.08053); the rest is replicated.

    Returns a PartitionSpec for each leaf of any pytree whose leaves are named and shaped like the parameters: a layer,
    a stack, the model, Adam's moments. Each device computes its own heads and hidden units, and XLA sums after each
    sub-layer.
    """
    axes = {"query": "dhk", "key": "dhk", "value": "dhv", "output": "hvd", "w1": "df", "b1": "f", "w2": "fd"}

    def spec(path, leaf):
        leaf_axes = axes.get(jax.tree_util.keystr(path[-1:], simple=True))
        if leaf_axes is None or np.ndim(leaf) < len(leaf_axes):
            return P()
        num_layer_axes = np.ndim(leaf) - len(leaf_axes)
        split = next(i for i, axis in enumerate(leaf_axes) if axis in "hf")
        return P(*[None] * (num_layer_axes + split), "model")

    return jax.tree.map_with_path(spec, params)


# ---- The data: pairs of strings --------------------------------------------------------------------------------------


def task(string):
    """The target of a random string: the string reversed."""
    return string[::-1]


def random_pairs(generator, count, length):
    """Random strings of one length, of at most 8 different symbols each, and their targets. Returns strings (count, 2).

    Symbols repeat, so the previous symbol does not determine the next, and the model must look at positions.
    """
    symbols = generator.integers(32, 127, size=(count, 8))  # printable ASCII
    codes = np.take_along_axis(symbols, generator.integers(8, size=(count, length)), axis=1)
    return np.array([(string := "".join(map(chr, row)), task(string)) for row in codes])


def read_pairs(file):
    """Reads a UTF-8 file with a source, a tab and a target on each line. Returns strings (count, 2).

    Skips blank lines and further columns. Raises argparse.ArgumentTypeError, which names the file and the line.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {file}: {error}") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if "\t" in line or line.strip():
            pairs.append(line.split("\t")[:2])
            problem = (
                (len(pairs[-1]) < 2 and "no tab between source and target")
                or (max(map(len, pairs[-1])) > MAX_LENGTH and f"a string of more than {MAX_LENGTH} characters")
                or ("\0" in "".join(pairs[-1]) and "a NUL character")
            )
            if problem:
                raise argparse.ArgumentTypeError(f"{file}, line {number}: {problem}")
    return np.array(pairs, str).reshape(-1, 2)


def hold_out(generator, pairs, text, count):
    """Holds out `count` test pairs with distinct sources, text first. Training keeps the pairs with other sources.

    pairs (n, 2) -> the test sources, their targets (None for a text that has no pair), and the training pairs.
    """
    targets = dict(generator.permutation(pairs).tolist())
    sources = [text, *(source for source in targets if source != text)][:count]
    return sources, [targets.get(source) for source in sources], pairs[~np.isin(pairs[:, 0], sources)]


def as_tokens(strings, length, symbols):
    """Strings (...) -> tokens (..., length): i for symbols[i - 1], then END. Raises ValueError for other strings."""
    strings = np.asarray(strings, object)  # NumPy's own strings lose a NUL at their end
    tokens = {symbol: token for token, symbol in enumerate(symbols, start=1)}
    if wrong := [string for string in strings.flat if len(string) > length or not set(string) <= tokens.keys()]:
        raise ValueError(f"strings must have at most {length} characters, all from {symbols!a}, got {wrong[0]!a}")
    rows = [[tokens[symbol] for symbol in string] + (length - len(string)) * [END] for string in strings.flat]
    return np.array(rows, np.int32).reshape(*strings.shape, length)


def as_text(tokens, symbols):
    """Tokens (n,) -> the string before the first END."""
    return "".join(symbols[token - 1] for token in tokens[: lengths(tokens)])


# ---- The program -----------------------------------------------------------------------------------------------------


def parse_arguments():
    """Parses the command line, joins the other processes, and returns the arguments and the mesh of all devices."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = "Initialize a Transformer, run it, train it to reverse strings or on your pairs, and apply it."
    add, default = parser.add_argument, "attention is all you need"
    add("TEXT", nargs="*", default=default, help="input (--pairs: of FILE); put -- before it if it begins with -")
    add("--pairs", type=read_pairs, metavar="FILE", help="learn from FILE: on each line, a source, a tab, its target")
    add("--num-layers", type=int, default=2, help="number N of encoder layers, and of decoder layers")
    add("--num-heads", type=int, default=4, help="number h of attention heads (must divide --d-model)")
    add("--d-model", type=int, default=64, help="dimension of the model (must be even)")
    add("--d-ff", type=int, default=128, help="inner dimension of the feed-forward network")
    add("--dropout-rate", type=float, default=0.0, help="dropout in training (section 5.4)")
    add("--batch-size", type=int, default=16, help="pairs per training step, and test pairs")
    add("--steps", type=int, default=380, help="number of training steps")
    add("--warmup-steps", type=int, default=560, help="steps of learning rate warm-up (Equation 3)")
    add("--seed", type=int, default=0, help="random seed")
    add("--model-parallel", type=int, default=1, help="number of devices that share heads and d_ff")
    add("--distributed", action="store_true", help="join the processes started by mpirun or srun")
    args = parser.parse_args()

    def require(condition, message):
        if not condition:
            parser.error(message)

    for name, value in vars(args).items():
        if type(value) is int:
            least, flag = int(name not in ("steps", "seed")), f"--{name.replace('_', '-')}"
            require(least <= value < 2**31, f"{flag} must be from {least} to 2^31 - 1, got {value}")
    pairs, batch_size, d_model, num_heads = args.pairs, args.batch_size, args.d_model, args.num_heads
    texts = [default] if pairs is None else np.random.default_rng(args.seed).permutation(pairs[:, 0]).tolist()
    args.text = text = next(filter(None, texts), "") if args.TEXT is default else " ".join(args.TEXT)
    others = batch_size if pairs is None else len(set(pairs[:, 0]) - {text})
    require(others >= batch_size, f"FILE needs {batch_size} distinct sources besides TEXT (--batch-size), got {others}")
    args.symbols = "".join(map(chr, range(32, 127))) if pairs is None else "".join(sorted(set("".join(pairs.flat))))
    require(1 <= len(text) <= MAX_LENGTH, f"TEXT must have 1 to {MAX_LENGTH} characters, got {len(text)}")
    wrong = "".join(sorted(set(text) - set(args.symbols)))
    require(not wrong, f"TEXT must be {'printable ASCII' if pairs is None else 'characters of FILE'}, not {wrong!a}")
    require(0 <= args.dropout_rate < 1, f"--dropout-rate must be at least 0 and below 1, got {args.dropout_rate}")
    require(d_model % 2 == 0, f"--d-model must be even (sines and cosines come in pairs), got {d_model}")
    require(d_model % num_heads == 0, f"--num-heads must divide --d-model, got {num_heads} and {d_model}")
    if args.distributed:
        try:
            jax.distributed.initialize()
        except ValueError:
            parser.error("--distributed: JAX found no launcher; use srun, or mpirun of Open MPI 4")
    devices, model_parallel = jax.device_count(), args.model_parallel
    for name, size in (("the number of devices", devices), ("--num-heads", num_heads), ("--d-ff", args.d_ff)):
        require(size % model_parallel == 0, f"--model-parallel must divide {name}, got {model_parallel} and {size}")
    data_parallel = devices // model_parallel
    message = f"--batch-size must be a multiple of {data_parallel} (devices / --model-parallel), got {batch_size}"
    require(batch_size % data_parallel == 0, message)
    return args, jax.make_mesh((data_parallel, model_parallel), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def show_attention(weights, text, output):
    """Prints attention weights (n, m): a row for each character of output, a column for each character of text."""
    if not output or not np.isfinite(weights).all():
        print("nothing to draw:", "the weights are not finite" if output else "the output is empty")
        return
    shades = " ░▒▓█" if "utf" in (getattr(sys.stdout, "encoding", None) or "").lower() else " .:*#"
    levels = (weights / weights.max() * (len(shades) - 0.01)).astype(int)  # 0, ..., len(shades) - 1
    print(f"  {text}")
    for symbol, row in zip(output, levels, strict=True):
        print(f"{symbol} {''.join(shades[level] for level in row)}".rstrip())


def main():
    """Runs the program: prints its five parts."""
    args, mesh = parse_arguments()
    if jax.process_index():  # process 0 alone prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    if hasattr(sys.stdout, "reconfigure"):  # prints ? for characters that the terminal cannot encode
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    text, symbols, steps, batch_size = args.text, args.symbols, args.steps, args.batch_size
    numpy_rng = np.random.default_rng(args.seed)  # for the data
    init_rng, dropout_rng = jax.random.split(jax.random.key(args.seed))
    if args.pairs is None:
        pairs = np.concatenate([[(text, task(text))], random_pairs(numpy_rng, batch_size + 19_999, len(text))])
        sources, answers, training = *pairs[:batch_size].T.tolist(), pairs[batch_size:]
    else:
        sources, answers, training = hold_out(numpy_rng, args.pairs, text, batch_size)
    n = max(map(len, [*filter(None, answers), *training[:, 1]])) + 1  # with END
    m = max(n, *map(len, [*sources, *training[:, 0]]))  # if m = n, encoder and decoder compile faster
    test = as_tokens(sources, m, symbols), as_tokens([answer or "" for answer in answers], n, symbols)
    counted = np.arange(n) <= [[-1 if answer is None else len(answer)] for answer in answers]  # tokens up to END

    def init():
        params = init_model(init_rng, len(symbols) + 1, args.num_layers, args.d_model, args.num_heads, args.d_ff)
        return params, init_adam(params)

    def update(params, moments, step, *batch):
        rng = jax.random.fold_in(dropout_rng, step) if args.dropout_rate else None  # a rate of 0 needs no key
        options = {"dropout_rng": rng, "dropout_rate": args.dropout_rate}
        return train_step(params, moments, step, *batch, args.warmup_steps, **options)

    replicated, batch_split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    state_shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(jax.eval_shape(init)))
    # Donated arguments: the new parameters and moments take the memory of the old ones, which cannot be used again.
    train = jax.jit(update, out_shardings=(*state_shardings, replicated), donate_argnums=(0, 1))
    decode = jax.jit(generate, static_argnums=2, out_shardings=replicated)
    fast_compilation = {"xla_backend_optimization_level": 0}  # these run only briefly, so favor fast compilation
    update_mean = jax.jit(average, compiler_options=fast_compilation)
    weights_of = jax.jit(cross_attention_weights, out_shardings=replicated, compiler_options=fast_compilation)
    params, moments = jax.jit(init, out_shardings=state_shardings, compiler_options=fast_compilation)()
    source, target = jax.device_put(test, batch_split)

    print("1. Parameters: a Transformer is a dict of dicts of arrays\n")
    for path, leaf in jax.tree.leaves_with_path(params):
        print(f"params{jax.tree_util.keystr(path):<44} {leaf.shape!s:>17} {leaf.size:>11,}")
    print(f"{'total':<68}{sum(leaf.size for leaf in jax.tree.leaves(params)):>12,}")

    print("\n2. Forward pass: one batch of test pairs, TEXT first\n")
    print(f"source            {source.shape!s:>16}\ntarget            {target.shape!s:>16}")
    print(f"logits            {(*target.shape, len(symbols) + 1)!s:>16}")
    print(f"devices           {tuple(mesh.shape.values())!s:>16}  (data, model)")
    forward = jax.jit(lambda params, source, target: model(params, source, shift_right(target)))
    for call in ("first call", "second call"):
        start = time.perf_counter()
        jax.block_until_ready(forward(params, source, target))
        print(f"{call:<17} {(time.perf_counter() - start) * 1e3:13.2f} ms{'  (compiles)' * (call == 'first call')}")

    print("\n3. Training:", f"{steps} steps on {len(training):,} pairs\n" if steps else "skipped (--steps 0)")
    printed = {i * steps // 6 for i in range(1, 7)}
    averaged, mean = min(steps, AVERAGED_STEPS), params
    for step in range(1, steps + 1):
        strings = training[numpy_rng.integers(len(training), size=batch_size)].T
        batch = as_tokens(strings[0], m, symbols), as_tokens(strings[1], n, symbols)
        params, moments, value = train(params, moments, step, *jax.device_put(batch, batch_split))
        if (count := step - (steps - averaged)) > 0:
            mean = update_mean(mean if count > 1 else params, params, count)
        if getattr(sys.stdout, "isatty", bool)():  # a counter, which the next line overwrites
            print(f"step {step:>5}  loss {value:7.4f}", end="\r", flush=True)
        if step in printed:
            tokens = np.asarray(decode(params, source, n))
            correct, output = (tokens == test[1])[counted], as_text(tokens[0], symbols)
            accuracy = f"{correct.mean():.2%}" if correct.size else "-"
            print(f'step {step:>5}  loss {value:7.4f}  accuracy {accuracy:>7}  "{output[:34]}"')  # 80 columns

    print("\n4. Result: the model's output for TEXT\n")
    generated = [np.asarray(decode(parameters, source, n)) for parameters in (params, mean)]
    matches = [(tokens == test[1]).all(axis=1)[counted[:, 0]] for tokens in generated]
    exact = [f"{match.sum()}/{match.size}" if match.size else "-" for match in matches]
    output = as_text(generated[1][0], symbols)
    print(f'input   "{text}"\noutput  "{output}"')
    if answers[0] not in (None, output):
        print(f'answer  "{answers[0]}"')
    print(f"exact matches: {exact[0]} (final parameters)", end="")
    print(f", {exact[1]} (average of the last {averaged} steps)" if averaged > 1 else "")

    print("\n5. Attention: cross-attention of the last decoder layer, mean of its heads")
    print("   rows: output, columns: input; a fuller block means more attention\n")
    weights = np.asarray(weights_of(mean, source, generated[1]))[0].mean(axis=0)
    show_attention(weights[: len(output), : len(text)], text, output)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader (e.g. `head`) closed the pipe
        sys.stdout = None  # silences the error at exit
