"""Loading a checkpoint in its stored type to change its weights, and writing the result."""

from pathlib import Path

from actors.checkpoint.loading import load_model
from actors.checkpoint.tensors import copy_companions, local_folder, publish_names, stored_dtype
from actors.probe import probe_logits, write_probe
from actors.specs import Llava, ModelSpec


def load_stored(spec: ModelSpec) -> Llava:
    """Return the checkpoint's model on the CPU, its weights in the type in which they are stored."""
    return load_model(**{**spec.loading, "dtype": _stored_name(spec)}, device="cpu")


def write_changed(model: Llava, processor, spec: ModelSpec, out: Path) -> None:
    """Write a model that was made from the checkpoint `spec` to `out`: in its type, with its companions and a probe."""
    copy_companions(local_folder(spec.path, spec.revision), out)
    model.to(stored_dtype(spec.path, spec.revision)).save_pretrained(out)
    publish_names(out)
    write_probe(out, probe_logits(model, processor), _stored_name(spec))


def _stored_name(spec: ModelSpec) -> str:
    return str(stored_dtype(spec.path, spec.revision)).removeprefix("torch.")
