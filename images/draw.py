"""Draws the pictures of README: `pip install matplotlib pillow`, then `python images/draw.py`.

Random seeds are fixed. The code in the boxes is copied from the source; tests/test_readme.py checks that it still
exists there. flash_attention.png shows the temporary memory that XLA plans on this machine (README: a CPU).
"""

import contextlib
import functools
import re
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.path
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from PIL import Image

IMAGES = Path(__file__).parent
README = (IMAGES.parent / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(IMAGES.parent))

# ruff: noqa: E402 - the imports below need the path above
import main
from attention import flash_attention, scaled_dot_product_attention

# The palette of Okabe and Ito, which is safe for color blindness, and a light background for each color.
INK, GREY, BLUE, ORANGE, GREEN = "#222222", "#666666", "#0072b2", "#d55e00", "#009e73"
LIGHT = {GREY: "#ececec", BLUE: "#d6e8f4", ORANGE: "#fbe3d3", GREEN: "#d5efe6"}
MONOSPACED = "DejaVu Sans Mono"
HEADING = {"ha": "center", "weight": "bold", "size": 11}
CAPTION = {"ha": "center", "va": "center", "color": GREY, "size": 8.5}
plt.rcParams.update({"savefig.dpi": 200, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY})


def code(line):
    """Marks a line copied from the source. tests/test_readme.py looks for calls of this function."""
    return line


def canvas(height):
    """A figure 8 inches wide, and axes that cover it, in inches."""
    figure = plt.figure(figsize=(8, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 8), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, title="", line="", color=BLUE, height=0.56):
    """A box centered at (x, y): the paper's name, and below it the code."""
    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": LIGHT[color], "edgecolor": color}
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, linewidth=1.3, **style))
    axes.text(x, y + 0.12, title, ha="center", va="center", weight="bold", size=9.5)
    axes.text(x, y - 0.13, line, ha="center", va="center", family=MONOSPACED, size=7)


def arrow(axes, *points, label="", color=INK):
    """An arrow along the points, with a label beside the middle of its last segment."""
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "joinstyle": "miter", "linewidth": 1.3, "color": color}
    axes.add_patch(FancyArrowPatch(path=matplotlib.path.Path(points), **style))
    (x0, y0), (x1, y1) = points[-2:]
    axes.text((x0 + x1) / 2 + 0.07, (y0 + y1) / 2, label, va="center", size=8.5, color=GREY)


def attention():
    """Figure 2 of the paper, with code and shapes."""
    figure, axes = canvas(6.3)
    axes.text(1.85, 6.08, "scaled_dot_product_attention", **HEADING)
    for x, name in ((0.6, "query"), (1.7, "key"), (3.5, "value"), (4.72, "query"), (5.98, "key"), (7.24, "value")):
        axes.text(x, 0.22, name, ha="center", weight="bold", size=9.5)
    arrow(axes, (0.6, 0.4), (0.6, 1.02), label="(n, k)")
    arrow(axes, (1.7, 0.4), (1.7, 1.02), label="(m, k)")
    box(axes, 1.65, 1.3, 3.14, "MatMul", code('jnp.einsum("...nk,...mk->...nm", query, key') + ", …)")
    arrow(axes, (1.15, 1.58), (1.15, 1.945), label="(n, m)")
    box(axes, 1.65, 2.225, 3.14, "Scale", code("/ math.sqrt(d_k)"))
    arrow(axes, (1.15, 2.505), (1.15, 2.87), label="scores (n, m)")
    box(axes, 1.65, 3.15, 3.14, "Mask (optional)", code("jnp.where(mask, scores, jnp.finfo(dtype).min)"), GREY)
    arrow(axes, (1.15, 3.43), (1.15, 3.795))
    box(axes, 1.65, 4.075, 3.14, "SoftMax", code("jax.nn.softmax(") + "…, axis=-1)", ORANGE)
    arrow(axes, (1.15, 4.355), (1.15, 4.72), label="weights (n, m), 0 where masked")
    box(axes, 1.65, 5.0, 3.14, "MatMul", code('jnp.einsum("...nm,...mv->...nv", weights, value') + ", …)")
    arrow(axes, (1.15, 5.28), (1.15, 5.95), label="(n, v)")
    arrow(axes, (3.5, 0.4), (3.5, 5.0), (3.22, 5.0))
    axes.text(3.58, 2.7, "(m, v)", size=8.5, color=GREY, rotation=90, va="center")
    axes.plot((3.92, 3.92), (0.2, 6.1), color=LIGHT[GREY], linewidth=2)

    axes.text(5.98, 6.08, "multi_head_attention", **HEADING)
    axes.text(4.1, 5.62, "Before each shape:\nany leading axes (...)", size=8.5, color=GREY, va="center")
    for x, line, before, after in (
        (4.72, code('"...nd,dhk->...hnk"'), "(n, d)", "(h, n, k)"),
        (5.98, code('"...md,dhk->...hmk"'), "(m, d)", "(h, m, k)"),
        (7.24, code('"...md,dhv->...hmv"'), "(m, d)", "(h, m, v)"),
    ):
        arrow(axes, (x, 0.4), (x, 1.42), label=before)
        box(axes, x, 1.7, 1.2, "Linear", line, GREEN)
        arrow(axes, (x, 1.98), (x, 3.02), label=after)
    for offset in (0.14, 0.07):
        box(axes, 5.92 + offset, 3.37 + offset, 3.6, height=0.7)
    box(axes, 5.92, 3.37, 3.6, "Attention, h heads at once", code("attention=scaled_dot_product_attention"), height=0.7)
    arrow(axes, (5.98, 3.86), (5.98, 4.72), label="heads (h, n, v)")
    line = code('jnp.einsum("...hnv,hvd->...nd", heads, params["output"])')
    box(axes, 5.98, 5.0, 3.72, "Concat and Linear", line, GREEN)
    arrow(axes, (5.98, 5.28), (5.98, 5.95), label="(n, d)")
    figure.savefig(IMAGES / "attention.png")


def layer(axes, x, side, sublayers):
    """One layer, from bottom to top. side: residual connections on the left (-1) or on the right (1)."""
    y = 0.95
    arrow(axes, (x, 0.42), (x, y))
    for title, name in sublayers:
        box(axes, x, y + 0.28, 2.3, title, f'params["{name}"]', GREEN if name == "feed_forward" else BLUE)
        arrow(axes, (x, y + 0.56), (x, y + 0.84), label="dropout")
        box(axes, x, y + 1.12, 2.3, "Add & Norm", f'params["{name}_norm"]', ORANGE)
        edge, turn = x + side * 1.15, x + side * 1.35
        arrow(axes, (x, y - 0.22), (turn, y - 0.22), (turn, y + 1.12), (edge, y + 1.12), color=ORANGE)
        y += 1.9
        arrow(axes, (x, y - 0.5), (x, y))


def transformer_layer():
    """Figure 1 of the paper, with the names of the parameters."""
    figure, axes = canvas(7.3)
    feed_forward = "Feed Forward", "feed_forward"
    cross_attention = "Multi-Head Attention", "cross_attention"
    layer(axes, 1.95, -1, [("Multi-Head Attention", "self_attention"), feed_forward])
    layer(axes, 5.9, 1, [("Causal Multi-Head Attention", "self_attention"), cross_attention, feed_forward])
    arrow(axes, (2.45, 4.94), (3.35, 4.94), (3.35, 3.13), (4.75, 3.13), color=BLUE)
    axes.text(4.05, 3.2, "key, value", ha="center", size=8.5, color=BLUE)
    axes.text(4.05, 2.9, "m: the encoder's n", ha="center", size=8.5, color=GREY)
    axes.text(1.95, 7.05, "encoder_layer", **HEADING)
    axes.text(5.9, 7.05, "decoder_layer", **HEADING)
    axes.text(1.95, 5.14, "after the last of the N layers: memory", ha="center", size=8.5, color=GREY)
    for x, y, text in (
        (1.95, 0.24, "x (..., n, d)"),
        (1.95, 4.9, "(..., n, d)"),
        (4.05, 3.42, "memory (..., m, d)"),
        (5.9, 0.24, "x (..., n, d)"),
        (5.9, 6.7, "(..., n, d)"),
    ):
        axes.text(x, y, text, ha="center", size=9.5)
    figure.savefig(IMAGES / "transformer_layer.png")


def arguments(*flags):
    """What main.py's argument parser returns for these flags."""
    return main.argument_parser().parse_args(flags)


def trained(args, generator, symbols, pairs):
    """Trains as main.py does: yields the parameters before the first and after each step, and finally their average."""
    rng, _ = jax.random.split(jax.random.key(args.seed))
    sizes = len(symbols) + 1, args.num_layers, args.d_model, args.num_heads, args.d_ff
    params = jax.jit(lambda: main.init_model(rng, *sizes))()
    moments, mean = main.init_adam(params), params
    train_step, average = jax.jit(main.train_step), jax.jit(main.average)
    m, n = (max(map(len, strings)) + 1 for strings in pairs.T)
    yield params
    for step in range(1, args.steps + 1):
        sources, targets = pairs[generator.integers(len(pairs), size=args.batch_size)].T
        batch = main.as_tokens(sources, m, symbols), main.as_tokens(targets, n, symbols)
        params, moments, _ = train_step(params, moments, step, *batch, args.warmup_steps)
        count = max(1, step - (args.steps - main.AVERAGED_STEPS))
        mean = average(mean, params, count)  # until count is 2, just params
        yield params if step < args.steps else mean


def visible(text):
    """The text with a visible character for each space."""
    return text.replace(" ", "·")


def learned_attention():
    """`python main.py` as an animation: the output, the cross-attention and the accuracy during training."""
    args = arguments()
    generator = np.random.default_rng(args.seed)
    text, symbols, test, training = main.make_data(args, generator)  # the text is the first test string
    source, target = main.as_tokens(test.T, len(text) + 1, symbols)
    shown, expected = visible(text), visible(main.task(text))
    generate = jax.jit(main.generate, static_argnums=2)
    cross_attention_weights = jax.jit(main.cross_attention_weights)

    height = 6.2
    figure, axes = canvas(height)
    title = axes.text(4, 5.82, "", family=MONOSPACED, ha="center", weight="bold", size=14)
    for x, word, color in ((6.95, "correct", BLUE), (7.72, "wrong", ORANGE)):
        style = {"facecolor": LIGHT[color], "edgecolor": "none", "pad": 3}
        axes.text(x, 5.82, word, color=color, size=11, ha="right", bbox=style)
    axes.text(2.38, 4.58, "cross-attention, mean of the heads", **HEADING)
    axes.text(6.37, 4.58, f"accuracy on {len(test)} test strings", **HEADING)
    axes.text(2.38, 0.12, "rows: output, columns: input (· is a space)", ha="center")
    axes.text(6.37, 0.12, "training steps", ha="center")
    axes.text(0.2, 5.45, "input", va="center", size=13)
    axes.text(0.2, 5.02, "output", va="center", size=13)

    def tile(i, y):
        """The background and the text of the i-th character of a row."""
        x = 1.4 + 0.26 * i
        background = axes.add_patch(Rectangle((x - 0.12, y - 0.18), 0.24, 0.36, facecolor=LIGHT[GREY]))
        return background, axes.text(x, y - 0.06, shown[i], ha="center", family=MONOSPACED, size=16)

    tiles = [(tile(i, 5.45), tile(i, 5.02))[1] for i in range(len(text))]  # only the output changes
    left = figure.add_axes((0.38 / 8, 0.35 / height, 4 / 8, 4 / height))
    image = left.imshow(np.zeros((len(text), len(text))), cmap="Blues")
    left.set_xticks(range(len(text)), shown, family=MONOSPACED, size=9)
    left.set_yticks(range(len(text)), expected, family=MONOSPACED, size=9)
    left.tick_params(length=0, pad=2, top=True, labeltop=True, labelbottom=False)
    right = figure.add_axes((5.06 / 8, 0.6 / height, 2.7 / 8, 3.75 / height), xlim=(0, args.steps), ylim=(0, 1))
    (curve,) = right.plot([], [], "o-", color=BLUE, linewidth=2, markersize=7, markevery=[-1], clip_on=False)
    right.yaxis.set_major_formatter("{x:.0%}")
    right.grid(color=LIGHT[GREY])
    right.spines[["top", "right"]].set_visible(False)

    accuracies, frames = [], []
    for step, params in enumerate(trained(args, generator, symbols, training)):
        if step % 10 == 0:
            output = np.asarray(generate(params, source, target.shape[1]))
            accuracies.append((step, main.accuracy(output, target)))
            curve.set_data(*zip(*accuracies, strict=True))
            weights = np.asarray(cross_attention_weights(params, source[0], target[0])).mean(axis=0)
            weights = weights[: len(text), : len(text)]
            image.set(data=weights, clim=(0, weights.max()))  # the largest weight is darkest, as in main.py
            averaged = f"average of the last {main.AVERAGED_STEPS} steps"  # the last frame is the result
            title.set_text(averaged if step == args.steps else f"step {step:>3} of {args.steps}")
            written = visible(main.as_text(output[0], symbols)).ljust(len(text))  # END and padding stay empty
            for (background, letter), symbol, correct in zip(tiles, written, expected, strict=False):
                color = BLUE if symbol == correct else ORANGE
                background.set_facecolor(LIGHT[color])
                letter.set(text=symbol, color=color)
            figure.canvas.draw()
            frames.append(np.array(figure.canvas.buffer_rgba())[..., :3])
    # One palette for all frames, so that the file holds only their differences: the blues, and text on its background.
    inks = ("white", INK), ("white", BLUE), (LIGHT[GREY], INK), (LIGHT[BLUE], BLUE), (LIGHT[ORANGE], ORANGE)
    ramps = plt.get_cmap("Blues", 32), *(LinearSegmentedColormap.from_list("", ink, 16) for ink in inks)
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate([ramp(np.arange(ramp.N), bytes=True)[:, :3] for ramp in ramps]).tobytes())
    first, *others = (Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    milliseconds = [120] * len(others) + [4000]
    first.save(IMAGES / "learned_attention.gif", save_all=True, append_images=others, duration=milliseconds, loop=0)


def dates():
    """Cross-attention of a model that learned the dates of README: rows are the output, columns the input."""
    code = re.search(r"^```python\n(.*?dates\.tsv.*?)^```$", README, re.DOTALL | re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        exec(code, {})
        args = arguments("--pairs", "dates.tsv", "--batch-size", "64", "--steps", "800")
    examples = "March 14, 2001", "Saturday, 27 June 1987"
    args.pairs = args.pairs[~np.isin(args.pairs[:, 0], examples)]  # these two are never seen in training
    generator = np.random.default_rng(args.seed)
    _, symbols, _, training = main.make_data(args, generator)
    *_, params = trained(args, generator, symbols, training)
    source = main.as_tokens(examples, 40, symbols)
    output = jax.jit(main.generate, static_argnums=2)(params, source, 11)
    weights = np.asarray(jax.jit(main.cross_attention_weights)(params, source, output)).mean(axis=1)
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.7), layout="constrained", width_ratios=list(map(len, examples)))
    for axis, text, tokens, written in zip(axes, examples, np.asarray(output), weights, strict=True):
        text_written = main.as_text(tokens, symbols)
        axis.imshow(written[: len(text_written), : len(text)], cmap="Blues")
        axis.set(xlabel="input (· is a space)", ylabel="output")
        axis.xaxis.set_label_position("top")
        axis.set_xticks(range(len(text)), visible(text), family=MONOSPACED, size=10)
        axis.set_yticks(range(len(text_written)), text_written, family=MONOSPACED, size=10)
        axis.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
        axis.spines[:].set_color(LIGHT[GREY])
    figure.savefig(IMAGES / "dates.png", bbox_inches="tight", pad_inches=0.05)


def megabytes(attention, shape):
    """Temporary memory of a gradient in MB, beyond arguments and results. Compiles it without running it."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    gradient = jax.jit(jax.value_and_grad(lambda *inputs: jnp.square(attention(*inputs)).sum(), argnums=(0, 1, 2)))
    return gradient.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes / 1e6


def flash():
    """The order in which `flash_attention` computes blocks, and a comparison of memory."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.3), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    for i in range(6):
        for j in range(6):
            style = {"facecolor": LIGHT[GREY], "hatch": "///"} if j > i else {"facecolor": LIGHT[BLUE]}
            left.add_patch(Rectangle((j, i), 1, 1, edgecolor="white", linewidth=2, **style))
        triangle = Polygon([(i, i), (i + 1, i), (i + 1, i + 1)], facecolor=LIGHT[ORANGE], edgecolor="white")
        left.add_patch(triangle)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "edgecolor": "none"}
    left.legend([triangle], ["computed, then masked"], fontsize=9, **below)
    left.add_patch(Rectangle((0, 4), 5, 1, facecolor="none", edgecolor=BLUE, linewidth=1.5))
    arrow(left, (0.1, 4.5), (4.9, 4.5), color=BLUE)
    for x, y, text, background in (
        (2.1, 4.25, "forward and backward: for each i", LIGHT[BLUE]),
        (2.1, 4.75, "j = 0, ..., i", LIGHT[BLUE]),
        (4.2, 1.5, "skipped:\nall keys masked", "white"),
    ):
        style = {"facecolor": background, "edgecolor": "none", "pad": 1.5}
        left.text(x, y, text, ha="center", va="center", size=8.5, bbox=style)
    left.set(xlim=(-0.03, 6), ylim=(6.03, 0), aspect="equal", anchor="N")
    left.set(xlabel="block j of keys", ylabel="block i of queries")
    left.set_xticks(np.arange(6) + 0.5, range(6))
    left.set_yticks(np.arange(6) + 0.5, range(6))
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    left.set_title("one block at a time (causal)", weight="bold", size=11)

    lengths = [512, 1024, 2048, 4096, 8192, 16_384, 32_768]
    plain = functools.partial(scaled_dot_product_attention, causal=True)
    jax_nn = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    blockwise = functools.partial(flash_attention, causal=True)
    for name, attention, shape, color, width in (  # the first two curves coincide: a narrow line over a wide one
        ("scaled_dot_product_attention", plain, lambda n: (1, 8, n, 64), GREEN, 7),
        ("jax.nn.dot_product_attention", jax_nn, lambda n: (1, n, 8, 64), ORANGE, 2),
        ("flash_attention", blockwise, lambda n: (1, 8, n, 64), BLUE, 2),
    ):
        memory = [megabytes(attention, shape(n)) for n in lengths]
        right.plot(lengths, memory, "o-", color=color, linewidth=width, markersize=width + 3, label=name)
    right.text(2048, 6.2, "up to here, one block per head\n(512 x 512) dominates", **CAPTION)
    right.plot((2048, 2048), (9, memory[2]), color=GREY, linewidth=1)
    right.set(xscale="log", yscale="log", ylim=(4, None), xlabel="sequence length n (8 heads, d_k = 64, float32)")
    right.set(ylabel="temporary memory of a gradient, MB")
    right.set_xticks(lengths[::2], [f"{n:,}" for n in lengths[::2]])
    right.set_yticks([10, 100, 1000, 10_000, 100_000], ["10", "100", "1,000", "10,000", "100,000"])
    right.minorticks_off()
    right.grid(color=LIGHT[GREY])
    right.spines[["top", "right"]].set_visible(False)
    right.legend(framealpha=1, edgecolor="none", fontsize=9)
    right.set_title("memory: linear in n, not quadratic", weight="bold", size=11)
    figure.savefig(IMAGES / "flash_attention.png")


if __name__ == "__main__":
    for draw in (attention, transformer_layer, learned_attention, dates, flash):
        draw()
