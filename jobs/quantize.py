"""Round a model's language layers to 4 bits: AWQ, bitsandbytes NF4, or round to nearest; group 64.

    python -m jobs.quantize --config configs/derm-tiny.yaml --quantize.method nf4
    python -m jobs.quantize --config configs/derm-tiny.yaml --model.path runs/derm-tiny/artifacts/recover-...

The vision tower, the projector, the embeddings and the head keep 16 bits.
"""

from pathlib import Path

import numpy as np

from actors.specs import QuantizeSettings
from jobs import prepare
from jobs.command import main
from jobs.recover import training_conversations
from jobs.run import Run, Source, Stage


def stage(run: Run, model: Stage | Source, data: Stage) -> Stage:
    """Return the stage that quantizes `model`; only AWQ looks at the data (training split)."""
    quantize = run.config.quantize
    settings: dict = {"method": quantize.method, "bits": quantize.bits, "group_size": quantize.group_size}
    parents: tuple = (model,)
    if quantize.method == "awq":
        parents = (model, data)
        settings |= {
            "calibration_samples": quantize.calibration_samples,
            "clip": quantize.clip,
            "dtype": run.config.model.dtype,
            "seed": run.config.seed,
        }
    return Stage("quantize", 1, settings, parents, lambda r, folder, facts: build(r, model, data, folder, facts))


def build(run: Run, model: Stage | Source, data: Stage, folder: Path, facts: dict) -> None:
    """Quantize in one worker."""
    quantize = run.config.quantize
    calibration = []
    if quantize.method == "awq":
        calibration = training_conversations(run.make(data))
        picks = np.random.default_rng(run.config.seed).permutation(len(calibration))[: quantize.calibration_samples]
        calibration = [calibration[i] for i in picks]
    settings = QuantizeSettings(quantize.method, quantize.bits, quantize.group_size, quantize.clip)
    spec = run.model_spec(model)
    with run.worker("actors.quantizers.quantizer:Quantizer") as worker:
        facts.update(worker.call("quantize", spec, settings, calibration, str(folder)))
    print(f"quantize: {facts['linears']} linears at {quantize.bits} bits by {quantize.method}", flush=True)


def job(run: Run) -> None:
    """Quantize the config's model."""
    print(f"quantize: the checkpoint is {run.make(stage(run, run.base_model(), prepare.stage(run)))}", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
