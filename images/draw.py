"""The pictures of README. Needs matplotlib, which nothing else here does: `pip install matplotlib`.

    python images/draw.py

rewrites them all: the same numbers, from the same seed, each time. The lines of code in the boxes are those of the
source (tests/test_readme.py looks), the memory in flash_attention.png is that of README's benchmark.
"""

import itertools
import re
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

IMAGES = Path(__file__).parent
sys.path.insert(0, str(IMAGES.parent))

import main  # noqa: E402 - as in any script of a folder below, the path comes first

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
    x, width = 1.62, 3.0
    for at, name, depth in ((0.75, "query", "n, k"), (1.62, "key", "m, k"), (3.42, "value", "m, v")):
        axes.text(at, 0.22, name, ha="center", weight="bold", size=9.5)
        if name != "value":
            arrow(axes, (at, 0.4), (at, 1.02), label=f"({depth})")
    box(axes, x, 1.3, width, "MatMul", code('jnp.einsum("...nk,...mk->...nm", query, key'))
    box(axes, x, 2.1, width, "Scale", code("/ math.sqrt(d_k)"))
    box(axes, x, 2.9, width, "Mask (optional)", code("jnp.where(mask, 0, 2 * _lowest_maximum(dtype))"), GREY, size=6.9)
    box(
        axes,
        x,
        3.7,
        width,
        "SoftMax: numerator",
        code("jnp.exp(scores - jax.lax.stop_gradient(maximum))"),
        ORANGE,
        size=7,
    )
    box(axes, x, 4.5, width, "MatMul", code('jnp.einsum("...nm,...mv->...nv", numerator, value)'), size=6.9)
    box(axes, x, 5.3, width, "SoftMax: denominator", code("weighted_sum / denominator"), ORANGE)
    for y in (1.58, 2.38, 3.18, 3.98):
        arrow(axes, (x, y), (x, y + 0.24), label="(n, m)")
    arrow(axes, (x, 4.78), (x, 5.02), label="(n, v)")
    arrow(axes, (x, 5.58), (x, 5.95), label="(n, v)")
    arrow(axes, (3.42, 0.4), (3.42, 4.5), (3.13, 4.5))
    axes.text(3.5, 2.5, "(m, v)", size=8.5, color=GREY, rotation=90, va="center")

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
        box(axes, at, 1.7, 1.2, "Linear", line, GREEN, size=7.2)
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
    """`python main.py "attention is all you need" --length 25`: weights before, amid and after, and the curve."""
    text, steps, batch = "attention is all you need", 300, 64
    length = len(text)
    rng_params, rng_train = jax.random.split(jax.random.key(0))
    params = main.init_model(rng_params, len(main.SYMBOLS), 1, 64, 1, 128)
    state = params, main.init_adam(params)
    train = jax.jit(main.train, static_argnames="shape")
    weights = jax.jit(main.last_layer_attention)
    held_out = jax.random.randint(jax.random.key(1), (256, length), 0, len(main.SYMBOLS))
    correct = jax.jit(lambda params: (main.model(params, held_out).argmax(-1) == held_out[:, ::-1]).mean())
    tokens, pictures, curve = main.encode([text])[0], {}, []
    for step in range(0, steps + 1, 10):
        if step:
            *state, _ = train(*state, rng_train, (step - 9, step + 1), shape=(batch, length))
        curve.append((step, float(correct(state[0]))))
        if step in (0, 100, steps):
            pictures[step] = weights(state[0], tokens)[0]

    figure, axes = plt.subplots(2, 2, figsize=(8, 7.9), layout="constrained")
    for (step, picture), ax in zip(pictures.items(), axes.flat, strict=False):
        ax.imshow(picture, cmap="Blues", vmin=0)
        title = "before training" if step == 0 else f"after {step} steps"
        ax.set_title(title, weight="bold", size=11)
        ax.set_xticks(range(length), text, family="DejaVu Sans Mono", size=9)
        ax.set_yticks(range(length), text, family="DejaVu Sans Mono", size=9)
        ax.tick_params(length=0, pad=2)
        ax.set_xlabel("key: what is looked at")
        ax.set_ylabel("query: the position that looks")
    ax = axes.flat[3]
    ax.plot(*zip(*curve, strict=True), color=BLUE, linewidth=2)
    for step in pictures:
        ax.plot(step, dict(curve)[step], "o", color=ORANGE, markersize=7)
    ax.set_title("it learns to write backwards", weight="bold", size=11)
    ax.set(xlabel="training steps", ylabel="symbols right, of strings it never saw", ylim=(-0.03, 1.03), box_aspect=1)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.grid(color=LIGHT[GREY])
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / "learned_attention.png")


def memory_of_the_benchmark():
    """{contestant: [(n, megabytes), ...]} of the gradients in README's table."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (IMAGES.parent / "README.md").read_text(encoding="utf-8").splitlines()
        if re.match(r"\| (n|[\d,]+) \|", line)
    ]
    columns = {name: i for i, name in enumerate(rows[0]) if name in ("plain", "flash", "jax.nn")}
    return {
        name: [
            (int(row[0].replace(",", "")), float(re.search(r"([\d,]+) MB", row[i])[1].replace(",", "")))
            for row in rows
            if row[1] == "gradient"
        ]
        for name, i in columns.items()
    }


def flash_attention():
    """Which blocks of the n x m matrix exist when, and what that saves."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.3), layout="constrained")
    count = 6
    for i in range(count):
        for j in range(count):
            kind = (LIGHT[GREY], "///") if j > i else (LIGHT[ORANGE], None) if j == i else (LIGHT[BLUE], None)
            left.add_patch(Rectangle((j, i), 1, 1, facecolor=kind[0], hatch=kind[1], edgecolor="white", linewidth=2))
    left.add_patch(Rectangle((2, 4), 1, 1, facecolor=BLUE, edgecolor="white", linewidth=2))
    left.text(2.5, 4.5, "now", color="white", ha="center", va="center", weight="bold")
    left.annotate("", (2.0, 4.5), (0.1, 4.5), arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.5})
    left.text(4.1, 1.2, "skipped:\nno query here may\nsee any key there", ha="center", va="center", size=9,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 3})  # fmt: skip
    left.text(1.0, 3.0, "no mask\nneeded", ha="center", va="center", size=9, bbox={"facecolor": LIGHT[BLUE], "lw": 0})
    left.text(5.5, 5.5, "mask", ha="center", va="center", size=9)
    left.set(xlim=(0, count), ylim=(count, 0), aspect="equal")
    left.set_xticks([j + 0.5 for j in range(count)], [f"{j}" for j in range(count)])
    left.set_yticks([i + 0.5 for i in range(count)], [f"{i}" for i in range(count)])
    left.set(xlabel="blocks of keys: lax.scan", ylabel="blocks of queries: lax.map")
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    left.set_title("one block at a time (causal)", weight="bold", size=11)
    for (name, points), colour in zip(memory_of_the_benchmark().items(), (GREEN, BLUE, ORANGE), strict=True):
        label = {"plain": "scaled_dot_product_attention", "flash": "flash_attention", "jax.nn": "jax.nn"}[name]
        right.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=2, label=label)
    right.set(xscale="log", yscale="log", xlabel="positions n = m", ylabel="temporary memory of a gradient, MB")
    right.set_xticks([n for n, _ in points], [f"{n:,}" for n, _ in points])
    right.set_yticks([10, 100, 1000, 10_000], ["10", "100", "1,000", "10,000"])
    right.minorticks_off()
    right.grid(color=LIGHT[GREY])
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=9)
    right.set_title("memory: n against n squared", weight="bold", size=11)
    figure.savefig(IMAGES / "flash_attention.png")


if __name__ == "__main__":
    for picture in (attention, transformer_layer, learned_attention, flash_attention):
        picture()
