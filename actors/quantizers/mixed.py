"""Decoder layers rounded to different bits in one checkpoint, in the compressed-tensors "pack-quantized" layout.

transformers loads it with the compressed-tensors package, and vLLM documents it for 4 and 8 bits: config.json gives
every group of layers its bits; the layers in no group keep 16. compressed-tensors 0.18 to 0.20 cannot load zero points
into transformers, and packs 3 bits in another order than 0.17: hence the pinned version.

Axes of the layout: q, z integers [out, in], [out, groups], stored as q - 2^(bits-1); words of int32 along `in` for
the weight, along `out` for the zero points, 32 // bits values each; scales float16 [out, groups].
"""

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from actors.checkpoint.loading import quiet
from actors.maths.rounding import dequantize, round_to_nearest
from actors.quantizers.awq import inputs_for, searched_layers
from actors.quantizers.storage import (
    cast_tensor,
    check_rounded,
    keep_blocks_apart,
    other_tensors,
    read_layers,
    write_rounded,
)
from actors.quantizers.structure import linear_shapes, open_checkpoint
from actors.quantizers.table import COMPRESSED_TENSORS
from actors.specs import NOT_ROUNDED, Conversation, ModelSpec, QuantizeSettings

FORMAT = "pack-quantized"
STORED = torch.float16
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
IGNORED = tuple(f"re:.*{name}.*" for name in NOT_ROUNDED if "." not in name)
NAME = "language_model.model.layers.{}.{}"  # as published
MISSING = (
    "Checkpoints of mixed bits need the compressed-tensors package, which is not installed: "
    "pip install -c constraints.txt '.[mixed]'."
)


def packer():
    """Return compressed-tensors' (pack, unpack); ValueError: the package is missing."""
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from None
    return pack_to_int32, unpack_from_int32


def pack_weight(weight: torch.Tensor, bits: int, group: int) -> dict[str, torch.Tensor]:
    """Round a weight [out, in] to nearest and return the layout's parts of it."""
    pack, _ = packer()
    q, zero, scale = round_to_nearest(weight, group, bits)
    middle = 2 ** (bits - 1)
    return {
        "weight_packed": pack((q - middle).to(torch.int8), bits),
        "weight_scale": scale,
        "weight_zero_point": pack((zero - middle).to(torch.int8), bits, packed_dim=0).contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }


def unpacked(parts: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Return the dequantized weight [out, in], in float32, from the parts that `pack_weight` returned."""
    _, unpack = packer()
    shape, scale = torch.Size(parts["weight_shape"].tolist()), parts["weight_scale"]
    q = unpack(parts["weight_packed"], bits, shape)
    zero = unpack(parts["weight_zero_point"], bits, scale.shape, packed_dim=0)
    return dequantize(q.int(), zero.int(), scale)


def rounded_layers(
    spec: ModelSpec,
    source: Path,
    config,
    settings: QuantizeSettings,
    bits: Sequence[int],
    calibration: Sequence[Conversation],
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield (number, tensors by their names in the layer) of every decoder layer, its linears packed at its `bits`.

    With awq a layer is scaled and clipped for its bits first; the calibration inputs are the unrounded model's, so that
    a layer does not depend on the other layers' bits. 16 bits: the layer is not rounded.
    """
    rounded = [number for number, each in enumerate(bits) if each < 16]
    linears = tuple(f"{name}.weight" for name in linear_shapes(config))
    scaled: Iterator = iter(())
    if settings.method == "awq" and rounded:
        hidden, kwargs = inputs_for(spec, source, config, calibration)
        chosen = {number: replace(settings, bits=bits[number]) for number in rounded}
        scaled = searched_layers(source, config, hidden, kwargs, chosen)
    for number, layer in enumerate(read_layers(source, len(bits))):
        tensors = {part: tensor for part, (_, tensor) in layer.items()}
        if number in rounded and settings.method == "awq":
            names = {name: part for part, (name, _) in layer.items()}
            tensors = {names[name]: tensor for name, tensor in next(scaled)[1].items()}
        packed: dict[str, torch.Tensor] = {}
        for part, tensor in tensors.items():
            if number in rounded and part in linears:
                stem = part.removesuffix("weight")
                packed |= {
                    stem + name: value for name, value in pack_weight(tensor, bits[number], settings.group_size).items()
                }
            else:
                packed[part] = cast_tensor(NAME.format(number, part), tensor, STORED)
        yield number, packed


def quantization_config(bits: Sequence[int], group: int, linears: Sequence[str]) -> dict:
    """Return the quantization_config of a checkpoint whose decoder layers have these bits (16: not rounded).

    Every linear is in a group or ignored by name: vLLM stops at one that is neither.
    """
    groups = {}
    names = "|".join(map(re.escape, linears))

    def target(wanted: int) -> str:
        numbers = "|".join(str(number) for number, each_bits in enumerate(bits) if each_bits == wanted)
        return rf"re:.*language_model\.(model\.)?layers\.({numbers})\.({names})$"

    for each in sorted(set(bits) - {16}):
        groups[f"bits_{each}"] = {
            "targets": [target(each)],
            "weights": {
                "num_bits": each,
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": group,
            },
            "format": FORMAT,
        }
    return {
        **COMPRESSED_TENSORS.marks,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*IGNORED, *([target(16)] if 16 in bits else [])],
    }


def group_bits(config: dict, number: int, stem: str) -> int:
    """Return the bits that a quantization_config gives the linear `stem` of decoder layer `number`."""
    name = NAME.format(number, stem)
    for group in config["config_groups"].values():
        if any(re.match(target.removeprefix("re:"), name) for target in group["targets"]):
            return group["weights"]["num_bits"]
    return 16


class MixedQuantizer:
    """Rounds each decoder layer to its own bits; a worker class."""

    def __init__(self):
        quiet()
        keep_blocks_apart()

    def quantize(
        self,
        spec: ModelSpec,
        settings: QuantizeSettings,
        bits: Sequence[int],
        calibration: Sequence[Conversation],
        out: str,
    ) -> dict:
        """Write the checkpoint of `spec` with every decoder layer's linears at its `bits` to `out`; returns facts.

        settings: awq or rtn, the group size and clipping; its bits are not used. The facts are those of
        actors.quantizers.storage.check_rounded. ValueError: `bits` is not one per layer, or the method cannot round
        this model.
        """
        packer()
        source, config = open_checkpoint(spec, settings)
        layers = config.text_config.num_hidden_layers
        if len(bits) != layers:
            raise ValueError(f"Bits were given for {len(bits)} layers, but the model has {layers}.")

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for number, layer in rounded_layers(spec, source, config, settings, bits, calibration):
                for part, tensor in layer.items():
                    yield NAME.format(number, part), tensor
            yield from other_tensors(source)

        written = deepcopy(config)
        if set(bits) != {16}:
            written.quantization_config = quantization_config(bits, settings.group_size, list(linear_shapes(config)))
        write_rounded(source, Path(out), written, STORED, tensors(), lambda weight: {"weight": weight})
        return check_rounded(Path(out), config, replace(settings, bits=4))

    def options(
        self,
        spec: ModelSpec,
        settings: QuantizeSettings,
        bits: Sequence[int],
        calibration: Sequence[Conversation],
        folder: str,
    ) -> dict:
        """Write every decoder layer at each of `bits` to a file of its own in `folder`; returns {layers, bytes}.

        `quantize` would store the same tensors; `read_option` reads one file.
        """
        packer()
        source, config = open_checkpoint(spec, settings)
        layers, size = config.text_config.num_hidden_layers, 0
        for each in bits:
            for number, tensors in rounded_layers(spec, source, config, settings, [each] * layers, calibration):
                file = option_file(folder, number, each)
                save_file({part: tensor.contiguous() for part, tensor in tensors.items()}, file)
                size += file.stat().st_size
        return {"layers": layers, "bytes": size}


def option_file(folder: str, number: int, bits: int) -> Path:
    """Return the file of one decoder layer at `bits` in an artifact of `MixedQuantizer.options`."""
    return Path(folder) / f"layer-{number:05d}-{bits}.safetensors"


def read_option(folder: str, number: int, bits: int) -> dict[str, torch.Tensor]:
    """Return a decoder layer's parameters by name, rounded to `bits` and dequantized to float32."""
    stored = load_file(option_file(folder, number, bits))
    stems = [name.removesuffix("weight_packed") for name in stored if name.endswith("weight_packed")]
    rounded = {f"{stem}weight": unpacked({part: stored[stem + part] for part in PARTS}, bits) for stem in stems}
    return rounded | {name: tensor for name, tensor in stored.items() if not name.endswith(PARTS)}
