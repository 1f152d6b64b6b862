"""Round a model's language layers, by the method that --quantize.method names (listed below).

    python -m jobs.quantize --config configs/derm-tiny.yaml --quantize.method nf4
    python -m jobs.quantize --config configs/derm-tiny.yaml --model.path runs/derm-tiny/artifacts/recover-...

The vision tower, the projector, the embeddings and the head keep 16 bits. Bits that a method's layout does not pack
are simulated: the weights are rounded, but stored in 16 bits (config.json and the manifest say so).
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from actors.quantizers.table import find_method
from actors.specs import Change, Conversation, QuantizeSettings
from jobs import prepare, verify
from jobs.core.command import main
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.reporting import card

if TYPE_CHECKING:
    from cluster.pool import Pool

LOG = logging.getLogger("jobs")

QUANTIZER = "actors.quantizers.quantizer:Quantizer"


def stage(run: Run, model: Stage | Source, data: Stage) -> Stage | Source:
    """Return the stage that quantizes `model` (`model` itself for method none); calibrated methods depend on the data.

    ValueError: the method cannot do this, as far as the config and the base model's config.json tell.
    """
    quantize = run.config.quantize
    if quantize.method == "none":
        return model
    chosen, method = chosen_settings(run), find_method(quantize.method)
    settings: dict = {"method": quantize.method}
    parents: tuple = (model,)
    if method.groups:
        settings |= {"bits": quantize.bits, "group_size": quantize.group_size}
    if method.calibrated:
        parents = (model, data)
        settings |= {"awq_search": quantize.awq_search, **calibration_settings(run)}
    quantized = Stage(
        "quantize",
        3,
        settings,
        parents,
        lambda r, folder, facts: build(r, model, data, settings, folder, facts),
        resume=settings.get("awq_search") == "layerwise",
    )
    if run.missing([quantized]):
        check(run, chosen)
    return quantized


def calibration_settings(run: Run) -> dict:
    """Return the settings that decide a calibrated method's result, besides bits and groups."""
    quantize = run.config.quantize
    return {
        "calibration_samples": quantize.calibration_samples,
        "calibration_images": quantize.calibration_images,
        "clip": quantize.clip,
        "dtype": run.config.model.dtype,
        "seed": run.config.seed,
    }


def calibration_conversations(run: Run, data: Stage) -> list[Conversation]:
    """Draw the calibration conversations from the training split; none for methods that are not calibrated."""
    quantize = run.config.quantize
    if not find_method(quantize.method).calibrated:
        return []
    drawn = prepare.draw_conversations(run.make(data), quantize.calibration_samples, run.config.seed)
    return drawn if quantize.calibration_images else [replace(each, image=None) for each in drawn]


def calibration_note(run: Run, data: Stage, calibration: Sequence[Conversation]) -> dict | None:
    """Return the model card's entry on the calibration; None without calibration."""
    if not calibration:
        return None
    ids = [c.id for c in calibration]
    return {"conversations": len(ids), "digest": card.conversations_digest(run.make(data), ids)}


def chosen_settings(run: Run) -> QuantizeSettings:
    """Return the settings for the worker; ValueError: bits or a group size that the method does not have."""
    q = run.config.quantize
    return QuantizeSettings(q.method, q.bits, q.group_size, q.clip, q.awq_search)


def check(run: Run, settings: QuantizeSettings) -> None:
    """Check the settings against the base model's config.json, before hours of other stages."""
    from actors.quantizers.structure import check_quantizable

    check_quantizable(run.base_config(), settings)


def build(run: Run, model: Stage | Source, data: Stage, settings: dict, folder: Path, facts: dict) -> None:
    """Quantize, in one worker unless several can share AWQ's search; `settings` are the stage's."""
    quantize = run.config.quantize
    calibration = calibration_conversations(run, data)
    spec = run.model_spec(model)
    shared = quantize.method == "awq" and quantize.awq_search == "layerwise"
    count = run.workers.count_workers() if shared else 1
    with run.workers.worker(QUANTIZER, count) as workers:
        if count > 1:
            facts.update(quantize_in_shares(workers, count, spec, chosen_settings(run), calibration, folder))
        else:
            facts.update(workers.call("quantize", spec, chosen_settings(run), calibration, str(folder)))
    facts["gate"] = verify.verify_change(run, folder, model, Change.ROUNDED)
    step = {
        "kind": "quantize",
        "method": quantize.method,
        "settings": settings,
        **{key: facts[key] for key in ("bits_per_weight", "simulated")},
        "bits": quantize.bits,
        "calibration": calibration_note(run, data, calibration),
    }
    card.finish(run, model, folder, facts, step)
    simulated = " (simulated: stored in 16 bits)" if facts["simulated"] else ""
    LOG.info(
        f"quantize: {facts['linears']} linears at {facts['bits_per_weight']:.2f} bits a weight by "
        f"{quantize.method}{simulated}",
    )


def quantize_in_shares(
    workers: "Pool", count: int, spec, settings: QuantizeSettings, calibration, folder: Path
) -> dict:
    """Quantize with AWQ's search divided among `count` workers by layers; returns what one worker would.

    Every finished layer is a file in `folder`/searched: a worker that replaces a dead one, or a job that continues,
    finds it there. RuntimeError: a worker's share failed three times.
    """
    searched = folder / "searched"
    searched.mkdir(exist_ok=True)
    shares = [(part, (spec, settings, calibration, part, count, str(searched))) for part in range(count)]
    facts_found: dict = {}
    for outcome in workers.map("search", shares):
        if outcome.error:
            raise RuntimeError(f"AWQ's search failed {outcome.attempts} times: {outcome.error}")
        facts_found = outcome.value
    facts_found |= workers.call("finish", spec, settings, str(searched), str(folder))
    shutil.rmtree(searched)
    return facts_found


def job(run: Run) -> None:
    """Quantize the config's model."""
    print(f"quantize: the checkpoint is {run.make(stage(run, run.base_model(), prepare.stage(run)))}", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
