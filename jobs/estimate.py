"""Say what a setting takes, before a GPU is used: parameters, weights, key/value cache, working memory.

    python -m jobs.estimate --config configs/llava-1.5-7b-dermnet.yaml --removed 7 --quantizer awq --json
    python -m jobs.estimate --config configs/llava-1.5-7b-dermnet.yaml --removed '[0, 2, 7]' --quantizer '[none, awq]'
    python -m jobs.estimate --estimate.architecture my/config.json --removed '[[23, 4]]' --estimate.batch 8

Only config.json is read, no weights: that of model.path, or of --estimate.architecture. Those of the hub models in
configs/ are kept in configs/OWNER/NAME/config.json, so that nothing is downloaded. Every combination of removed and
quantizer is a row: total = weights + cache + activations, in GiB (2^30 bytes), as torch allocates them for plain
generate with sdpa attention. A question of text is counted, which fits the paper's tables; total_with_image_gib is what
a question about an image takes. What a CUDA context takes (--estimate.cuda_context_gib) and what torch's allocator
keeps in reserve come on top. Bits and group size are those of quantize; weights that are not rounded have model.dtype.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from jobs.config.schema import Config
from jobs.core.command import main
from jobs.core.run import Run

GIB = 2**30
SHORTHANDS = {"removed": "estimate.removed", "quantizer": "estimate.quantizer", "json": "estimate.json_rows"}
_PUBLISHED = Path(__file__).resolve().parent.parent / "configs"
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_BITS = {"none": 16, "nf4": 4, "int8": 8}  # the others have those of quantize.bits


def config_file(config: Config) -> Path | None:
    """Return the config.json to read, None if the hub must be asked; ValueError: there is none where one was given."""
    given = config.estimate.architecture
    if given is not None:
        path = Path(given).expanduser()
        found = path / "config.json" if path.is_dir() else path
        if not found.is_file():
            raise ValueError(f"No config.json at estimate.architecture {given!r}: give the file, or its folder.")
        return found
    own = Path(config.model.path).expanduser() / "config.json"
    published = _PUBLISHED / config.model.path / "config.json"
    return next((path for path in (own, published) if path.is_file()), None)


def model_config(run: Run):
    """Return (the LLaVA config to estimate, where it is from). ValueError, with the remedy: it cannot be had."""
    from transformers import AutoConfig

    path = config_file(run.config)
    if path is None:
        try:
            return run.base_config(), run.config.model.path
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{reason} A config.json alone is enough here: --estimate.architecture FILE.") from None
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=run.config.model.trust_remote_code), str(path)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"{str(path)!r} is no config.json that transformers knows: {reason}.") from None


def removals(config: Config, windows: Sequence[int | None]) -> list[tuple[list[int], bool]]:
    """Return the sets of layers to remove, and whether it is known that it is these; `windows` are the layers' own.

    A count takes the first of prune.order; without one, layers with a sliding window, whose cache is smaller, and then
    the last ones: where layers differ, the estimate is the largest that this count can have. ValueError: a set leaves
    no layer, or has one that is not there.
    """
    from actors.checkpoint.pruning import check_removal

    given = config.estimate.removed
    wanted = config.prune.layers if given is None else given
    layers = len(windows)
    order = config.prune.order or sorted(range(layers), key=lambda layer: (windows[layer] is None, -layer))
    sets = []
    for each in wanted if isinstance(wanted, list) else [wanted]:
        if isinstance(each, int) and not 0 <= each < layers:
            raise ValueError(f"Cannot remove {each} layers: the model has {layers}, and at least one must stay.")
        if isinstance(each, int) and each > len(order):
            raise ValueError(f"prune.order names {len(order)} layers, but {each} are to go: give them as [[...]].")
        known = isinstance(each, list) or config.prune.order is not None
        sets.append((check_removal(each if isinstance(each, list) else order[:each], layers), known))
    return sets


def setting(config: Config, method: str, bits: tuple[int, ...], least_images: int = 0):
    """Return what `actors.estimate.estimate` takes: a method, every layer's bits, and the rest from the config."""
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


def checked_bits(config: Config, model, method: str) -> int:
    """Return a method's bits. ValueError: no such method, bits or group size, or the model's layers are not for it."""
    from actors.quantizers.structure import check_quantizable
    from actors.specs import QUANTIZER_BITS, QuantizeSettings

    if method not in ("none", *QUANTIZER_BITS):
        raise ValueError(f"Unknown quantizer {method!r}: choose none, {', '.join(QUANTIZER_BITS)}.")
    wanted = config.quantize
    bits = _BITS.get(method, wanted.bits)
    if method != "none":
        check_quantizable(model, QuantizeSettings(method, bits, wanted.group_size, wanted.clip, wanted.awq_search))
    return bits


def rows(run: Run) -> list[dict]:
    """Return a row per setting, sizes in GiB."""
    from actors.estimate import architecture, estimate, narrow_config, uniform

    config = run.config
    model, source = model_config(run)
    shapes = architecture(model, config.model.trust_remote_code)
    if config.estimate.width < 1:
        model = narrow_config(model, config.estimate.width, config.quantize.group_size)
        shapes = architecture(model, config.model.trust_remote_code)
    wanted = config.quantize.method if config.estimate.quantizer is None else config.estimate.quantizer
    methods = [(each, checked_bits(config, model, each)) for each in (wanted if isinstance(wanted, list) else [wanted])]
    found = []
    for removed, known in removals(config, [layer.window for layer in shapes.layers]):
        for method, bits in methods:
            asked = setting(config, method, uniform(len(shapes.layers), removed, bits))
            who = {"removed": len(removed), "removed_layers": removed if known else None}
            seeing = estimate(shapes, setting(config, method, asked.bits, least_images=1))
            found.append({**who, **row(estimate(shapes, asked), seeing, asked, bits, config, source)})
    return found


def row(sizes: dict, seeing: dict, asked, bits: int, config: Config, source: str) -> dict:
    """Lay one estimate out: the quantizer, sizes in GiB, and what was assumed; seeing: the sizes with an image."""
    gib = {name: sizes[f"{name}_bytes"] / GIB for name in ("weight", "kv_cache", "activation", "total", "device")}
    return {
        "quantizer": asked.method,
        "bits": bits,
        "simulated": sizes["simulated"],
        "params": sizes["params"],
        **{f"{name}_gib": round(value, 6) for name, value in gib.items()},
        "total_with_image_gib": round(seeing["total_bytes"] / GIB, 6),
        "weight_parts_gib": {name: round(count / GIB, 6) for name, count in sizes["parts"].items()},
        "moments_gib": {name: round(count / GIB, 6) for name, count in sizes["phases"].items()},
        "assumptions": {
            "architecture": source,
            "width": config.estimate.width,
            "dtype": config.model.dtype,
            "group_size": asked.group_size,
            "batch": asked.batch,
            "images": asked.images,
            "context": sizes["context"],
            "decode_tokens": asked.decode_tokens,
            "devices": asked.devices,
            "unpacked_linear_gib": round(sizes["workspace_bytes"] / GIB, 6),
            "cuda_context_gib": config.estimate.cuda_context_gib,
        },
    }


def format_rows(found: Sequence[dict]) -> str:
    """Lay rows out for a terminal."""
    lines = [["removed", "quantizer", "bits", "params B", "weights", "cache", "activations", "total GiB", "with image"]]
    several = found[0]["assumptions"]["devices"] > 1
    lines[0] += ["fullest GPU"] if several else []
    for each in found:
        cells = [str(each["removed"]), each["quantizer"], f"{each['bits']}{'*' if each['simulated'] else ''}"]
        cells.append(f"{each['params'] / 1e9:.4f}")
        sizes = (
            "weight_gib",
            "kv_cache_gib",
            "activation_gib",
            "total_gib",
            "total_with_image_gib",
            *(["device_gib"] if several else []),
        )
        lines.append(cells + [f"{each[size]:.4f}" for size in sizes])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    if any(each["simulated"] for each in found):
        text.append("* counted at these bits, but stored in 16: simulated, for studies of accuracy.")
    told = found[0]["assumptions"]
    text += [
        f"Batch {told['batch']}, prompt of {told['context']} tokens with {told['images']} image(s), "
        f"{told['decode_tokens']} new tokens, {told['dtype']}, groups of {told['group_size']}; {told['architecture']}.",
        f"Each GPU's context (about {told['cuda_context_gib']:g} GiB) and the allocator's reserve come on top.",
    ]
    return "\n".join(text)


def job(run: Run) -> None:
    """Print the rows."""
    from actors.checkpoint.loading import quiet

    quiet()
    found = rows(run)
    if run.config.estimate.json_rows:
        for each in found:
            print(json.dumps(each), flush=True)
    else:
        print(format_rows(found), flush=True)


if __name__ == "__main__":
    main(__doc__, job, SHORTHANDS)
