"""A checkpoint's files: which there are, their tensors one at a time, and the tensors' published names."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from actors.checkpoint.config import read_config, write_processor

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 10**9  # a shard is in memory until it is written
NOT_COPIED = ("config.json", INDEX, "manifest.json", "prunella.json")  # they describe the checkpoint's own weights


def local_folder(path: str, revision: str | None = None) -> Path:
    """Return the checkpoint's folder, downloading a hub id once."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            path, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        )
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the .safetensors files that transformers would read; ValueError: none, one is missing or damaged."""
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        files = sorted({folder / name for name in _indexed(folder)}) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{str(folder)!r} holds no .safetensors file: convert the weights (pickled ones are not loaded)."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{str(file)!r} is missing or damaged ({error}): copy or download it again.") from None
    return files


def tensor_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], Path]]:
    """Return the shape of every tensor of a checkpoint, and the file that holds it, by the names in the files."""
    shapes: dict[str, tuple[tuple[int, ...], Path]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as shard:
            shapes |= {name: (tuple(shard.get_slice(name).get_shape()), file) for name in shard.keys()}  # noqa: SIM118
    return shapes


@contextmanager
def loadable(path: str | Path) -> Iterator[str | Path]:
    """Yield a path that transformers can load: `path`, or a folder of links to its files while the block runs.

    transformers fails at shards without an index, and at an index without `metadata`, which it does not need. The
    folder of links has a complete index.
    """
    folder = Path(path)
    if not folder.is_dir() or (folder / "model.safetensors").is_file():
        yield path
        return
    index = json.loads((folder / INDEX).read_text()) if (folder / INDEX).is_file() else {}
    if "metadata" in index:
        yield path
        return
    where = {name: file.name for name, (_, file) in tensor_shapes(folder).items()}
    with tempfile.TemporaryDirectory() as links:
        for file in folder.resolve().iterdir():
            if file.name != INDEX:
                (Path(links) / file.name).symlink_to(file)
        (Path(links) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        yield links


def _indexed(folder: Path) -> list[str]:
    """Return the files that a checkpoint's index names, [] without an index; ValueError: the index is invalid."""
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        files = list(json.loads(index.read_text())["weight_map"].values())
        if not all(isinstance(file, str) for file in files):
            raise TypeError
        return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{str(index)!r} has no weight_map: copy or download it again.") from None


def iterate_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every (name, tensor) of a checkpoint, one at a time, shard by shard."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as shard:
            names = list(shard.keys())
        for name in names:
            yield name, read_tensor(file, name)


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """Return one tensor of a file, mapped by itself: its pages are freed with the tensor, not with the file."""
    with safe_open(file, framework="pt") as shard:
        return shard.get_tensor(name)


def tensor_places(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return where a checkpoint's tensors are, by their published names: (file, name in it)."""
    places: dict[str, tuple[Path, str]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as shard:
            places |= {published_name(name): (file, name) for name in shard.keys()}  # noqa: SIM118 (not iterable)
    return places


def published_name(name: str) -> str:
    """Return a LLaVA tensor's name as the llava-hf checkpoints spell it, which vLLM and older transformers expect.

    transformers 5 saves models built from a config as vision_tower.encoder... or model.language_model...
    """
    name = re.sub(r"^model\.(language_model|vision_tower|multi_modal_projector)\.", r"\1.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def published_layer(name: str) -> tuple[int, str] | None:
    """Return (number of the decoder layer, name in it) of a tensor's published name; None: it is in no layer."""
    match = re.match(r"language_model\.model\.layers\.(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else None


def publish_names(folder: Path) -> None:
    """Rewrite a saved checkpoint whose tensors have other names than the published ones."""
    files = weight_files(folder)
    if all(published_name(name) == name for name, _ in iterate_tensors(folder)):
        return
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        renamed = Path(temporary)
        write_tensors(renamed, iterate_tensors(folder))
        for file in [*files, folder / INDEX]:
            file.unlink(missing_ok=True)
        for file in renamed.iterdir():
            file.rename(folder / file.name)


def write_tensors(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as model.safetensors, or as shards of at most `shard_bytes` with an index; one shard in memory.

    Their names become the published ones.
    """
    shards: list[Path] = []
    where: dict[str, int] = {}
    held: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        shards.append(folder / f"shard-{len(shards)}.tmp")
        save_file(held, shards[-1], metadata={"format": "pt"})
        where.update(dict.fromkeys(held, len(shards) - 1))
        held, size = {}, 0

    for name, tensor in ((published_name(name), tensor) for name, tensor in tensors):
        count = tensor.numel() * tensor.element_size()
        if held and size + count > shard_bytes:
            flush()
        held[name] = tensor.contiguous()
        size += count
        total += count
    flush()
    if len(shards) == 1:
        _publish(shards[0], folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        _publish(shard, folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in where.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def _publish(temporary: Path, final: Path) -> None:
    temporary.chmod(0o644)
    temporary.rename(final)


def copy_companions(source: Path, target: Path) -> None:
    """Copy everything but weights, config.json and cards: tokenizer, processor, chat template, generation config.

    Entries that the processor's file lacks are added to the copy, from config.json.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt") and file.name not in NOT_COPIED:
            shutil.copyfile(file, target / file.name)
    write_processor(target, read_config(source))


def stored_bytes(path: str, revision: str | None = None) -> int:
    """Return the bytes of a checkpoint's tensors, those that rounding adds included, from the files' headers."""
    total = 0
    for file in weight_files(local_folder(path, revision)):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += sum(e["data_offsets"][1] - e["data_offsets"][0] for n, e in header.items() if n != "__metadata__")
    return total


def stored_dtype(path: str, revision: str | None = None) -> torch.dtype:
    """Return the type a checkpoint's weights are stored in, float16 where its config does not say."""
    config = read_config(local_folder(path, revision))
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype or "float16"))
