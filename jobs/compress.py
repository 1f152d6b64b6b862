"""The paper's pipeline for one setting: score layers, prune, recover, quantize; evaluate each combination.

    python -m jobs.compress --config configs/derm-tiny.yaml
    ray job submit --working-dir . -- python -m jobs.compress --config configs/llava-1.5-7b-dermnet.yaml \\
        --data.root /shared/dermnet --run_dir /shared/runs/dermnet --prune.layers 7

Stages that already exist in run_dir are reused. The rows of the paper's Table 4 go to run_dir/summary.json.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

from actors.judge.verdict import TOP_LABEL
from jobs import ablate, evaluate, judge, prepare, prune, quantize, recover
from jobs.core.command import main
from jobs.core.facts import EvaluateFacts, Interval, Profile, QuantizeFacts
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.judging import text as judge_text
from jobs.judging.asking import check_judge
from jobs.judging.tables import NOT_JUDGED, remarks
from jobs.ranking import ranges
from jobs.reporting.summary import SUMMARY, SummaryRow
from jobs.scoring.differences import differences, name_tests
from jobs.scoring.metrics import compute_retention, judge_given_name, retention
from jobs.scoring.rows import ANSWERS, AnswerRow

LOG = logging.getLogger("jobs")

_METRICS = (
    *("baseline_pct", "baseline_interval_pct", "exact_pct", "name_accuracy", "name_accuracy_interval"),
    *("macro_f1_pct", "macro_f1_interval_pct", "without_stop_pct", "without_stop_interval_pct"),
    *("loop_pct", "loop_interval_pct"),
)


def plan(run: Run) -> dict[str, tuple[Any, Stage]]:
    """Return method -> (checkpoint, its evaluation), the six rows of the paper's Table 4."""
    if run.config.prune.layers == 0 and run.config.prune.width == 1:
        raise ValueError(
            "prune.layers is 0 and prune.width 1: jobs.compress compares pruned models; use jobs.quantize alone."
        )
    data, base = prepare.stage(run), run.base_model()
    pruned = prune.stage(run, base)
    recovered = recover.stage(run, pruned, data)
    models = {
        "original": base,
        "prune": pruned,
        "prune+sft": recovered,
        "quant": quantize.stage(run, base, data),
        "prune+quant": quantize.stage(run, pruned, data),
        "prune+sft+quant": quantize.stage(run, recovered, data),
    }
    return {method: (model, evaluate.stage(run, model, data)) for method, model in models.items()}


def scores_stage(run: Run) -> Stage | None:
    """Return the ablation that chose the layers, None if the config lists them, or removes none."""
    if run.config.prune.order is not None or run.config.prune.layers == 0:
        return None
    return ablate.stage(run, run.base_model(), prepare.stage(run))


def comparison(run: Run) -> Stage | None:
    """Return the stage that compares other criteria with the ablation; None without either of them."""
    scores = scores_stage(run)
    if scores is None or not run.config.ablate.compare:
        return None
    return ablate.comparison_stage(run, run.base_model(), prepare.stage(run), scores)


def studies(run: Run) -> list[Stage]:
    """Return the stages that only the report reads: the criteria's comparison and the activation ranges."""
    others = comparison(run)
    recorded = ranges.stage(run, run.base_model(), prepare.stage(run))
    return [recorded] if others is None else [others, recorded]


def judgements(run: Run, planned: dict[str, tuple[Any, Stage]]) -> list[Stage]:
    """Return the stages that judge the evaluations, in their order; none without a judge."""
    if run.config.judge.engine == "none":
        return []
    return [judge.stage(run, evaluated) for _, evaluated in planned.values()]


def make_summary(run: Run, planned: dict[str, tuple[Any, Stage]], failure: Exception | None = None) -> list[SummaryRow]:
    """Return one row per method, from existing artifacts; failure: the error that ended the judge, if any."""
    removed = prune.removed_layers(run, planned["prune"][0])
    rows: list[dict] = []
    original: dict[str, AnswerRow] = {}
    tables: list[dict[str, AnswerRow]] = []
    classes = [kind.name for kind in run.config.data.classes]
    for method, (model, evaluated) in planned.items():
        facts = run.facts(evaluated, EvaluateFacts)
        scores, profile = facts["metrics"], facts["profile"]
        metrics: Mapping = scores
        quantized = "quant" in method
        answers = ANSWERS.by_sample(run.folder_of(evaluated))
        original = original or answers
        tables.append(answers)
        rows.append(
            {
                "method": method,
                "removed_layers": removed if "prune" in method else [],
                "quantizer": run.config.quantize.method if quantized else "none",
                "params": profile["params"],
                "weight_bytes": profile["weight_bytes"],
                **_bits(run, model, profile),
                "peak_memory_bytes": profile["peak_memory_bytes"],
                "peak_memory_kind": profile["peak_memory_kind"],
                **{key: metrics[key] for key in _METRICS},
                "controls": facts["controls"],
                "retention": retention(list(original.values()), list(answers.values()), classes),
                "images": scores["images"],
                "answers": scores["answers"],
                "unanswered": scores["unanswered"],
                "ms_per_token": profile["ms_per_token"],
                "ms_per_token_p5_p95": profile["ms_per_token_p5_p95"],
                "first_token_ms": profile["first_token_ms"],
                "device": profile["device"],
                "threads": profile["threads"],
                "checkpoint": run.config.model.path if isinstance(model, Source) else str(run.folder_of(model)),
                "evaluation": evaluated.name,
            }
        )
    judges = judgements(run, planned)
    compared = _compare_methods(run, tables, [] if run.missing(judges) else judges)
    end = {"judge_failure": None if failure is None else str(failure)}
    return [cast(SummaryRow, row | end | columns) for row, columns in zip(rows, compared, strict=True)]


def _bits(run: Run, model: Stage | Source, profile: Profile) -> dict:
    """Return the bits of a decoder weight, also with its scales, and the checkpoint's bytes at those bits.

    If `simulated`, they are nominal: the rounded weights are stored in 16 bits.
    """
    if isinstance(model, Stage) and model.kind == "quantize":
        facts = run.facts(model, QuantizeFacts)
        return {
            "bits": run.config.quantize.bits,
            "simulated": facts["simulated"],
            "bits_per_weight": facts["bits_per_weight"],
            "nominal_bytes": facts["nominal_bytes"],
        }
    stored = profile["stored_bits"]
    sizes = {"simulated": False, "bits_per_weight": float(stored), "nominal_bytes": profile["weight_bytes"]}
    return {"bits": stored, **sizes}


def _compare_methods(run: Run, tables: list[dict[str, AnswerRow]], judges: list[Stage]) -> list[dict]:
    """Return each model's judge columns and paired differences from the first model; tables: answers by sample_id."""
    groups = {s: row["group"] for s, row in tables[0].items()}
    baseline = differences([{s: row["baseline"] for s, row in rows.items()} for rows in tables], groups, 1.0)
    name_p_values = name_tests(
        [{s: r["verdict"] == "right" for s, r in rows.items() if r["verdict"]} for rows in tables]
    )
    labels = [judge.labels(run, judgement) for judgement in judges] or [{} for _ in tables]
    judge_differences = differences(labels, groups, TOP_LABEL, "judge_difference")
    shares = [
        {
            "judge_retention": _judge_retention(labels[0], judgement, groups),
            "judge_given_name": judge_given_name(list(rows.values()), judgement),
        }
        for judgement, rows in zip(labels, tables, strict=True)
    ]
    columns: Sequence[Mapping] = [judge.row(run, judgement) for judgement in judges] or [NOT_JUDGED for _ in tables]
    return [
        {**column, **difference, "name_p_holm": p, **judge_difference, **share}
        for column, difference, p, judge_difference, share in zip(
            columns, baseline, name_p_values, judge_differences, shares, strict=True
        )
    ]


def _judge_retention(first: dict[str, int | None], labels: dict[str, int | None], groups: dict) -> dict | None:
    """Return what a model retains of the first one's mean label; None if no answer has a label from both."""
    both = [(label, first[s], groups[s]) for s, label in labels.items() if None not in (label, first.get(s))]
    scores, before, images = zip(*both, strict=True) if both else ((), (), ())
    return compute_retention(scores, before, images) if both else None


def format_rows(rows: Sequence[SummaryRow]) -> str:
    """Lay the rows out for a terminal."""
    heads = ("method", "params", "bits", "weights", "disease named %", "baseline %", "verbatim %", "ms/token")
    judged, failure = (rows[0][key] for key in ("is_llm_judge", "judge_failure"))
    lines = ["{:<16} {:>10} {:>4} {:>10} {:>16} {:>16} {:>10} {:>8}".format(*heads)]
    for row in rows:
        name = _with_interval(row["name_accuracy"], row["name_accuracy_interval"])
        baseline = _with_interval(row["baseline_pct"], row["baseline_interval_pct"])
        size = f"{row['nominal_bytes'] / 2**20:.2f} MiB{'*' if row['simulated'] else ''}"
        lines.append(
            f"{row['method']:<16} {row['params']:>10,} {row['bits']:>4} {size:>10} {name:>16} {baseline:>16} "
            f"{row['exact_pct']:>10.1f} {row['ms_per_token']:>8.2f}"
        )
    first = rows[0]
    lines.append(
        f"{first['images']} test images, {first['answers']} answers; 95 % intervals; {first['device']}, "
        f"{first['threads']} thread(s)" + ("" if judged or failure else "; LLM judge: not run")
    )
    if failure:
        lines.append(f"LLM judge: FAILED, {'its earlier verdicts are shown' if judged else 'no scores'}: {failure}")
    if judged:
        by_method = {row["method"]: row for row in rows}
        lines += [judge_text.format_rows(by_method, by_method), *remarks(rows)]
    if any(row["simulated"] for row in rows):
        lines.append(f"* simulated: the size at {rows[-1]['bits']} bits; the rounded weights are stored in 16 bits")
    for row in rows:
        if row["unanswered"]:
            lines.append(f"{row['method']}: {row['unanswered']} questions could not be answered and are left out")
    return "\n".join(lines)


def _with_interval(value: float | None, interval: Interval | None) -> str:
    return "-" if value is None or interval is None else f"{value:.1f} [{interval[0]:.0f}, {interval[1]:.0f}]"


def job(run: Run) -> None:
    """Make all stages and write the summary."""
    planned = plan(run)
    if run.missing(judgements(run, planned)):
        check_judge(run)  # a judge that cannot start fails now, not after hours
    for model, evaluated in planned.values():
        run.make(evaluated)
        judge.refresh_card(run, model, evaluated)
    failure = None
    if run.config.judge.engine != "none":
        failure = judge.judge_or_error(run, [evaluated for _, evaluated in planned.values()])
        for model, evaluated in planned.values():
            judge.refresh_card(run, model, evaluated)
    for study in studies(run) if failure is None else []:
        run.make(study)
    rows = make_summary(run, planned, failure)
    path = SUMMARY.write(run.folder, rows)
    print(format_rows(rows), flush=True)
    if failure is not None:
        LOG.info(f"compress: rows are in {path}; the same command continues with the judge")
        raise failure
    LOG.info(f"compress: rows are in {path}; python -m jobs.report with the same options writes the report")


if __name__ == "__main__":
    main(__doc__, job)
