"""The vision tower and the projector as the GGUF that llama.cpp calls mmproj.

Source: tools/mtmd/clip-impl.h (keys, names), clip.cpp (the loader) and models/llava.cpp (the graph) of
github.com/ggml-org/llama.cpp. Its present converter writes no such file of a LLaVA-1.5; the one in
tools/mtmd/legacy-models did. The loader's graph ends at the deepest feature layer, drops the class token where there is
one, and applies a final norm where there is one: LLaVA takes its features before that norm, so it is left out.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch

from actors.export.ggml import Kind, encode
from actors.export.gguf_file import Entry, Stored

PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}
ACTIVATIONS = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}  # whether the loader takes GELU's curve
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}  # the features that the graph takes
_TOWER, _LAYERS = "vision_tower.vision_model.", "vision_tower.vision_model.encoder.layers."
CLASS_TOKEN = ("last", "first")
_UNUSED = ("post_layernorm.", "head.", "embeddings.position_ids")


def check_vision(config, image_processor) -> None:
    """Raise ValueError if llama.cpp would compute something else with this tower, projector or image processor."""
    vision = config.vision_config
    if (chosen := TOWERS.get(vision.model_type)) is None:
        raise ValueError(f"A tower of type {vision.model_type!r} has no mmproj: {', '.join(TOWERS)} have.")
    if config.vision_feature_select_strategy != chosen:
        raise ValueError(
            f"llama.cpp takes the features {chosen!r} of a {vision.model_type}, not "
            f"{config.vision_feature_select_strategy!r} (vision_feature_select_strategy)."
        )
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"Features of one layer are exported, not of {config.vision_feature_layer} (vision_feature_layer)."
        )
    if vision.hidden_act not in ACTIVATIONS or config.projector_hidden_act != "gelu":
        raise ValueError(
            f"llama.cpp computes {', '.join(ACTIVATIONS)} in a tower and gelu in a projector, not "
            f"{vision.hidden_act!r} and {config.projector_hidden_act!r}."
        )
    size = image_size(image_processor)
    if set(size) != {vision.image_size}:
        raise ValueError(
            f"The processor makes images of {size}, the tower takes {vision.image_size}: llama.cpp needs both equal."
        )


def image_size(image_processor) -> tuple[int, int]:
    """Return (height, width) of the pixels that an image processor makes, of a square image (pixels)."""
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    height = size.get("height") or size["shortest_edge"]
    return int(height), int(size.get("width") or height)


def feature_layer(config) -> int:
    """Return how many layers of the tower its features have gone through."""
    layer = config.vision_feature_layer
    return layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer


def write_keys(writer: gguf.GGUFWriter, config, image_processor) -> None:
    """Write the keys of the tower, the projector and the image processor."""
    vision, layers = config.vision_config, feature_layer(config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_bool("clip.use_gelu", ACTIVATIONS[vision.hidden_act])
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_block_count(layers)
    writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_vision_image_mean([float(value) for value in image_processor.image_mean])
    writer.add_vision_image_std([float(value) for value in image_processor.image_std])


def has_class_token(config) -> bool:
    """Tell whether the tower has a class token, for whose place there is a choice."""
    return TOWERS[config.vision_config.model_type] == "default"


def entries(folder: Path, config, class_token: str) -> Iterator[Entry]:
    """Yield the tensors of the tower and the projector. ValueError: one that llama.cpp has no name for."""
    rolls = has_class_token(config) and class_token == "last"
    stored, layers = Stored(folder), feature_layer(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    for name in stored.names(_TOWER):
        part = name.removeprefix(_TOWER)
        if part.startswith(_UNUSED) or (name.startswith(_LAYERS) and int(name.split(".")[4]) >= layers):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"llama.cpp's vision tower has no tensor like {name!r}.")
        yield _entry(stored, name, target, rolls and target == "v.position_embd.weight")
    for ours, theirs in PROJECTOR.items():
        yield _entry(stored, f"multi_modal_projector.{ours}.weight", f"{theirs}.weight")
        if config.multimodal_projector_bias:
            yield _entry(stored, f"multi_modal_projector.{ours}.bias", f"{theirs}.bias")
        else:  # the graph adds one
            zeros = np.zeros(config.text_config.hidden_size, np.float32)
            yield Entry(f"{theirs}.bias", zeros.shape, Kind.F32, zeros.copy)


def _entry(stored: Stored, name: str, target: str, rolls: bool = False) -> Entry:
    shape = stored.shape(name)
    kind = Kind.F32 if len(shape) == 1 or "position_embd" in target else Kind.F16

    def data() -> np.ndarray:
        tensor = stored.read(name).float()
        return encode((torch.roll(tensor, -1, 0) if rolls else tensor).numpy(), kind, name)

    return Entry(target, shape, kind, data)
