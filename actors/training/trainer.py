"""Fine-tuning (paper, section 3.3) and distillation (second paper): the loop, and the checkpoint that it ends in."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig

from actors.answer_states import AnswerStates, answer_states
from actors.checkpoint.loading import load_model, load_processor, quiet
from actors.conversations import collate
from actors.maths.distillation import cross_entropy, forward_kl, hidden_error, reverse_kl
from actors.specs import NOT_ROUNDED, Conversation, Llava, ModelSpec
from actors.training import ranks
from actors.training.parts import adapted_linears, trained_weights
from actors.training.settings import SNAPSHOTS, TrainingSettings, needs_teacher, weigh_objectives
from actors.training.snapshots import Snapshots
from actors.training.teacher import TeacherStates
from actors.training.writing import load_stored, write_changed

DIVERGED = 3.0  # times the smallest mean loss of WINDOW steps, plus 1: more than this is no fluctuation
WINDOW = 20


def nf4_config(model_dtype: torch.dtype, double_quant: bool = False) -> BitsAndBytesConfig:
    """Return bitsandbytes' NF4 settings (block 64) for the decoder's linears alone."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=model_dtype,
        bnb_4bit_use_double_quant=double_quant,
        llm_int8_skip_modules=NOT_ROUNDED,
    )


def training_dtype(dtype: str, settings: TrainingSettings) -> str:
    """Return the compute type for training: that of `settings.precision`, by default the model's `dtype`.

    float16, whose gradients underflow, becomes bfloat16 on a GPU that supports it, otherwise float32. Without bfloat16
    QLoRA keeps float16, since its weights outside NF4 are in float32. Stored weights keep their own type.
    """
    if settings.precision != "auto":
        return settings.precision
    if dtype != "float16":
        return dtype
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float16" if settings.adapter == "qlora" else "float32"


class Trainer:
    """Fine-tunes one checkpoint; the weights that it writes have the checkpoint's own precision."""

    def __init__(self, spec: ModelSpec):
        quiet()
        self._spec = spec

    def train(
        self,
        conversations: Sequence[Conversation],
        settings: TrainingSettings,
        out: str,
        teacher: str | None = None,
        kept_layers: Sequence[int] = (),
    ) -> Iterator[dict]:
        """Train on the conversations and write the new checkpoint to `out`.

        teacher: the folder of the teacher's states, if an objective needs it; kept_layers: the teacher's layers that
        this model still has. Yields {step, loss, cross_entropy, learning_rate} of every step, the losses in nats per
        answer token. The folder SNAPSHOTS in `out` is the caller's to remove: if it holds the snapshot of an
        interrupted training, its steps are yielded from there, and the training goes on after it. In a torch process
        group every rank calls this: they share each step's conversations, and the first writes. RuntimeError: the loss
        or a gradient is not finite, or the training diverges.
        """
        torch.manual_seed(settings.seed)
        model = self._prepare(settings)
        processor = load_processor(self._spec.path, self._spec.revision, self._spec.trust_remote_code)
        device = next(model.parameters()).device
        is_mixed = training_dtype(self._spec.dtype, settings) == "bfloat16"
        loss = Loss(settings, TeacherStates(teacher, device, kept_layers) if teacher is not None else None, is_mixed)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimiser = torch.optim.AdamW(trained.values(), lr=settings.learning_rate, weight_decay=0.0)
        snapshots = Snapshots(Path(out) / SNAPSHOTS, trained, optimiser)
        steps, rows = settings.steps(len(conversations)), snapshots.restore()
        yield from rows
        order = torch.Generator().manual_seed(settings.seed)
        model.train()
        for step, picks in enumerate(_batches(len(conversations), settings.batch, steps, order), 1):
            if step <= len(rows):
                continue
            rate = settings.learning_rate * _cosine(step - 1, steps)
            for group in optimiser.param_groups:
                group["lr"] = rate
            examples = [conversations[i] for i in picks]
            torch.manual_seed(settings.seed + 1_000_003 * step + 7_919 * ranks.rank())
            values = loss.backward(model, processor, examples)
            ranks.add_up_gradients(trained.values())
            norm = nn.utils.clip_grad_norm_(trained.values(), 1.0)
            rows.append({"step": step, **values, "learning_rate": rate})
            check_loss(rows, bool(torch.isfinite(norm)), examples, settings.learning_rate)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            yield rows[-1]
            if ranks.rank() == 0 and (step % settings.checkpoint_every == 0 or step == steps):
                snapshots.save(rows)
        if ranks.rank() == 0:
            self._merge(model, processor, Path(out), settings)

    def _prepare(self, settings: TrainingSettings) -> Llava:
        """Load the model; what is trained requires gradients, and is float32."""
        dtype, is_quantized = training_dtype(self._spec.dtype, settings), settings.adapter == "qlora"
        quantization = nf4_config(getattr(torch, dtype), double_quant=True) if is_quantized else None
        model = load_model(**{**self._spec.loading, "dtype": dtype}, quantization=quantization)
        recompute = settings.gradient_checkpointing
        recompute = torch.cuda.is_available() if recompute is None else recompute
        if is_quantized:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=recompute)
        elif recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.requires_grad_(False)
        whole = [weight for _, weight in trained_weights(model, settings.train)]
        if settings.adapter:
            config = LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=adapted_linears(model, settings.targets),
                bias="none",
            )
            model = get_peft_model(model, config)
        for weight in whole:
            weight.data = weight.data.float()
            weight.requires_grad_(True)
        return model

    def _merge(self, model: Llava, processor, out: Path, settings: TrainingSettings) -> None:
        # Merge into the original weights: merging into the NF4 ones would add their rounding error.
        parts = out / "adapter"
        base = load_stored(self._spec)
        whole = {name: weight.detach().cpu() for name, weight in trained_weights(_plain(model), settings.train)}
        lost = base.load_state_dict(whole, strict=False).unexpected_keys
        assert not lost, f"trained weights that the checkpoint lacks: {lost}"
        if settings.adapter:
            model.save_pretrained(str(parts))
            base = PeftModel.from_pretrained(base, parts).merge_and_unload()
            shutil.rmtree(parts)
        write_changed(base, processor, self._spec, out)


class Loss:
    """The weighted objectives of a fine-tuning, as the mean over the answer tokens of a step.

    is_mixed: the models' own operators compute in bfloat16, the losses in float32 as always.
    """

    def __init__(self, settings: TrainingSettings, teacher: TeacherStates | None, is_mixed: bool = False):
        self._weights = weigh_objectives(settings.objective)
        self._settings, self._teacher, self._is_mixed = settings, teacher, is_mixed
        if needs_teacher(self._weights) and teacher is None:
            raise ValueError(f"The objectives {', '.join(self._weights)} need a teacher.")

    def backward(self, model: Llava, processor, examples: Sequence[Conversation]) -> dict[str, float]:
        """Accumulate the gradients over this rank's micro-batches; return {loss, cross_entropy}, per answer token.

        Both are of all ranks, and so is the number of tokens by which the gradients are divided.
        """
        plain, device = _plain(model), next(model.parameters()).device
        size = min(self._settings.micro_batch, math.ceil(len(examples) / ranks.count_ranks()))
        cuts = [examples[i : i + size] for i in range(0, len(examples), size)][ranks.rank() :: ranks.count_ranks()]
        batches = [collate(processor, cut) for cut in cuts]
        (tokens,) = ranks.add_up([sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)], device)
        sums = [0.0, 0.0]
        for cut, batch in zip(cuts, batches, strict=True):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=self._is_mixed):
                states = answer_states(plain, inputs, "layers" in self._weights)
                logits_AV = plain.lm_head(states.last_AD)
            values = self.values(states, logits_AV, cut)
            total = torch.stack([self._weights[name] * values[name] for name in self._weights if name in values]).sum()
            (total / tokens).backward()
            sums[0] += float(total.detach()) / tokens
            sums[1] += float(values["sft"].detach()) / tokens
        return dict(zip(("loss", "cross_entropy"), ranks.add_up(sums, device), strict=True))

    def values(
        self, states: AnswerStates, logits_AV: torch.Tensor, examples: Sequence[Conversation]
    ) -> Mapping[str, torch.Tensor]:
        """Return every objective, and the cross-entropy, summed over the answer tokens of `examples`."""
        logits_AV, last_AD = logits_AV.float(), states.last_AD.float()
        values = {"sft": cross_entropy(logits_AV, states.targets_A)}
        if self._teacher is None or not needs_teacher(self._weights):
            return values
        teacher_AD = self._teacher.last(examples)
        compares_states = bool({"hidden", "layers"} & set(self._weights))
        if len(teacher_AD) != len(last_AD) or (compares_states and teacher_AD.shape != last_AD.shape):
            raise ValueError(
                f"The teacher has hidden states {list(teacher_AD.shape)}, the student {list(last_AD.shape)} (answer "
                "tokens, width): they need one tokenizer and image size, and one width unless recover.objective is "
                "logits or reverse_logits."
            )
        if "layers" in self._weights and states.inputs_ALD is None:
            raise ValueError("recover.objective layers compares what enters the second layer on; the model has one.")
        if "hidden" in self._weights:
            values["hidden"] = hidden_error(last_AD, teacher_AD)
        if states.inputs_ALD is not None:
            inputs_ALD, teacher_ALD = states.inputs_ALD.float(), self._teacher.inputs(examples)
            values["layers"] = hidden_error(inputs_ALD.flatten(1), teacher_ALD.flatten(1))
        for name, divergence in (("logits", forward_kl), ("reverse_logits", reverse_kl)):
            if name in self._weights:
                teacher_AV = self._teacher.logits(teacher_AD)
                if teacher_AV.shape != logits_AV.shape:
                    raise ValueError(
                        f"The teacher has {teacher_AV.shape[1]} words, the student {logits_AV.shape[1]}: "
                        f"recover.objective {name} needs one vocabulary."
                    )
                values[name] = divergence(logits_AV, teacher_AV, self._settings.temperature)
        return values


def check_loss(rows: Sequence[dict], is_finite: bool, examples: Sequence[Conversation], learning_rate: float) -> None:
    """RuntimeError: the last step's loss or gradient is not finite, or the loss grew far beyond its smallest mean."""
    step, losses = rows[-1]["step"], [row["loss"] for row in rows]
    advice = f"Lower recover.learning_rate ({learning_rate:g}), or look at the conversations of this step: "
    advice += ", ".join(item.id for item in examples)
    if not is_finite or not math.isfinite(losses[-1]):
        raise RuntimeError(
            f"The loss is {losses[-1]:.4g} at step {step}, its gradient {'' if is_finite else 'not '}finite. {advice}"
        )
    if len(losses) < 2 * WINDOW:
        return
    means = [sum(losses[end - WINDOW : end]) / WINDOW for end in range(WINDOW, len(losses) + 1)]
    if means[-1] > DIVERGED * min(means) + 1:
        raise RuntimeError(
            f"The training diverges: at step {step} the mean loss of {WINDOW} steps is {means[-1]:.4g}, it was "
            f"{min(means):.4g}. {advice}"
        )


def _plain(model: Llava) -> Llava:
    """Return the LLaVA inside an adapted model; its linears have their adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _batches(count: int, size: int, steps: int, order: torch.Generator) -> Iterator[list[int]]:
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < min(size, count):
            queue += torch.randperm(count, generator=order).tolist()
        yield queue[:size]
        queue = queue[size:]


def _cosine(step: int, steps: int) -> float:
    warmup = max(1, round(0.03 * steps))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
