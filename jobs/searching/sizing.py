"""What actors.estimate needs to know of a setting: the model of the config, layers to remove, bits."""

from collections.abc import Sequence
from pathlib import Path

from jobs.config.schema import Config
from jobs.core.run import Run

_PUBLISHED = Path(__file__).resolve().parents[2] / "configs"


_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


def config_file(config: Config) -> Path | None:
    """Return the config.json to read, None if only the hub has it; ValueError: estimate.architecture has none."""
    architecture = config.estimate.architecture
    if architecture is not None:
        path = Path(architecture).expanduser()
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"No config.json at estimate.architecture {architecture!r}: give the file, or its folder.")
        return file
    model_file = Path(config.model.path).expanduser() / "config.json"
    published = _PUBLISHED / config.model.path / "config.json"
    return next((path for path in (model_file, published) if path.is_file()), None)


def model_config(run: Run):
    """Return (the LLaVA config to estimate, where it is from). ValueError, with the remedy: it cannot be read."""
    from actors.checkpoint.config import read_config

    path = config_file(run.config)
    if path is None:
        try:
            return run.base_config(), run.config.model.path
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{reason} A config.json alone is enough here: --estimate.architecture FILE.") from None
    return read_config(path, trust_remote_code=run.config.model.trust_remote_code), str(path)


def removals(config: Config, windows: Sequence[int | None]) -> list[tuple[list[int], bool]]:
    """Return (layers to remove, whether the config lists them) for all of estimate.removed; windows: of the layers.

    A count takes the first of prune.order; without one, layers with a sliding window, whose cache is smaller, and then
    the last ones: where layers differ, the estimate is the largest that this count can have. ValueError: a set leaves
    no layer, or has one that does not exist.
    """
    from actors.checkpoint.pruning import check_removal

    wanted = config.prune.layers if config.estimate.removed is None else config.estimate.removed
    layers = len(windows)
    order = config.prune.order or sorted(range(layers), key=lambda layer: (windows[layer] is None, -layer))
    sets = []
    for each in wanted if isinstance(wanted, list) else [wanted]:
        if isinstance(each, int) and not 0 <= each < layers:
            raise ValueError(f"Cannot remove {each} layers: the model has {layers}, and at least one must stay.")
        if isinstance(each, int) and each > len(order):
            raise ValueError(
                f"prune.order names {len(order)} layers, but {each} are to be removed: give them as [[...]]."
            )
        is_listed = isinstance(each, list) or config.prune.order is not None
        sets.append((check_removal(each if isinstance(each, list) else order[:each], layers), is_listed))
    return sets


def make_setting(config: Config, method: str, bits: tuple[int, ...], least_images: int = 0):
    """Return the Setting for `actors.estimate.estimate`: a method, every layer's bits, and the rest from the config."""
    from actors.estimate import Setting

    wanted = config.estimate
    return Setting(
        bits=bits,
        method=method,
        group_size=config.quantize.group_size,
        batch=wanted.batch,
        images=max(wanted.images, least_images),
        context=wanted.context,
        decode_tokens=wanted.decode_tokens or config.generation.max_new_tokens,
        dtype_bytes=_ITEMSIZE[config.model.dtype],
        devices=wanted.devices or max(1, int(config.replicas.gpus)),
    )
