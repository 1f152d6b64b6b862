"""The model card of a checkpoint: what it was made from and how, what it scored, and how to make it again."""

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import yaml

from actors.quantizers.table import METHODS
from cluster.artifacts import MANIFEST, digest, write_text
from jobs import prepare
from jobs.config.schema import Config
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.judging.agreement import sentence

CARD = "README.md"
RECORD = "prunella.json"  # of a published copy: its history and the sums of its tensors
TEMPLATES = Path(__file__).parent / "templates"
_ABSOLUTE = re.compile(r"(?:^|(?<=[=\s'\"\[,]))/[^'\",\]]*/([^/'\",\]]+)")
# Left out of a card: what changes no checkpoint, and `data`, whose classes, questions and answers are private.
_ELSEWHERE = {"run_dir", "replicas", "evaluate", "judge", "profile", "estimate", "publish", "data"}
_DONE = {
    **{"prune": "pruned", "narrow": "narrowed", "recover": "fine-tuned", "patch": "patched"},
    **{"quantize": "quantized", "export": "exported"},
}


def record(folder: Path) -> dict:
    """Return the record of how a checkpoint was made: its manifest, or a published copy's prunella.json; or {}."""
    for name in (MANIFEST, RECORD):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text())
    return {}


def finish(run: Run, model: Stage | Source, folder: Path, facts: dict, step: dict) -> None:
    """Record in `facts` how the checkpoint in `folder` was made from `model`, by `step`, and write its card.

    Every step has the command, the options and the versions that made it.
    """
    history = _history(run, model)
    if step["kind"] == "prune":
        step = {**step, "removed": original_layers(history, step["removed"], step["left"])}
    origin = {
        "command": run.command or command(),
        "options": options(run.config),
        "versions": {name: version(name) for name in ("prunella", "transformers", "torch")},
    }
    facts["history"] = [*history, {**step, "made": origin}]
    write(folder, facts)


def refresh(folder: Path, evaluation: Mapping, judged: Mapping | None = None) -> None:
    """Write the scores of an evaluation into the card of a checkpoint that Prunella made; leave others alone.

    judged: the columns of jobs.judge.row, if a judge scored the answers.
    """
    if "gate" in (manifest := record(folder)):
        write(folder, manifest, evaluation, judged)


def original_layers(history: Sequence[dict], removed: Sequence[int], left: int) -> list[int]:
    """Return `removed` in the numbering of the original model, from which `history` may have removed others."""
    gone = {layer for step in history if step["kind"] == "prune" for layer in step["removed"]}
    present = [layer for layer in range(len(gone) + len(removed) + left) if layer not in gone]
    return [present[layer] for layer in removed]


def kept_layers(run: Run, model: Stage | Source, teacher: Source) -> list[int]:
    """Return the teacher's layers that `model` still has, zero-based; ValueError: their records do not tell."""
    (ours, whole), (theirs, before) = _original_layers(run, model), _original_layers(run, teacher)
    if whole != before or not set(ours) <= set(theirs):
        raise ValueError(
            f"Nothing records which layers of {teacher.path!r} are left in {run.make(model)!r}: give the checkpoint "
            "from which Prunella pruned it as recover.teacher."
        )
    return [theirs.index(layer) for layer in ours]


def _original_layers(run: Run, model: Stage | Source) -> tuple[list[int], int]:
    """Return (the layers that are left in the numbering of the model that was pruned first, how many that had)."""
    from actors.checkpoint.config import read_config

    revision = model.revision if isinstance(model, Source) else None
    config = read_config(run.make(model), revision, run.config.model.trust_remote_code)
    removed = {layer for step in read_history(run, model) if step["kind"] == "prune" for layer in step["removed"]}
    whole = config.text_config.num_hidden_layers + len(removed)
    return [layer for layer in range(whole) if layer not in removed], whole


def read_history(run: Run, model: Stage | Source) -> list[dict]:
    """Return the steps that a checkpoint's record has; [] if it has none."""
    return record(Path(run.make(model))).get("history", [])


def steps_since(run: Run, model: Stage | Source, teacher: Source) -> list[dict]:
    """Return what was done to `model` after the teacher was made."""
    return [step for step in read_history(run, model)[len(read_history(run, teacher)) :] if step["kind"] != "source"]


def conversations_digest(folder: str, ids: Sequence[str]) -> str:
    """Return the digest of training conversations: each image's SHA-256, its question and its answer, in order."""
    rows = {row["sample_id"]: row for row in prepare.conversations(folder, "train")}
    return digest([[rows[i][key] for key in ("sha256", "question", "reference")] for i in ids])


def source_of(run: Run, model: Stage | Source) -> dict:
    """Return what is known of the model that a checkpoint was first made from: {name, base, licence, ...}."""
    return _history(run, model)[0]


def _history(run: Run, model: Stage | Source) -> list[dict]:
    folder = Path(run.make(model))
    if history := read_history(run, model):
        return history
    if not folder.is_dir():  # a hub id
        revision = model.revision if isinstance(model, Source) else None
        return [{"kind": "source", "name": str(folder), "revision": revision, "base": str(folder), "licence": None}]
    text = (folder / CARD).read_text(errors="replace") if (folder / CARD).is_file() else ""
    front, title = _front_matter(text), re.search(r"^# (.+)", text, re.MULTILINE)
    return [
        {
            "kind": "source",
            "name": title[1] if title else folder.name,
            "revision": None,
            "base": front.get("base_model"),
            "licence": front.get("license"),
        }
    ]


def _front_matter(card: str) -> dict:
    """Return the YAML between the dashes at the head of a card, {} if there is none."""
    match = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        values = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def command() -> str:
    """Return the command of this process; absolute paths keep only their last part, for the card is made public."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    words = [_ABSOLUTE.sub(r"/.../\1", word) for word in sys.argv[1:]]
    return shlex.join(["python", "-m", spec.name if spec else Path(sys.argv[0]).stem, *words])


def options(config: Config) -> dict:
    """Return the options behind a checkpoint that differ from the defaults, from the file or the command.

    Like the command they are made public: absolute paths keep only their last part.
    """
    return _public(config.model_dump(mode="json", exclude_defaults=True, exclude=_ELSEWHERE))


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return f"/.../{Path(value).name}" if isinstance(value, str) and Path(value).is_absolute() else value


def _describe_history(steps: Sequence[dict]) -> list[dict]:
    """Return how the steps were made, grouped by command; numbers count from 1."""
    sentences = []
    for origin, group in groupby(enumerate(steps, 1), key=lambda numbered: numbered[1].get("made")):
        numbers = [number for number, _ in group]
        text = yaml.safe_dump(origin["options"], sort_keys=False, allow_unicode=True, width=100) if origin else None
        sentences.append({**(origin or {"command": None}), "numbers": numbers, "options": text})
    return sentences


def _describe_judge(row: Mapping) -> dict:
    """Return what the card says of a judge; of a local one only the folder's name."""
    columns = {"pct": "pct", "interval": "interval_pct", "bounds": "bounds_pct", "scored": "scored", "total": "total"}
    return {
        "name": _ABSOLUTE.sub(r"\1", row["judge"]),
        "agreement": sentence(row["judge_agreement"]),
        "flagged": row["judge_flagged"],
        **{name: row[f"judge_{column}"] for name, column in columns.items()},
    }


def write(folder: Path, facts: dict, evaluation: Mapping | None = None, judged: Mapping | None = None) -> None:
    """Write the card into a checkpoint's folder, atomically; `facts` are those of its manifest."""
    source, *steps = facts["history"]
    quantized = next((step for step in steps if step["kind"] == "quantize"), None)
    exported = next((step for step in steps if step["kind"] == "export"), None)
    tags = ["prunella", "llava", *dict.fromkeys(_DONE[step["kind"]] for step in steps)]
    front = {
        "license": source["licence"] or "unknown",
        **({"base_model": source["base"]} if source["base"] else {}),
        "library_name": exported["format"] if exported else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": [*tags, quantized["method"], f"{quantized['bits']}-bit"] if quantized else tags,
    }
    content = {
        "front": yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "title": f"{source['name']}, {', '.join(dict.fromkeys(_DONE[step['kind']] for step in steps))}",
        "source": source,
        "steps": steps,
        "quantized": quantized,
        "exported": exported,
        "own_reader": quantized and (method := METHODS.get(quantized["method"])) and method.layout.reader,
        "origins": _describe_history(steps),
        "facts": facts,
        "judged": judged and _describe_judge(judged),
        "metrics": evaluation and evaluation["metrics"],
        "profile": evaluation and evaluation["profile"],
    }
    environment = jinja2.Environment(  # Markdown, not HTML
        loader=jinja2.FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    write_text(folder / CARD, environment.get_template("card.md.j2").render(content) + "\n")
