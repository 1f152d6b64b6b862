"""Checkpoints with a number of bits per decoder layer, and the quantized layers that measure choices."""

import logging
from collections.abc import Sequence
from pathlib import Path

from actors.quantizers.table import METHODS
from actors.specs import Change
from jobs import quantize, verify
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.reporting import card

LOG = logging.getLogger("jobs.allocation")

QUANTIZER = "actors.quantizers.mixed:MixedQuantizer"


def check(run: Run) -> None:
    """ValueError: the method cannot mix bits, or not for this model, or the layout's package is missing."""
    from actors.quantizers.mixed import packer

    _check_method(run)
    quantize.check(run, _settings(run))
    packer()


def stage(run: Run, model: Stage | Source, data: Stage, bits: Sequence[int]) -> Stage | Source:
    """Return the stage that rounds `model`'s decoder layers to `bits` (one per layer); `model` if all keep 16.

    ValueError: the method cannot give each layer its own bits.
    """
    if set(bits) == {16}:
        return model
    settings, parents = _recipe(run, model, data, bits)
    return Stage("mixed", 2, settings, parents, lambda r, f, facts: _write(r, model, data, bits, settings, f, facts))


def options_stage(run: Run, model: Stage | Source, data: Stage, bits: Sequence[int]) -> Stage:
    """Return the stage that rounds every decoder layer to each of `bits`, a file each."""
    settings, parents = _recipe(run, model, data, bits)
    return Stage("rounded", 1, settings, parents, lambda r, f, facts: _write_options(r, model, data, bits, f, facts))


def _check_method(run: Run) -> None:
    mixing = [name for name, method in METHODS.items() if method.mixes]
    if run.config.quantize.method not in mixing:
        raise ValueError(
            f"quantize.method {run.config.quantize.method} cannot give each layer its own bits: choose "
            f"{' or '.join(mixing)}."
        )


def _recipe(run: Run, model: Stage | Source, data: Stage, bits: Sequence[int]) -> tuple[dict, tuple]:
    _check_method(run)
    wanted = run.config.quantize
    settings = {"method": wanted.method, "bits": list(bits), "group_size": wanted.group_size}
    if METHODS[wanted.method].calibrated:  # AWQ's scales and clipping are those of the layerwise search
        return {**settings, **quantize.calibration_settings(run)}, (model, data)
    return settings, (model,)


def _write(run: Run, model, data, bits: Sequence[int], settings: dict, folder: Path, facts: dict) -> None:
    spec, calibration = run.model_spec(model), quantize.calibration_conversations(run, data)
    with run.workers.worker(QUANTIZER) as worker:
        facts.update(worker.call("quantize", spec, _settings(run), list(bits), calibration, str(folder)))
    facts["gate"] = verify.verify_change(run, folder, model, Change.ROUNDED)
    step = {
        "kind": "quantize",
        "method": settings["method"],
        "settings": settings,
        "bits_per_weight": facts["bits_per_weight"],
        "simulated": False,
        "bits": "mixed",
        "calibration": quantize.calibration_note(run, data, calibration),
    }
    card.finish(run, model, folder, facts, step)
    LOG.info(f"mixed: {facts['bits_per_weight']:.2f} bits a weight, layers at {list(bits)}")


def _write_options(run: Run, model, data, bits: Sequence[int], folder: Path, facts: dict) -> None:
    spec, calibration = run.model_spec(model), quantize.calibration_conversations(run, data)
    with run.workers.worker(QUANTIZER) as worker:
        facts.update(worker.call("options", spec, _settings(run), list(bits), calibration, str(folder)))
    LOG.info(f"rounded: {facts['layers']} layers at {', '.join(map(str, bits))} bits")


def _settings(run: Run):
    from actors.specs import QuantizeSettings

    wanted = run.config.quantize
    return QuantizeSettings(wanted.method, 4, wanted.group_size, wanted.clip, "layerwise")
