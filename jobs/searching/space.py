"""The settings of a search: how many layers go, how the model is fine-tuned after it, how it is rounded."""

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from actors.quantizers.table import METHODS
from jobs.config.schema import Config

_MODES = ("--resume", "--search.resume", "--resolve-only", "--search.resolve_only", "--search.resolve-only")


@dataclass(frozen=True)
class Setting:
    """One point of the space; bits: of the decoder's linears, 16 where nothing is rounded, 0 where layers differ."""

    depth: int
    recovery: str
    quantizer: str
    bits: int
    name: str = ""  # what people call it, if not by the others

    @property
    def key(self) -> tuple[str, ...]:
        """What names it in Tune: one value for each thing that is searched."""
        return str(self.depth), self.recovery, f"{self.quantizer}{self.bits}"

    @property
    def label(self) -> str:
        """What names it for people."""
        if self.name:
            return self.name
        parts = [f"{self.depth} out"] if self.depth else []
        parts += [self.recovery] if self.recovery != "none" else []
        parts += [f"{self.quantizer} {self.bits} bit"] if self.quantizer != "none" else []
        return ", ".join(parts) or "original"

    @property
    def simulated(self) -> bool:
        """Whether its rounded weights are stored in 16 bits: it stands for a setting that cannot be used."""
        return self.quantizer in METHODS and METHODS[self.quantizer].simulated(self.bits)

    @property
    def kernels(self) -> tuple[str, int]:
        """What multiplies its weights: of two settings with the same, the one with fewer layers is not slower."""
        if self.simulated:
            return "none", 16
        return METHODS[self.quantizer].layout.name if self.quantizer in METHODS else self.quantizer, self.bits


def space(config: Config) -> list[Setting]:
    """Return all settings in order; ValueError: bits that none of the quantizers has."""
    search = config.search
    rounded = []
    for quantizer in dict.fromkeys(search.quantizers):
        allowed = METHODS[quantizer].bits if quantizer in METHODS else (16,)
        chosen = [bits for bits in dict.fromkeys(search.bits) if bits in allowed] if len(allowed) > 1 else list(allowed)
        if not chosen:
            raise ValueError(f"search.bits {search.bits} has none that {quantizer} has: add one of {list(allowed)}.")
        rounded += [(quantizer, bits) for bits in chosen]
    return [
        Setting(depth, recovery, quantizer, bits)
        for depth in dict.fromkeys(search.depths)
        for recovery in dict.fromkeys(search.recoveries)
        for quantizer, bits in rounded
    ]


def config_of(config: Config, setting: Setting, screen: bool = False) -> Config:
    """Return the configuration of one setting; screen: that of its cheap evaluation."""
    changes: dict[str, dict] = {
        "prune": {"layers": setting.depth},
        "quantize": {"method": setting.quantizer, "bits": setting.bits},
    }
    if setting.recovery != "none":
        changes["recover"] = {"method": setting.recovery}
    if screen:
        given = config.evaluate.limit, config.search.screen_images
        limit = min(images for images in given if images is not None)
        changes["evaluate"] = {"limit": limit, "controls": False, "warmup_runs": 1, "timed_runs": 3}
    sections = {name: getattr(config, name).model_copy(update=fields) for name, fields in changes.items()}
    return config.model_copy(update=sections)


def format_command() -> str:
    """Return the command of this process, whole: it is for those who have this run folder, and not made public."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return shlex.join(["python", "-m", spec.name if spec else Path(sys.argv[0]).stem, *sys.argv[1:]])


def format_single_command(setting: Setting, run_dir: str) -> str:
    """Return the command that makes this one setting anew: this process's, with a space of one and its own folder."""
    words, rest = [], sys.argv[1:]
    while rest:
        word = rest.pop(0)
        if word.partition("=")[0] not in _MODES:
            words.append(word)
        elif "=" not in word and rest and not rest[0].startswith("--"):
            rest.pop(0)  # its value
    chosen = {"depths": setting.depth, "recoveries": setting.recovery, "quantizers": setting.quantizer}
    if setting.quantizer in METHODS and not METHODS[setting.quantizer].only_bits:
        chosen["bits"] = setting.bits
    for name, value in chosen.items():
        words += [f"--search.{name}", f"[{value}]"]
    words += ["--search.screen_images", "null", "--search.budget.memory_gib", "null"]
    words += ["--run_dir", f"{run_dir}/alone/{'-'.join(setting.key)}"]
    return shlex.join(["python", "-m", "jobs.search", *words])


def to_columns(setting: Setting) -> dict:
    """Return a setting's columns."""
    return {"setting": setting.label, **{key: value for key, value in asdict(setting).items() if key != "name"}}
