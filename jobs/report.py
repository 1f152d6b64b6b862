"""Write the report: tables, figures and sample answers from recorded rows, one HTML file and a Markdown twin.

    python -m jobs.report --config configs/derm-tiny.yaml

Reads the results of jobs.compress with the same options. The page needs no network.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from actors.baseline import REFUSALS
from actors.criteria import CRITERIA
from actors.maths.ranges import OUTLIER
from actors.quantizers.table import METHODS
from cluster.artifacts import write_text
from jobs import ablate, compress, prepare, recover
from jobs.core.command import main
from jobs.core.facts import AblateFacts, EvaluateFacts, RangesFacts, SelectFacts
from jobs.core.run import Run
from jobs.core.stage import Stage
from jobs.core.text import size, takes_more_unpacked, with_interval
from jobs.figures.layers import importance_figure, loss_figure, tradeoff_figure
from jobs.judging.rows import VERDICTS
from jobs.ranking import ranges
from jobs.ranking.rows import AGREEMENT, SCORES
from jobs.reporting import answers as report_answers
from jobs.reporting import judge as report_judge
from jobs.reporting import metrics as report_metrics
from jobs.reporting.pages import render_page
from jobs.reporting.summary import SUMMARY, SummaryRow
from jobs.scoring.rows import ANSWERS

HTML, MARKDOWN = "report.html", "report.md"


def job(run: Run) -> None:
    """Write report.html and report.md into the run folder."""
    planned = compress.plan(run)
    stages = [*(stage for pair in planned.values() for stage in pair), *compress.judgements(run, planned)]
    stages += compress.studies(run)
    open_stages = run.missing(stages)
    if open_stages:
        raise ValueError(
            f"Nothing to report yet: {len(open_stages)} artifacts of this config do not exist in {run.folder} "
            f"(first: {open_stages[0].kind}). Run jobs.compress with the same options."
        )
    rows = compress.make_summary(run, planned)
    SUMMARY.write(run.folder, rows)
    content = _content(run, planned, rows)
    for name, template in ((HTML, "report.html.j2"), (MARKDOWN, "report.md.j2")):
        write_text(run.folder / name, render_page(template, content))
    print(f"report: {run.folder / HTML}", flush=True)


def _content(run: Run, planned: dict, rows: list[SummaryRow]) -> dict:
    removed = tuple(rows[1]["removed_layers"])
    recovered = planned["prune+sft"][0]
    losses = recover.LOSSES.read(run.folder_of(recovered)) if recovered.kind == "recover" else []  # a patch has none
    original = rows[0]
    by_method = {method: ANSWERS.by_sample(run.folder_of(evaluated)) for method, (_, evaluated) in planned.items()}
    judgements = zip(planned, compress.judgements(run, planned), strict=False)  # no judge, no stages
    verdicts = {method: VERDICTS.read(run.folder_of(judgement)) for method, judgement in judgements}
    metrics = {method: run.facts(evaluated, EvaluateFacts)["metrics"] for method, (_, evaluated) in planned.items()}
    return {
        "title": f"{run.folder.name}: what compression cost",
        "model": run.config.model.path,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "rows": [format_row({**row, "given_name": metrics[row["method"]]["given_name"]}, original) for row in rows],
        "first": original,
        "removed": _describe_removal(removed, run.config.prune.width),
        "quantizer": _quantizer(run, next(row for row in rows if row["method"] == "quant")),
        "recovery": recover.describe(run.config.recover),
        "layers": _layers(run, planned["prune"][0], removed),
        "ranges": _ranges(run, ranges.stage(run, run.base_model(), prepare.stage(run))),
        "loss": loss_figure(losses) if losses else None,
        "tradeoff": tradeoff_figure(rows),
        "names": report_metrics.names(metrics),
        "loops": report_metrics.LOOPS,
        "retained": report_metrics.tabulate_retention(rows),
        "samples": report_answers.samples(by_method),
        "viewer": report_answers.viewer(by_method, verdicts),
        "detectable": _detectable(rows),
        "name_tests": ", ".join(f"{r['method']} {r['name_p_holm']:.2g}" for r in rows if r["name_p_holm"] is not None),
        "refusals": REFUSALS,
        "judge": report_judge.describe_verdicts(rows) if verdicts else None,
        "methods": list(planned),
        "profile": run.config.evaluate,
        "options": json.dumps(run.config.model_dump(mode="json", exclude={"data"}), indent=1),
        "command": f"python -m jobs.compress --config {run.folder}/config.report.yaml",
    }


def _describe_removal(removed: Sequence[int], width: float) -> str:
    layers = ", ".join(map(str, removed)) or "none"
    return layers if width == 1 else f"{layers}; share of heads and channels kept: {width:g}"


def _layers(run: Run, pruned: Stage, removed: tuple[int, ...]) -> dict | None:
    """Return what the ablation and the search found; None if the config lists the layers, or removes none."""
    scored = compress.scores_stage(run)
    if scored is None:
        return None
    criterion = run.config.ablate.criterion
    facts: Mapping = run.facts(scored, AblateFacts)
    scores = SCORES.read(run.folder_of(scored))
    others = compress.comparison(run)
    pairs = AGREEMENT.read(run.folder_of(others)) if others else []
    criteria = list(dict.fromkeys(row["criterion"] for row in pairs))
    tau = {(row["criterion"], row["other"]): ablate.format_tau(row["tau"]) for row in pairs}
    depth = pruned.parents[0] if pruned.kind == "narrow" else pruned
    before = depth.parents if isinstance(depth, Stage) else ()
    search_facts = next(
        (run.facts(p, SelectFacts) for p in before if isinstance(p, Stage) and p.kind == "select"), None
    )
    label = CRITERIA[criterion].label
    return {
        **{key: facts[key] for key in ("pairs_apart", "pairs", "outliers", "failed")},
        "scores": sorted(scores, key=lambda row: row["rank"]),
        "figure": importance_figure(scores, removed, label),
        "label": label,
        "criterion": criterion,
        "criteria": criteria,
        "agreement": [
            (first_criterion, [tau[first_criterion, other] for other in criteria]) for first_criterion in criteria
        ],
        "search": search_facts,
        "method": run.config.prune.search,
        "embedder": run.config.ablate.embedder,
        "calibration": scores[0]["samples"] if CRITERIA[criterion].by_sample else None,
    }


def _ranges(run: Run, recorded: Stage) -> dict:
    """Return the recorded activation ranges and the outlier channels."""
    folder, facts = run.folder_of(recorded), run.facts(recorded, RangesFacts)
    return {
        "figure": (folder / ranges.FIGURE).read_text(),
        "outliers": facts["outliers"],
        "largest": facts["largest_outliers"],
        "threshold": OUTLIER,
    }


def format_row(row: Mapping, original: Mapping | None = None) -> dict:
    """Format one row; a difference to the original is unresolved unless interval and p value both show it."""
    unpacked = original is not None and takes_more_unpacked(row, original)
    finding = row["difference_finding"]  # None: the original itself, or nothing to compare
    name = row["name_accuracy_interval"]
    return {
        **row,
        "params_text": _count(row["params"]),
        "bits_text": f"{row['bits']} (simulated)" if row["simulated"] else str(row["bits"]),
        "weights_text": _weights(row),
        "peak_text": size(row["peak_memory_bytes"]) + (" (weights unpacked)" if unpacked else ""),
        "baseline_text": with_interval(row["baseline_pct"], row["baseline_interval_pct"]),
        "name_text": "-" if name is None else with_interval(row["name_accuracy"], name),
        "latency_text": "{:.2f} [{:.2f}, {:.2f}]".format(row["ms_per_token"], *row["ms_per_token_p5_p95"]),
        "unresolved": finding == "unresolved",
        "difference_text": "{:+.1f} [{:+.1f}, {:+.1f}]".format(row["difference_pct"], *row["difference_interval_pct"])
        if finding
        else "",
    }


def _detectable(rows: Sequence[SummaryRow]) -> str:
    """Return the range over models of the detectable difference (points), "" where all answer alike."""
    differences = [row["difference_detectable_pct"] for row in rows if row["difference_detectable_pct"] is not None]
    return f"{min(differences):.1f} to {max(differences):.1f}" if differences else ""


def _quantizer(run: Run, row: SummaryRow) -> str:
    """Tell how the weights were rounded."""
    settings = run.config.quantize
    if settings.method == "none":
        return "none"
    method = METHODS[settings.method]
    groups = f", groups of {settings.group_size}" if method.groups or method.block else ""
    stored = "; simulated: stored in 16 bits" if row["simulated"] else ""
    with_scales = f"{row['bits_per_weight']:.2f} with scales"
    return f"{settings.method}, {settings.bits} bits ({with_scales}){groups}{stored}"


def _count(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.3f} M"


def _weights(row: Mapping) -> str:
    """Write the size of the weights; of simulated ones the nominal size, and the stored one."""
    if row["simulated"]:
        return f"{size(row['nominal_bytes'])} ({size(row['weight_bytes'])} stored)"
    return size(row["weight_bytes"])


if __name__ == "__main__":
    main(__doc__, job)
