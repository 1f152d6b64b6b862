"""Tiny random LLaVA models of every supported shape, real images, and greedy answers of plain transformers."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from actors.checkpoint.loading import language_model
from actors.derm_tiny.build import PATCH, SIDE, build_processor
from actors.specs import Conversation, Sample

DERM_TINY = Path(__file__).resolve().parent.parent / "actors" / "derm_tiny" / "checkpoint"
LAYERS = 5
WIDTH = 64
PATCHES = (SIDE // PATCH) ** 2
# Prompts of unequal length, so that a batch has padding.
QUESTIONS = ("Describe the lesion.", "What is the name of this disease?", "Name?")
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
_TEXTS = {
    "clip-llama": (LlamaConfig, {"num_attention_heads": 4}),
    "siglip-llama": (LlamaConfig, {"num_attention_heads": 4}),
    "clip-llama-tied": (LlamaConfig, {"num_attention_heads": 4, "tie_word_embeddings": True}),
    "clip-mistral-window": (MistralConfig, {**_GROUPED, "sliding_window": 8}),
    "clip-qwen2": (Qwen2Config, _GROUPED),
    "clip-qwen2-mixed": (
        Qwen2Config,
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "clip-phi": (PhiConfig, {"num_attention_heads": 4, "partial_rotary_factor": 0.5}),
    "siglip-phi": (PhiConfig, {"num_attention_heads": 4, "partial_rotary_factor": 0.5}),
}
ARCHITECTURES = tuple(_TEXTS)


@cache
def processor_for(tower: str) -> LlavaProcessor:
    """Return derm-tiny's processor, told how many features the tower ("clip" or "siglip") gives."""
    processor = build_processor()
    if tower == "siglip":
        processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    return processor


def tiny_config(name: str, layers: int = LAYERS) -> LlavaConfig:
    """Return the config of one of ARCHITECTURES with `layers` decoder layers of width 64."""
    kind, extra = _TEXTS[name]
    return config_of(name.split("-")[0], kind, layers, extra)


def config_of(tower: str, kind: type[PreTrainedConfig], layers: int, extra: Mapping[str, Any]) -> LlavaConfig:
    """Return the config of a tower ("clip" or "siglip") before a decoder: its `kind` of config, and `extra` fields."""
    tokenizer = processor_for(tower).tokenizer
    text = kind(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, **extra},
    )
    siglip = tower == "siglip"
    vision = (SiglipVisionConfig if siglip else CLIPVisionConfig)(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        vision_feature_select_strategy="full" if siglip else "default",
        tie_word_embeddings=text.tie_word_embeddings,
    )


def llava_7b() -> LlavaConfig:
    """Return the config of llava-hf/llava-1.5-7b-hf, which is not tiny at all."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
        ),
        tie_word_embeddings=False,
    )


def tiny_model(name: str, layers: int = LAYERS, seed: int = 0) -> LlavaForConditionalGeneration:
    """Return a random model of one of ARCHITECTURES."""
    return random_model(tiny_config(name, layers), seed)


def random_model(config: LlavaConfig, seed: int = 0) -> LlavaForConditionalGeneration:
    """Return a random model whose weights are large enough for its greedy answers to vary."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.2 / parameter[0].numel() ** 0.5)
            else:  # norms away from 1 and biases away from 0: neither may be lost on the way
                parameter.add_(0.2 * torch.randn_like(parameter))
    tokens = config.text_config
    model.generation_config.update(
        pad_token_id=tokens.pad_token_id, bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id
    )
    return model


def save_tiny(folder: Path, name: str, layers: int = LAYERS, seed: int = 0, dtype: torch.dtype = torch.float32) -> str:
    """Save a tiny model and its processor to `folder`; return the folder as a model path."""
    model = tiny_model(name, layers, seed).to(dtype)
    model.save_pretrained(folder)
    processor_for(name.split("-")[0]).save_pretrained(folder)
    return str(folder)


def rename_tensors(folder: Path, style: str) -> None:
    """Rewrite a saved tiny model under "published" names (llava-hf's files) or "five" (transformers 5's modules)."""
    file = folder / "model.safetensors"
    tensors = {_RENAME[style](name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _published(name: str) -> str:
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)


def _five(name: str) -> str:
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    return re.sub(r"^(vision_tower|multi_modal_projector)\.", r"model.\1.", name)


_RENAME = {"published": _published, "five": _five}


def plain_model(path: str, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """Load a checkpoint with plain transformers and nothing of ours; every weight must be in the files."""
    model, info = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, output_loading_info=True)
    left = {kind: names for kind, names in info.items() if names}
    assert not left, left
    return model.eval()


def plain_inputs(processor, sample: Sample) -> dict[str, torch.Tensor]:
    """Return the processor's tensors for one question, made as a user would."""
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=Image.open(sample.image).convert("RGB"), text=text, return_tensors="pt")


@torch.inference_mode()
def plain_answer(model, processor, sample: Sample, max_new_tokens: int) -> list[int]:
    """Return the new token ids of `generate(do_sample=False)` for one question."""
    inputs = plain_inputs(processor, sample)
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@contextmanager
def without(model, removed: Sequence[int]) -> Iterator[None]:
    """Take layers out of a model, as surgery on its files would, for the length of the block."""
    decoder, text = language_model(model), model.config.text_config
    stock, kinds = decoder.layers, getattr(text, "layer_types", None)
    kept = [number for number in range(len(stock)) if number not in removed]
    decoder.layers, text.num_hidden_layers = nn.ModuleList(stock[number] for number in kept), len(kept)
    if kinds:
        text.layer_types = [kinds[number] for number in kept]
    for number, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = number
    try:
        yield
    finally:
        decoder.layers, text.num_hidden_layers = stock, len(stock)
        if kinds:
            text.layer_types = kinds
        for number, layer in enumerate(stock):
            layer.self_attn.layer_idx = number


def draw_samples(root: Path, images: int = 2, questions: Sequence[str] = QUESTIONS) -> list[Sample]:
    """Return every question about the first images of a drawn tree, one image from each class."""
    found = [sorted(folder.glob("*.png"))[0] for folder in sorted(root.iterdir()) if folder.is_dir()]
    return [Sample(f"{file.stem}:{q}", str(file), q) for file in found[:images] for q in questions]


def draw_conversations(root: Path, count: int) -> list[Conversation]:
    """Return `count` conversations about a drawn tree: what it shows, from the tree's own annotations."""
    with open(root / "annotations.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    picked = rows[:: max(1, len(rows) // count)][:count]
    return [Conversation(row["path"], str(root / row["path"]), QUESTIONS[0], row["answer"]) for row in picked]
