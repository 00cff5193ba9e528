"""The claims of "Attention Is All You Need" (arXiv 1706.03762), one test each, in the order of the paper.

The reference implementation, in NumPy, is written from the paper's text alone. A tolerance without a comment allows a
few roundings of float32, 1e-7 each.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import main
import transformer_layer as tl
from attention import attention_weights, padding_mask, scaled_dot_product_attention
from common import arrays, random_params

D_MODEL, HEADS, D_FF, LAYERS, VOCAB_SIZE = 12, 3, 20, 2, 11
SIZES = LAYERS, D_MODEL, HEADS, D_FF
N, M = 5, 7  # positions, positions of the memory
X, MEMORY, VALUE = arrays((N, D_MODEL), (M, D_MODEL), (M, D_MODEL))
TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6])
encodings = jax.jit(main.positional_encoding, static_argnums=(0, 1))


# ---- The paper's equations in NumPy, float64, for a single sequence --------------------------------------------------


def in_float64(tree):
    """The arrays of a pytree as NumPy arrays in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def equation_1(query, key, value, mask=True):
    """softmax(Q K^T / sqrt(d_k)) V, one query at a time. A fully masked query outputs zeros."""
    output = np.zeros((len(query), value.shape[-1]))
    for i, attended in enumerate(np.broadcast_to(mask, (len(query), len(key)))):
        exponentials = [math.exp(query[i] @ k / math.sqrt(len(k))) for k in key[attended]]
        for exponential, v in zip(exponentials, value[attended], strict=True):
            output[i] += exponential / sum(exponentials) * v
    return output


def multi_head(params, query, key, value, mask=True):
    """Concat(head_1, ..., head_h) W^O, where head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V)."""
    heads = [
        equation_1(query @ params["query"][:, i], key @ params["key"][:, i], value @ params["value"][:, i], mask)
        for i in range(params["query"].shape[1])
    ]
    h, d_v, d_model = params["output"].shape
    return np.concatenate(heads, axis=-1) @ params["output"].reshape(h * d_v, d_model)


def equation_2(params, x):
    """max(0, x W_1 + b_1) W_2 + b_2."""
    return np.maximum(0, x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def layer_norm(params, x):
    """Each position minus its mean, divided by its standard deviation, times scale, plus bias (arXiv 1607.06450)."""
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]


def encoder(params, x):
    """Figure 1, left: N times self-attention and feed-forward network, each as LayerNorm(x + Sublayer(x))."""
    for p in layers(params):
        x = layer_norm(p["self_attention_norm"], x + multi_head(p["self_attention"], x, x, x))
        x = layer_norm(p["feed_forward_norm"], x + equation_2(p["feed_forward"], x))
    return x


def decoder(params, x, memory):
    """Figure 1, right: like the encoder, with causal self-attention, then attention over the memory."""
    causal = np.tri(len(x), dtype=bool)
    for p in layers(params):
        x = layer_norm(p["self_attention_norm"], x + multi_head(p["self_attention"], x, x, x, causal))
        x = layer_norm(p["cross_attention_norm"], x + multi_head(p["cross_attention"], x, memory, memory))
        x = layer_norm(p["feed_forward_norm"], x + equation_2(p["feed_forward"], x))
    return x


def layers(params):
    """The parameters of a stack, as a list of layers."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(LAYERS)]


def positional_encoding(length, d_model):
    """PE(pos, 2i) = sin(pos / 10000^(2i / d_model)) and PE(pos, 2i + 1) = cos(pos / 10000^(2i / d_model))."""
    encoding = np.zeros((length, d_model))
    for pos in range(length):
        for i in range(d_model // 2):
            encoding[pos, 2 * i] = math.sin(pos / 10_000 ** (2 * i / d_model))
            encoding[pos, 2 * i + 1] = math.cos(pos / 10_000 ** (2 * i / d_model))
    return encoding


# ---- Costs and dependencies of a function ----------------------------------------------------------------------------


def flops(function, *inputs):
    """The floating-point operations that XLA counts in the compiled CPU program of a function."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(function).lower(*inputs).compile().cost_analysis()["flops"]


def depends(function, *inputs):
    """For each input, booleans (n, m): whether output position i depends on input position j, without a tolerance."""
    jacobians = jax.jit(jax.jacfwd(function, argnums=range(len(inputs))))(*inputs)
    assert all(np.isfinite(jacobian).all() for jacobian in jacobians)
    return [(np.asarray(jacobian) != 0).any(axis=(1, 3)) for jacobian in jacobians]  # (n, d, m, d) -> (n, m)


# ---- The claims, in the order of the paper ---------------------------------------------------------------------------


def test_3_1_each_sublayer_is_layer_norm_of_x_plus_sublayer_of_x():
    """Section 3.1: each sub-layer outputs LayerNorm(x + Sublayer(x)); later models normalize before the sub-layer."""
    params = random_params(tl.init_encoder, *SIZES)
    expected = encoder(*in_float64((params, X)))
    np.testing.assert_allclose(jax.jit(tl.encoder)(params, X), expected, rtol=1e-6, atol=1e-6)
    params = random_params(tl.init_decoder, *SIZES)
    expected = decoder(*in_float64((params, X, MEMORY)))
    np.testing.assert_allclose(jax.jit(tl.decoder)(params, X, MEMORY), expected, rtol=1e-6, atol=1e-6)


def test_3_1_a_prediction_depends_only_on_known_outputs():
    """Section 3.1: the output embeddings are offset by one position: predictions for i depend on outputs before i."""
    np.testing.assert_array_equal(main.shift_right(TOKENS), [main.END, *TOKENS[:-1]])
    params, target = random_params(main.init_model, VOCAB_SIZE, *SIZES), TOKENS[:5]
    changed = np.where(np.eye(5, dtype=bool), 10, target)  # row j: another token at position j
    logits = jax.jit(lambda *targets: [main.model(params, TOKENS, main.shift_right(t)) for t in targets])
    expected, *others = logits(target, *changed)
    differs = [np.any(other != expected, axis=-1) for other in others]
    np.testing.assert_array_equal(differs, np.tri(5, k=-1).T)


def test_3_2_1_attention_is_equation_1():
    """Section 3.2.1, Equation 1: Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V, against a loop in float64."""
    query, key, value = arrays((N, 8), (M, 8), (M, 6))
    expected = equation_1(*in_float64((query, key, value)))
    output = jax.jit(scaled_dot_product_attention)(query, key, value)
    np.testing.assert_allclose(output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d_k", [8, 64])
def test_3_2_1_the_scale_reduces_the_variance_of_q_k_from_d_k_to_1(d_k):
    """Section 3.2.1, footnote 4: for components of mean 0 and variance 1, q . k has variance d_k; after scaling, 1.

    Each query has two keys: k, and zeros, whose score is 0. The log of the ratio of the two weights is the score of k.
    """
    samples = 50_000
    query, key = arrays((samples, 1, d_k), (samples, 1, d_k))
    weights = np.asarray(jax.jit(attention_weights)(query, np.concatenate([key, np.zeros_like(key)], axis=1)))
    scaled = np.log(weights[:, 0, 0] / weights[:, 0, 1])
    unscaled = np.einsum("snk,snk->s", query, key)
    # q . k has kurtosis 3 + 6 / d_k, which gives the standard errors of its mean and variance. Allow five of them.
    error_of_mean, error_of_variance = math.sqrt(1 / samples), math.sqrt((2 + 6 / d_k) / samples)
    for products, variance in ((unscaled, d_k), (scaled, 1)):
        assert abs(products.mean()) < 5 * error_of_mean * math.sqrt(variance)
        assert abs(products.var() / variance - 1) < 5 * error_of_variance


def test_3_2_1_without_the_scale_the_gradient_of_the_softmax_vanishes():
    """Section 3.2.1: at d_k = 512, the softmax has extremely small gradients without the scale, but not with it.

    Two random keys compete for each of a thousand random queries. Without the scale, their scores differ by about 30,
    so the softmax saturates. Take the median, because some queries happen to have two scores that are close.
    """
    d_k = 512
    queries, keys = arrays((1000, 1, d_k), (1000, 2, d_k))

    @jax.jit
    def gradients(queries, keys, factor):
        return jax.vmap(jax.grad(lambda query, key: attention_weights(factor * query, key)[0, 0]))(queries, keys)

    with_scale, without_scale = (
        np.median(np.linalg.norm(gradients(queries, keys, factor), axis=-1)) for factor in (1, math.sqrt(d_k))
    )
    assert with_scale > 0.1
    assert without_scale < 1e-5  # gradients of about e^-30 vanish in float32


def test_3_2_2_multi_head_is_concat_of_heads_times_w_o():
    """Section 3.2.2: MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O, each head computed separately."""
    params = random_params(tl.init_multi_head_attention, D_MODEL, HEADS)
    expected = multi_head(*in_float64((params, X, MEMORY, VALUE)))
    output = jax.jit(tl.multi_head_attention)(params, X, MEMORY, VALUE)
    np.testing.assert_allclose(output, expected, rtol=1e-6, atol=2e-6)


def test_3_2_2_multi_head_costs_as_much_as_single_head():
    """Section 3.2.2: eight heads of dimension d_model / 8 cost as much as one head of dimension d_model."""
    n, d_model = 128, 512

    def cost(params):
        return flops(tl.multi_head_attention, params, *3 * arrays((n, d_model)))

    single, multi = (
        cost(jax.eval_shape(lambda h=h: tl.init_multi_head_attention(jax.random.key(0), d_model, h))) for h in (1, 8)
    )
    # Not exactly: there are eight softmaxes instead of one, about 0.2% of the total.
    assert multi == pytest.approx(single, rel=5e-3)
    # Eight heads of dimension d_model would cost eight times as much.
    full, output = arrays((d_model, 8, d_model), (8, d_model, d_model))
    assert cost({"query": full, "key": full, "value": full, "output": output}) == pytest.approx(8 * single, rel=5e-3)


def test_3_2_3_encoder_attends_to_all_positions():
    """Section 3.2.3: each encoder position can attend to all positions, and with causal=True only up to itself.

    A position always depends on itself, through the residual connection, but here no other one attends to position 1.
    """
    params, mask = random_params(tl.init_encoder, *SIZES), np.arange(N) != 1
    np.testing.assert_array_equal(depends(lambda x: tl.encoder(params, x), X)[0], np.ones((N, N)))
    causal = depends(lambda x: tl.encoder(params, x, mask, causal=True), X)
    np.testing.assert_array_equal(causal[0], np.tri(N) * mask + np.diag(~mask))


def test_3_2_3_decoder_attends_to_its_past_and_to_the_memory():
    """Section 3.2.3: each decoder position attends to all positions up to and including itself, and to all the memory.

    Here, the last three positions of the memory are padding, and no other position attends to position 1. In the stack,
    a position depends on itself through the residual connection, so check causal attention alone, too.
    """
    params, mask, memory_mask = random_params(tl.init_decoder, *SIZES), np.arange(N) != 1, padding_mask(M - 3, M)
    on_x, on_memory = depends(lambda x, memory: tl.decoder(params, x, memory, mask, memory_mask), X, MEMORY)
    np.testing.assert_array_equal(on_x, np.tri(N) * mask + np.diag(~mask))
    np.testing.assert_array_equal(on_memory, N * [[1, 1, 1, 1, 0, 0, 0]])
    causal = depends(lambda value: scaled_dot_product_attention(X, X, value, causal=True), X)
    np.testing.assert_array_equal(causal[0], np.tri(N))


def test_3_3_feed_forward_is_equation_2():
    """Section 3.3, Equation 2: FFN(x) = max(0, x W_1 + b_1) W_2 + b_2."""
    params = random_params(tl.init_feed_forward, D_MODEL, D_FF)
    expected = equation_2(*in_float64((params, X)))
    np.testing.assert_allclose(jax.jit(tl.feed_forward)(params, X), expected, rtol=1e-6, atol=2e-6)


def test_3_3_feed_forward_is_applied_to_each_position_separately():
    """Section 3.3: the feed-forward network is applied to each position separately."""
    params = random_params(tl.init_feed_forward, D_MODEL, D_FF)
    np.testing.assert_array_equal(depends(lambda x: tl.feed_forward(params, x), X)[0], np.eye(N))


def test_3_4_embedding_and_softmax_share_one_matrix():
    """Section 3.4: embedding and logits share one matrix; the embedding is multiplied by sqrt(d_model)."""
    params = random_params(main.init_model, VOCAB_SIZE, *SIZES)
    assert set(params) == {"embedding", "encoder", "decoder"}
    p = in_float64(params)
    source, target = (
        p["embedding"][tokens] * math.sqrt(D_MODEL) + positional_encoding(len(tokens), D_MODEL)
        for tokens in (TOKENS, TOKENS[:5])
    )
    np.testing.assert_allclose(jax.jit(main.embed)(params, TOKENS), source, rtol=1e-6, atol=1e-6)
    logits = decoder(p["decoder"], target, encoder(p["encoder"], source)) @ p["embedding"].T
    np.testing.assert_allclose(jax.jit(main.model)(params, TOKENS, TOKENS[:5]), logits, rtol=1e-6, atol=5e-6)


def test_3_5_only_positions_carry_the_order_of_the_sequence():
    """Section 3.5: the encoder is equivariant to permutations of its input, unless positions are added."""
    params = random_params(tl.init_encoder, *SIZES)
    encode = jax.jit(tl.encoder)
    order = np.array([2, 0, 4, 1, 3])

    def difference(positions):
        return abs(np.asarray(encode(params, X + positions))[order] - encode(params, X[order] + positions)).max()

    assert difference(np.zeros((N, D_MODEL), np.float32)) < 1e-6
    assert difference(np.asarray(encodings(N, D_MODEL))) > 0.01


def test_3_5_positional_encoding_is_the_formula():
    """Section 3.5: PE(pos, 2i) is the sine of pos / 10000^(2i / d_model), and PE(pos, 2i + 1) its cosine."""
    # In float32, an angle of up to 100 radians has an error of 1e-5.
    np.testing.assert_allclose(encodings(100, 16), positional_encoding(100, 16), atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, 64])
def test_3_5_positional_encoding_of_pos_plus_k_is_linear_in_that_of_pos(k):
    """Section 3.5: for any fixed offset k, PE(pos + k) is a linear function of PE(pos), the same for all positions."""
    encoding = np.asarray(encodings(200, 16))
    matrix, *_ = np.linalg.lstsq(encoding[:-k], encoding[k:])
    np.testing.assert_allclose(encoding[:-k] @ matrix, encoding[k:], atol=1e-5)


def test_4_the_cost_of_self_attention_grows_as_n_squared_times_d():
    """Section 4, Table 1: the complexity of a self-attention layer is O(n^2 d), in operations counted by XLA."""

    def cost(n, d):
        return flops(scaled_dot_product_attention, *3 * arrays((n, d)))

    n, d = 1024, 512
    # To leading order: besides the two matrix products, 4 n^2 d, the softmax takes about 6 n^2.
    assert cost(n, d) == pytest.approx(4 * n**2 * d, rel=5e-3)
    assert cost(2 * n, d) == pytest.approx(4 * cost(n, d), rel=2e-3)
    assert cost(n, 2 * d) == pytest.approx(2 * cost(n, d), rel=2e-3)


def test_5_3_learning_rate_peaks_at_warmup_and_falls_as_the_inverse_square_root():
    """Section 5.3, Equation 3: the learning rate grows linearly for warmup_steps, then falls as 1 / sqrt(step)."""
    d_model, warmup = 512, 4000  # as in the paper
    steps = np.arange(1, 100_001, dtype=np.float64)
    rates = np.asarray(main.learning_rate(steps, d_model, warmup))
    assert steps[rates.argmax()] == warmup
    np.testing.assert_allclose(rates.max(), 1 / math.sqrt(d_model * warmup), rtol=2e-7)
    np.testing.assert_allclose(rates[:warmup], rates.max() * steps[:warmup] / warmup, rtol=2e-7)
    np.testing.assert_allclose(rates[warmup:], rates.max() * np.sqrt(warmup / steps[warmup:]), rtol=2e-7)


def test_5_3_adam_is_its_algorithm():
    """Section 5.3: Adam with beta_1 = 0.9, beta_2 = 0.98 and epsilon = 1e-9, five steps against a loop in float64."""
    generator = np.random.default_rng(0)
    gradients, parameter = generator.standard_normal((5, 3)) * [1, 1e-5, 1e-9], generator.standard_normal(3)
    expected, m, v = parameter, 0, 0
    params, adam = {"x": parameter.astype(np.float32)}, jax.jit(main.adam)
    moments = main.init_adam(params)
    for t, gradient in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient**2
        expected = expected - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.98**t)) + 1e-9)
        params, moments = adam(params, moments, {"x": gradient.astype(np.float32)}, t, 0.1)
    np.testing.assert_allclose(params["x"], expected, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_5_4_dropout_keeps_the_mean(rate):
    """Section 5.4: dropout sets a fraction P_drop of the elements to zero; scaling the others keeps the mean."""
    samples = 1_000_000
    dropped = np.asarray(jax.jit(tl.dropout)(jax.random.key(0), np.ones(samples, np.float32), rate))
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / (1 - rate)], rtol=2e-7)
    five_standard_errors = 5 * math.sqrt(rate * (1 - rate) / samples)
    assert abs((dropped == 0).mean() - rate) < five_standard_errors
    assert abs(dropped.mean(dtype=np.float64) - 1) < five_standard_errors / (1 - rate)


def test_5_4_dropout_applies_to_the_output_of_each_sublayer(monkeypatch):
    """Section 5.4: dropout applies to the output of each sub-layer, before it is added to the sub-layer's input.

    If it drops everything, only the residual connections remain: one LayerNorm(x) after another.
    """
    monkeypatch.setattr(tl, "dropout", lambda rng, x, rate: jnp.zeros_like(x))
    params = random_params(tl.init_decoder, *SIZES)
    expected = in_float64(X)
    for p in layers(in_float64(params)):
        for name in ("self_attention_norm", "cross_attention_norm", "feed_forward_norm"):
            expected = layer_norm(p[name], expected)
    output = jax.jit(lambda params, x: tl.decoder(params, x, MEMORY))(params, X)
    np.testing.assert_allclose(output, expected, rtol=1e-6, atol=1e-6)


def test_5_4_dropout_applies_to_the_sums_of_embeddings_and_positional_encodings(monkeypatch):
    """Section 5.4: dropout applies to the sums of embeddings and positional encodings, in encoder and decoder.

    If it drops everything, both stacks start from zeros.
    """
    monkeypatch.setattr(main, "dropout", lambda rng, x, rate: jnp.zeros_like(x))
    params = random_params(main.init_model, VOCAB_SIZE, *SIZES)
    p, zeros = in_float64(params), np.zeros((len(TOKENS), D_MODEL))
    logits = decoder(p["decoder"], zeros[:5], encoder(p["encoder"], zeros)) @ p["embedding"].T
    output = jax.jit(lambda params: main.model(params, TOKENS, TOKENS[:5]))(params)
    np.testing.assert_allclose(output, logits, rtol=1e-6, atol=5e-6)


def test_5_4_without_a_key_there_is_no_dropout():
    """Section 5.4: dropout is for training. Without a random key, it is the identity, whatever the rate."""
    assert tl.dropout(None, X, 0.5) is X
    params, encode = random_params(tl.init_encoder, *SIZES), jax.jit(tl.encoder)
    np.testing.assert_array_equal(encode(params, X, dropout_rate=0.5), encode(params, X))


def test_5_4_label_smoothing_spreads_a_tenth_over_the_vocabulary():
    """Section 5.4: label smoothing of 0.1 puts 0.9 on the correct token and spreads 0.1 over the whole vocabulary."""
    params = random_params(main.init_model, VOCAB_SIZE, *SIZES)
    source, target = TOKENS, TOKENS[::-1].copy()
    logits = np.asarray(jax.jit(main.model)(params, source, np.array([0, *target[:-1]])), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    labels = np.full((len(target), VOCAB_SIZE), 0.1 / VOCAB_SIZE)
    for i, token in enumerate(target):
        labels[i, token] += 0.9
    cross_entropy = -(labels * log_probabilities).sum(axis=-1).mean()
    np.testing.assert_allclose(jax.jit(main.loss)(params, source, target), cross_entropy, rtol=1e-6)


def test_6_1_average_is_the_mean_of_the_last_parameters():
    """Section 6.1: the final model is the average of the last checkpoints."""
    checkpoints = arrays((7, 3))[0]
    mean, average = np.zeros(3, np.float32), jax.jit(main.average)
    for count, params in enumerate(checkpoints, start=1):
        mean = average(mean, params, count)
    np.testing.assert_allclose(mean, checkpoints.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("d_model", "heads", "d_ff", "in_the_paper", "expected"),
    [(512, 8, 2048, 65e6, 63_045_632), (1024, 16, 4096, 213e6, 214_171_648)],
    ids=["base", "big"],
)
def test_6_2_table_3_number_of_parameters(d_model, heads, d_ff, in_the_paper, expected):
    """Section 6.2, Table 3: the base model has 63.0 million parameters (the paper: 65), the big one 214 (213)."""
    model = jax.eval_shape(lambda: main.init_model(jax.random.key(0), 37_000, 6, d_model, heads, d_ff))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert parameters == expected
    assert parameters == pytest.approx(in_the_paper, rel=0.04)  # for "about 37000" tokens, and rounded
