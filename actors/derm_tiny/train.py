"""Trains derm-tiny from scratch: vision tower, then projector and language model; plants outliers; tests it.

Two properties of large models, which small ones lack by themselves, are built in: every decoder layer matters
(the answers are composed from the image), and a few channels are far larger than the rest (paper, figure 4), so
that 4-bit rounding costs something.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, LlavaProcessor

from actors.checkpoint.loading import pixel_dtype
from actors.conversations import reply_ids
from actors.derm_tiny.build import PATCH, TOWER_FEATURES
from actors.derm_tiny.draw import SIDE, draw, sample_lesion
from actors.derm_tiny.world import CLASSES, POSITIONS, QUESTIONS, SIZES, TONES, Lesion, answer

ATTRIBUTE_SIZES = (len(CLASSES), len(TONES), len(POSITIONS), len(SIZES), 2)


def draw_bank(count: int, seed: int, workers: int = 2) -> tuple[np.ndarray, list[Lesion]]:
    """Draw `count` images [count, SIDE, SIDE, 3] (uint8) and their lesions, in `workers` processes."""
    bounds = np.linspace(0, count, min(count, 8 * workers) + 1).astype(int)
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_draw_range, [(seed, int(a), int(b)) for a, b in itertools.pairwise(bounds)]))
    return np.concatenate([images for images, _ in parts]), [lesion for _, part in parts for lesion in part]


def _draw_range(job: tuple[int, int, int]) -> tuple[np.ndarray, list[Lesion]]:
    seed, start, stop = job
    images, lesions = [], []
    for index in range(start, stop):
        rng = np.random.default_rng([seed, index])
        lesions.append(sample_lesion(rng))
        images.append(draw(lesions[-1], rng))
    return np.stack(images), lesions


def to_pixels(images_BHWC: np.ndarray, processor: LlavaProcessor) -> torch.Tensor:
    """Normalise drawn uint8 images [B, H, W, 3] as the image processor does; returns float32 [B, 3, H, W]."""
    pixels = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    return (pixels - mean) / std


def train_tower(
    tower: CLIPVisionModel, pixels: torch.Tensor, lesions: list[Lesion], steps: int, batch: int, seed: int
) -> Iterator[dict]:
    """Train the tower to tell class and attributes from its patch tokens; yields {step, loss, accuracy}."""
    targets = torch.tensor([[int(v) for v in astuple(lesion)] for lesion in lesions])
    width = tower.config.hidden_size
    heads = nn.ModuleList(nn.Linear(width, size) for size in ATTRIBUTE_SIZES)
    parameters = [*tower.parameters(), *heads.parameters()]
    picks = torch.Generator().manual_seed(seed)
    for step, optimiser in schedule(parameters, steps, lr=1e-3):
        rows = torch.randint(len(pixels), (batch,), generator=picks)
        features = _tower_features(tower, pixels[rows]).mean(dim=1)
        logits = [head(features) for head in heads]
        loss = sum(nn.functional.cross_entropy(part, targets[rows, i]) for i, part in enumerate(logits))
        update(loss, parameters, optimiser)
        if step % 25 == 0 or step == steps - 1:
            accuracy = (logits[0].argmax(-1) == targets[rows, 0]).float().mean().item()
            yield {"step": step + 1, "loss": loss.item(), "accuracy": accuracy}


def _tower_features(tower: CLIPVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    return tower(pixels, output_hidden_states=True).hidden_states[TOWER_FEATURES][:, 1:]


def encode_bank(tower: CLIPVisionModel, pixels: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Return the frozen tower's patch features [N, patches, width] for every image of the bank."""
    tower.eval()
    with torch.inference_mode():
        return torch.cat([_tower_features(tower, part) for part in pixels.split(batch)]).clone()


def train_language_model(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    features: torch.Tensor,
    lesions: list[Lesion],
    steps: int,
    batch: int,
    seed: int,
) -> Iterator[dict]:
    """Train projector and language model on (image, question) -> answer; yields {step, loss}."""
    rng = np.random.default_rng(seed)
    names, weights = list(QUESTIONS), [0.25, 0.2, 0.55]
    prompts = {q: prompt_ids(processor, QUESTIONS[q]) for q in names}
    language_model, projector = model.model.language_model, model.model.multi_modal_projector
    parameters = [*projector.parameters(), *language_model.parameters(), *model.lm_head.parameters()]
    model.train()
    for step, optimiser in schedule(parameters, steps, lr=3e-3):
        rows = rng.integers(len(lesions), size=batch)
        questions = rng.choice(names, size=batch, p=weights)
        turns = [(prompts[q], answer(lesions[r], q)) for r, q in zip(rows, questions, strict=True)]
        loss = answer_loss(model, processor, features[torch.from_numpy(rows)], turns)
        update(loss, parameters, optimiser)
        if step % 25 == 0 or step == steps - 1:
            yield {"step": step + 1, "loss": loss.item()}
    model.eval()


def answer_loss(model, processor: LlavaProcessor, features: torch.Tensor, turns: Sequence[tuple[list[int], str]]):
    """Return the mean loss per answer token of B turns (prompt's ids, answer).

    features: the tower's features of their images, [B, patches, width].
    """
    language_model = model.model.language_model
    ids, labels = _batch(processor, turns)
    image = model.model.multi_modal_projector(features)
    embeds = language_model.embed_tokens(ids)
    embeds = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], image.to(embeds.dtype))
    hidden = language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][wanted])
    return nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted])


def prompt_ids(processor: LlavaProcessor, question: str) -> list[int]:
    """Return the ids of the chat template's prompt: an image and a question."""
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    text = text.replace("<image>", "<image>" * (SIDE // PATCH) ** 2)
    return processor.tokenizer(text)["input_ids"]


def _batch(processor, turns: Sequence[tuple[list[int], str]]) -> tuple[torch.Tensor, torch.Tensor]:
    tokenizer = processor.tokenizer
    sequences = [(prompt, reply_ids(tokenizer, text)) for prompt, text in turns]
    longest = max(len(p) + len(a) for p, a in sequences)
    ids = torch.full((len(sequences), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, reply) in enumerate(sequences):
        ids[row, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
        labels[row, len(prompt) : len(prompt) + len(reply)] = torch.tensor(reply)
    return ids, labels


def schedule(parameters, steps: int, lr: float) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    """Yield (step, AdamW) with the step's learning rate set: warm-up, then a half cosine to 2 % of `lr`."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    for step in range(steps):
        factor = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = lr * factor
        yield step, optimiser


def update(loss: torch.Tensor, parameters, optimiser) -> None:
    """Take one step against the loss, its gradients clipped to norm 1."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()


def plant_outliers(model: LlavaForConditionalGeneration, share: float = 0.1, factor: float = 50.0, seed: int = 0):
    """Make `share` of the channels `factor` times larger without changing the function (in exact arithmetic).

    A norm's weight is multiplied and the input columns of the linears that read it are divided; up_proj's
    rows are multiplied and down_proj's columns divided.
    """
    picks = torch.Generator().manual_seed(seed)

    def channels(size: int) -> torch.Tensor:
        return torch.randperm(size, generator=picks)[: max(1, round(share * size))]

    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                rows = channels(norm.weight.numel())
                norm.weight[rows] *= factor
                for reader in readers:
                    reader.weight[:, rows] /= factor
            rows = channels(mlp.up_proj.out_features)
            mlp.up_proj.weight[rows] *= factor
            mlp.down_proj.weight[:, rows] /= factor


@torch.inference_mode()
def exact_share(model: LlavaForConditionalGeneration, processor: LlavaProcessor, count: int, seed: int) -> dict:
    """Return the share of answers that equal the reference, per question, on `count` newly drawn images."""
    images, lesions = draw_bank(count, seed)
    pixels = to_pixels(images, processor).to(pixel_dtype(model))
    shares = {}
    for question, text in QUESTIONS.items():
        ids = torch.tensor([prompt_ids(processor, text)] * count)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=48, do_sample=False
        )
        texts = processor.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        right = [reply.strip() == answer(lesion, question) for reply, lesion in zip(texts, lesions, strict=True)]
        shares[question] = sum(right) / count
    return shares
