"""The settings of a search: number of layers removed, width of the others, fine-tuning, quantizer and bits."""

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from actors.quantizers.table import METHODS
from actors.training.settings import read_recovery
from jobs.config.schema import Config

_MODES = ("--resume", "--search.resume", "--resolve-only", "--search.resolve_only", "--search.resolve-only")


@dataclass(frozen=True)
class Setting:
    """One point of the space; bits: of the decoder's linears, 16 where nothing is rounded, 0 where layers differ."""

    depth: int
    recovery: str
    quantizer: str
    bits: int
    name: str = ""  # its name for people, if not made of the others
    width: float = 1.0  # share of heads and channels that every layer keeps

    @property
    def key(self) -> tuple[str, ...]:
        """Its key in Ray Tune: its shape, recovery and quantizer."""
        shape = str(self.depth) if self.width == 1 else f"{self.depth}x{self.width:g}"
        return shape, self.recovery, f"{self.quantizer}{self.bits}"

    @property
    def label(self) -> str:
        """Its name for people."""
        if self.name:
            return self.name
        parts = [f"{self.depth} out"] if self.depth else []
        parts += [f"width {self.width:g}"] if self.width < 1 else []
        parts += [self.recovery] if self.recovery != "none" else []
        parts += [f"{self.quantizer} {self.bits} bit"] if self.quantizer != "none" else []
        return ", ".join(parts) or "original"

    @property
    def simulated(self) -> bool:
        """Whether its rounded weights are stored in 16 bits: it is for studies, not for use."""
        return self.quantizer in METHODS and METHODS[self.quantizer].simulated(self.bits)

    @property
    def kernels(self) -> tuple[str, int]:
        """The kernels that multiply its weights: with the same ones, a setting with fewer layers is not slower."""
        if self.simulated:
            return "none", 16
        return METHODS[self.quantizer].layout.name if self.quantizer in METHODS else self.quantizer, self.bits


def space(config: Config) -> list[Setting]:
    """Return all settings in order; ValueError: a quantizer has none of search.bits."""
    search = config.search
    rounded = []
    for quantizer in dict.fromkeys(search.quantizers):
        allowed = METHODS[quantizer].bits if quantizer in METHODS else (16,)
        chosen = [bits for bits in dict.fromkeys(search.bits) if bits in allowed] if len(allowed) > 1 else list(allowed)
        if not chosen:
            raise ValueError(f"search.bits {search.bits} has none that {quantizer} has: add one of {list(allowed)}.")
        rounded += [(quantizer, bits) for bits in chosen]
    settings = [
        Setting(depth, recovery, quantizer, bits, width=width)
        for grid in search.grids
        for depth in grid.depths
        for width in grid.widths
        for recovery in grid.recoveries
        for quantizer, bits in rounded
    ]
    return list(dict.fromkeys(settings))


def config_of(config: Config, setting: Setting, screen: bool = False) -> Config:
    """Return the configuration of one setting; screen: that of its screening evaluation."""
    changes: dict[str, dict] = {
        "prune": {"layers": setting.depth, "width": setting.width},
        "quantize": {"method": setting.quantizer, "bits": setting.bits},
    }
    if setting.recovery != "none":
        changes["recover"] = read_recovery(setting.recovery)
    if screen:
        limits = config.evaluate.limit, config.search.screen_images
        limit = min(images for images in limits if images is not None)
        changes["evaluate"] = {"limit": limit, "controls": False, "warmup_runs": 1, "timed_runs": 3}
    sections = {name: getattr(config, name).model_copy(update=fields) for name, fields in changes.items()}
    return config.model_copy(update=sections)


def format_command() -> str:
    """Return the whole command of this process: it stays in the run folder, and is not made public."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return shlex.join(["python", "-m", spec.name if spec else Path(sys.argv[0]).stem, *sys.argv[1:]])


def format_single_command(setting: Setting, run_dir: str) -> str:
    """Return the command that makes this setting anew: this process's, with a space of one and its own folder."""
    words, rest = [], sys.argv[1:]
    while rest:
        word = rest.pop(0)
        if word.partition("=")[0] not in _MODES:
            words.append(word)
        elif "=" not in word and rest and not rest[0].startswith("--"):
            rest.pop(0)  # its value
    chosen = {
        "depths": setting.depth,
        "widths": setting.width,
        "recoveries": setting.recovery,
        "quantizers": setting.quantizer,
    }
    if setting.quantizer in METHODS and not METHODS[setting.quantizer].only_bits:
        chosen["bits"] = setting.bits
    for name, value in chosen.items():
        words += [f"--search.{name}", f"[{value}]"]
    words += ["--search.also", "[]", "--search.screen_images", "null", "--search.budget.memory_gib", "null"]
    words += ["--run_dir", f"{run_dir}/alone/{'-'.join(setting.key)}"]
    return shlex.join(["python", "-m", "jobs.search", *words])


def to_columns(setting: Setting) -> dict:
    """Return a setting's columns."""
    return {"setting": setting.label, **{key: value for key, value in asdict(setting).items() if key != "name"}}
