"""Figures as SVG text, readable on white and in print."""

import io
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update(
    {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "prunella"}
)
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first)
from matplotlib.transforms import Bbox  # noqa: E402

BLUE, GREY, RED = "#2b6cb0", "#718096", "#c05621"  # each 3:1 on white or more (WCAG 2.2, 1.4.11)


def svg(figure) -> str:
    """Return a figure as an SVG element, and close the figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def importance_figure(scores: Sequence[Mapping], removed: tuple[int, ...] = (), label: str = "score") -> str:
    """Bar chart of the score without each layer (paper, figure 3), with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(7, 2.8))
    layers = [row["layer"] for row in scores]
    values = [row["score"] for row in scores]
    spread = [
        [row["score"] - row["low"] for row in scores],
        [row["high"] - row["score"] for row in scores],
    ]
    colours = [RED if layer in removed else BLUE for layer in layers]
    axes.bar(layers, values, color=colours, yerr=spread, ecolor="#4a5568", capsize=2)
    axes.set_xticks(layers)
    axes.set_xlabel("decoder layer removed (zero-based)")
    low, high = min(row["low"] for row in scores), max(row["high"] for row in scores)
    floor = max(min(0.0, low), low - 0.3 * (high - low) - 0.005 * abs(high))  # small differences must be visible
    axes.set_ylabel("\n".join(textwrap.wrap(f"{label} (axis starts at {floor:.3g})", 34)))
    axes.set_ylim(floor, high + 0.05 * (high - floor))
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def ranges_figure(rows: Sequence[Mapping]) -> str:
    """Largest |x| of the channels that go into the decoder's linears, by layer (paper, figure 4): median, 99 %, max."""
    inputs = list(dict.fromkeys(row["projections"] for row in rows))
    figure, grid = plt.subplots(1, len(inputs), figsize=(2 * len(inputs) + 1, 2.6), sharey=True, squeeze=False)
    for axes, projections in zip(grid[0], inputs, strict=True):
        rows_of_input = [row for row in rows if row["projections"] == projections]
        for key, colour, label in (("max", RED, "max"), ("p99", GREY, "99 %"), ("median", BLUE, "median")):
            axes.plot(
                [row["layer"] for row in rows_of_input],
                [row[key] for row in rows_of_input],
                color=colour,
                label=label,
                marker=".",
                lw=1.2,
            )
        axes.set_title(projections.replace("_proj", ""), fontsize=9)
        axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("largest |x| of a channel")
    grid[0, -1].legend(frameon=False, fontsize=8)
    return svg(figure)


def loss_figure(losses: Sequence[Mapping]) -> str:
    """Line of the training loss per step."""
    figure, axes = plt.subplots(figsize=(7, 2.4))
    axes.plot([row["step"] for row in losses], [row["loss"] for row in losses], color=BLUE, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def tradeoff_figure(rows: Sequence[Mapping]) -> str:
    """Score of every method against the bytes of its weights, with 95 % intervals; hollow: simulated, nominal bytes."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for row in rows:
        low, high = row["baseline_interval_pct"]
        size = row["nominal_bytes"] / 2**20
        colour = BLUE if row["quantizer"] == "none" else RED
        axes.errorbar(
            size,
            row["baseline_pct"],
            yerr=[[row["baseline_pct"] - low], [high - row["baseline_pct"]]],
            fmt="o",
            color=colour,
            markerfacecolor="white" if row["simulated"] else colour,
            capsize=3,
        )
    axes.set_xlabel("weights (MiB)")
    axes.set_ylabel("baseline score (%)")
    axes.margins(x=0.2, y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, rows)
    return svg(figure)


def _label(axes, rows: Sequence[Mapping]) -> None:
    """Write each method beside its point or at an end of its interval, where it covers nothing if possible."""
    axes.figure.draw_without_rendering()  # limits and sizes are final only then
    places = [(row["nominal_bytes"] / 2**20, row["baseline_pct"], *row["baseline_interval_pct"]) for row in rows]
    occupied = [Bbox(axes.transData.transform([(x, low), (x, high)])).padded(3) for x, _, low, high in places]
    for row, (x, centre, low, high) in zip(rows, places, strict=True):
        beside = [
            (centre, (7, -3), "left"),
            (centre, (-7, -3), "right"),
            (high, (0, 7), "center"),
            (low, (0, -14), "center"),
        ]
        for height, offset, side in [*beside, beside[0]]:
            label = axes.annotate(
                row["method"], (x, height), textcoords="offset points", xytext=offset, ha=side, fontsize=9
            )
            box = label.get_window_extent()
            inside = axes.bbox.x0 < box.x0 and all(axes.figure.bbox.contains(x, y) for x, y in (box.min, box.max))
            if inside and not any(box.overlaps(other) for other in occupied):
                break
            label.set_visible(False)
        label.set_visible(True)
        occupied.append(box)
