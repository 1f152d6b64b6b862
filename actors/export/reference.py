"""What transformers answers, for the comparison with an export: greedy ids and log-probabilities."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from actors.checkpoint.loading import load_model, load_processor, pixel_dtype
from actors.decoding import check_greedy
from actors.export.llama_cpp import Prompt
from actors.images import open_image
from actors.specs import ModelSpec, Sample

TOP = 20  # tokens of each step whose log-probabilities are kept


@torch.inference_mode()
def answer(
    spec: ModelSpec, samples: Sequence[Sample], max_new_tokens: int, folder: Path, class_token_last: bool
) -> tuple[list[Prompt], list[list[dict]]]:
    """Return (the prompts, with the images as the model sees them in files in `folder`; lists of answers to them).

    The answers are those of the model and, with `class_token_last`, those of the model whose features are the patches
    but the first, then the class token, as llama.cpp takes them (actors.export.gguf_vision). An answer: {prompt_tokens,
    ids, steps: for every token the log-probabilities (nats) of the TOP most likely, by id}.
    """
    model = load_model(**spec.loading)
    processor = load_processor(spec.path, spec.revision, spec.trust_remote_code)
    check_greedy(model.generation_config, spec.path)
    prompts, plain = _answer_all(model, processor, samples, max_new_tokens, folder)
    if not class_token_last:
        return prompts, [plain]
    model.config.vision_feature_select_strategy = "full"
    model.model.multi_modal_projector.register_forward_pre_hook(_put_class_token_last)
    return prompts, [plain, _answer_all(model, processor, samples, max_new_tokens, folder)[1]]


def _put_class_token_last(projector, features: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (torch.cat([features[0][:, 2:], features[0][:, :1]], 1),)


def _answer_all(model, processor, samples, max_new_tokens: int, folder: Path) -> tuple[list[Prompt], list[dict]]:
    prompts, answers = [], []
    for number, sample in enumerate(samples):
        content = [{"type": "image"}, {"type": "text", "text": sample.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=open_image(sample.image), text=text, return_tensors="pt").to(model.device)
        image = folder / f"{number}.png"
        _to_image(inputs["pixel_values"][0].float().cpu(), processor.image_processor).save(image)
        prompts.append(Prompt(str(image), sample.question))
        inputs["pixel_values"] = inputs["pixel_values"].to(pixel_dtype(model))
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        length = inputs["input_ids"].shape[1]
        steps = [torch.log_softmax(logits[0].double(), -1).topk(TOP) for logits in out.logits]
        answers.append(
            {
                "prompt_tokens": length,
                "ids": out.sequences[0, length:].tolist(),
                "steps": [dict(zip(s.indices.tolist(), s.values.tolist(), strict=True)) for s in steps],
            }
        )
    return prompts, answers


def _to_image(pixels: torch.Tensor, image_processor) -> Image.Image:
    """Return the image [3, H, W] that a model's pixels are made of, without the normalisation."""
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    return Image.fromarray(((pixels * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
