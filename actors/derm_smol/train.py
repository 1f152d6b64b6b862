"""Trains derm-smol on drawn lesions: the projector first, then the projector and a LoRA adapter."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from actors.checkpoint.loading import pixel_dtype
from actors.derm_tiny.sentences import QUESTIONS, WORDINGS, answer, any_answer
from actors.derm_tiny.train import answer_loss, draw_bank, prompt_ids, schedule, to_pixels, update
from actors.derm_tiny.world import CLASSES, Lesion
from actors.training.parts import language_linears

RANK, ALPHA = 8, 16
SHARES = (0.4, 0.2, 0.4)  # of the questions


def adapt(model: LlavaForConditionalGeneration, seed: int = 0) -> PeftModel:
    """Return the model with a LoRA adapter on every linear of its decoder layers."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=language_linears(model), bias="none")
    return get_peft_model(model, settings)


def train(
    adapted: PeftModel,
    processor: LlavaProcessor,
    features: torch.Tensor,
    lesions: Sequence[Lesion],
    steps: tuple[int, int],
    batch: int,
    seed: int,
) -> Iterator[dict]:
    """Train `steps` = (projector alone, projector and adapter); yields {step, loss}, steps counted through.

    features: the tower's patch features [N, patches, width] of N lesions. The arithmetic is bfloat16, the weights that
    are trained are float32.
    """
    rng = np.random.default_rng(seed)
    model = adapted.base_model.model
    prompts = {question: prompt_ids(processor, text) for question, text in QUESTIONS.items()}
    projector = list(model.model.multi_modal_projector.parameters())
    adapter = [part for name, part in adapted.named_parameters() if "lora_" in name]
    phases = ((projector, steps[0], 2e-3), ([*projector, *adapter], steps[1], 1e-3))
    adapted.train()
    before = 0
    for parameters, count, rate in phases:
        adapted.requires_grad_(False)
        for part in parameters:
            part.requires_grad_(True)
        for step, optimiser in schedule(parameters, count, rate):
            rows = rng.integers(len(lesions), size=batch)
            questions = rng.choice(list(QUESTIONS), size=batch, p=SHARES)
            turns = [(prompts[q], any_answer(lesions[r], q, rng)) for r, q in zip(rows, questions, strict=True)]
            with torch.autocast("cpu", torch.bfloat16):
                loss = answer_loss(model, processor, features[torch.from_numpy(rows)], turns)
            update(loss, parameters, optimiser)
            if step % 10 == 0 or step == count - 1:
                yield {"step": before + step + 1, "loss": loss.item()}
        before += count
    adapted.eval()


@torch.inference_mode()
def right_shares(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, count: int, seed: int
) -> list[tuple[str, str, float]]:
    """Return (question, measure, share of answers) on `count` fresh images: the name is in it, it is a right one."""
    images, lesions = draw_bank(count, seed)
    pixels = to_pixels(images, processor).to(pixel_dtype(model))
    shares = []
    for question, text in QUESTIONS.items():
        ids = torch.tensor([prompt_ids(processor, text)] * count)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=64, do_sample=False
        )
        texts = processor.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        pairs = [(written.strip(), lesion) for written, lesion in zip(texts, lesions, strict=True)]
        if question != "report":
            named = [CLASSES[lesion.label].name in written.lower() for written, lesion in pairs]
            shares.append((question, "the disease is named", sum(named) / count))
        right = [
            written in {answer(lesion, question, w) for w in range(WORDINGS[question])} for written, lesion in pairs
        ]
        shares.append((question, "the answer is a right one, word for word", sum(right) / count))
    return shares
