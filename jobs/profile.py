"""Compare the memory and latency of checkpoints on this hardware, and test which fit into a given memory.

    python -m jobs.profile --config configs/derm-tiny.yaml
    python -m jobs.profile --config configs/llava-1.5-7b-dermnet.yaml --evaluate.decode static \\
        --profile.models '[llava-hf/llava-1.5-7b-hf, RUN_DIR/artifacts/quantize-...]' --cap-gib 6

The checkpoints take turns: every round runs each in a fresh process that has the device to itself. Processes that
stayed alive would share the GPU's memory, so that none could be measured alone. The rows go to run_dir/profile.json.
"""

import json
import logging
import os
from collections.abc import Sequence

from actors.maths.latency import merge_rounds
from actors.specs import Sample
from cluster.artifacts import write_text
from jobs import evaluate, prepare
from jobs.core.command import main
from jobs.core.run import Run
from jobs.core.stage import Source
from jobs.core.text import GIB, align, takes_more_unpacked

LOG = logging.getLogger("jobs")

ROWS = "profile.json"


def sources(run: Run) -> list[Source]:
    """Return the checkpoints to compare; ValueError: one does not exist."""
    models = run.config.profile.models
    return [run.source(path, "profile.models") for path in models] or [run.base_model()]


def samples(run: Run) -> list[Sample]:
    """Return the test questions; without data, one about a probe image, which is drawn into the run folder."""
    data = run.config.data
    if data.root or data.classes:
        return evaluate.questions(evaluate.test_rows(run, prepare.stage(run)))
    from actors.images import QUESTION, probe_image

    path = run.folder / "probe.png"
    probe_image().save(path)
    return [Sample("probe", str(path), QUESTION)]


def turns(models: Sequence[Source], rounds: int) -> list[int]:
    """Return the order of the measurements: every model's number once per round."""
    return [number for _ in range(rounds) for number in range(len(models))]


def compare_models(run: Run, models: Sequence[Source], sample: Sample) -> list[dict]:
    """Return one row per model: memory and times of the same question, over all rounds."""
    config = run.config
    rounds_of: list[list[dict]] = [[] for _ in models]
    runs = -(-config.evaluate.timed_runs // config.profile.rounds)
    for number in turns(models, config.profile.rounds):
        with run.workers.replicas(run.model_spec(models[number])) as pool:
            rounds_of[number].append(evaluate.measure_round(pool, sample, config.evaluate, runs))
        measured = merge_rounds(rounds_of[number][-1:])
        LOG.info(
            f"profile: round {len(rounds_of[number])} of {config.profile.rounds}, {models[number].path}: "
            f"{measured['ms_per_token']:.2f} ms/token"
        )
    return [{"checkpoint": model.path, **merge_rounds(rounds)} for model, rounds in zip(models, rounds_of, strict=True)]


def run_capped(run: Run, model: Source, questions: Sequence[Sample], cap_gib: float) -> dict:
    """Return whether the questions are answered within the cap (see `actors.capped`)."""
    spec = run.model_spec(model, run.config.replicas.gpus)
    with run.workers.worker("actors.capped:Capped") as worker:
        return worker.call("answers", spec, questions, run.config.generation.max_new_tokens, int(cap_gib * GIB))


def format_rows(rows: Sequence[dict]) -> str:
    """Lay the rows out for a terminal, like the paper's Table 4; memory is the peak of the runs."""
    first = rows[0]
    kinds = list(first["steady_peak_bytes"])
    lines = [["checkpoint", "params B", "bits", "weights", "ms/token", "p5-p95", "first token ms"]]
    lines[0] += ["processor ms", "image ms", "prefill ms", "before", "loading", *kinds]
    for row in rows:
        low, high = row["ms_per_token_p5_p95"]
        mark = "*" if takes_more_unpacked(row, first) else ""
        lines.append(
            [
                os.path.basename(row["checkpoint"].rstrip("/")),
                f"{row['params'] / 1e9:.4f}",
                str(row["bits"]),
                _size(row["weight_bytes"]),
                f"{row['ms_per_token']:.2f}",
                f"{low:.2f}-{high:.2f}",
                *(f"{row[key]:.1f}" for key in ("first_token_ms", "preprocess_ms", "encode_ms", "prefill_ms")),
                *(_size(row[when][kinds[-1]]) for when in ("baseline_bytes", "load_peak_bytes")),
                *(_size(row["steady_peak_bytes"][kind]) + mark for kind in kinds),
            ]
        )
    text = align(lines)
    before = "context, and other processes if any" if "driver" in kinds else "interpreter and libraries"
    text += [
        f"Memory: {kinds[-1]} before loading ({before}), peak while loading; then peaks of the runs.",
        f"{first['device']}, {first['threads']} thread(s), {first['decode']} decoding, {first['timed_tokens']} tokens, "
        f"batch 1; medians of {first['timed_runs']} runs in {first['rounds']} process(es) each, in turn.",
    ]
    if any(takes_more_unpacked(row, first) for row in rows):
        text.append("* smaller weights, but more memory than the first: they are unpacked while the model computes.")
    if not all(row["peak_restarted"] for row in rows):
        text.append("This system cannot reset the peak of resident memory: the runs' peaks include loading.")
    return "\n".join(text)


def verdict(row: dict) -> str:
    """Say in one line whether a checkpoint fits under the cap."""
    cap = row["cap"]
    before = "" if cap["baseline_bytes"] is None else f", {_size(cap['baseline_bytes'])} before loading"
    end = "" if cap["fits"] else f", ended while {cap['stage']}"
    return (
        f"{row['checkpoint']}: {'fits' if cap['fits'] else 'does not fit'} in {_size(cap['cap_bytes'])} "
        f"(peak {_size(cap['peak_bytes'])}{before}; {cap['answers']} questions answered{end})"
    )


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def job(run: Run) -> None:
    """Measure, try the cap, print the table."""
    config = run.config
    cap = config.profile.cap_gib
    if cap is not None and config.replicas.gpus not in (0, 1):
        raise ValueError(f"profile.cap_gib caps one whole GPU, or the CPU: replicas.gpus is {config.replicas.gpus:g}.")
    models = sources(run)
    questions = samples(run)
    rows = compare_models(run, models, questions[0])
    write_text(run.folder / ROWS, json.dumps(rows, indent=1))
    print(format_rows(rows), flush=True)
    if cap is not None:
        for row, model in zip(rows, models, strict=True):
            row["cap"] = run_capped(run, model, questions, cap)
            write_text(run.folder / ROWS, json.dumps(rows, indent=1))
            print(verdict(row), flush=True)
    LOG.info(f"profile: rows are in {run.folder / ROWS}")


if __name__ == "__main__":
    main(__doc__, job, {"cap-gib": "profile.cap_gib"})
