"""A Bunny becomes a stock LLaVA: the logits of its own arithmetic, its prompt and pixels; errors name the tensor."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from actors.checkpoint.bunny import TOWER_ENTRIES, translate_name
from actors.checkpoint.config import read_config
from actors.checkpoint.conversion import convert
from actors.checkpoint.intake import Intake
from actors.checkpoint.layouts import LAYOUTS
from actors.checkpoint.loading import load_processor
from actors.checkpoint.pruning import prune_checkpoint
from actors.checkpoint.tensors import published_name
from actors.memory import meta_model
from actors.narrowing.narrower import Narrower
from actors.specs import Change, Conversation, ModelSpec
from tests import bunny
from tests.gating import check
from tests.tiny import plain_inputs, plain_model

QUESTION = "Why is the lesion  dark?\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(a tiny Bunny, the stock model made of it, an image that is no square)."""
    root = tmp_path_factory.mktemp("bunny")
    source = bunny.save_bunny(root)
    convert(str(source), root / "stock")
    noise = torch.randint(256, (70, 101, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(root / "image.png")
    return source, root / "stock", root / "image.png"


def test_logits_are_those_of_bunnys_arithmetic(folders):
    source, stock, file = folders
    model, processor, image = plain_model(str(stock)), load_processor(str(stock)), Image.open(file)
    inputs = plain_inputs(processor, Conversation("a", str(file), QUESTION, ""))
    assert torch.allclose(inputs["pixel_values"], bunny.pixels(image), atol=1e-6)
    with torch.inference_mode():
        found = model(**inputs).logits[0]
    expected = bunny.logits(source, image, QUESTION)
    assert found.shape == (len(expected), expected.shape[1] + 1)
    assert (found[:, :-1] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found[:, -1] - expected.mean(-1)).abs().max() <= 1e-5 * expected.abs().max()  # never the largest
    assert inputs["input_ids"].eq(model.config.image_token_id).sum() == bunny.PATCHES


def test_prompts_are_bunnys(folders):
    """The README's for one question; in a longer conversation answers end as conv_bunny's do."""
    processor = load_processor(str(folders[1]))
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "So."}]}
    again = {"role": "user", "content": [{"type": "text", "text": "And?"}]}
    one = processor.apply_chat_template([user], add_generation_prompt=True)
    assert one == bunny.prompt("Why?")
    long = processor.apply_chat_template([user, answer, again], add_generation_prompt=True)
    assert long == f"{bunny.prompt('Why?')} So.{bunny.END}USER: And? ASSISTANT:"


@pytest.mark.slow
def test_a_converted_bunny_is_pruned_narrowed_and_passes_the_gate(folders, tmp_path):
    _, stock, file = folders
    assert Intake().look(ModelSpec(str(stock))) == {"completed": []}
    assert check(stock)
    prune_checkpoint(str(stock), str(tmp_path / "pruned"), [1])
    assert check(tmp_path / "pruned", stock, [1])
    spec = ModelSpec(str(tmp_path / "pruned"))
    conversations = [Conversation(str(n), str(file), QUESTION, f"It is {n}.") for n in range(3)]
    Narrower(spec).narrow(conversations, 0.5, 8, "magnitude", 0, str(tmp_path / "narrow"))
    assert check(tmp_path / "narrow", tmp_path / "pruned", change=Change.NARROWED)
    assert plain_model(str(tmp_path / "narrow")).config.text_config.num_hidden_layers == bunny.LAYERS - 1


def test_names_and_sizes_are_those_of_the_published_files():
    """Bytes of the published index and shards: 877 tensors, neither a head of the tower nor a bias of lm_head."""
    wanted = bunny.published_shapes(bunny.PUBLISHED, TOWER_ENTRIES)
    config = LAYOUTS["bunny-phi"].config(bunny.PUBLISHED, Path("config.json"))
    stock = {published_name(name): tuple(part.shape) for name, part in meta_model(config).named_parameters()}
    assert {translate_name(name): shape for name, shape in wanted.items()} == stock
    assert config.dtype == torch.float16 and config.text_config.rope_parameters["partial_rotary_factor"] == 0.4
    shards, size = [{}], 0
    for name, shape in wanted.items():  # as transformers 4.36 splits at 5 GB
        if size + 2 * math.prod(shape) > 5 * 10**9:
            shards, size = [*shards, {}], 0
        shards[-1][name] = shape
        size += 2 * math.prod(shape)
    where = {name: f"model-0000{n}-of-00002.safetensors" for n, shard in enumerate(shards, 1) for name in shard}
    total = sum(2 * math.prod(shape) for shape in wanted.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    assert len(json.dumps(index, indent=2, sort_keys=True) + "\n") == 88_677
    assert [_file_bytes(shard) for shard in shards] == [4_990_950_824, 1_373_673_760]


def _file_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the bytes of a safetensors file of float16 tensors."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in sorted(shapes.items()):
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + end


def _tensors(edit):
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def _entry(name: str, value):
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))

    return apply


LAST = f"{bunny.VISION}encoder.layers.2.mlp.fc1.bias"


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (
            _tensors(lambda t: t.pop("model.layers.1.mlp.fc1.bias")),
            r"lacks .*language_model\.model\.layers\.1\.mlp\.fc1",
        ),
        (_tensors(lambda t: t.update({LAST: torch.ones(48)})), r"holds the tensor '.*encoder\.layers\.2\.mlp\.fc1"),
        (_tensors(lambda t: t.update({"lm_head.bias": torch.ones(9)})), r"holds the tensor 'lm_head\.bias'"),
        (_tensors(lambda t: t.update({"model.rest": torch.ones(9)})), r"holds the tensor 'model\.rest'"),
        (_tensors(lambda t: t.update({"lm_head.weight": torch.ones(9, 9)})), r"'lm_head\.weight' as \[9, 9\], but"),
        (_tensors(lambda t: t["lm_head.weight"].fill_(math.nan)), r"NaN or infinite values in '.*lm_head\.weight'"),
        (_entry("mm_projector_type", "ldp"), r"config\.json' asks for the projector 'ldp'"),
        (_entry("use_s2", True), r"use_s2: True"),
        (_entry("mm_vision_tower", "owner/eva-clip"), r"mm_vision_tower 'owner/eva-clip' is neither"),
        (_entry("vocab_size", 9999), r"as \[\d+, 40\], but config\.json says \[9999, 40\]"),
        (_entry("hidden_size", "wide"), r"config\.json': transformers refuses it"),
        (_entry("model_type", "bunny-qwen2"), r"'bunny-qwen2', but only bunny-phi can be converted"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"its tokenizer cannot be read"),
    ],
)
def test_what_is_broken_is_named_and_nothing_appears(folders, tmp_path, broken, words):
    source = shutil.copytree(folders[0], tmp_path / "copy")
    broken(source)
    with pytest.raises(ValueError, match=words) as error:
        convert(str(source), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_bunny_as_model_path_is_refused_with_the_command(folders):
    with pytest.raises(ValueError, match=r"'bunny-phi': convert it \(python -m jobs\.convert "):
        read_config(folders[0])
