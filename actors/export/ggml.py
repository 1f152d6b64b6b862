"""GGML's types of weights: which there are, what width they need, and weights encoded in them.

Source of the block layouts: ggml-common.h of llama.cpp (block_q4_1: scale, minimum, 16 bytes of which the low nibbles
are the first half); the `gguf` package encodes all but the repacked one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class WeightType:
    """How a GGUF file stores the language model's weights.

    linears: of the decoder's linears; rest: of the embeddings and the head, which cost most in 4 bits; file_type: what
    the file says of itself.
    """

    linears: Kind
    rest: Kind
    file_type: gguf.LlamaFileType

    @property
    def block(self) -> int:
        """Input channels that are stored together."""
        return max(gguf.GGML_QUANT_SIZES[kind][0] for kind in (self.linears, self.rest))


TYPES = {
    "F16": WeightType(Kind.F16, Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "Q8_0": WeightType(Kind.Q8_0, Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "Q4_1": WeightType(Kind.Q4_1, Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q4_1),
    "Q4_0": WeightType(Kind.Q4_0, Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}


def check_widths(name: str, widths: Sequence[int]) -> None:
    """Raise ValueError if a type of TYPES cannot hold linears with these numbers of input channels."""
    odd = [width for width in widths if width % TYPES[name].block]
    if odd:
        others = [each for each, kind in TYPES.items() if not any(width % kind.block for width in widths)]
        raise ValueError(
            f"export.type {name} stores {TYPES[name].block} input channels together, and a linear has {odd[0]}: choose "
            f"{' or '.join(others)}."
        )


def encode(weight: np.ndarray, kind: Kind, name: str) -> np.ndarray:
    """Return a weight [out, in] as a type stores it; ValueError: a value exceeds float16."""
    if kind == Kind.F32:
        return weight.astype(np.float32)
    with np.errstate(over="ignore"):
        data = weight.astype(np.float16) if kind == Kind.F16 else gguf.quantize(weight.astype(np.float32), kind)
        limit = float(np.abs(weight).max(initial=0))
    if limit > np.finfo(np.float16).max:
        raise ValueError(f"{name!r} has a value of {limit:.3g}, which exceeds float16: GGUF's types cannot hold it.")
    return data


def stored_bytes(shape: Sequence[int], kind: Kind) -> int:
    """Return the bytes of a tensor in a type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size
