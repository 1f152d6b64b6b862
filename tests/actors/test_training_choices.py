"""What is trained, towards what: only the chosen parts move, every objective is the naive formula's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.answer_states import answer_states
from actors.checkpoint.loading import load_model, load_processor
from actors.checkpoint.pruning import Surgeon
from actors.checkpoint.tensors import iterate_tensors, published_name
from actors.conversations import collate
from actors.gate.check import Gate
from actors.quantizers.structure import linear_shapes
from actors.specs import Change, GateError, ModelSpec
from actors.training.parts import may_differ
from actors.training.settings import PARTS, Trained, read_recovery, recovery_label
from actors.training.teacher import Teacher, TeacherStates
from actors.training.trainer import Loss, Trainer, check_loss
from tests.tiny import draw_conversations, plain_model, save_tiny
from tests.training import training_settings

CPU = torch.device("cpu")


def train(path: str, conversations, out: Path, *taught, **changes) -> list[dict]:
    return list(Trainer(ModelSpec(path)).train(conversations, training_settings(**changes), str(out), *taught))


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {published_name(name): tensor for name, tensor in iterate_tensors(Path(folder))}


def write_states(path: str, conversations, folder: Path, layers: bool = False) -> str:
    folder.mkdir()
    teacher = Teacher(ModelSpec(path), rows=3, layers=layers)
    teacher.write_head(str(folder))
    teacher.write_states(conversations[:5], str(folder), "states-00000")
    teacher.write_states(conversations[5:], str(folder), "states-00001")
    return str(folder)


@pytest.fixture(scope="module")
def conversations(lesions):
    return draw_conversations(lesions, 8)


@pytest.mark.parametrize("kind", ["clip-llama", "siglip-phi"])
@pytest.mark.parametrize("parts", ["projector", "norms", "all", "lora+projector", "qlora+norms"])
def test_only_what_is_trained_moves(kind, parts, conversations, tmp_path):
    """All of it does move, the gate lets it pass, and refuses it under any other name that has less."""
    source = save_tiny(tmp_path / "a", kind, 2)
    train_parts = tuple(parts.split("+"))
    rows = train(source, conversations, tmp_path / "b", train=train_parts, learning_rate=3e-3, epochs=2)
    assert rows[-1]["loss"] < rows[0]["loss"]
    before, after = tensors_of(source), tensors_of(tmp_path / "b")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    model = plain_model(source)
    differs = may_differ(Trained(train_parts), linear_shapes(model.config))
    expected = {name for name in before if differs(name)}
    # A key's bias moves no softmax, and words that no conversation has get no gradient.
    still = {name for name in expected if name.endswith("k_proj.bias")}
    assert expected - still <= changed <= expected and changed
    kinds = {name.split(".")[0] for name in changed}
    assert ("multi_modal_projector" in kinds) == bool({"projector", "all"} & set(train_parts))
    gate = Gate()
    found = gate.check(ModelSpec(str(tmp_path / "b")), ModelSpec(source), Change.TRAINED, trained=Trained(train_parts))
    assert found["kept"].startswith(f"{len(before) - len(expected)} tensors")
    for other in PARTS:
        if (
            expected
            - still
            - {name for name in before if may_differ(Trained((other,)), linear_shapes(model.config))(name)}
        ):
            with pytest.raises(GateError, match=r"is not .* of the model before"):
                gate.check(ModelSpec(str(tmp_path / "b")), ModelSpec(source), Change.TRAINED, trained=Trained((other,)))


def test_targets_choose_the_linears(conversations, tmp_path):
    source = save_tiny(tmp_path / "a", "clip-llama", 2)
    train(source, conversations, tmp_path / "b", targets=("q_proj", "down_proj"))
    before, after = tensors_of(source), tensors_of(tmp_path / "b")
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "down_proj"}
    with pytest.raises(ValueError, match=r"recover.targets names 'qproj': this model's linears are down_proj, "):
        train(source, conversations, tmp_path / "c", targets=("qproj",))


@torch.inference_mode()
def naive_sums(student, teacher, processor, conversations, kept=None) -> dict[str, float]:
    """Sums over the answer tokens, one conversation and one token at a time, in float64; temperature 2."""
    sums = dict.fromkeys(("sft", "hidden", "layers", "logits", "reverse_logits"), 0.0) | {"tokens": 0}
    student, teacher = student.double(), teacher.double()
    for item in conversations:
        batch = collate(processor, [item])
        labels = batch.pop("labels")[0]
        batch["pixel_values"] = batch["pixel_values"].double()
        ours, theirs = (model(**batch, output_hidden_states=True) for model in (student, teacher))
        for place in range(len(labels) - 1):
            target = int(labels[place + 1])
            if target == -100:
                continue
            sums["tokens"] += 1
            sums["sft"] -= float(ours.logits[0, place].log_softmax(-1)[target])
            last = [model.model(**batch).last_hidden_state[0, place] for model in (student, teacher)]
            sums["hidden"] += float(((last[0] - last[1]) ** 2).mean())
            if kept:
                pairs = [(ours.hidden_states[now], theirs.hidden_states[old]) for now, old in enumerate(kept) if now]
                errors = [((mine[0, place] - taught[0, place]) ** 2).mean() for mine, taught in pairs]
                sums["layers"] += float(sum(errors)) / len(errors)
            p, q = ((each.logits[0, place] / 2).softmax(-1) for each in (theirs, ours))
            sums["logits"] += 4 * float((p * (p / q).log()).sum())
            sums["reverse_logits"] += 4 * float((q * (q / p).log()).sum())
    return sums


@pytest.mark.parametrize("kind", ["clip-llama", "siglip-phi"])
def test_objectives_are_the_naive_formulas(kind, conversations, tmp_path):
    """A student without layers 1 and 3, and with a projector of its own: the teacher sees its own image embeddings."""
    source = save_tiny(tmp_path / "a", kind, 5)
    states = write_states(source, conversations, tmp_path / "states", layers=True)
    Surgeon().prune(source, str(tmp_path / "pruned"), [1, 3])
    student, processor = load_model(str(tmp_path / "pruned")), load_processor(source)
    with torch.no_grad():
        student.model.multi_modal_projector.linear_1.weight.mul_(1.5)
    expected = naive_sums(student, plain_model(source), processor, conversations, [0, 2, 4])
    student.float()
    objective = {"sft": 1, "hidden": 2, "layers": 3, "logits": 1, "reverse_logits": 3}
    loss = Loss(training_settings(objective=objective, micro_batch=3), TeacherStates(states, CPU, [0, 2, 4]))
    student.requires_grad_(True)
    found = loss.backward(student, processor, conversations)
    weighted = sum(weight * expected[name] for name, weight in objective.items()) / 10 / expected["tokens"]
    assert found["loss"] == pytest.approx(weighted, rel=1e-4)
    assert found["cross_entropy"] == pytest.approx(expected["sft"] / expected["tokens"], rel=1e-4)
    for name in objective:
        alone = Loss(training_settings(objective={name: 5}), TeacherStates(states, CPU, [0, 2, 4]))
        value = alone.backward(student, processor, conversations)["loss"]
        assert value == pytest.approx(expected[name] / expected["tokens"], rel=1e-4), name


def test_prompt_and_padding_teach_nothing(conversations, tmp_path):
    """The loss has no gradient at states of the prompt or the padding, and what stands in the padding is no matter."""
    source = save_tiny(tmp_path / "a", "clip-llama", 2)
    states = write_states(source, conversations, tmp_path / "states")
    model, processor = load_model(source).requires_grad_(False), load_processor(source)
    seen = []

    def note(module, args, output):
        output.requires_grad_(True).retain_grad()
        seen.append(output)

    model.model.language_model.norm.register_forward_hook(note)
    batch = collate(processor, conversations[:3])
    loss = Loss(training_settings(objective={"sft": 1, "hidden": 1, "logits": 1}), TeacherStates(states, CPU, ()))
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.mul_(2)  # so that it is not its own teacher

    def value(batch):
        found = answer_states(model, batch, False)
        return sum(loss.values(found, model.lm_head(found.last_AD), conversations[:3]).values())

    total = value(batch)
    total.backward()
    learns = seen[0].grad.abs().sum(-1) > 0
    predicts = torch.zeros_like(learns)
    predicts[:, :-1] = batch["labels"][:, 1:] != -100
    assert torch.equal(learns, predicts) and (batch["attention_mask"] == 0).any()
    padded = batch["input_ids"].where(batch["attention_mask"] == 1, 7)
    assert not torch.equal(padded, batch["input_ids"])
    assert value({**batch, "input_ids": padded}).item() == total.item()


def test_distillation_without_sft_brings_a_student_to_its_teacher(conversations, tmp_path):
    """The answers are of no use here: only the teacher tells, and the student's error falls by half."""
    source = save_tiny(tmp_path / "a", "clip-llama", 5)
    states = write_states(source, conversations, tmp_path / "states", layers=True)
    Surgeon().prune(source, str(tmp_path / "pruned"), [3])
    for objective in ("hidden", "layers", "logits", "reverse_logits"):
        rows = train(
            str(tmp_path / "pruned"), conversations, tmp_path / objective, states, [0, 1, 2, 4],
            objective={objective: 1.0}, epochs=15, batch=8,
        )  # fmt: skip
        assert rows[-1]["loss"] < 0.5 * rows[0]["loss"], objective


def test_a_teacher_of_another_width_is_refused(conversations, tmp_path):
    source = save_tiny(tmp_path / "a", "clip-llama", 2)
    states = write_states(source, conversations, tmp_path / "states")
    for path in Path(states).glob("states-*"):
        save_file({name: tensor[:, 1:].contiguous() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="one tokenizer and image size, and one width unless"):
        train(source, conversations, tmp_path / "c", states, objective={"hidden": 1})
    with pytest.raises(ValueError, match="The objectives hidden need a teacher"):
        train(source, conversations, tmp_path / "c", objective={"hidden": 1})


def test_a_training_that_diverges_stops(conversations):
    """Twice the window of steps first; a loss that only jumps for a step goes on."""
    rows = [{"step": step, "loss": 1.0} for step in range(1, 40)]
    check_loss([*rows, {"step": 40, "loss": 9.0}], True, conversations, 1e-3)
    with pytest.raises(RuntimeError, match=r"diverges: at step 59 the mean loss of 20 steps is 9, it was 1\. Lower"):
        check_loss([*rows, *({"step": step, "loss": 9.0} for step in range(40, 60))], True, conversations, 1e-3)
    with pytest.raises(RuntimeError, match=rf"loss is nan at step 40.*{conversations[7].id}$"):
        check_loss([*rows, {"step": 40, "loss": float("nan")}], True, conversations, 1e-3)
    with pytest.raises(RuntimeError, match="its gradient not finite"):
        check_loss(rows, False, conversations, 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ("lora", "qlora")}, "lora or qlora, not both"),
        ({"train": ("all", "lora")}, "'all' trains every weight outside the tower"),
        ({"train": ("vision",)}, "there is no 'vision'; give qlora, lora"),
        ({"train": ()}, "recover.train is empty"),
        ({"objective": {}}, "recover.objective is empty"),
        ({"objective": {"kd": 1}}, "there is no 'kd'; give sft"),
        ({"objective": {"sft": 0}}, "the weight 0: give a number above 0"),
    ],
)
def test_impossible_choices(change, message):
    with pytest.raises(ValueError, match=message):
        training_settings(**change)


def test_labels_of_recoveries():
    assert recovery_label(["lora"], {"sft": 1.0}) == "lora"
    assert read_recovery("lora") == {"train": ["lora"]}
    label = recovery_label(["lora", "projector"], {"sft": 0.5, "hidden": 0.5})
    assert label == "lora+projector+sft+hidden"
    assert read_recovery(label) == {"train": ["lora", "projector"], "objective": {"sft": 0.5, "hidden": 0.5}}
    assert recovery_label(["projector"], {"sft": 1.0}, 0.05) == "projector+5%"
    assert read_recovery("projector+5%") == {"train": ["projector"], "fraction": 0.05}
    for wrong in ("lora+0%", "lora+101%"):
        with pytest.raises(ValueError, match="There is no recovery"):
            read_recovery(wrong)
    with pytest.raises(ValueError, match="no recovery 'lore'"):
        read_recovery("lore+sft")
    with pytest.raises(ValueError, match=r"recover\.train is empty"):
        read_recovery("sft")
