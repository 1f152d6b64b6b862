"""The primary paper's own points: Khan et al., arXiv 2507.21976, LLaVA-1.5-7B on DermNet, judged by Qwen-2.5-32B."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One row of a table: score (%), peak memory (GB), time (ms/token; None where the table has none)."""

    label: str
    score_pct: float
    memory_gb: float
    ms_per_token: float | None = None


TABLE_1 = (  # pruning alone, by layers removed
    Point("original", 80.12, 13.4),
    Point("2 out", 73.15, 12.5),
    Point("4 out", 65.75, 11.7),
    Point("7 out", 57.25, 10.5),
    Point("8 out", 49.50, 10.1),
    Point("9 out", 36.25, 9.7),
    Point("10 out", 27.25, 9.4),
)
TABLE_3 = (  # quantized, the smaller ones after pruning and SFT
    Point("7 B, AWQ", 64.72, 4.5),
    Point("7 B, bitsandbytes", 66.25, 4.5),
    Point("5.6 B, AWQ", 54.25, 3.9),
    Point("5.6 B, bitsandbytes", 47.25, 3.9),
    Point("5.2 B, AWQ", 36.25, 3.7),
    Point("5.2 B, bitsandbytes", 32.50, 3.7),
)
TABLE_4 = (  # the pipeline against its parts
    Point("original", 80.12, 13.4, 154),
    Point("prune", 62.50, 11.2, 148),
    Point("prune + SFT", 74.25, 11.2, 146),
    Point("quantize", 64.72, 4.5, 146),
    Point("prune + quantize", 25.00, 3.9, 122),
    Point("prune + SFT + quantize", 54.25, 3.9, 122),
)
POINTS = (*TABLE_1, *TABLE_3, *TABLE_4)
MEMORY = tuple({(p.score_pct, p.memory_gb): p for p in POINTS}.values())
TIME = TABLE_4
