"""Remove decoder layers, by the ablation's scores or by a list; then heads and channels of those that are left.

    python -m jobs.prune --config configs/derm-tiny.yaml --prune.layers 2
    python -m jobs.prune --config configs/llava-1.5-7b-dermnet.yaml --prune.layers 7 \\
        --prune.order '[23, 4, 18, 22, 21, 24, 17, 27, 20, 26, 19, 29, 28, 5]'     # the authors' published order

    python -m jobs.prune --config configs/derm-tiny.yaml --prune.search greedy
    python -m jobs.prune --config configs/derm-tiny.yaml --prune.layers 0 --prune.width 0.75    # width alone

The checkpoint has renumbered layers and a corrected config: plain transformers loads it. All layers keep the same
number of heads and channels.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from actors.specs import Change
from jobs import ablate, prepare, verify
from jobs.core.command import main
from jobs.core.facts import PruneFacts, SelectFacts
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.ranking import select
from jobs.reporting import card

LOG = logging.getLogger("jobs")


def stage(run: Run, model: Stage | Source) -> Stage | Source:
    """Return the stage that prunes `model`, depth first, then width; `model` itself, if there is nothing to remove.

    ValueError: more layers than the model has or may lose, as far as the config and its config.json tell.
    """
    if run.config.prune.layers:
        model = _stage(run, model)
        if run.missing([model]):
            _check(run)
    if run.config.prune.width == 1:
        return model
    narrow = narrow_stage(run, model)
    if run.missing([narrow]):
        _check_width(run)
    return narrow


def removed_layers(run: Run, model: Stage | Source) -> list[int]:
    """Return the layers that the depth pruning of `model`, a result of `stage`, removed, zero-based."""
    if isinstance(model, Source):
        return []
    return removed_layers(run, model.parents[0]) if model.kind == "narrow" else run.facts(model, PruneFacts)["removed"]


def narrow_stage(run: Run, model: Stage | Source) -> Stage:
    """Return the stage that removes heads and channels of every layer of `model`."""
    prune, data = run.config.prune, prepare.stage(run)
    settings = {
        "width": prune.width,
        "multiple": run.config.quantize.group_size,
        "criterion": prune.width_criterion,
        "samples": prune.width_samples,
        "seed": run.config.seed,
        "dtype": run.config.model.dtype,
    }
    return Stage("narrow", 1, settings, (model, data), lambda r, f, facts: narrow(r, model, data, f, facts))


def narrow(run: Run, model: Stage | Source, data: Stage, folder: Path, facts: dict) -> None:
    """Score heads and channels, and write the checkpoint with the most important ones."""
    prune = run.config.prune
    conversations = prepare.draw_conversations(run.make(data), prune.width_samples, run.config.seed)
    options = (prune.width, run.config.quantize.group_size, prune.width_criterion, run.config.seed)
    with run.workers.worker("actors.narrowing.narrower:Narrower", spec=run.model_spec(model)) as worker:
        facts.update(worker.call("narrow", conversations, *options, str(folder)))
    facts["gate"] = verify.verify_change(run, folder, model, Change.NARROWED)
    step = {
        "kind": "narrow",
        "width": prune.width,
        "criterion": prune.width_criterion,
        **{name: facts[name] for name in ("head_groups", "channels", "compensated")},
        "conversations": len(conversations),
        "digest": card.conversations_digest(run.make(data), [c.id for c in conversations]),
    }
    card.finish(run, model, folder, facts, step)
    LOG.info(f"prune: every layer keeps {facts['head_groups']} head groups and {facts['channels']} channels")


def _check_width(run: Run) -> None:
    """Check by the base model's config.json that its layers can be narrowed so far."""
    from actors.checkpoint.config import check_llava
    from actors.narrowing.groups import layer_shape
    from actors.narrowing.narrower import narrow_config

    config = check_llava(run.base_config())
    layer_shape(config.text_config)
    narrow_config(config, run.config.prune.width, run.config.quantize.group_size)


def _check(run: Run) -> None:
    """Check the layers against the base model's config.json, before hours of ablation."""
    from actors.checkpoint.config import check_llava

    prune, layers = run.config.prune, check_llava(run.base_config()).text_config.num_hidden_layers
    for layer in prune.order or []:
        if not 0 <= layer < layers:
            raise ValueError(f"prune.order names layer {layer}: the model has layers 0 to {layers - 1}.")
    most = layers - 1 if prune.order else min(layers - 1, len(ablate.candidate_layers(run.config.ablate, layers, [])))
    if prune.layers > most:
        raise ValueError(
            f"prune.layers is {prune.layers}, but only {most} of {layers} layers may be removed "
            f"(ablate.candidates: {run.config.ablate.candidates})."
        )


def _stage(run: Run, model: Stage | Source) -> Stage:
    prune = run.config.prune
    settings: dict
    parents: tuple
    choose: Callable[[Run], Sequence[int]]
    if prune.order is not None:
        if len(prune.order) < prune.layers:
            raise ValueError(f"prune.layers is {prune.layers} but prune.order names {len(prune.order)} layers.")
        removed = sorted(prune.order[: prune.layers])
        settings, parents, choose = {"removed": removed}, (model,), lambda run: removed
    else:
        data = prepare.stage(run)
        scores = ablate.stage(run, model, data)
        if prune.search == "one_shot":
            settings, parents = {"layers": prune.layers}, (model, scores)
            choose = lambda run: select.one_shot(run, scores)  # noqa: E731
        else:
            search = select.stage(run, model, data, scores)
            settings, parents, choose = {}, (model, search), lambda run: run.facts(search, SelectFacts)["removed"]
    return Stage("prune", 3, settings, parents, lambda r, f, facts: _write(r, model, choose(r), f, facts))


def _write(run: Run, model: Stage | Source, removed: Sequence[int], folder: Path, facts: dict) -> None:
    spec = run.model_spec(model)
    with run.workers.worker("actors.checkpoint.pruning:Surgeon") as worker:
        facts.update(worker.call("prune", spec.path, str(folder), list(removed), spec.revision))
    facts["gate"] = verify.verify_change(run, folder, model, Change.PRUNED, facts["removed"])
    step = {"kind": "prune", "removed": facts["removed"], "left": facts["layers"], "chosen": _describe_choice(run)}
    card.finish(run, model, folder, facts, step)
    LOG.info(f"prune: removed layers {facts['removed']}, {facts['layers']} are left")


def _describe_choice(run: Run) -> str:
    prune, criterion = run.config.prune, run.config.ablate.criterion
    if prune.order is not None:
        return "a given list"
    return f"{criterion}, layer by layer" if prune.search == "one_shot" else f"{prune.search} search by {criterion}"


def job(run: Run) -> None:
    """Prune the config's model."""
    if run.config.prune.layers == 0 and run.config.prune.width == 1:
        raise ValueError("prune.layers is 0 and prune.width 1: nothing to remove.")
    print(f"prune: the checkpoint is {run.make(stage(run, run.base_model()))}", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
