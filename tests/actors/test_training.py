"""Fine-tuning: the loss falls, and what is merged into the checkpoint is the adapter and nothing else."""

import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel

import actors.training.trainer as trainer
from actors.checkpoint.loading import load_model, load_processor
from actors.checkpoint.tensors import copy_companions, iterate_tensors, published_name
from actors.conversations import collate
from actors.specs import ModelSpec
from actors.training.parts import language_linears
from actors.training.settings import SNAPSHOTS
from actors.training.trainer import Trainer, nf4_config
from tests.tiny import draw_conversations, plain_model, rename_tensors, save_tiny
from tests.training import training_settings

SETTINGS = training_settings(epochs=6)


def train(path: str, conversations, out: Path, *taught, **changes) -> list[dict]:
    settings = training_settings(**{"epochs": 6, **changes})
    return list(Trainer(ModelSpec(path)).train(conversations, settings, str(out), *taught))


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return dict(iterate_tensors(Path(folder)))


@torch.inference_mode()
def reply_loss(model, processor, conversations) -> float:
    """Mean negative log-likelihood per answer token, one conversation at a time, in float64."""
    total, tokens = 0.0, 0
    for item in conversations:
        batch = collate(processor, [item])
        labels = batch.pop("labels")[0]
        logs = model(**batch).logits[0].double().log_softmax(-1)
        for place in range(1, len(labels)):
            if labels[place] != -100:
                total -= float(logs[place - 1, labels[place]])
                tokens += 1
    return total / tokens


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lesions, tiny_path):
    """A short LoRA fine-tuning, the adapter kept aside: folder, steps, adapter, conversations."""
    out = tmp_path_factory.mktemp("trained")
    aside = tmp_path_factory.mktemp("aside") / "adapter"
    conversations = draw_conversations(lesions, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.shutil, "rmtree", lambda folder, **_: folder.is_dir() and folder.rename(aside))
        steps = train(tiny_path, conversations, out)
    return str(out), steps, aside, conversations


def test_loss_falls(trained, tiny_path):
    """The first loss is the untrained model's, 8 conversations x 6 epochs / 4 are 12 steps, and it ends far lower."""
    out, steps, _, conversations = trained
    processor = load_processor(tiny_path)
    before = reply_loss(load_model(tiny_path), processor, conversations)
    after = reply_loss(load_model(out), processor, conversations)
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert abs(steps[0]["loss"] - before) < 0.5
    assert after < 0.7 * before and steps[-1]["loss"] < 0.7 * steps[0]["loss"]


def test_learning_rate_schedule(trained):
    """One warm-up step of 12, then a half cosine: at step 7 of 12 it is one half."""
    rates = [row["learning_rate"] for row in trained[1]]
    assert rates[0] == pytest.approx(1e-2) and rates[6] == pytest.approx(5e-3)
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0


def test_merged_checkpoint_differs_in_decoder_linears_only(trained, tiny_path):
    """Same names, same types; every decoder linear changed, nothing else did; only a LoRA-rank change."""
    before, after = tensors_of(tiny_path), tensors_of(trained[0])
    assert sorted(after) == sorted(map(published_name, before))
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert changed == {f"language_model.model.layers.{i}.{part}.weight" for i in range(5) for part in parts}
    name = "language_model.model.layers.2.mlp.down_proj.weight"
    assert int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3)) <= SETTINGS.rank
    assert not (Path(trained[0]) / "adapter").exists()


@torch.inference_mode()
def test_merged_logits_equal_adapter_logits(trained, tiny_path):
    """Plain transformers on the merged files says what base and adapter say together."""
    out, _, adapter, conversations = trained
    batch = collate(load_processor(tiny_path), conversations[:3])
    del batch["labels"]
    adapted = PeftModel.from_pretrained(plain_model(tiny_path), adapter).eval()
    expected, base = adapted(**batch).logits, plain_model(tiny_path)(**batch).logits
    found = plain_model(out)(**batch).logits
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (base - expected).norm() > 1e-2 * expected.norm()


def test_same_seed_same_training(trained, tiny_path, tmp_path):
    """Order and initialisation come from the seed: the losses repeat, and another seed's differ."""
    conversations = trained[3]
    again = train(tiny_path, conversations, tmp_path / "a", epochs=1)
    repeat = train(tiny_path, conversations, tmp_path / "b", epochs=1)
    other = train(tiny_path, conversations, tmp_path / "c", epochs=1, seed=4)
    assert [row["loss"] for row in again] == [row["loss"] for row in repeat]
    assert [row["loss"] for row in again] != [row["loss"] for row in other]


@pytest.mark.parametrize(
    ("epochs", "count", "batch", "steps"), [(6, 8, 4, 12), (0.5, 10, 4, 2), (1, 3, 8, 1), (0, 5, 4, 1)]
)
def test_step_count(epochs, count, batch, steps):
    """Passes times conversations over the batch, rounded up, and at least one."""
    assert training_settings(epochs=epochs, batch=batch).steps(count) == steps


def test_micro_batches_do_not_change_the_loss(tiny_path, lesions, tmp_path):
    """The mean is per answer token over the whole batch, however it is cut."""
    conversations = draw_conversations(lesions, 8)
    losses = [
        [row["loss"] for row in train(tiny_path, conversations, tmp_path / str(size), epochs=1, micro_batch=size)]
        for size in (1, 3, 4)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("style", ["published", "five", "saved", "tied"])
def test_names_are_the_published_ones_and_types_the_sources(style, lesions, tmp_path):
    """float16 stays float16, and tensors get the names of the llava-hf checkpoints."""
    source = save_tiny(tmp_path / "a", "clip-llama-tied" if style == "tied" else "clip-qwen2", 2, dtype=torch.float16)
    if style in ("published", "five"):
        rename_tensors(tmp_path / "a", style)
    train(source, draw_conversations(lesions, 2), tmp_path / "b", epochs=1)
    before, after = tensors_of(source), tensors_of(tmp_path / "b")
    assert sorted(after) == sorted(map(published_name, before))
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    plain_model(str(tmp_path / "b"))


def test_loss_that_is_no_number(tiny_path, lesions, tmp_path):
    """An absurd learning rate ends with an error that names it, and nothing is written."""
    with pytest.raises(RuntimeError, match=r"finite\. Lower recover\.learning_rate \(1e\+30\), .*: \w+"):
        train(tiny_path, draw_conversations(lesions, 8), tmp_path, learning_rate=1e30)
    assert not list(tmp_path.iterdir())


def test_qlora_trains_and_merges_into_the_original(lesions, tmp_path):
    """The frozen base is NF4, the merged checkpoint is in the source's own type: only decoder linears moved."""
    source = save_tiny(tmp_path / "a", "siglip-llama", dtype=torch.float16)
    steps = train(source, draw_conversations(lesions, 8), tmp_path / "b", train=("qlora",))
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    before, after = tensors_of(source), tensors_of(tmp_path / "b")
    changed = {published_name(n) for n in before if not torch.equal(before[n], after[published_name(n)])}
    assert changed and all(".layers." in name and "_proj." in name for name in changed)
    assert all(name.startswith("language_model.model.layers.") for name in changed)
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}


def test_nf4_rounds_decoder_linears_alone(tiny_path):
    """What QLoRA freezes in NF4 is what LoRA adapts: 7 linears in each of 5 layers."""
    names = language_linears(load_model(tiny_path))
    model = load_model(tiny_path, quantization=nf4_config(torch.float32, double_quant=True))
    rounded = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert sorted(rounded) == sorted(names) and len(names) == 35
    assert language_linears(model) == names


def test_collate_by_hand(tiny_path, lesions):
    """The prompt is the chat template's; labels are the reference and the end token; padding is silent."""
    processor = load_processor(tiny_path)
    first, second = draw_conversations(lesions, 2)
    second = replace(second, question="Name?", reference="This is melanoma.")
    batch = collate(processor, [first, second])
    tokenizer = processor.tokenizer
    for row, item in enumerate((first, second)):
        text = f"USER: {'<image>' * 16}\n{item.question} ASSISTANT:"
        prompt = tokenizer(text)["input_ids"]
        reply = [*tokenizer(f" {item.reference}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        pad = batch["input_ids"].shape[1] - len(prompt) - len(reply)
        assert batch["input_ids"][row].tolist() == prompt + reply + [tokenizer.pad_token_id] * pad
        assert batch["labels"][row].tolist() == [-100] * len(prompt) + reply + [-100] * pad
        assert batch["attention_mask"][row].tolist() == [1] * (len(prompt) + len(reply)) + [0] * pad
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert max(lengths) == batch["labels"].shape[1] > min(lengths)


def test_companions_of_a_run(tmp_path):
    """Companions exclude weights, config and a run's manifest."""
    source = Path(save_tiny(tmp_path / "a", "clip-llama"))
    for name in ("manifest.json", "README.md"):
        (source / name).write_text(name)
    copy_companions(source, tmp_path / "b")
    there = {path.name for path in source.iterdir()} - {
        "config.json",
        "manifest.json",
        "README.md",
        "model.safetensors",
    }
    assert {path.name for path in (tmp_path / "b").iterdir()} == there >= {"chat_template.jinja", "tokenizer.json"}


def test_an_interrupted_training_goes_on(tiny_path, lesions, tmp_path):
    """Stopped after steps 3, 6, 7 and 11 of 12, with a snapshot every second step: losses and weights are the same."""
    conversations = draw_conversations(lesions, 8)
    options = {"dropout": 0.1, "checkpoint_every": 2}
    whole = train(tiny_path, conversations, tmp_path / "whole", **options)
    settings, out = training_settings(epochs=6, **options), str(tmp_path / "stopped")
    for stop in (3, 6, 7, 11):
        seen = []
        for row in Trainer(ModelSpec(tiny_path)).train(conversations, settings, out):
            seen.append(row)
            if row["step"] == stop:
                break
        assert seen == whole[:stop]
    assert (tmp_path / "stopped" / SNAPSHOTS / "snapshot.safetensors").is_file()
    assert train(tiny_path, conversations, tmp_path / "stopped", **options) == whole
    ours, theirs = tensors_of(tmp_path / "stopped"), tensors_of(tmp_path / "whole")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def train_and_note(source: str, lesions: Path, out: Path, notes: Path) -> None:
    """Train in a process of its own, and write every step's row into a file."""
    torch.set_num_threads(1)
    settings = training_settings(epochs=10, dropout=0.1, checkpoint_every=2)
    with open(notes, "w") as file:
        for row in Trainer(ModelSpec(source)).train(draw_conversations(lesions, 8), settings, str(out)):
            print(json.dumps(row), file=file, flush=True)


@pytest.mark.slow
def test_a_training_killed_ten_times(tiny_path, lesions, tmp_path):
    """SIGKILL at random steps: no more than two steps are done again, losses and weights are those of no kill."""
    random, processes = Random(5), multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["actors.training.trainer", "tests.tiny"])
    notes = tmp_path / "notes"

    def start(out: Path):
        notes.unlink(missing_ok=True)
        process = processes.Process(target=train_and_note, args=(tiny_path, lesions, out, notes))
        process.start()
        return process

    def rows() -> list[str]:
        return notes.read_text().splitlines() if notes.exists() else []

    start(tmp_path / "whole").join()
    whole, reached = rows(), 0
    for _ in range(10):
        stop = reached + random.choice((1, 1, 2, 3))
        process = start(tmp_path / "killed")
        while len(rows()) < stop:
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
        assert rows() == whole[: len(rows())]
        reached = max(reached, stop - stop % 2)
    assert 4 < reached < 20
    start(tmp_path / "killed").join()
    assert rows() == whole and len(whole) == 20
    ours, theirs = tensors_of(tmp_path / "killed"), tensors_of(tmp_path / "whole")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
