"""The probe: a drawn image and a question, whose next-token logits [V] tell whether two models are the same."""

from pathlib import Path

import numpy as np
import torch

from actors.checkpoint.loading import language_model, pixel_dtype
from actors.images import QUESTION, probe_image

PROBE = "probe.npy"


def probe_inputs(processor) -> dict[str, torch.Tensor]:
    """Return the probe as the processor's tensors."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=probe_image(), text=text, return_tensors="pt")
    return {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}


@torch.inference_mode()
def probe_logits(model, processor) -> np.ndarray:
    """Return a model's logits [V] of the token after the probe, in float32."""
    inputs = placed_probe(model, processor)
    return model(**inputs).logits[0, -1].float().cpu().numpy()


def placed_probe(model, processor) -> dict[str, torch.Tensor]:
    """Return the probe on a model's device, the pixels in its tower's type."""
    device = language_model(model).embed_tokens.weight.device
    inputs = {key: value.to(device) for key, value in probe_inputs(processor).items()}
    return {**inputs, "pixel_values": inputs["pixel_values"].to(pixel_dtype(model))}


def write_probe(folder: Path, logits: np.ndarray, dtype: str) -> None:
    """Write a checkpoint's probe logits [V] into its folder, with the type in which they were computed."""
    np.save(folder / PROBE, logits.astype([(dtype, np.float32)]), allow_pickle=False)


def read_probe(folder: Path) -> tuple[np.ndarray, str | None]:
    """Return a folder's probe logits [V] and the type in which they were computed (None: not recorded)."""
    archive = np.load(folder / PROBE, allow_pickle=False)
    return (archive[archive.dtype.names[0]], archive.dtype.names[0]) if archive.dtype.names else (archive, None)
