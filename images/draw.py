"""The pictures of README. They need two packages that nothing else here does: `pip install matplotlib pillow`.

    python images/draw.py

rewrites them all: the same numbers, from the same seed, each time. The lines of code in the boxes are those of the
source (tests/test_readme.py looks). The memory in flash_attention.png is what XLA plans when it compiles the gradients,
here for a CPU.
"""

import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

IMAGES = Path(__file__).parent
sys.path.insert(0, str(IMAGES.parent))

# ruff: noqa: E402 - as in any script of a folder below, the path comes first
import main
from attention import flash_attention as flash
from attention import scaled_dot_product_attention as plain

# Okabe and Ito's colours, which all kinds of colour vision tell apart, and lighter ones of the same hue to write on.
INK, GREY, BLUE, ORANGE, GREEN = "#222222", "#666666", "#0072b2", "#d55e00", "#009e73"
LIGHT = {GREY: "#ececec", BLUE: "#d6e8f4", ORANGE: "#fbe3d3", GREEN: "#d5efe6"}

plt.rcParams.update(
    {
        "figure.dpi": 100,  # README shows 800 pixels, saved at twice that
        "savefig.dpi": 200,
        "savefig.facecolor": "white",  # opaque, so that dark mode does not hide the ink
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "xtick.color": INK,
        "ytick.color": INK,
    }
)


def code(line):
    """A line of the source, to be written in a box; tests/test_readme.py finds it by this name."""
    return line


def canvas(height):
    """A figure of 8 by `height` inches, and axes over all of it, in inches."""
    figure, axes = plt.subplots(figsize=(8, height))
    axes.set(xlim=(0, 8), ylim=(0, height), position=(0, 0, 1, 1))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, title, line=None, colour=BLUE, height=0.56, size=7.6):
    """A box around (x, y): what the paper calls it, and the code that does it."""
    corner = x - width / 2, y - height / 2
    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": LIGHT[colour], "edgecolor": colour}
    axes.add_patch(FancyBboxPatch(corner, width, height, linewidth=1.3, **style))
    axes.text(x, y + (0.12 if line else 0), title, ha="center", va="center", weight="bold", size=9.5)
    if line:
        axes.text(x, y - 0.13, line, ha="center", va="center", family="DejaVu Sans Mono", size=size)


def arrow(axes, *points, label=None, colour=INK):
    """A line through the points that ends in an arrow head, with a shape written beside its middle."""
    style = {"color": colour, "linewidth": 1.3}
    for start, end in itertools.pairwise(points[:-1]):
        axes.plot(*zip(start, end, strict=True), **style)
    axes.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **style})
    if label:
        (x0, y0), (x1, y1) = points[-2:]
        axes.text((x0 + x1) / 2 + 0.07, (y0 + y1) / 2, label, va="center", size=8.5, color=GREY)


def attention():
    """Figure 2 of the paper, with code and shapes."""
    figure, axes = canvas(6.3)
    axes.text(1.85, 6.08, "scaled_dot_product_attention", ha="center", weight="bold", size=11)
    x, width = 1.65, 3.14
    for at, name, depth in ((0.78, "query", "n, k"), (x, "key", "m, k"), (3.5, "value", "m, v")):
        axes.text(at, 0.22, name, ha="center", weight="bold", size=9.5)
        if name != "value":
            arrow(axes, (at, 0.4), (at, 1.02), label=f"({depth})")
    for y, title, line, colour, size in (
        (1.3, "MatMul", code('jnp.einsum("...nk,...mk->...nm", query, key') + ", …)", BLUE, 6.9),
        (2.225, "Scale", code("/ math.sqrt(d_k)"), BLUE, 7.6),
        (3.15, "Mask (optional)", code("mask & causal_mask(n)"), GREY, 7.6),
        (4.075, "SoftMax", code("jax.nn.softmax(scores, axis=-1, where=mask)"), ORANGE, 7.6),
        (5.0, "MatMul", code('jnp.einsum("...nm,...mv->...nv", weights, value') + ", …)", BLUE, 6.9),
    ):
        box(axes, x, y, width, title, line, colour, size=size)
        arrow(axes, (x, y + 0.28), (x, y + 0.645 if y < 5 else 5.95), label="(n, m)" if y < 5 else "(n, v)")
    arrow(axes, (3.5, 0.4), (3.5, 5.0), (x + width / 2, 5.0))
    axes.text(3.58, 2.7, "(m, v)", size=8.5, color=GREY, rotation=90, va="center")

    axes.plot((3.92, 3.92), (0.2, 6.1), color=LIGHT[GREY], linewidth=2)
    axes.text(5.98, 6.08, "multi_head_attention", ha="center", weight="bold", size=11)
    axes.text(4.1, 5.62, "Before each shape:\nany leading axes (...)", size=8.5, color=GREY, va="center")
    for at, name, line, length, split in (
        (4.72, "query", code('"...nd,dhk->...hnk"'), "n", "h, n, k"),
        (5.98, "key", code('"...md,dhk->...hmk"'), "m", "h, m, k"),
        (7.24, "value", code('"...md,dhv->...hmv"'), "m", "h, m, v"),
    ):
        axes.text(at, 0.22, name, ha="center", weight="bold", size=9.5)
        arrow(axes, (at, 0.4), (at, 1.42), label=f"({length}, d)")
        box(axes, at, 1.7, 1.2, "Linear", line, GREEN, size=6.7)
        arrow(axes, (at, 1.98), (at, 3.02), label=f"({split})")
    for offset in (0.14, 0.07):
        corner = 4.12 + offset, 3.02 + offset
        style = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": LIGHT[BLUE], "edgecolor": BLUE}
        axes.add_patch(FancyBboxPatch(corner, 3.6, 0.7, linewidth=1.3, **style))
    box(axes, 5.92, 3.37, 3.6, "Attention, h heads at once", code("attention=scaled_dot_product_attention"), height=0.7)
    arrow(axes, (5.98, 3.86), (5.98, 4.72), label="(h, n, v)")
    box(
        axes,
        5.98,
        5.0,
        3.72,
        "Concat and Linear",
        code('jnp.einsum("...hnv,hvd->...nd", heads, params["output"])'),
        GREEN,
        size=6.9,
    )
    arrow(axes, (5.98, 5.28), (5.98, 5.95), label="(n, d)")
    figure.savefig(IMAGES / "attention.png")


def sublayers(axes, x, names, memory=None):
    """The sub-layers of one layer above each other: the function, Add & Norm, and the residual arrow around both."""
    y, inner = 0.95, 2.3
    arrow(axes, (x, 0.42), (x, y))
    for name in names:
        last = name == names[-1]
        middle = y + 0.28
        title = {"self_attention": "Multi-Head Attention", "cross_attention": "Multi-Head Attention"}.get(
            name, "Feed Forward"
        )
        if name == "self_attention" and memory:
            title = "Causal Multi-Head Attention"
        box(axes, x, middle, inner, title, f'params["{name}"]', GREEN if name == "feed_forward" else BLUE)
        arrow(axes, (x, y + 0.56), (x, y + 0.84), label="dropout")
        box(axes, x, y + 1.12, inner, "Add & Norm", f'params["{name}_norm"]', ORANGE)
        turn = x - inner / 2 - 0.2
        arrow(axes, (x, y - 0.22), (turn, y - 0.22), (turn, y + 1.12), (x - inner / 2, y + 1.12), colour=ORANGE)
        if name == "cross_attention":
            arrow(axes, *memory, (x + inner / 2 + 0.3, middle), (x + inner / 2, middle), colour=BLUE)
        arrow(axes, (x, y + 1.4), (x, y + (1.72 if last else 1.9)))
        y += 1.9
    return y


def transformer_layer():
    """Figure 1 of the paper, with the names of the parameter dicts."""
    figure, axes = canvas(7.3)
    axes.text(1.95, 7.02, "encoder_layer", ha="center", weight="bold", size=11)
    axes.text(5.6, 7.02, "decoder_layer", ha="center", weight="bold", size=11)
    top = sublayers(axes, 1.95, ["self_attention", "feed_forward"])
    axes.text(1.95, 0.24, "x (..., m, d)", ha="center", size=9.5)
    axes.text(1.95, top, "memory (..., m, d)", ha="center", size=9.5)
    axes.text(2.25, top + 0.24, "after the last of the N layers", ha="center", size=8.5, color=GREY)
    names = ["self_attention", "cross_attention", "feed_forward"]
    way = [(2.75, top + 0.06), (3.72, top + 0.06), (3.72, 2.5), (7.05, 2.5)]
    top = sublayers(axes, 5.6, names, memory=way)
    axes.text(5.6, 0.24, "x (..., n, d)", ha="center", size=9.5)
    axes.text(5.6, top, "(..., n, d)", ha="center", size=9.5)
    axes.text(7.12, 2.56, "memory", size=8.5, color=BLUE)
    figure.savefig(IMAGES / "transformer_layer.png")


def learned_attention():
    """`python main.py` as a film: what the decoder reads and writes, and how much of it is right, while it learns."""
    text, batch_size, steps = "attention is all you need", 32, 300  # all numbers are those of main.py
    length, monospaced = len(text), "DejaVu Sans Mono"
    generator = np.random.default_rng(0)
    source = main.random_strings(generator, batch_size, length)
    source[0] = [main.SYMBOLS.index(symbol) for symbol in text]
    target = source[:, ::-1]
    params = jax.jit(lambda: main.init_model(jax.random.key(0), len(main.SYMBOLS), 1, 64, 1, 128))()
    moments = main.init_adam(params)
    train_step, write, look = jax.jit(main.train_step), jax.jit(main.generate), jax.jit(main.cross_attention_weights)

    height = 6.2
    figure, axes = canvas(height)
    title = axes.text(4, height - 0.38, "", ha="center", family=monospaced, weight="bold", size=14)
    for y, word, colour in ((height - 0.75, "reads", GREY), (height - 1.18, "writes", BLUE)):
        axes.text(0.2, y, word, va="center", size=13)
        tiles = []  # in the end those of the lower row, which changes
        for i, symbol in enumerate(text):
            x = 1.4 + 0.26 * i
            tile = axes.add_patch(Rectangle((x - 0.12, y - 0.18), 0.24, 0.36, facecolor=LIGHT[colour]))
            tiles.append((tile, axes.text(x, y - 0.06, symbol, ha="center", family=monospaced, size=16)))
    axes.text(2.38, 4.58, "what the decoder attends to", ha="center", weight="bold", size=11)
    axes.text(6.37, 4.58, "symbols right in unseen texts", ha="center", weight="bold", size=11)
    axes.text(2.38, 0.12, "row: symbol to write, column: symbol that is read", ha="center", size=10)
    axes.text(6.37, 0.12, "training steps", ha="center", size=10)

    left = figure.add_axes((0.38 / 8, 0.35 / height, 4 / 8, 4 / height))
    image = left.imshow(np.zeros((length, length)), cmap="Blues")
    left.set_xticks(range(length), text, family=monospaced, size=9)
    left.set_yticks(range(length), text[::-1], family=monospaced, size=9)
    left.tick_params(length=0, pad=2, top=True, labeltop=True, labelbottom=False)
    right = figure.add_axes((5.06 / 8, 0.6 / height, 2.7 / 8, 3.75 / height))
    (line,) = right.plot([], [], "o-", color=BLUE, linewidth=2, markersize=7, markevery=[-1], clip_on=False)
    right.set(xlim=(0, steps), ylim=(0, 1))
    right.yaxis.set_major_formatter("{x:.0%}")
    right.grid(color=LIGHT[GREY])
    right.spines[["top", "right"]].set_visible(False)

    curve, frames = [], []
    for step in range(steps + 1):
        if step:
            strings = main.random_strings(generator, batch_size, length)
            params, moments, _ = train_step(params, moments, step, strings, strings[:, ::-1])
        if step % 6 == 0:
            written = np.asarray(write(params, source))
            curve.append((step, (written == target).mean()))
            line.set_data(*zip(*curve, strict=True))
            weights = np.asarray(look(params, source, target))[0, 0]
            image.set(data=weights, clim=(0, weights.max()))  # the largest weight is darkest, as in main.py
            title.set_text(f"step {step:>3} of {steps}")
            for (tile, letter), symbol, wanted in zip(tiles, main.as_text(written[0]), text[::-1], strict=True):
                colour = BLUE if symbol == wanted else ORANGE
                tile.set_facecolor(LIGHT[colour])
                letter.set(text=symbol, color=colour)
            figure.canvas.draw()
            frames.append(np.array(figure.canvas.buffer_rgba())[..., :3])
    # One palette for all frames, so that the file holds only what changes: the blues, and each ink on its ground.
    inks = ("white", INK), ("white", BLUE), (LIGHT[GREY], INK), (LIGHT[BLUE], BLUE), (LIGHT[ORANGE], ORANGE)
    maps = plt.get_cmap("Blues", 64), *(LinearSegmentedColormap.from_list("", ink, 16) for ink in inks)
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate([shades(np.arange(shades.N), bytes=True)[:, :3] for shades in maps]).tobytes())
    first, *others = (Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    milliseconds = [120] * len(others) + [4000]
    path = IMAGES / "learned_attention.gif"
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)


def jax_nn(query, key, value, causal):
    """`jax.nn.dot_product_attention`, which has its heads after its positions."""
    swapped = (x.swapaxes(-2, -3) for x in (query, key, value))
    return jax.nn.dot_product_attention(*swapped, is_causal=causal).swapaxes(-2, -3)


def megabytes(function, n):
    """Memory of a gradient besides arguments and results, as in tests/benchmark.py. It is compiled, and not run."""

    def loss(query, key, value):
        return jnp.square(function(query, key, value, causal=True)).sum()

    x = jax.ShapeDtypeStruct((1, 8, n, 64), jnp.float32)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return gradient.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes / 1e6


def flash_attention():
    """Which blocks of the n x m matrix are computed, in which order, and what that saves."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.3), layout="constrained")
    count = 6
    for i in range(count):
        for j in range(count):
            colour = GREY if j > i else ORANGE if j == 3 else BLUE
            style = {"facecolor": LIGHT[colour], "edgecolor": "white", "hatch": "///" if j > i else None}
            left.add_patch(Rectangle((j, i), 1, 1, linewidth=2, **style))
    for x, y, width, height, colour in ((0, 2, 3, 1, BLUE), (3, 3, 1, 3, ORANGE)):  # one turn of each outer loop
        left.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=colour, linewidth=1.5))
        start, end = ((0.1, 2.5), (2.9, 2.5)) if colour == BLUE else ((3.5, 3.1), (3.5, 5.9))
        left.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.5})
    for x, y, text, background, rotation in (
        (1.5, 2.25, "forward: for each i", LIGHT[BLUE], 0),
        (1.5, 2.75, "j = 0, ..., i", LIGHT[BLUE], 0),
        (3.76, 4.5, "backward: for each j", LIGHT[ORANGE], 270),
        (3.24, 4.5, "i = j, j + 1, ...", LIGHT[ORANGE], 270),
        (1.5, 4.5, "computed,\nthen masked", LIGHT[BLUE], 0),
        (4.2, 1.2, "never computed:\nno query here may\nsee any key there", "white", 0),
    ):
        style = {"facecolor": background, "edgecolor": "none", "pad": 1.5}
        left.text(x, y, text, rotation=rotation, ha="center", va="center", size=8.5, bbox=style)
    left.set(xlim=(-0.03, count), ylim=(count + 0.03, 0), aspect="equal")
    left.set_xticks([j + 0.5 for j in range(count)], range(count))
    left.set_yticks([i + 0.5 for i in range(count)], range(count))
    left.set(xlabel="block j of keys", ylabel="block i of queries")
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    left.set_title("one block at a time (causal)", weight="bold", size=11)
    lengths = [512, 1024, 2048, 4096, 8192]
    for name, function, colour, width in (  # the first two lie on each other: a wide line below a narrow one
        ("scaled_dot_product_attention", plain, GREEN, 7),
        ("jax.nn.dot_product_attention", jax_nn, ORANGE, 2),
        ("flash_attention", flash, BLUE, 2),
    ):
        memory = [megabytes(function, n) for n in lengths]
        right.plot(lengths, memory, "o-", color=colour, linewidth=width, markersize=width + 3, label=name)
    right.set(xscale="log", yscale="log", xlabel="positions n = m (8 heads of 64, float32)")
    right.set(ylabel="temporary memory of a gradient, MB")
    right.set_xticks(lengths, [f"{n:,}" for n in lengths])
    right.set_yticks([10, 100, 1000, 10_000], ["10", "100", "1,000", "10,000"])
    right.minorticks_off()
    right.grid(color=LIGHT[GREY])
    right.spines[["top", "right"]].set_visible(False)
    right.legend(framealpha=1, edgecolor="none", fontsize=9)
    right.set_title("memory: n against n squared", weight="bold", size=11)
    figure.savefig(IMAGES / "flash_attention.png")


if __name__ == "__main__":
    for picture in (attention, transformer_layer, learned_attention, flash_attention):
        picture()
