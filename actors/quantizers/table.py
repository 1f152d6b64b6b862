"""The quantizers: one entry each, from which options, checks, sizes, the gate and the figures derive.

A method says how weights are rounded, a layout how the rounded numbers are stored; two methods may share a layout.
Imports neither torch nor transformers: the driver reads this table, too.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from actors.maths.sizes import compressed_tensors_bytes, gemm_bytes, hqq_bytes, int8_bytes, nf4_bytes

NF4_BLOCK = 64  # weights that share a scale
SIMULATED = "simulated_quantization"  # the config.json entry of a checkpoint that holds rounded weights in 16 bits
# By bits, how far from 1 the gate lets a slope be: of a whole linear, and of one block of it (actors.gate.scales).
# Sound checkpoints have shown at most .004 (4 bits), .0003 (8), .008 (3) and .04 (hqq with 2) of a linear, .075, .0045,
# .15 and .37 of a block: the tests' models (derm-tiny with its outliers, and four architectures), and 1024 x 1024
# random weights (normal, Student's t with 5 and 3 degrees of freedom, 1 % ten and .5 % thirty times as large, input
# channels divided by 50), in groups of 8 to 128. The bounds of linears are at least twice as large; those of blocks far
# more, as a model of 7B has 10^8 of them, and none may be refused that is sound. With 2 bits sound linears and scales
# that are 20 % too small overlap.
SLOPES = {8: (0.005, 0.1), 4: (0.02, 0.5), 3: (0.04, 0.7), 2: (0.06, 0.9)}
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How rounded weights are stored.

    linear_bytes: (bits, group, outputs, inputs) -> bytes of one weight with all that is stored beside its numbers.
    bits: those that it packs; none: it is only counted with, and all that is rounded is simulated. marks: entries of
    config.json's quantization_config that tell the layout; none where nothing is packed. unpacked_bytes: (weights,
    bytes of a number) -> what unpacking one weight takes; by default one copy in the activations' type, as GPU kernels
    make it (on a CPU, where no kernel unpacks awq's, about six times this). reader: the module that teaches
    transformers the layout; None: transformers knows it. vllm: the entries of quantization_config that vLLM's documents
    ask for; None: vLLM does not read it. skipped: the entry that lists what is not rounded. one_by_one: how far logits
    may move, relative to the largest, when tokens are fed one by one; None: as far as in 16 bits.
    """

    name: str
    linear_bytes: Callable[[int, int, int, int], int]
    bits: tuple[int, ...] = ()
    marks: Mapping[str, Any] = field(default_factory=dict)
    unpacked_bytes: Callable[[int, int], int] = lambda weights, itemsize: weights * itemsize
    reader: str | None = None
    vllm: Mapping[str, Any] | None = None
    skipped: str | None = None
    one_by_one: float | None = None


@dataclass(frozen=True)
class Method:
    """How weights are rounded.

    words: what --help says of it. function: "module:function", called as function(source, config, settings, out), with
    spec and calibration besides if it is calibrated; it writes a checkpoint and may return facts about it. bits: those
    that it rounds to; where its layout does not pack them, rounded weights are stored in 16 bits (simulated). groups:
    what quantize.group_size must be a multiple of; None: the method has no such groups. block: weights of an output
    that share a scale where there are no groups; None: all. calibrated: it looks at training conversations. rescales:
    it multiplies weights and divides what comes before them, so that the gate cannot compare weight by weight. mixes:
    layers may have bits of their own. check: "module:function", called as function(config, settings), which refuses
    (ValueError) a model that it cannot round. slopes: as SLOPES, where the method needs other bounds; not read where it
    rescales, or where the layout is one whose packed numbers the gate unpacks itself. marker: in figures
    (matplotlib's).
    """

    words: str
    function: str
    bits: tuple[int, ...]
    layout: Layout
    marker: str
    groups: int | None = None
    block: int | None = None
    calibrated: bool = False
    rescales: bool = False
    mixes: bool = False
    check: str | None = None
    slopes: Mapping[int, tuple[float, float]] = field(default_factory=lambda: SLOPES)

    @property
    def only_bits(self) -> int | None:
        """Its bits, if it has no choice."""
        return self.bits[0] if len(self.bits) == 1 else None

    def simulated(self, bits: int) -> bool:
        """Tell whether rounded weights are stored in 16 bits, because the layout does not pack these."""
        return bits not in self.layout.bits


GEMM = Layout(
    name="awq",
    marks={"quant_method": "awq"},
    bits=(4,),
    linear_bytes=gemm_bytes,
    vllm={"bits": 4, "zero_point": True, "version": "gemm"},
    skipped="modules_to_not_convert",
)
NF4 = Layout(
    name="nf4",
    marks={"quant_method": "bitsandbytes", "load_in_4bit": True},
    bits=(4,),
    linear_bytes=lambda bits, group, outputs, inputs: nf4_bytes(bits, NF4_BLOCK, outputs, inputs),
    vllm={"load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"},
    skipped="llm_int8_skip_modules",
)
INT8 = Layout(
    name="int8",
    marks={"quant_method": "bitsandbytes", "load_in_8bit": True},
    bits=(8,),
    linear_bytes=int8_bytes,
    unpacked_bytes=lambda weights, itemsize: 0,  # it multiplies without unpacking
    vllm={"load_in_4bit": False, "llm_int8_has_fp16_weight": False},
    skipped="llm_int8_skip_modules",
    one_by_one=0.1,  # 16 bits for input columns that exceed 6 in any of the tokens at hand
)
HQQ = Layout(
    name="hqq",
    marks={"quant_method": "prunella-hqq"},
    bits=(2, 3, 4, 8),
    linear_bytes=hqq_bytes,
    unpacked_bytes=lambda weights, itemsize: 6 * weights,  # its arithmetic holds three copies in 16 bits
    reader="actors.quantizers.hqq",
)
COMPRESSED_TENSORS = Layout(
    name="mixed",
    marks={"quant_method": "compressed-tensors"},
    bits=(3, 4, 8),
    linear_bytes=compressed_tensors_bytes,
    vllm={"format": "pack-quantized"},
)
# vllm: what AutoAWQConfig, BitsAndBytesConfig and CompressedTensorsConfig ask for, in
# vllm/model_executor/layers/quantization.
METHODS: dict[str, Method] = {
    "awq": Method(
        words="activation-aware: scales and clipping are searched on calibration conversations",
        function="actors.quantizers.awq:quantize_awq",
        bits=(2, 3, 4, 8),
        layout=GEMM,
        marker="s",
        groups=1,
        calibrated=True,
        rescales=True,
        mixes=True,
        check="actors.quantizers.structure:check_awq",
    ),
    "nf4": Method(
        words="bitsandbytes, in blocks of 64",
        function="actors.quantizers.bnb:quantize_bnb",
        bits=(4,),
        layout=NF4,
        marker="^",
        block=NF4_BLOCK,
    ),
    "int8": Method(
        words="bitsandbytes, a scale a row",
        function="actors.quantizers.bnb:quantize_bnb",
        bits=(8,),
        layout=INT8,
        marker="D",
    ),
    "hqq": Method(
        words="half-quadratic",
        function="actors.quantizers.hqq:quantize_hqq",
        bits=(2, 3, 4, 8),
        layout=HQQ,
        marker="v",
        groups=8,
        slopes={**SLOPES, 2: (0.08, 0.9)},
    ),
    "rtn": Method(
        words="round to nearest",
        function="actors.quantizers.rtn:quantize_rtn",
        bits=(2, 3, 4, 8),
        layout=GEMM,
        marker="P",
        groups=1,
        mixes=True,
    ),
}


def find_method(name: str, besides: str = "") -> Method:
    """Return a method by its name; ValueError names those that exist, after `besides`."""
    if name not in METHODS:
        raise ValueError(f"Unknown quantizer {name!r}: choose {besides}{', '.join(METHODS)}.")
    return METHODS[name]


def bits_of(name: str, chosen: int) -> int:
    """Return the bits of a method ("none": 16): its only ones, else the `chosen`."""
    return 16 if name == "none" else find_method(name, "none, ").only_bits or chosen


def known_bits() -> list[int]:
    """Return all bits that a weight may have, fewest first; 16: it is not rounded."""
    return sorted({16, *(bits for method in METHODS.values() for bits in method.bits)})


def for_bits(bounds: Mapping[int, T], bits: int) -> T:
    """Return what `bounds` has for these bits; if it has nothing, the wider bound of the next fewer bits."""
    return bounds[max((each for each in bounds if each <= bits), default=min(bounds))]


def layouts() -> list[Layout]:
    """Return every layout once: those of the methods, and that of layers with bits of their own."""
    return list(
        {layout.name: layout for layout in (*(m.layout for m in METHODS.values()), COMPRESSED_TENSORS)}.values()
    )


def find_layout(stored: Mapping[str, Any] | None) -> Layout | None:
    """Return the layout of a checkpoint's quantization_config; None: there is none, or it is not known here."""
    return next((each for each in layouts() if stored and each.marks and each.marks.items() <= stored.items()), None)


def find_methods(stored: Mapping[str, Any] | None, simulated: Mapping[str, Any] | None) -> list[Method]:
    """Return the methods that may have rounded a checkpoint: by its quantization_config, or its entry SIMULATED.

    Packed weights tell their layout alone: all methods that share it may have made them.
    """
    if simulated:
        return [find_method(simulated["method"])]
    layout = find_layout(stored)
    if layout is COMPRESSED_TENSORS:
        return [method for method in METHODS.values() if method.mixes]
    return [method for method in METHODS.values() if method.layout is layout]


def load_function(target: str) -> Callable:
    """Return the function that "module:function" names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
