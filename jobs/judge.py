"""Score answers with an LLM judge: of an evaluated model, or of anyone's tables.

    python -m jobs.judge --config configs/judge-qwen2.5-32b.yaml --tables '[a.csv, b.parquet, c.jsonl]'
    python -m jobs.judge --config configs/judge-qwen2.5-32b.yaml --agreement ratings.csv
    python -m jobs.judge --config configs/judge-qwen2.5-32b.yaml --serve

A table has the columns question, reference, answer, and optionally sample_id, class, image, group. The verdicts go to
<name>.judged.parquet and <name>.judged.json beside it, and tables with common sample_ids are compared with the first.
Without tables the answers of model.path are judged, as jobs.compress does for its models when judge.engine is set.
--agreement compares the judge with people: a CSV with rating (0-4), sample_id or question, reference and answer, and
rater if there are several. --serve keeps the judge up as an OpenAI-compatible endpoint on this machine.
"""

import asyncio
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from actors.judge.cache import verdict_key
from actors.judge.verdict import TOP_LABEL
from cluster.artifacts import write_text
from cluster.tables import write_table
from jobs import evaluate, prepare
from jobs.core.command import main
from jobs.core.facts import EvaluateFacts, JudgeFacts
from jobs.core.run import Run
from jobs.core.signals import run_async
from jobs.core.stage import Source, Stage
from jobs.judging import agreement
from jobs.judging.answer_tables import AnswerTable, read_answers
from jobs.judging.asking import identity_of
from jobs.judging.rows import VERDICTS, JudgedColumns
from jobs.judging.tables import (
    JudgedTable,
    clusters,
    judged_tables,
    may_be_asked_again,
    remarks,
    summary_columns,
)
from jobs.judging.text import format_rows
from jobs.reporting import card
from jobs.scoring.differences import differences
from jobs.scoring.rows import ANSWERS, AnswerRow

LOG = logging.getLogger("jobs")

SHOWN = 5  # skipped rows of a table that are printed with their reason; the summary has all


def stage(run: Run, evaluated: Stage, judged: JudgedTable | None = None) -> Stage:
    """Return the stage that judges an evaluation's answers; `judged`: its table, if it was judged with others."""
    settings = {
        "verdicts": verdict_key(identity_of(run), "", "", "", 0),
        "controls": run.config.judge.controls,
        "seed": run.config.seed,
    }
    return Stage(
        "judge", 1, settings, (evaluated,), lambda r, folder, facts: build(r, evaluated, judged, folder, facts)
    )


def build(run: Run, evaluated: Stage, judged: JudgedTable | None, folder: Path, facts: dict) -> None:
    """Write one evaluation's verdicts."""
    if judged is None:
        judged = judged_tables(run, {evaluated.name: answers(run, evaluated)})[0][evaluated.name]
    VERDICTS.write(folder, judged.rows)
    facts |= judged.facts
    facts["calibrated"] = agreement.calibration(run, judged.facts["identity"]) is not None


def make_all(run: Run, evaluated: Sequence[Stage]) -> list[Stage]:
    """Judge the evaluations that are not judged yet, in one session; return the stages of all.

    Evaluations that lack verdicts because the judge could not be reached are judged again.
    """
    stages = [stage(run, evaluation) for evaluation in evaluated]
    todo = {
        evaluation.name: evaluation
        for evaluation, judgement in zip(evaluated, stages, strict=True)
        if run.missing([judgement]) or may_be_asked_again(run.facts(judgement, JudgeFacts))
    }
    if todo:
        judged = judged_tables(run, {name: answers(run, evaluation) for name, evaluation in todo.items()})[0]
        for name, evaluation in todo.items():
            judgement = stage(run, evaluation, judged[name])
            run.store.remove(judgement.name)
            run.make(judgement)
    return stages


def judge_or_error(run: Run, evaluated: Sequence[Stage]) -> Exception | None:
    """Judge several evaluations; return the error that ended it, which the job raises after showing its results."""
    try:
        make_all(run, evaluated)
    except (ValueError, RuntimeError, ConnectionError) as error:  # those that a user sees as one sentence
        LOG.warning(f"judge: failed: {error}")
        return error
    return None


def answers(run: Run, evaluated: Stage) -> list[AnswerRow]:
    """Return the answers of an evaluation, which is made if it is missing."""
    return ANSWERS.read(run.make(evaluated))


def row(run: Run, judgement: Stage) -> JudgedColumns:
    """Return the summary columns of an evaluation that is judged."""
    facts = run.facts(judgement, JudgeFacts)
    return summary_columns(facts, agreement.calibration(run, facts["identity"]))


def refresh_card(run: Run, model: Stage | Source, evaluated: Stage) -> None:
    """Write the scores of an evaluation, and the judge's if there are any, into the card of a checkpoint made here."""
    if isinstance(model, Source):
        return
    judgement = stage(run, evaluated) if run.config.judge.engine != "none" else None
    judged = row(run, judgement) if judgement and run.store.find(judgement.name) else None
    card.refresh(run.folder_of(model), run.facts(evaluated, EvaluateFacts), judged)


def labels(run: Run, judgement: Stage) -> dict[str, int | None]:
    """Return the labels of an evaluation that is judged, by sample_id; none where it has no headline."""
    return JudgedTable(VERDICTS.read(run.folder_of(judgement)), run.facts(judgement, JudgeFacts)).labels


def compare_tables(tables: Mapping[str, JudgedTable]) -> tuple[dict[str, dict], str]:
    """Compare all tables with the first, on common sample_ids with the same question and reference; or say why not."""
    if len(tables) < 2:
        return {}, ""
    ids = {name: [row.get("sample_id") for row in table.rows] for name, table in tables.items()}
    for name, ids_of_table in ids.items():
        if None in ids_of_table or len(set(ids_of_table)) < len(ids_of_table):
            return {}, f"not compared: {name} has rows without a sample_id, or with the same one"
    first, *_ = tables.values()
    first_texts = {row["sample_id"]: (row["question"], row["reference"]) for row in first.rows}
    scores = []
    for table in tables.values():
        texts = {row["sample_id"]: (row["question"], row["reference"]) for row in table.rows}
        scores.append({s: label for s, label in table.labels.items() if texts[s] == first_texts.get(s)})
    groups = dict(zip(first_texts, clusters(first.rows)[0], strict=True))
    return dict(zip(tables, differences(scores, groups, TOP_LABEL, "judge_difference"), strict=True)), ""


def judge_files(run: Run, tables: Sequence[AnswerTable], rated: AnswerTable | None) -> None:
    """Judge files (and the answers that people rated), write the verdicts beside the files, and print a summary."""
    rows: dict[str, Sequence[Mapping]] = {table.name: table.rows for table in tables}
    ratings: list[agreement.Rating] = []
    if rated is not None:
        if agreement.has_texts(rated.rows):
            rows[f"ratings {rated.name}"] = rated.rows
        elif not rows:
            rows[run.config.model.path] = answers(run, evaluate.stage(run, run.base_model(), prepare.stage(run)))
        ratings = agreement.resolve_ratings(rated, next(iter(rows.values())))
    judged, verdicts, identity = judged_tables(run, rows)
    if rated is not None:
        measured = agreement.record(run, rated, ratings, verdicts, identity)
        print(f"judge: {agreement.sentence(measured)}", flush=True)
    calibration = agreement.calibration(run, asdict(identity))
    summaries = {name: summary_columns(judged_table.facts, calibration) for name, judged_table in judged.items()}
    differ, reason = compare_tables({table.name: judged[table.name] for table in tables})
    for table in tables:
        judged_table = judged[table.name]
        write_table(table.parquet, judged_table.rows)
        summary = {
            "table": table.name,
            **summaries[table.name],
            **differ.get(table.name, {}),
            "not_compared": reason or None,
        }
        write_text(table.summary, json.dumps({**summary, **judged_table.facts, "skipped": table.skipped}, indent=1))
    print_tables(summaries, [judged_table.facts for judged_table in judged.values()], differ, reason)
    for table in [*tables, *([rated] if rated is not None else [])]:
        for row in table.skipped[:SHOWN]:
            LOG.warning(f"{table.name}: row {row['row']} skipped: {row['reason']}")
        if len(table.skipped) > SHOWN:
            LOG.warning(f"{table.name}: {len(table.skipped)} rows skipped in all")
    for table in tables:
        LOG.info(f"judge: verdicts are in {table.parquet}, the summary is in {table.summary}")


def print_tables(
    rows: Mapping[str, Mapping], facts: Sequence[Mapping], differ: Mapping[str, Mapping], reason: str = ""
) -> None:
    """Print judged tables, with the units of their intervals and all remarks."""
    lines = [format_rows(rows, differ)]
    for name, table_facts in zip(rows, facts, strict=True):
        tally = table_facts["tally"]
        unit = {"group": "series of images", "image": "images", "answer": "answers (no image column: each is a unit)"}
        lines.append(f"{name}: 95 % interval over {tally['clusters']} {unit[tally['unit']]}")
    print("\n".join([*lines, *remarks(list(rows.values())), *([reason] if reason else [])]), flush=True)


def serve(run: Run) -> None:
    """Keep the judge up until the job is interrupted."""

    async def up() -> None:
        from jobs.judging.engine import endpoint

        async with endpoint(run) as url:
            name = run.config.judge.model
            body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
            print(f"judge: {name} answers at {url} until Ctrl-C", flush=True)
            print(f'  curl {url}/chat/completions -H "Content-Type: application/json" -d {shlex.quote(body)}')
            print(f"or jobs.judge --judge.engine openai --judge.url {url} --judge.model {name}", flush=True)
            await asyncio.Event().wait()

    try:
        run_async(up())
    except KeyboardInterrupt:
        LOG.info("judge: stopped")


def job(run: Run) -> None:
    """Do what the options ask for."""
    config = run.config.judge
    if config.engine == "none":
        raise ValueError("judge.engine is none: give --judge.engine transformers, vllm or openai.")
    if config.serve:
        return serve(run)
    rated = agreement.read_ratings(config.agreement) if config.agreement is not None else None
    if config.tables or rated is not None:
        return judge_files(run, check_names([read_answers(path) for path in config.tables]), rated)
    evaluated = evaluate.stage(run, run.base_model(), prepare.stage(run))
    (judgement,) = make_all(run, [evaluated])
    card.refresh(Path(run.config.model.path), run.facts(evaluated, EvaluateFacts), row(run, judgement))
    print_tables({run.config.model.path: row(run, judgement)}, [run.facts(judgement, JudgeFacts)], {}, "")
    LOG.info(f"judge: verdicts are in {run.folder_of(judgement) / VERDICTS}")


def check_names(tables: Sequence[AnswerTable]) -> list[AnswerTable]:
    """Return the tables; ValueError: two share a name or an output file, or one's output would overwrite another."""
    for table in tables:
        for other in tables:
            if table.parquet.resolve() == other.path.resolve():
                raise ValueError(f"judge.tables: the verdicts on {table.path} would overwrite {other.path}: rename it.")
    for number, table in enumerate(tables):
        for other in tables[:number]:
            if table.name == other.name or table.parquet == other.parquet:
                raise ValueError(f"judge.tables: {other.path} and {table.path} need different names.")
    return list(tables)


if __name__ == "__main__":
    main(__doc__, job, {"tables": "judge.tables", "agreement": "judge.agreement", "serve": "judge.serve"})
