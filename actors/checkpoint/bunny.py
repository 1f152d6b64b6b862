"""Bunny-v1.0-3B (SigLIP before Phi-2; He et al. 2024, arXiv 2402.11530) in the terms of a stock LLaVA.

Bunny's files hold all of the tower but its last layer and its head, and take the features before the tower's last norm.
docs/checkpoints.md says where each fact was read.
"""

import re
from pathlib import Path
from typing import Any

from transformers import (
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PhiConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from actors.checkpoint.foreign import reading

IMAGE = "<image>"
TOWER = "siglip-so400m-patch14-384"  # google's; Bunny's config.json has its name alone
TOWER_ENTRIES = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
TEXT_ENTRIES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "layer_norm_eps", "tie_word_embeddings", "rope_theta"),
    *("rope_scaling", "partial_rotary_factor", "qk_layernorm", "bos_token_id", "eos_token_id", "pad_token_id"),
)
NAMES = (  # of tensors: Bunny's beginning, the published LLaVA's
    (r"model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"model\.(?=(embed_tokens|layers|final_layernorm)\.)", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
CHAT_TEMPLATE = (
    f'{{{{ "{SYSTEM}" }}}}'
    "{% for message in messages %}"
    "{{ message['role'].upper() }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def translate_config(entries: dict[str, Any], file: Path) -> LlavaConfig:
    """Return the stock config of a Bunny's config.json, its vocabulary unchanged.

    file: where the entries come from, for errors. ValueError: another tower or projector, or entries of another type.
    """
    tower, projector = str(entries.get("mm_vision_tower", "")), entries.get("mm_projector_type")
    if projector != "mlp2x_gelu" or entries.get("use_s2"):
        raise ValueError(
            f"{str(file)!r} asks for the projector {projector!r} (use_s2: {bool(entries.get('use_s2'))}), but a "
            "stock LLaVA has 'mlp2x_gelu' on one image size: give a Bunny of this kind, such as BAAI/Bunny-v1_0-3B."
        )
    if Path(tower).name != TOWER and not (Path(tower) / "config.json").is_file():
        raise ValueError(
            f"{str(file)!r}: mm_vision_tower {tower!r} is neither {TOWER!r} nor a folder with config.json. Write the "
            "folder of the model's SigLIP tower there."
        )
    with reading(file, "transformers refuses it", "copy it again from the original model"):
        known = Path(tower).name == TOWER
        vision = SiglipVisionConfig(**TOWER_ENTRIES) if known else SiglipVisionConfig.from_pretrained(tower)
        vision.num_hidden_layers -= 1
        vision.vision_use_head = False
        text = PhiConfig(**{name: entries[name] for name in TEXT_ENTRIES if name in entries})
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_seq_length=(vision.image_size // vision.patch_size) ** 2,
            projector_hidden_act="gelu",
            vision_feature_layer=-1,  # the last of the stored layers, before the tower's last norm
            vision_feature_select_strategy="full",
            tie_word_embeddings=text.tie_word_embeddings,
            dtype=entries.get("torch_dtype") or entries.get("dtype"),
        )


def translate_name(name: str) -> str | None:
    """Return a tensor's name in published LLaVAs, None if Bunny's layout has no such tensor."""
    for begin, stock in NAMES:
        if match := re.match(begin, name):
            return stock + name[match.end() :]
    return None


def build_processor(folder: Path, entries: dict[str, Any], config: LlavaConfig) -> LlavaProcessor:
    """Return Bunny's tokenizer with an image token, its prompt, and its image preprocessing: pad, resize, normalise."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side, tokenizer.model_max_length = "left", config.text_config.max_position_embeddings
    side = config.vision_config.image_size
    images = LlavaImageProcessorPil(
        do_pad=entries.get("image_aspect_ratio") == "pad",
        size={"height": side, "width": side},
        resample=3,  # bicubic
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )
