"""Numbers as people read them."""

from collections.abc import Mapping, Sequence

GIB = 2**30  # bytes


def size(count: float) -> str:
    """Write a number of bytes in GiB or MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.2f} MiB"


def format_score(value: float) -> str:
    """Write a number of any unit: with four decimals, or four digits where it is so small that these would hide it."""
    return f"{value:#.4g}" if 0 < abs(value) < 0.1 else f"{value:.4f}"


def with_interval(value: float, interval: Sequence[float]) -> str:
    """Write a percentage and its interval."""
    return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def takes_more_unpacked(row: Mapping, first: Mapping) -> bool:
    """Tell whether a model with smaller weights than the first one's takes more memory: its weights are unpacked."""
    return row["weight_bytes"] < first["weight_bytes"] and row["peak_memory_bytes"] > first["peak_memory_bytes"]


def align(lines: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Lay cells out in columns: the first `left` flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return [
        "  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)).rstrip()
        for line in lines
    ]
