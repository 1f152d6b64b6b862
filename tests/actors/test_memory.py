"""What does not fit is refused before it is loaded; a replica stays within its share of a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

import actors.checkpoint.loading
import actors.memory
from actors.checkpoint.loading import load_model
from actors.checkpoint.tensors import stored_bytes
from actors.memory import GIB, TEXT_TOKENS, cached_bytes, claim_devices, free_bytes, weight_bytes
from tests.tiny import LAYERS, PATCHES, WIDTH, processor_for, tiny_config, tiny_model

COMMON = {"revision": None, "trust_remote_code": False}
PARAMETERS = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * 2 * WIDTH)  # of the decoder layers' matrices


def needed(path: str, itemsize: int) -> int:
    """The tiny model's numbers and one row: an image, 512 tokens, two vectors of width 64 in 5 layers."""
    count = sum(tensor.numel() for tensor in load_file(Path(path) / "model.safetensors").values())
    return itemsize * (count + (PATCHES + TEXT_TOKENS) * 2 * LAYERS * WIDTH)


@pytest.fixture
def memory(monkeypatch):
    """Main memory of which a test says how much is free."""
    found = SimpleNamespace(available=0)
    monkeypatch.setattr(actors.memory.psutil, "virtual_memory", lambda: found)
    return found


def test_weights_are_counted_from_the_config(tiny_path):
    """What the files hold, at the bytes of the compute type; rounded while loading, the layers at 4 or 8 bits."""
    config = AutoConfig.from_pretrained(tiny_path)
    assert weight_bytes(tiny_path, config, 4, None, COMMON) == stored_bytes(tiny_path)
    assert weight_bytes(tiny_path, config, 2, None, COMMON) == stored_bytes(tiny_path) // 2
    for bits, left in ((4, PARAMETERS // 2), (8, PARAMETERS)):
        rounded = weight_bytes(tiny_path, config, 2, bits, COMMON)
        assert stored_bytes(tiny_path) // 2 - rounded == 2 * PARAMETERS - left
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    assert weight_bytes(tiny_path, config, 2, None, COMMON) == stored_bytes(tiny_path)


def test_keys_and_values_by_hand():
    """Two heads of 16 for four of queries: 5 layers, keys and values, 2 bytes each."""
    assert cached_bytes(tiny_config("clip-qwen2").text_config, LAYERS, 2) == 5 * 2 * 2 * 16 * 2
    assert cached_bytes(tiny_config("clip-phi").text_config, 1, 4) == 2 * 4 * 16 * 4


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float16", 2)])
def test_too_large_is_refused_before_loading(tiny_path, memory, monkeypatch, dtype, itemsize):
    """One byte less than needed: both amounts and the remedies are said, and no weight was read."""
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    memory.available = needed(tiny_path, itemsize) - 1
    with pytest.raises(ValueError, match="free in main memory") as error:
        load_model(tiny_path, dtype, device="cpu")
    for word in (
        f"needs {needed(tiny_path, itemsize) / GIB:.2f} GiB",
        "float16",
        "quantized",
        "replicas.gpus",
        "fewer",
    ):
        assert word in str(error.value)


def test_what_just_fits_is_loaded(tiny_path, memory):
    """Exactly the needed bytes, and in float16 half of them."""
    memory.available = needed(tiny_path, 4)
    assert load_model(tiny_path, device="cpu").dtype == torch.float32
    memory.available = needed(tiny_path, 2)
    assert load_model(tiny_path, "float16", device="cpu").dtype == torch.float16


def test_rounding_while_loading_needs_less(tiny_path, memory):
    """QLoRA's model fits where the unrounded one does not."""
    memory.available = needed(tiny_path, 2) - PARAMETERS * 3 // 2
    with pytest.raises(ValueError, match="GiB are free"):
        load_model(tiny_path, "float16", device="cpu")
    skip = ["lm_head", "vision_tower", "multi_modal_projector"]
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
    assert load_model(tiny_path, "float16", device="cpu", quantization=settings).is_loaded_in_4bit
    memory.available -= 1
    with pytest.raises(ValueError, match="GiB are free"):
        load_model(tiny_path, "float16", device="cpu", quantization=settings)


@pytest.fixture
def gpus(monkeypatch):
    """Two pretended GPUs of 1,000 bytes, 900 free; this process has taken 100 of which it uses 60."""
    shares = {}
    stand_in = SimpleNamespace(
        device_count=lambda: 2,
        current_device=lambda: 0,
        mem_get_info=lambda device: (900, 1000),
        memory_reserved=lambda device: 100,
        memory_allocated=lambda device: 60,
        set_per_process_memory_fraction=lambda share, device: shares.__setitem__(device.index, share),
        get_per_process_memory_fraction=lambda device: shares.get(device.index, 1.0),
    )
    monkeypatch.setattr(actors.memory.torch, "cuda", stand_in)
    return shares


def test_a_fraction_caps_this_process(gpus):
    """Whole: the 900 free and the 40 reserved but unused; half: 500 less the 60 in use."""
    first = torch.device("cuda", 0)
    assert claim_devices("cuda", 1) == [first] and gpus == {0: 1.0}
    assert free_bytes(first) == 940
    assert claim_devices("cuda", 0.5) == [first] and gpus == {0: 0.5}
    assert free_bytes(first) == 440


def test_a_rank_claims_the_gpu_that_it_was_given(gpus, monkeypatch):
    monkeypatch.setattr(actors.memory.torch.cuda, "current_device", lambda: 1)
    assert claim_devices("cuda", 1) == [torch.device("cuda", 1)] and gpus == {1: 1.0}


def test_several_gpus_are_claimed_whole(gpus):
    """Two of two; a third is not there; on a CPU nothing is claimed."""
    assert [device.index for device in claim_devices("cuda", 2)] == [0, 1] and gpus == {0: 1.0, 1: 1.0}
    with pytest.raises(ValueError, match=r"given 3 GPUs, but 2 are visible here: lower replicas\.gpus"):
        claim_devices("cuda", 3)
    assert claim_devices("cpu", 2) == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0.5, {"device_map": {"": 0}}),
        (2, {"device_map": "auto", "max_memory": {0: 10**9, 1: 10**9}}),
    ],
)
def test_where_transformers_is_told_to_put_it(tiny_path, gpus, monkeypatch, count, expected):
    """One GPU takes all; over several the layers are dealt out, with no word of CPU or disk."""
    asked = {}

    def loaded(path, **kwargs):
        asked.update(kwargs)
        raise KeyboardInterrupt

    for module in (actors.checkpoint.loading, actors.memory):
        monkeypatch.setattr(module, "free_bytes", lambda device: 10**9)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", loaded)
    with pytest.raises(KeyboardInterrupt):
        load_model(tiny_path, device="cuda", gpus=count)
    assert {key: asked[key] for key in expected} == expected and "offload_folder" not in asked
    assert ("max_memory" in asked) == (count == 2)


class Dealt(BaseException):
    """Where from_pretrained would put the layers; raised before it reads a weight."""


@pytest.fixture
def dealt(tiny_path, gpus, monkeypatch):
    """Load on pretended GPUs, each with a share of the weights' bytes free: returns where the layers go, or raises."""
    deal = transformers.modeling_utils._get_device_map

    def stopped(*arguments):
        raise Dealt(deal(*arguments))

    def load(share: float, count: int) -> set:
        free = int(share * stored_bytes(tiny_path))
        for module in (actors.checkpoint.loading, actors.memory):
            monkeypatch.setattr(module, "free_bytes", lambda device: free)
        with pytest.raises(Dealt) as found:
            load_model(tiny_path, device="cuda", gpus=count)
        return set(found.value.args[0].values())

    monkeypatch.setattr(transformers.modeling_utils, "_get_device_map", stopped)
    monkeypatch.setattr(actors.memory, "TEXT_TOKENS", 0)  # keys and values outweigh so small a model
    return load


def test_the_gpus_count_together(dealt):
    """What two GPUs hold together, one does not."""
    with pytest.raises(ValueError, match=r"free on 1 GPU\(s\)"):
        dealt(0.9, 1)
    assert dealt(0.9, 2) == {0, 1}


@pytest.mark.parametrize("share", [0.54, 0.6, 0.66, 0.9])
def test_layers_that_do_not_divide_are_refused_before_loading(dealt, monkeypatch, share):
    """Two GPUs that hold the bytes together: refused, with no weight read, where transformers would leave some over."""
    with monkeypatch.context() as patch:
        patch.setattr(actors.checkpoint.loading, "_check_layers_fit", lambda *_: None)
        left_over = "disk" in dealt(share, 2)
    assert left_over == (share < 0.63)
    if left_over:
        with pytest.raises(ValueError, match=r"layer by layer.*stay on the CPU or the disk.*replicas\.gpus"):
            dealt(share, 2)
    else:
        assert dealt(share, 2) == {0, 1}


def test_no_gpus_is_the_cpu(tiny_path, monkeypatch):
    """A GPU that is visible is left alone by a replica that was given none."""
    monkeypatch.setattr(actors.checkpoint.loading, "pick_device", lambda: "cuda")
    assert next(load_model(tiny_path, gpus=0).parameters()).device.type == "cpu"


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloading_is_an_error(tiny_path, monkeypatch, place):
    """A layer left on the CPU or the disk would make every answer crawl: refused."""
    load = AutoModelForImageTextToText.from_pretrained

    def offloaded(*args, **kwargs):
        model, info = load(*args, **kwargs)
        model.hf_device_map = {"model": 0, "lm_head": place}
        return model, info

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", offloaded)
    with pytest.raises(ValueError, match=r"stay on the CPU or the disk.*replicas\.gpus"):
        load_model(tiny_path, device="cpu")


@pytest.mark.slow
def test_hub_ids_are_read_from_the_cache(tmp_path):
    """Offline, with the model in the hub's cache once, in one folder: loading needs no other files."""
    snapshot = tmp_path / "hub" / "models--some--llava" / "snapshots" / ("a" * 40)
    tiny_model("clip-llama").save_pretrained(snapshot)
    processor_for("clip").save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    before = sorted(map(str, tmp_path.rglob("*")))
    code = "import json; from actors.checkpoint.loading import *; quiet(); load_processor('some/llava'); "
    code += "print(json.dumps(sum(p.numel() for p in load_model('some/llava', device='cpu').parameters())))"
    settings = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) * 4 == stored_bytes(str(snapshot))
    weights = [path for path in sorted(map(str, tmp_path.rglob("*"))) if path.endswith(".safetensors")]
    assert weights == [path for path in before if path.endswith(".safetensors")]
