"""The search's figures as SVG text: score against a cost, and the bits of every layer in the joint choices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from matplotlib.patches import Rectangle

from actors.quantizers.table import METHODS
from jobs.figures.layers import BLUE, GREY, RED, plt, svg

_NEAR = 1.5  # a budget above this many times the largest cost would leave the settings no room in the figure
_STYLES = [(colour, marker) for marker in ("o-", "s--", "^:") for colour in (BLUE, RED, "#2f855a", "#744210")]
_SHADES = {0: "#ffffff", 3: "#bee3f8", 4: "#90cdf4", 8: "#63b3ed", 16: BLUE}


@dataclass(frozen=True)
class Mark:
    """One setting in a figure: its number in the table, cost, score (%) with its interval, and quantizer."""

    number: int
    cost: float
    score: float
    low: float
    high: float
    quantizer: str
    on_front: bool


def front_figure(
    marks: Sequence[Mark],
    label: str,
    score: str,
    limit: float | None,
    published: Sequence[tuple[float, float]],
    unit: str,
) -> str:
    """Score against a cost, the Pareto front in blue with the numbers of the table; beside it the paper's points.

    limit: the budget, a dashed line, or an arrow if it lies far off; published: (cost in `unit`, score %) of the paper,
    on an axis of their own, since model, images and judge were others.
    """
    figure, (ours, theirs) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 1.4))
    for mark in sorted(marks, key=lambda mark: mark.on_front):
        ours.errorbar(
            mark.cost,
            mark.score,
            yerr=[[mark.score - mark.low], [mark.high - mark.score]],
            fmt=_marker(mark.quantizer),
            color=BLUE if mark.on_front else GREY,
            capsize=2,
            markersize=9 if mark.quantizer == "mixed" else 6,
            lw=1,
        )
    front = sorted((mark for mark in marks if mark.on_front), key=lambda mark: mark.cost)
    ours.step([mark.cost for mark in front], [mark.score for mark in front], where="post", color=BLUE, lw=1)
    if limit is not None:
        costs = [mark.cost for mark in marks] or [limit]
        near = limit <= _NEAR * max(costs)
        if near:
            ours.axvline(limit, color=RED, ls="--", lw=1.2)
        left = 2 * limit > min(costs) + max(costs)  # the text is left of the line
        ours.annotate(f"budget {limit:.4g}" + ("" if near else " →"), (limit if near else 1, 1), color=RED, fontsize=8,
                     xycoords=("data" if near else "axes fraction", "axes fraction"), ha="right" if left else "left",
                     xytext=(-4 if left else 4, 0), textcoords="offset points", va="top")  # fmt: skip
    for quantizer in dict.fromkeys(mark.quantizer for mark in marks):
        ours.plot([], [], _marker(quantizer), color=GREY, label="16 bit" if quantizer == "none" else quantizer)
    ours.legend(frameon=False, fontsize=8, ncols=6, columnspacing=1, loc="lower left", bbox_to_anchor=(0, 1))
    theirs.plot([x for x, _ in published], [y for _, y in published], "x", color="#1a202c", ms=5)
    theirs.set_title("as published: LLaVA-1.5-7B, DermNet", fontsize=8)
    theirs.set_xlabel(unit)
    ours.set_xlabel(label)
    ours.set_ylabel(score)
    lowest = min((mark.low for mark in marks), default=0)
    ours.set_ylim(max(-3, lowest - 0.1 * (100 - lowest)), 100 + 0.35 * (100 - lowest))
    ours.set_yticks([tick for tick in ours.get_yticks() if lowest - 10 <= tick <= 100])
    theirs.set_ylim(-3, 103)
    ours.margins(x=0.08)
    _number(ours, front, marks)
    for axes in (ours, theirs):
        axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def retained_figure(lines: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> str:
    """Share of the score that is retained against the share of parameters removed, a line for each way.

    lines: (removed %, retained %, low, high) of each point, in order.
    """
    figure, axes = plt.subplots(figsize=(9, 3.6))
    axes.axhline(100, color=GREY, lw=0.8, ls=":")
    for (name, points), (colour, marker) in zip(lines.items(), cycle(_STYLES), strict=False):
        removed, retained, low, high = zip(*points, strict=True)
        below, above = ([abs(a - b) for a, b in zip(retained, bounds, strict=True)] for bounds in (low, high))
        axes.errorbar(removed, retained, yerr=[below, above], fmt=marker, color=colour, capsize=2, lw=1.2, label=name)
    axes.set_xlabel("parameters removed (%)")
    axes.set_ylabel("score retained (%)")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return svg(figure)


def _number(axes, front: Sequence[Mark], marks: Sequence[Mark]) -> None:
    """Write the front's numbers above it, each as low as the marks and the numbers before it allow."""
    axes.figure.draw_without_rendering()  # limits are final only then
    points = 72 / axes.figure.dpi  # per pixel

    def place(cost: float, score: float) -> tuple[float, float]:
        x, y = axes.transData.transform((cost, score))
        return points * x, points * y

    occupied = [(x, y - 5, 8.0) for x, y in (place(mark.cost, mark.score) for mark in marks)]  # middle, foot, width
    for mark in front:
        middle, top = place(mark.cost, mark.high)
        foot, width = top + 6, 6.0 * len(str(mark.number))
        while any(abs(middle - x) < (width + w) / 2 + 2 and abs(foot - y) < 10 for x, y, w in occupied):
            foot += 1
        occupied.append((middle, foot, width))
        axes.annotate(
            str(mark.number), (mark.cost, mark.high), textcoords="offset points", xytext=(0, foot - top), ha="center",
            fontsize=9,
        )  # fmt: skip


def _marker(quantizer: str) -> str:
    """Return matplotlib's marker of a quantizer, of "mixed" bits, or of "none"."""
    return METHODS[quantizer].marker if quantizer in METHODS else {"none": "o", "mixed": "*"}[quantizer]


def layers_figure(choices: Sequence[tuple[str, Sequence[int]]]) -> str:
    """A row for every choice, a cell for every decoder layer: its bits, or a dash where it is removed."""
    layers = len(choices[0][1])
    figure, axes = plt.subplots(figsize=(min(12.0, 2 + 0.36 * layers), 0.7 + 0.36 * len(choices)))
    for row, (_, bits_L) in enumerate(choices):
        for layer, bits in enumerate(bits_L):
            axes.add_patch(
                Rectangle((layer - 0.5, row - 0.5), 1, 1, facecolor=_SHADES[bits], edgecolor="#718096", lw=0.6)
            )
            colour = "#ffffff" if bits == 16 else "#1a202c"
            axes.text(layer, row, str(bits) if bits else "–", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_ylim(len(choices) - 0.5, -0.5)
    axes.set_xticks(range(layers))
    axes.set_yticks(range(len(choices)), [name for name, _ in choices])
    axes.set_xlabel("decoder layer (zero-based)")
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    return svg(figure)
