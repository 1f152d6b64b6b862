"""The derm-smol checkpoint: SmolLM2 from its package, derm-tiny's tower, and the parts that were trained here."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from actors.checkpoint.loading import load_model, load_processor
from actors.derm_smol.package import read_model, read_tokenizer

DERM_TINY = Path(__file__).resolve().parents[1] / "derm_tiny" / "checkpoint"
PARTS = Path(__file__).resolve().parent / "parts"  # projector.safetensors; the adapter in PEFT's format
PROJECTOR = "projector.safetensors"
IMAGE, MULTIPLE = "<image>", 128  # the vocabulary is padded to a multiple
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_processor() -> LlavaProcessor:
    """Return SmolLM2's tokenizer with an image token, beside derm-tiny's image processor."""
    tiny = load_processor(str(DERM_TINY))
    tokenizer = read_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length = "<|endoftext|>", "left", 8192
    return LlavaProcessor(
        image_processor=tiny.image_processor,
        tokenizer=tokenizer,
        patch_size=tiny.patch_size,
        vision_feature_select_strategy=tiny.vision_feature_select_strategy,
        num_additional_image_tokens=tiny.num_additional_image_tokens,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """Return the model in float32 with an untrained projector: it writes English and does not see the image yet.

    The rows of the image token and of the padding are the mean of all others, so that their logit is the mean logit,
    which is never the largest.
    """
    tiny, smol = load_model(str(DERM_TINY), device="cpu"), read_model()
    text = smol.config.to_dict()
    text.pop("quantization_config", None)
    tokenizer = processor.tokenizer
    size = -(-len(tokenizer) // MULTIPLE) * MULTIPLE
    text |= {"vocab_size": size, "pad_token_id": tokenizer.pad_token_id}
    config = LlavaConfig(
        vision_config=tiny.config.vision_config.to_dict(),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=tiny.config.image_seq_length,
        vision_feature_layer=tiny.config.vision_feature_layer,
        vision_feature_select_strategy=tiny.config.vision_feature_select_strategy,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tiny.model.vision_tower.state_dict())
    weights = smol.model.state_dict()
    rows = weights["embed_tokens.weight"].float()
    weights["embed_tokens.weight"] = torch.cat([rows, rows.mean(0, keepdim=True).expand(size - len(rows), -1)])
    model.model.language_model.load_state_dict({name: part.float() for name, part in weights.items()})
    model.tie_weights()
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config.update(bos_token_id=tokenizer.bos_token_id, **ids)
    return model


def add_parts(model: LlavaForConditionalGeneration, parts: Path = PARTS) -> LlavaForConditionalGeneration:
    """Return the model with the trained projector, and the trained adapter merged into the language model."""
    if not (parts / PROJECTOR).is_file():
        raise ValueError(f"No {PROJECTOR} in {str(parts)!r}: python -m jobs.make_derm_smol --train --parts {parts}")
    model.model.multi_modal_projector.load_state_dict(load_file(parts / PROJECTOR))
    return PeftModel.from_pretrained(model, str(parts)).merge_and_unload()


def save_parts(adapted: PeftModel, parts: Path) -> None:
    """Write what was trained, in float16: the projector, and the adapter in PEFT's format."""
    parts.mkdir(parents=True, exist_ok=True)
    adapted.save_pretrained(str(parts))
    (parts / "README.md").unlink(missing_ok=True)  # peft's empty card
    file = parts / "adapter_model.safetensors"
    save_file({name: part.half() for name, part in load_file(file).items()}, file, metadata={"format": "pt"})
    projector = adapted.base_model.model.model.multi_modal_projector
    halves = {name: part.detach().half().contiguous() for name, part in projector.state_dict().items()}
    save_file(halves, parts / PROJECTOR, metadata={"format": "pt"})
    settings = json.loads((parts / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = None
    (parts / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
