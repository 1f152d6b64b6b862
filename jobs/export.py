"""Write a checkpoint in the format of another program, and compare that program's answers with transformers'.

    python -m jobs.export --config configs/derm-tiny.yaml
    python -m jobs.export --config configs/derm-tiny.yaml --model.path runs/derm-tiny/artifacts/recover-... \\
        --export.type F16
    python -m jobs.export --model.path you/your-llava --export.type Q8_0

gguf: two files for llama.cpp, the language model with tokenizer and chat template (model-Q4_0.gguf) and the vision
tower with the projector (mmproj-F16.gguf), beside the model card and, of a local folder, its licence files.
docs/deploy.md says how to run them. Pruned, narrowed and recovered checkpoints are exported as they are, and those in
AWQ's layout; of other rounded ones export the checkpoint before rounding.

The check runs where the package xllamacpp is installed: a fresh process loads both files and answers test questions. A
file of 16 or 8 bits is refused if the first token's log-probabilities are too far from transformers'; of fewer bits the
similarity is recorded.
"""

import importlib.util
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

from actors.export.formats import FORMATS
from actors.specs import ExportSettings, GateError, Sample
from jobs import prepare, profile, verify
from jobs.core.command import main
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.reporting import card

LOG = logging.getLogger("jobs")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def stage(run: Run, model: Stage | Source) -> Stage:
    """Return the stage that exports `model`."""
    chosen = run.config.export
    settings: dict = {"format": chosen.format, "type": chosen.type, "class_token": chosen.class_token, "check": None}
    parents: tuple[Stage | Source, ...] = (model,)
    if importlib.util.find_spec(FORMATS[chosen.format].package):
        settings["check"] = {"questions": chosen.questions, "tokens": chosen.tokens}
        parents += (prepare.stage(run),) if run.config.data.root or run.config.data.classes else ()
    return Stage("export", 2, settings, parents, lambda r, folder, facts: build(r, model, folder, facts))


def build(run: Run, model: Stage | Source, folder: Path, facts: dict) -> None:
    """Write the files, check them, and add card and licence. Refused: llama.cpp answers something else."""
    chosen, spec = run.config.export, run.model_spec(model)
    settings, form = ExportSettings(chosen.format, chosen.type, chosen.class_token), FORMATS[chosen.format]
    if importlib.util.find_spec(form.writer) is None:
        raise ValueError(
            f"The package {form.writer}, which writes {settings.format} files, is missing: {form.install}."
        )
    source = card.source_of(run, model)
    installed = importlib.util.find_spec(form.package) is not None
    with run.workers.worker(form.worker) as worker:
        facts.update(worker.call("write", spec, settings, source["name"], source["licence"], str(folder)))
        found = {}
        if installed:
            try:
                found = worker.call("check", spec, settings, questions(run), chosen.tokens, str(folder))
            except GateError as error:
                raise verify.Refused(f"The export of {spec.path!r} is refused: {error}") from error
    facts["checked"] = _words(found) if found else f"not run ({form.package} is not installed: {form.install})"
    facts.update(found)
    for pattern in LICENCES if Path(spec.path).is_dir() else ():
        for file in Path(spec.path).glob(pattern):
            shutil.copyfile(file, folder / file.name)
    facts["gate"] = {"llama.cpp": facts["checked"]}
    card.finish(run, model, folder, facts, {"kind": "export", **asdict(settings), "files": facts["sizes"]})
    LOG.info(f"export: {', '.join(facts['sizes'])}; check: {facts['checked']}")


def questions(run: Run) -> list[Sample]:
    """Return the questions of the check, spread over the test split."""
    samples = profile.samples(run)
    count = min(run.config.export.questions, len(samples))
    return [samples[number * len(samples) // count] for number in range(count)]


def _words(found: dict) -> str:
    agreement, plain = found["agreement"], found["plain_agreement"]
    text = (
        f"{agreement['same_answers']:.0%} of {agreement['questions']} answers are transformers', token for token, "
        f"{agreement['same_tokens']:.0%} of the tokens before the first that differs; first token "
        f"{_nats(agreement)}"
    )
    if plain != agreement:
        text += (
            f" (transformers with the image features in llama.cpp's order; as it is: {plain['same_answers']:.0%}, "
            f"{plain['same_tokens']:.0%}, {_nats(plain)})"
        )
    return text


def _nats(found: dict) -> str:
    nats = found["first_token_nats"]
    return "not compared" if nats is None else f"within {nats:.2g} nats"


def job(run: Run) -> None:
    """Export the config's model."""
    print(f"export: the files are in {run.make(stage(run, run.base_model()))}", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
