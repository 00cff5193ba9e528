"""The whole Transformer of "Attention Is All You Need" (Figure 1): model, training and a program.

    python main.py [TEXT] [--pairs FILE]

prints the parameters, runs a jitted forward pass, trains the model on reversed strings or on the pairs of FILE, writes
its output for TEXT, and draws the attention of the decoder. The axes, in shapes and einsum strings:

    ...  any leading (batch) axes        d  d_model
    m    source positions                h  heads
    n    target positions                k  d_k = d_model / h, the dimension of queries and keys
    l    layers                          v  d_v = d_k, the dimension of values
    s    vocab_size                      f  d_ff
"""

import argparse
import math
import os
import signal
import sys
import time
import unicodedata
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program, also during the slow imports below

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attention import at_least_float32, attention_weights, padding_mask, scaled_dot_product_attention
from transformer_layer import decoder, decoder_layer, dropout, encoder, init_decoder, init_encoder, split_rng

END = 0  # the token that ends a target, pads sources and targets, and is the decoder's first input
BETA1, BETA2, EPSILON = 0.9, 0.98, 1e-9  # section 5.3
LABEL_SMOOTHING = 0.1  # section 5.4
MAX_NORM = 0.3  # of the gradient; see `clip`
AVERAGED_STEPS = 75  # section 6.1: average the parameters of the last steps
PRINTABLE_ASCII = "".join(map(chr, range(32, 127)))
DEFAULT_TEXT = "attention is all you need"
MAX_LENGTH = 100  # characters of a string
TEST_PAIRS = 64

# ---- The model: Figure 1, sections 3.4 and 3.5 ---------------------------------------------------


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

    The embedding is normal with standard deviation 0.02, as in GPT. Raises ValueError if sizes do not match.
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
    """Sections 3.4 and 3.5: Embedding(tokens) sqrt(d_model) + PE. Tokens (..., n) -> (..., n, d).

    Integers outside the vocabulary raise no error: JAX counts negative ones from the end, and clamps the others.
    """
    embedding, tokens = jnp.asarray(params["embedding"]), jnp.asarray(tokens)
    length, d_model = tokens.shape[-1], embedding.shape[-1]
    x = embedding[tokens] * math.sqrt(d_model) + positional_encoding(length, d_model)
    return x.astype(embedding.dtype)


def lengths(tokens):
    """The number of tokens before the first END, where padding begins. (..., n) -> (...,)."""
    return (jnp.asarray(tokens) != END).cumprod(axis=-1).sum(axis=-1)  # 1 before the first END, then 0


def pad_after_end(tokens):
    """Sets all tokens after the first END to END. (..., n) -> (..., n)."""
    tokens = jnp.asarray(tokens)
    return jnp.where(jnp.arange(tokens.shape[-1]) < lengths(tokens)[..., None], tokens, END)


def encode(params, source, *, dropout_rng=None, dropout_rate=0.1, **options):
    """Figure 1, left: source (..., m) tokens -> memory (..., m, d), and its mask (..., 1, 1, m).

    The mask is False for padding, so sources of different lengths fit in one batch.
    """
    source = jnp.asarray(source)
    rngs = split_rng(dropout_rng, 2)
    mask = padding_mask(lengths(source), source.shape[-1])
    x = dropout(rngs[0], embed(params, source), dropout_rate)
    return encoder(params["encoder"], x, mask, dropout_rng=rngs[1], dropout_rate=dropout_rate, **options), mask


def model(params, source, target, *, dropout_rng=None, dropout_rate=0.1, **options):
    """Figure 1: source (..., m) and target (..., n) tokens -> logits (..., n, s).

    target is the decoder's input, `shift_right` of the tokens to predict. Position i scores the token after 0 to i.
    Dropout as in section 5.4: on the output of each sub-layer, and on both sums of embeddings and positional encodings.
    Padding in source is masked; padding in target comes last, and attention is causal. Option: `attention`.
    """
    rngs = split_rng(dropout_rng, 3)
    options = {"dropout_rate": dropout_rate, **options}
    memory, mask = encode(params, source, dropout_rng=rngs[0], **options)
    x = dropout(rngs[1], embed(params, target), dropout_rate)
    x = decoder(params["decoder"], x, memory, memory_mask=mask, dropout_rng=rngs[2], **options)
    return jnp.einsum("...nd,sd->...ns", x, params["embedding"])  # section 3.4: the same matrix


def shift_right(target):
    """Section 3.1: shifts targets right by one: END, then all but the last. (..., n) -> (..., n)."""
    target = jnp.asarray(target)
    return jnp.concatenate([jnp.full_like(target[..., :1], END), target[..., :-1]], axis=-1)


def cross_attention_weights(params, source, target):
    """The cross-attention weights of the last decoder layer. Tokens (..., m), (..., n) -> (..., h, n, m)."""
    memory, memory_mask = encode(params, source)
    target = pad_after_end(target)

    def layer(x, layer_params):
        recorded = []  # filled while tracing, because `decoder_layer` does not return its weights

        def recording_attention(query, key, value, mask=None, *, causal=False):
            recorded.append(attention_weights(query, key, mask, causal=causal))
            return scaled_dot_product_attention(query, key, value, mask, causal=causal)

        x = decoder_layer(layer_params, x, memory, memory_mask=memory_mask, attention=recording_attention)
        _, cross_attention = recorded  # self-attention comes first
        return x, cross_attention

    _, weights = jax.lax.scan(layer, embed(params, shift_right(target)), params["decoder"])  # of all layers
    return weights[-1]


# ---- Training: sections 5.3, 5.4 and 6.1 ---------------------------------------------------------


def loss(params, source, target, **options):
    """Section 5.4: mean cross-entropy with label smoothing. Tokens (..., m) and (..., n) -> ().

    The smoothed labels put 0.9 on the correct token and spread 0.1 uniformly over the whole vocabulary. The mean is
    over all target tokens up to and including the first END. Options are as in `model`. Target tokens outside the
    vocabulary raise no error: JAX counts negative ones from the end, and the others give NaN.
    """
    target = jnp.asarray(target)
    logits = model(params, source, shift_right(target), **options)
    log_probabilities = jax.nn.log_softmax(logits.astype(at_least_float32(logits)))
    correct = jnp.take_along_axis(log_probabilities, target[..., None], axis=-1)[..., 0]
    uniform = log_probabilities.mean(axis=-1)
    cross_entropy = -((1 - LABEL_SMOOTHING) * correct + LABEL_SMOOTHING * uniform)
    up_to_end = jnp.arange(target.shape[-1]) <= lengths(target)[..., None]
    return cross_entropy.mean(where=up_to_end)


def learning_rate(step, d_model, warmup_steps):
    """Equation 3: d_model^-0.5 min(step^-0.5, step warmup_steps^-1.5), for step 1, 2, ..."""
    return d_model**-0.5 * jnp.minimum(step**-0.5, step * warmup_steps**-1.5)


def clip(gradient):
    """Scales the gradient to a global norm of at most 0.3 (arXiv 1211.5063). Leaves keep their dtypes.

    The paper does not mention it. Without clipping, some steps are so large that the model loses what it has learned.
    """
    leaves = [leaf.astype(at_least_float32(leaf)) for leaf in jax.tree.leaves(gradient)]
    norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in leaves))
    factor = MAX_NORM / jnp.maximum(norm, MAX_NORM)
    return jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), gradient)


def init_adam(params):
    """Adam's first and second moments m and v, zero and shaped like the parameters."""
    return {"m": jax.tree.map(jnp.zeros_like, params), "v": jax.tree.map(jnp.zeros_like, params)}


def adam(params, moments, gradient, step, rate):
    """One step of Adam (arXiv 1412.6980, algorithm 1). Returns the new parameters and moments.

    Steps count from 1. All keep their dtypes. float16 is not supported: EPSILON underflows in it.
    """
    m = jax.tree.map(lambda m, g: (BETA1 * m + (1 - BETA1) * g).astype(m.dtype), moments["m"], gradient)
    v = jax.tree.map(lambda v, g: (BETA2 * v + (1 - BETA2) * g**2).astype(v.dtype), moments["v"], gradient)

    def update(p, m, v):
        m_hat = m / (1 - BETA1**step)  # without the bias towards the initial zeros
        v_hat = v / (1 - BETA2**step)
        return (p - rate * m_hat / (jnp.sqrt(v_hat) + EPSILON)).astype(p.dtype)

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
    """Section 6.1: adds params to the running mean of `count - 1` earlier ones, in at least float32."""
    return jax.tree.map(lambda m, p: ((count - 1) * m.astype(at_least_float32(m, p)) + p) / count, mean, params)


# ---- Decoding with a KV cache --------------------------------------------------------------------

# Three lines in the docstring of `generate` are the complete algorithm. The rest is efficiency: the
# keys and values of memory, and of positions already decoded, do not change, so they are stored.


def init_cache(params, memory, length):
    """The KV cache of all layers, for n = length positions: arrays with a leading layer axis l.

    Self-attention: key (l, ..., h, n, k) and value (l, ..., h, n, v), zeros to be replaced.
    Cross-attention: memory_key (l, ..., h, m, k) and memory_value (l, ..., h, m, v).
    """
    self_attention = params["decoder"]["self_attention"]
    cross_attention = params["decoder"]["cross_attention"]
    num_layers, _, num_heads, d_k = self_attention["key"].shape
    shape = num_layers, *memory.shape[:-2], num_heads, length, d_k
    dtype = jnp.result_type(memory, self_attention["key"], self_attention["value"])
    zeros = jnp.zeros_like(memory, dtype, shape)  # in `jax.shard_map`, they vary over devices like memory
    return {
        "key": zeros,
        "value": zeros,
        "memory_key": jnp.einsum("...md,ldhk->l...hmk", memory, cross_attention["key"]),
        "memory_value": jnp.einsum("...md,ldhv->l...hmv", memory, cross_attention["value"]),
    }


def cached_decoder_layer(params, x, cache, layer_index, position, memory, memory_mask):
    """One decoder layer at one position: x (..., 1, d) -> (..., 1, d), and the new cache.

    Writes this position's key and value to the cache at (layer_index, position), and attends to positions up to it.
    """
    cache = dict(cache)  # a copy, which `cached_attention` updates while it is traced

    def cached_attention(query, key, value, mask=None, *, causal=False):
        if not causal:  # cross-attention; XLA omits the projections of memory, because nothing uses them
            key, value = cache["memory_key"][layer_index], cache["memory_value"][layer_index]
            return scaled_dot_product_attention(query, key, value, mask)
        cache["key"] = cache["key"].at[layer_index, ..., position, :].set(key[..., 0, :])
        cache["value"] = cache["value"].at[layer_index, ..., position, :].set(value[..., 0, :])
        key, value = cache["key"][layer_index], cache["value"][layer_index]
        mask = jnp.arange(key.shape[-2]) <= position
        return scaled_dot_product_attention(query, key, value, mask)

    x = decoder_layer(params, x, memory, memory_mask=memory_mask, attention=cached_attention)
    return x, cache


def generate(params, source, length):
    """Greedy decoding: each token is the most likely one, given those before it.

    source (..., m) -> target (..., length). This is the same algorithm without a cache:

        for i in range(length):
            logits = model(params, source, shift_right(target))
            target = target.at[..., i].set(logits[..., i, :].argmax(axis=-1))

    Tokens after the first END are then set to END. Here, the encoder runs once, and each step decodes one position.
    Use it under `jax.jit` with a static length; outside, every call compiles it again. Raises ValueError if length is
    not a Python int of at least 1.
    """
    if type(length) is not int or length < 1:
        raise ValueError(f"length must be a Python int of at least 1 (under jax.jit: static), got {length!r}")
    memory, memory_mask = encode(params, source)
    target = jnp.full_like(memory, END, int, shape=(*memory.shape[:-2], length))
    cache = init_cache(params, memory, length)

    def step(position, target_and_cache):
        target, cache = target_and_cache

        def layer(x_and_cache, params_and_index):
            layer_params, index = params_and_index
            x, cache = x_and_cache
            return cached_decoder_layer(layer_params, x, cache, index, position, memory, memory_mask), None

        x = embed(params, shift_right(target))[..., position, None, :]
        layers = params["decoder"], jnp.arange(len(cache["key"]))
        (x, cache), _ = jax.lax.scan(layer, (x, cache), layers)
        logits = jnp.einsum("...nd,sd->...ns", x, params["embedding"])
        return target.at[..., position].set(logits[..., 0, :].argmax(axis=-1)), cache

    target, _ = jax.lax.fori_loop(0, length, step, (target, cache))
    return pad_after_end(target)


# ---- Many devices --------------------------------------------------------------------------------


def partition_specs(params):
    """Splits heads and d_ff over the mesh axis "model", as Megatron-LM does (arXiv 1909.08053).

    Returns a PartitionSpec for each leaf of any pytree whose leaves are named and shaped like the parameters: a layer,
    a stack, the model, Adam's moments. Each device computes its own heads and hidden units, and XLA sums after each
    sub-layer. All other leaves are replicated.
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


# ---- The data: pairs of strings ------------------------------------------------------------------


def task(string):
    """The target of a random string: the string reversed."""
    return string[::-1]


def random_pairs(generator, count, length):
    """Random strings of this length, and their targets. Returns strings (count, 2).

    A string has at most 8 different symbols. They repeat, so none determines the next: the model must use positions.
    """
    symbols = generator.integers(32, 127, size=(count, 8))  # printable ASCII
    codes = np.take_along_axis(symbols, generator.integers(8, size=(count, length)), axis=1)
    strings = ["".join(map(chr, row)) for row in codes]
    return np.array([(string, task(string)) for string in strings])


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
        if not line.strip():
            continue
        strings = line.split("\t")[:2]
        problem = ""
        if len(strings) < 2:
            problem = "no tab between source and target"
        elif max(map(len, strings)) > MAX_LENGTH:
            problem = f"a string of more than {MAX_LENGTH} characters"
        elif any(unicodedata.category(symbol) == "Cc" for symbol in "".join(strings)):
            problem = "a control character"
        if problem:
            raise argparse.ArgumentTypeError(f"{file}, line {number}: {problem}")
        pairs.append(strings)
    return np.array(pairs, str).reshape(-1, 2)


def hold_out(generator, pairs, text):
    """Splits pairs (n, 2) into test pairs and training pairs, which have no source in common.

    The test sources are a tenth of the distinct sources, at most 64 and at least one: text, if it is among them, and
    others at random, but never the empty string. If a source has several targets, the last one is the answer. Raises
    ValueError for fewer than two distinct sources.
    """
    answers = dict(pairs.tolist())
    if len(answers) < 2:
        raise ValueError(f"FILE needs at least 2 distinct sources, got {len(answers)}")
    count = min(TEST_PAIRS, max(1, len(answers) // 10))
    sources = generator.permutation([source for source in answers if source]).tolist()
    sources.sort(key=lambda source: source != text)  # text first; the sort is stable
    test = np.array([(source, answers[source]) for source in sources[:count]])
    return test, pairs[~np.isin(pairs[:, 0], test[:, 0])]


def as_tokens(strings, length, symbols):
    """Strings (...) -> tokens (..., length): i for symbols[i - 1], then END. Raises ValueError for other strings."""
    strings = np.asarray(strings, object)  # NumPy's own strings lose a NUL at their end
    tokens = {symbol: token for token, symbol in enumerate(symbols, start=1)}
    rows = []
    for string in strings.flat:
        if len(string) > length or not set(string) <= tokens.keys():
            allowed = f"at most {length} characters, all from {symbols!a}"
            raise ValueError(f"strings must have {allowed}, got {str(string)!a}")
        rows.append([tokens[symbol] for symbol in string] + (length - len(string)) * [END])
    return np.array(rows, np.int32).reshape(*strings.shape, length)


def as_text(tokens, symbols):
    """Tokens (n,) -> the string before the first END."""
    return "".join(symbols[token - 1] for token in tokens[: lengths(tokens)])


# ---- The program: arguments, data and devices ----------------------------------------------------


def number(kind, least, limit):
    """An argparse type: an int or a float (kind) of at least `least` and below `limit`."""

    def parse(string):
        value = kind(string)
        if not least <= value < limit:
            raise argparse.ArgumentTypeError(f"must be at least {least} and below {limit}, got {value}")
        return value

    parse.__name__ = kind.__name__  # argparse then says "invalid int value"
    return parse


def argument_parser():
    """The command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = "Initialize a Transformer, run it, train it on pairs of strings, and apply it."
    natural, positive, rate = number(int, 0, 2**31), number(int, 1, 2**31), number(float, 0, 1)
    text = f"input (default: {DEFAULT_TEXT}; with --pairs: a source of FILE); if it begins with -, put -- before it"
    pairs = "learn from FILE instead of reversed strings: on each line, a source, a tab, its target"
    parser.set_defaults(TEXT=[], pairs=None)  # --help does not show these
    add = parser.add_argument
    add("TEXT", nargs="*", default=argparse.SUPPRESS, help=text)
    add("--pairs", type=read_pairs, default=argparse.SUPPRESS, metavar="FILE", help=pairs)
    add("--num-layers", type=positive, default=2, help="number N of layers in each stack (encoder, decoder)")
    add("--num-heads", type=positive, default=4, help="number h of heads (must divide --d-model)")
    add("--d-model", type=positive, default=64, help="dimension of the model (must be even)")
    add("--d-ff", type=positive, default=128, help="inner dimension of the feed-forward network")
    add("--dropout-rate", type=rate, default=0.0, help="dropout in training (section 5.4)")
    add("--batch-size", type=positive, default=16, help="pairs per training step")
    add("--steps", type=natural, default=380, help="number of training steps")
    add("--warmup-steps", type=positive, default=560, help="learning rate warm-up (Equation 3)")
    add("--seed", type=natural, default=0, help="random seed")
    add("--model-parallel", type=positive, default=1, help="devices that share heads and d_ff")
    add("--distributed", action="store_true", help="join the processes started by mpirun or srun")
    return parser


def check_text(text, symbols, description):
    """Raises ValueError if the text is empty, too long, or has other symbols."""
    if not 1 <= len(text) <= MAX_LENGTH:
        raise ValueError(f"TEXT must have 1 to {MAX_LENGTH} characters, got {len(text)}")
    wrong = "".join(sorted(set(text) - set(symbols)))
    if wrong:
        raise ValueError(f"TEXT must be {description}, not {wrong!a}")


def make_data(args, generator):
    """The text, the symbols, the test pairs and the training pairs. Raises ValueError for a bad TEXT or FILE."""
    text = " ".join(args.TEXT)
    if args.pairs is None:
        text = text if args.TEXT else DEFAULT_TEXT
        symbols = PRINTABLE_ASCII
        check_text(text, symbols, "printable ASCII")
        pairs = random_pairs(generator, TEST_PAIRS + 20_000, len(text))
        pairs[0] = text, task(text)
        test, training = pairs[:TEST_PAIRS], pairs[TEST_PAIRS:]
    else:
        symbols = "".join(sorted(set("".join(args.pairs.flat))))
        test, training = hold_out(generator, args.pairs, text)
        text = text if args.TEXT else str(test[0, 0])
        check_text(text, symbols, "characters of FILE")
    return text, symbols, test, training


def make_mesh(args):
    """The mesh of all devices; --distributed joins processes first. Raises ValueError for sizes that do not match."""
    num_heads, d_model, d_ff = args.num_heads, args.d_model, args.d_ff
    if d_model % 2:
        raise ValueError(f"--d-model must be even (sines and cosines come in pairs), got {d_model}")
    if d_model % num_heads:
        raise ValueError(f"--num-heads must divide --d-model, got {num_heads} and {d_model}")
    if args.distributed:
        try:
            jax.distributed.initialize()
        except ValueError:
            raise ValueError("--distributed: JAX found no launcher; use srun, or mpirun of Open MPI 4") from None
    devices, model_parallel = jax.device_count(), args.model_parallel
    for name, size in (("the number of devices", devices), ("--num-heads", num_heads), ("--d-ff", d_ff)):
        if size % model_parallel:
            raise ValueError(f"--model-parallel must divide {name}, got {model_parallel} and {size}")
    data_parallel = devices // model_parallel
    if args.batch_size % data_parallel:
        multiple = f"a multiple of {data_parallel} (devices / --model-parallel)"
        raise ValueError(f"--batch-size must be {multiple}, got {args.batch_size}")
    return jax.make_mesh((data_parallel, model_parallel), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


# ---- The program: its five parts -----------------------------------------------------------------


def make_programs(args, vocab_size):
    """The functions that the program compiles. The state is a dict: params, moments, and mean (section 6.1)."""
    init_rng, dropout_rng = jax.random.split(jax.random.key(args.seed))
    steps_before_average = max(0, args.steps - AVERAGED_STEPS)

    def init():
        params = init_model(init_rng, vocab_size, args.num_layers, args.d_model, args.num_heads, args.d_ff)
        return {"params": params, "moments": init_adam(params), "mean": params}

    def train(state, step, source, target):
        rng = jax.random.fold_in(dropout_rng, step) if args.dropout_rate else None  # a rate of 0 needs no key
        options = {"dropout_rng": rng, "dropout_rate": args.dropout_rate}
        before = state["params"], state["moments"]
        params, moments, value = train_step(*before, step, source, target, args.warmup_steps, **options)
        count = jnp.maximum(1, step - steps_before_average)
        mean = average(state["mean"], params, count)  # params while count is 1
        return {"params": params, "moments": moments, "mean": mean}, value

    specs = partition_specs(jax.eval_shape(init))
    fast_compilation = {"xla_backend_optimization_level": 0}  # for what runs only once
    return (
        jax.jit(init, out_shardings=specs, compiler_options=fast_compilation),
        # The new state takes the memory of the old one, which is donated: it cannot be used again.
        jax.jit(train, out_shardings=(specs, P()), donate_argnums=0),
        jax.jit(generate, static_argnums=2, out_shardings=P()),
        jax.jit(cross_attention_weights, out_shardings=P(), compiler_options=fast_compilation),
    )


def print_parameters(params):
    """Prints the path, the shape and the size of each array."""
    for path, leaf in jax.tree.leaves_with_path(params):
        print(f"params{jax.tree_util.keystr(path):<44} {leaf.shape!s:>17} {leaf.size:>11,}")
    print(f"{'total':<68}{sum(leaf.size for leaf in jax.tree.leaves(params)):>12,}")


def time_forward(params, source, target, mesh):
    """Prints the shapes of a forward pass, and the times of its first two calls."""
    logits_shape = *target.shape, len(params["embedding"])
    for name, shape in (("source", source.shape), ("target", target.shape), ("logits", logits_shape)):
        print(f"{name:<17} {shape!s:>16}")
    print(f"devices           {tuple(mesh.shape.values())!s:>16}  (data, model)")
    forward = jax.jit(lambda params, source, target: model(params, source, shift_right(target)))
    for call, note in (("first call", "  (compiles)"), ("second call", "")):
        start = time.perf_counter()
        jax.block_until_ready(forward(params, source, target))
        print(f"{call:<17} {(time.perf_counter() - start) * 1e3:13.2f} ms{note}")


def fit(state, train, next_batch, steps, progress):
    """Trains, and prints at most six lines: step, loss and `progress(params)`. Returns the new state."""
    printed = {i * steps // 6 for i in range(1, 7)}
    for step in range(1, steps + 1):
        state, value = train(state, step, *next_batch())
        if sys.stdout.isatty():  # a counter, which the next line overwrites
            print(f"step {step:>5}  loss {value:7.4f}", end="\r", flush=True)
        if step in printed:
            print(f"step {step:>5}  loss {value:7.4f}  {progress(state['params'])}")
    return state


def accuracy(output, target):
    """The fraction of correct tokens, each target's first END included. Tokens (count, n)."""
    up_to_end = np.arange(target.shape[-1]) <= np.asarray(lengths(target))[:, None]
    return (output == target)[up_to_end].mean()


def exact_matches(output, target):
    """The number of rows in which all tokens are correct, as "63/64". Tokens (count, n)."""
    return f"{(output == target).all(axis=1).sum()}/{len(target)}"


def show_text(source, output, answer):
    """Prints a source, the model's output, and the answer if it is known and another one."""
    print(f'input   "{source}"')
    print(f'output  "{output}"')
    if answer not in (None, output):
        print(f'answer  "{answer}"')


def show_mistakes(test, outputs, text):
    """Prints up to three test pairs (count, 2) that the model gets wrong, besides text."""
    rows = [(source, output, answer) for (source, answer), output in zip(test, outputs, strict=True)]
    wrong = [row for row in rows if row[1] != row[2] and row[0] != text]
    if wrong:
        print(f"\nwrong outputs ({min(3, len(wrong))} of {len(wrong)}):")
    for source, output, answer in wrong[:3]:
        print()
        show_text(source, output, answer)


def columns(symbol):
    """The columns of a character in a terminal: 0 if it combines with another, 2 if it is wide."""
    wide = unicodedata.east_asian_width(symbol) in ("W", "F")
    return 0 if unicodedata.category(symbol) in ("Mn", "Me", "Cf") else 1 + wide


def show_attention(weights, text, output):
    """Prints attention weights (n, m): one row per character of output, one column per character of text."""
    if not output:
        print("nothing to draw: the output is empty")
        return
    if not np.isfinite(weights).all():
        print("nothing to draw: the weights are not finite")
        return
    encoding = getattr(sys.stdout, "encoding", None) or ""
    shades = " ░▒▓█" if "utf" in encoding.lower() else " .:*#"
    levels = (weights / weights.max() * (len(shades) - 0.01)).astype(int)  # 0, ..., len(shades) - 1
    print(f"  {text}")
    for symbol, row in zip(output, levels, strict=True):
        cells = [shades[level] * columns(column) for level, column in zip(row, text, strict=True)]
        label = symbol + " " * (2 - columns(symbol))
        print(f"{label}{''.join(cells)}".rstrip())


def training_heading(steps, test, training):
    """The numbers of steps, of pairs, and of test strings that also occur in training, if any."""
    heading = f"{steps} step{'s' * (steps > 1)} on {len(training):,} pair{'s' * (len(training) > 1)}"
    repeated = np.isin(test[:, 0], training[:, 0]).sum()
    return f"{heading}, {repeated} of the {len(test)} test strings among them" if repeated else heading


def run(args, generator, mesh, text, symbols, test, training):
    """Prints the five parts. The text is decoded together with the test pairs: it comes first."""
    longest = np.char.str_len(np.concatenate([test, training])).max(axis=0).tolist()
    n = longest[1] + 1  # with END
    m = max(n, longest[0], len(text))  # if m = n, encoder and decoder compile faster
    sources = as_tokens([text, *test[:, 0]], m, symbols)
    targets = as_tokens(test[:, 1], n, symbols)
    init, train, decode, attend = make_programs(args, len(symbols) + 1)

    def next_batch():
        pairs = training[generator.integers(len(training), size=args.batch_size)]
        batch = as_tokens(pairs[:, 0], m, symbols), as_tokens(pairs[:, 1], n, symbols)
        return jax.device_put(batch, P("data"))

    def progress(params):
        tokens = np.asarray(decode(params, sources, n))
        output = as_text(tokens[0], symbols)[:34]  # 80 columns, unless characters are wide
        return f'accuracy {accuracy(tokens[1:], targets):>7.2%}  "{output}"'

    state = init()
    print("1. Parameters: a Transformer is a dict of dicts of arrays\n")
    print_parameters(state["params"])

    print("\n2. Forward pass: one batch of training pairs\n")
    time_forward(state["params"], *next_batch(), mesh)

    if args.steps:
        print(f"\n3. Training: {training_heading(args.steps, test, training)}\n")
        state = fit(state, train, next_batch, args.steps, progress)
    else:
        print("\n3. Training: skipped (--steps 0)")

    print("\n4. Result: the model's output for TEXT\n")
    final_tokens = np.asarray(decode(state["params"], sources, n))
    mean_tokens = np.asarray(decode(state["mean"], sources, n))
    output, *test_outputs = (as_text(tokens, symbols) for tokens in mean_tokens)
    show_text(text, output, dict(test.tolist()).get(text))
    matches = f"{exact_matches(final_tokens[1:], targets)} (final parameters)"
    averaged = min(args.steps, AVERAGED_STEPS)
    if averaged > 1:
        matches += f", {exact_matches(mean_tokens[1:], targets)} (average of the last {averaged} steps)"
    print(f"exact matches: {matches}")
    if args.steps:
        show_mistakes(test, test_outputs, text)

    print("\n5. Attention: cross-attention of the last decoder layer, mean of its heads")
    print("   rows: output, columns: input; a fuller block means more attention\n")
    weights = np.asarray(attend(state["mean"], sources[0], mean_tokens[0])).mean(axis=0)
    show_attention(weights[: len(output), : len(text)], text, output)


def main():
    """Runs the program."""
    parser = argument_parser()
    args = parser.parse_args()
    generator = np.random.default_rng(args.seed)  # for the data
    try:
        data = make_data(args, generator)
        mesh = make_mesh(args)
    except ValueError as error:
        parser.error(str(error))
    if jax.process_index() or sys.stdout is None:  # process 0 alone prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    if hasattr(sys.stdout, "reconfigure"):  # prints ? for characters that the terminal cannot encode
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    with jax.set_mesh(mesh):
        run(args, generator, mesh, *data)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader (e.g. `head`) closed the pipe
        sys.stdout = None  # silences the error at exit
