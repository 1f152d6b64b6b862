"""A report's page from answers made by hand: eight images of two classes, three questions, three models."""

from functools import cache
from pathlib import Path

from PIL import Image

from actors.baseline import REFUSALS
from actors.judge.verdict import TOP_LABEL, tally
from jobs.config.schema import ClassConfig, EvaluateConfig
from jobs.judging.tables import NOT_JUDGED, summary_columns
from jobs.report import format_row
from jobs.reporting import answers as report_answers
from jobs.reporting import judge as report_judge
from jobs.reporting import metrics as report_metrics
from jobs.reporting.pages import render_page
from jobs.scoring import image_controls
from jobs.scoring.differences import differences, name_tests
from jobs.scoring.metrics import judge_given_name, metrics, retention, score_answers

CLASSES = ["melanoma", "psoriasis"]
METHODS = ("original", "prune", "quant")
HOSTILE = (
    "</script><script>window.broken = 1</script>",
    '<img src="x" onerror="window.broken = 1">',
    "<!-- <script> \"quoted\" & 'single' -->",
    "</dd></dl><h1>a heading</h1><style>body { display: none }</style>",
    "{{ 7 * 7 }} {% raw %} ${7 * 7} `tick` \\u003cb\\u003e",
    "abc \u202e desrever \u2028 line \u2029 \x00 nul \u05d0\u05d1\u05d2",
    "javascript:window.broken=1",
    "x" * 9000,
)
RETAINED = {"pct": 88.0, "interval_pct": [80.0, 96.0]}  # of a judge's labels
_PROFILE = {
    **{"params": 1000, "bits": 16, "simulated": False, "weight_bytes": 2**20, "nominal_bytes": 2**20},
    **{"peak_memory_bytes": 2**30, "peak_memory_kind": "process, resident", "ms_per_token": 2.0},
    **{"ms_per_token_p5_p95": [1.0, 3.0], "first_token_ms": 5.0, "device": "CPU", "threads": 1, "unanswered": 0},
}


def answers(folder: Path) -> dict[str, list[dict]]:
    """The original is always right; prune takes psoriasis for melanoma; quant says hostile things of each image."""
    found: dict[str, list[dict]] = {method: [] for method in METHODS}
    for number in range(8):
        kind, path = CLASSES[number % 2], folder / f"lesion-{number}.png"
        if number != 7:  # one is gone since
            Image.new("RGB", (300, 200), (200, 20 * number, 120)).save(path)
        texts = {"name": f"This is {kind}.", "about": f"About {kind}.", "describe": f"A spot, number {number}."}
        for question, reference in texts.items():
            common = {
                **{"sample_id": f"{path.name}#{question}", "image": str(path), "group": number, "class": kind},
                **{"question_id": question, "question": f"Tell the {question}?", "reference": reference},
                **{"token_ids": [1, 2, 3], "tokens": 3, "stopped": True},
            }
            pruned = texts[question].replace("psoriasis", "melanoma")
            said = {"original": reference, "prune": pruned, "quant": reference}
            if question == "describe":
                said["quant"] = HOSTILE[number]
            for method in METHODS:
                found[method].append({**common, "answer": said[method]})
    found["prune"][-1] |= {"token_ids": [7] * 9, "tokens": 9, "stopped": False}
    kinds = [ClassConfig(name=name) for name in CLASSES]
    return {method: score_answers(rows, [0.5] * len(rows), kinds) for method, rows in found.items()}


def verdicts(rows: list[dict], missing: int = 0) -> list[dict]:
    """4 for the reference, else 1; the last `missing` answers are unscored."""
    return [
        {
            "sample_id": row["sample_id"],
            "judge_label": None if n >= len(rows) - missing else 4 if row["answer"] == row["reference"] else 1,
            "judge_reason": f"Because of {row['answer'][:60]}",
        }
        for n, row in enumerate(rows)
    ]


def judge_facts(labels: list[int | None], missed: int) -> dict:
    counted = {**tally(labels), "judge_interval_pct": None, "judge_expected_pct": None}
    if counted["judge_pct"] is not None:
        counted["judge_expected_pct"] = 77.7
        counted["judge_interval_pct"] = [counted["judge_pct"] - 5, counted["judge_pct"] + 5]
    kinds = {"reference": {"count": 4, "missed": missed}, "empty": {"count": 4, "missed": 0}}
    return {
        "tally": counted,
        "unscored": {"timeout": labels.count(None)} if None in labels else {},
        "controls": {"count": 8, "missed": missed, "by_kind": kinds, "misses": [], "unbuilt": ["other_class"]},
        "judge": "Tiny/Judge@1",
    }


def summary(by_method: dict[str, list[dict]], labels: dict[str, list[int | None]], missed: int) -> list[dict]:
    """Rows like those of jobs.compress."""
    groups = {row["sample_id"]: row["group"] for row in by_method["original"]}
    compared = differences([{r["sample_id"]: r["baseline"] for r in rows} for rows in by_method.values()], groups, 1.0)
    named = [{r["sample_id"]: r["verdict"] == "right" for r in rows if r["verdict"]} for rows in by_method.values()]
    judged = [dict(zip(groups, own, strict=True)) for own in labels.values()] or [{} for _ in METHODS]
    apart = differences(judged, groups, TOP_LABEL, "judge_difference")
    found = []
    for n, (method, rows) in enumerate(by_method.items()):
        swapped = image_controls.swapped_rows(rows, 0)
        told = metrics(rows, CLASSES)
        found.append(
            {
                **{"method": method, "quantizer": "none", "removed_layers": [], **_PROFILE, **told},
                "controls": image_controls.summary(
                    rows, score_answers(swapped, [0.5] * len(swapped), [ClassConfig(name=k) for k in CLASSES])
                ),
                "retention": retention(by_method["original"], rows, CLASSES),
                **(summary_columns(judge_facts(labels[method], missed), None) if labels else NOT_JUDGED),
                **{
                    **compared[n],
                    "name_p_holm": name_tests(named)[n],
                    **apart[n],
                    "judge_retention": RETAINED if n else None,
                    "judge_given_name": judge_given_name(rows, judged[n]),
                },
            }
        )
    return found


@cache
def content(folder: Path, judged: bool = False, missed: int = 0, missing: int = 0) -> dict:
    """What the templates are filled with."""
    by_method = answers(folder)
    said = {method: verdicts(rows, missing) for method, rows in by_method.items()} if judged else {}
    rows = summary(by_method, {m: [one["judge_label"] for one in own] for m, own in said.items()}, missed)
    keyed = {method: {row["sample_id"]: row for row in own} for method, own in by_method.items()}
    return {
        **{"title": "by hand", "model": "tiny", "made": "today", "removed": "1", "quantizer": "none"},
        **{"rows": [format_row(row) for row in rows], "first": rows[0], "recovery": "lora", "layers": None},
        "ranges": {"figure": "<svg></svg>", "outliers": 0, "largest": [], "threshold": 20},
        **{"loss": "<svg></svg>", "tradeoff": "<svg></svg>", "options": "{}", "command": "none"},
        "names": report_metrics.names({row["method"]: row for row in rows}),
        **{"loops": report_metrics.LOOPS, "retained": report_metrics.tabulate_retention(rows), "refusals": REFUSALS},
        **{"samples": report_answers.samples(keyed), "viewer": report_answers.viewer(keyed, said)},
        **{"detectable": "", "name_tests": "", "methods": list(METHODS), "profile": EvaluateConfig()},
        "judge": report_judge.describe_verdicts(rows) if judged else None,
    }


def page(folder: Path, **choices) -> str:
    """The page itself."""
    return render_page("report.html.j2", content(folder, **choices))
