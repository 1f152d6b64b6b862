"""What each quantizer costs on derm-tiny, with its planted outlier channels: 4 and 3 bits, with and without pruning.

    make study-quantizers        (python -m tests.benchmarks.quantizer_study --help)

One row per quantizer and model: verbatim answers and baseline score in percent, each with its paired difference to
the same model in 16 bits and to round to nearest at the same bits; then AWQ calibrated on text alone against AWQ
calibrated on images and text. All with 95 % intervals, the image as the unit; a star marks a difference whose interval
does not hold 0. The table is Markdown.
"""

import argparse

import numpy as np

from actors.maths.statistics import cluster_bootstrap_interval
from cluster.tables import read_table
from jobs import evaluate, prepare, prune, quantize, recover
from jobs.config.schema import Config
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.stage import Source, Stage

SETTINGS = (
    ("none", 16, True),
    *((method, bits, True) for bits in (4, 3) for method in ("rtn", "hqq", "awq")),
    ("nf4", 4, True),
    ("int8", 8, True),
    ("awq", 4, False),
    ("awq", 3, False),
)


def answers(run: Run, model: Stage | Source, data: Stage, config: Config) -> dict[str, dict]:
    """Quantize as `config` says, evaluate, return the scored answers by question."""
    run.config = config
    made = evaluate.stage(run, quantize.stage(run, model, data), data)
    return {row["sample_id"]: row for row in read_table(run.store.root / run.make(made) / evaluate.ANSWERS)}


def score(rows: dict, value) -> str:
    """Return the mean in percent, with its interval."""
    values = np.array([value(row) for row in rows.values()])
    low, high = cluster_bootstrap_interval(values, np.array([row["group"] for row in rows.values()]))
    return f"{100 * values.mean():.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def difference(rows: dict, reference: dict, value) -> str:
    """Return the paired difference in points, with its interval."""
    shared = sorted(set(rows) & set(reference))
    gained = np.array([value(rows[s]) - value(reference[s]) for s in shared])
    low, high = cluster_bootstrap_interval(gained, np.array([rows[s]["group"] for s in shared]))
    return f"{100 * gained.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]{'*' if low > 0 or high < 0 else ''}"


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", type=int, default=112, help="drawn lesions per class (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=5, help="layers to remove (default: %(default)s)")
    parser.add_argument("--run-dir", default="runs/quantizer-study", help="folder of results (default: %(default)s)")
    options = parser.parse_args()
    common = [
        ("run_dir", options.run_dir),
        ("data.draw_per_class", str(options.per_class)),
        ("prune.layers", str(options.layers)),
        ("evaluate.warmup_runs", "0"),
        ("evaluate.timed_runs", "1"),
    ]
    config = load_config("configs/derm-tiny.yaml", common)
    columns = (("verbatim", lambda r: float(r["answer"] == r["reference"])), ("baseline", lambda r: r["baseline"]))
    print("| model | quantizer | bits | verbatim % | to 16 bits | to rtn | baseline % | to 16 bits | to rtn |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    texts = []
    with Run(config) as run:
        data, base = prepare.stage(run), run.base_model()
        healed = recover.stage(run, prune.stage(run, base), data)
        for name, model in (("whole", base), (f"{options.layers} layers out + SFT", healed)):
            found: dict[tuple, dict] = {}
            for method, bits, images in SETTINGS:
                chosen = [("quantize.method", method), ("quantize.bits", str(bits))]
                chosen += [] if images else [("quantize.calibration_images", "false")]
                rows = answers(run, model, data, load_config("configs/derm-tiny.yaml", [*common, *chosen]))
                found[method, bits, images] = rows
                label = method if images else f"{method}, calibrated on text alone"
                cells = [name, label, str(bits)]
                for _, value in columns:
                    cells.append(score(rows, value))
                    cells.append("" if method == "none" else difference(rows, found["none", 16, True], value))
                    rounded = found.get(("rtn", bits, True))
                    cells.append(difference(rows, rounded, value) if rounded and method != "rtn" else "")
                print(f"| {' | '.join(cells)} |", flush=True)
            for bits in (4, 3):
                pair = found["awq", bits, False], found["awq", bits, True]
                texts.append(f"{name}, {bits} bits: {', '.join(f'{n} {difference(*pair, v)}' for n, v in columns)}")
    print("\nAWQ calibrated on text alone, against on images and text:\n" + "\n".join(texts))


if __name__ == "__main__":
    main()
