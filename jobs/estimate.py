"""Estimate what a setting takes before a GPU is used: parameters, weights, key/value cache, working memory.

    python -m jobs.estimate --config configs/llava-1.5-7b-dermnet.yaml --removed 7 --quantizer awq --json
    python -m jobs.estimate --config configs/llava-1.5-7b-dermnet.yaml --removed '[0, 2, 7]' --quantizer '[none, awq]'
    python -m jobs.estimate --estimate.architecture my/config.json --removed '[[23, 4]]' --estimate.batch 8

Only config.json is read, no weights: that of model.path, or --estimate.architecture. configs/OWNER/NAME/config.json
holds it for the hub models in configs/, so nothing is downloaded. Every combination of removed and quantizer is a row:
total = weights + cache + activations, in GiB (2^30 bytes), as torch allocates them for plain generate with sdpa
attention. The prompt is text alone, as in the paper's tables; total_with_image_gib is the total with an image. The CUDA
context (--estimate.cuda_context_gib) and the reserve of torch's allocator come on top. Bits and group size are those of
quantize; weights that are not quantized have model.dtype.
"""

import json
from collections.abc import Sequence

from actors.quantizers.table import bits_of
from jobs.config.schema import Config
from jobs.core.command import main
from jobs.core.run import Run
from jobs.core.text import GIB, align
from jobs.searching.sizing import make_setting, model_config, removals

SHORTHANDS = {"removed": "estimate.removed", "quantizer": "estimate.quantizer", "json": "estimate.json_rows"}


def checked_bits(config: Config, model, method: str) -> int:
    """Return a method's bits. ValueError: no such method, bits or group size, or layers that do not fit them."""
    from actors.quantizers.structure import check_quantizable
    from actors.specs import QuantizeSettings

    wanted = config.quantize
    bits = bits_of(method, wanted.bits)
    if method != "none":
        check_quantizable(model, QuantizeSettings(method, bits, wanted.group_size, wanted.clip, wanted.awq_search))
    return bits


def rows(run: Run) -> list[dict]:
    """Return a row per setting, sizes in GiB."""
    from actors.estimate import architecture, estimate, uniform
    from actors.narrowing.narrower import narrow_config

    config = run.config
    model, source = model_config(run)
    shapes = architecture(model, config.model.trust_remote_code)
    if config.estimate.width < 1:
        model = narrow_config(model, config.estimate.width, config.quantize.group_size)
        shapes = architecture(model, config.model.trust_remote_code)
    wanted = config.quantize.method if config.estimate.quantizer is None else config.estimate.quantizer
    methods = [(each, checked_bits(config, model, each)) for each in (wanted if isinstance(wanted, list) else [wanted])]
    table = []
    for removed, is_listed in removals(config, [layer.window for layer in shapes.layers]):
        for method, bits in methods:
            setup = make_setting(config, method, uniform(len(shapes.layers), removed, bits))
            layers = {"removed": len(removed), "removed_layers": removed if is_listed else None}
            with_image = estimate(shapes, make_setting(config, method, setup.bits, least_images=1))
            table.append({**layers, **row(estimate(shapes, setup), with_image, setup, bits, config, source)})
    return table


def row(sizes: dict, with_image: dict, setup, bits: int, config: Config, source: str) -> dict:
    """Return an estimate's row: quantizer, sizes in GiB, assumptions; with_image: the sizes with an image."""
    gib = {name: sizes[f"{name}_bytes"] / GIB for name in ("weight", "kv_cache", "activation", "total", "device")}
    return {
        "quantizer": setup.method,
        "bits": bits,
        "simulated": sizes["simulated"],
        "params": sizes["params"],
        **{f"{name}_gib": round(value, 6) for name, value in gib.items()},
        "total_with_image_gib": round(with_image["total_bytes"] / GIB, 6),
        "weight_parts_gib": {name: round(count / GIB, 6) for name, count in sizes["parts"].items()},
        "moments_gib": {name: round(count / GIB, 6) for name, count in sizes["phases"].items()},
        "assumptions": {
            "architecture": source,
            "width": config.estimate.width,
            "dtype": config.model.dtype,
            "group_size": setup.group_size,
            "batch": setup.batch,
            "images": setup.images,
            "context": sizes["context"],
            "decode_tokens": setup.decode_tokens,
            "devices": setup.devices,
            "unpacked_linear_gib": round(sizes["workspace_bytes"] / GIB, 6),
            "cuda_context_gib": config.estimate.cuda_context_gib,
        },
    }


def format_rows(table: Sequence[dict]) -> str:
    """Lay rows out for a terminal."""
    lines = [["removed", "quantizer", "bits", "params B", "weights", "cache", "activations", "total GiB", "with image"]]
    is_spread = table[0]["assumptions"]["devices"] > 1
    lines[0] += ["fullest GPU"] if is_spread else []
    for each in table:
        cells = [str(each["removed"]), each["quantizer"], f"{each['bits']}{'*' if each['simulated'] else ''}"]
        cells.append(f"{each['params'] / 1e9:.4f}")
        sizes = (
            "weight_gib",
            "kv_cache_gib",
            "activation_gib",
            "total_gib",
            "total_with_image_gib",
            *(["device_gib"] if is_spread else []),
        )
        lines.append(cells + [f"{each[size]:.4f}" for size in sizes])
    text = align(lines)
    if any(each["simulated"] for each in table):
        text.append("* simulated, for studies of accuracy: counted at these bits, but stored in 16.")
    assumed = table[0]["assumptions"]
    text += [
        f"Batch {assumed['batch']}, prompt of {assumed['context']} tokens with {assumed['images']} image(s), "
        f"{assumed['decode_tokens']} new tokens, {assumed['dtype']}, groups of {assumed['group_size']}; "
        f"{assumed['architecture']}.",
        f"Each GPU's context (about {assumed['cuda_context_gib']:g} GiB) and the allocator's reserve come on top.",
    ]
    return "\n".join(text)


def job(run: Run) -> None:
    """Print the rows."""
    from actors.checkpoint.loading import quiet

    quiet()
    table = rows(run)
    if run.config.estimate.json_rows:
        for each in table:
            print(json.dumps(each), flush=True)
    else:
        print(format_rows(table), flush=True)


if __name__ == "__main__":
    main(__doc__, job, SHORTHANDS)
