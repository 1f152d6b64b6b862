"""Supervised fine-tuning with LoRA or QLoRA, merged into the weights (paper, section 3.3)."""

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig

from actors.checkpoint.loading import language_model, load_model, load_processor, quiet
from actors.checkpoint.tensors import copy_companions, local_folder, publish_names, stored_dtype
from actors.conversations import collate
from actors.probe import probe_logits, write_probe
from actors.specs import NOT_ROUNDED, Conversation, Llava, LoraSettings, ModelSpec


def language_linears(model: Llava) -> list[str]:
    """Return the full names of the decoder layers' linears: what LoRA adapts and quantizers round."""
    layers = language_model(model).layers
    linears = {id(module) for module in layers.modules() if isinstance(module, nn.Linear)}
    return [name for name, module in model.named_modules() if id(module) in linears]


def nf4_config(model_dtype: torch.dtype, double_quant: bool = False) -> BitsAndBytesConfig:
    """Return bitsandbytes' NF4 settings (block 64) for the decoder's linears alone."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=model_dtype,
        bnb_4bit_use_double_quant=double_quant,
        llm_int8_skip_modules=NOT_ROUNDED,
    )


def training_dtype(dtype: str, method: str) -> str:
    """Return the compute type for training: `dtype`, but a substitute for float16, whose gradients underflow.

    bfloat16 on a GPU that supports it, else float32; QLoRA keeps float16, since what is not NF4 is float32 anyway.
    Stored weights keep their own type.
    """
    if dtype != "float16":
        return dtype
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float16" if method == "qlora" else "float32"


class LoraTrainer:
    """Fine-tunes one checkpoint; the merged weights have the checkpoint's own precision."""

    def __init__(self, spec: ModelSpec):
        quiet()
        self._spec = spec

    def train(self, conversations: Sequence[Conversation], settings: LoraSettings, out: str) -> Iterator[dict]:
        """Train on the conversations and write the merged checkpoint to `out`.

        Yields {step, loss, learning_rate} after every step. RuntimeError: the loss or a gradient is not finite.
        """
        torch.manual_seed(settings.seed)
        model = self._adapted(settings)
        processor = load_processor(self._spec.path, self._spec.revision, self._spec.trust_remote_code)
        device = next(model.parameters()).device
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
        steps = settings.steps(len(conversations))
        order = torch.Generator().manual_seed(settings.seed)
        model.train()
        for step, picks in enumerate(_batches(len(conversations), settings.batch, steps, order)):
            rate = settings.learning_rate * _cosine(step, steps)
            for group in optimiser.param_groups:
                group["lr"] = rate
            examples = [conversations[i] for i in picks]
            loss = _step(model, processor, examples, settings.micro_batch, device)
            norm = nn.utils.clip_grad_norm_(trained, 1.0)
            if not math.isfinite(loss) or not torch.isfinite(norm):
                raise RuntimeError(
                    f"The loss is {loss} at step {step + 1}: lower recover.learning_rate ({settings.learning_rate})."
                )
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            yield {"step": step + 1, "loss": loss, "learning_rate": rate}
        self._merge(model, processor, Path(out))

    def _adapted(self, settings: LoraSettings) -> Llava:
        dtype = training_dtype(self._spec.dtype, settings.method)
        quantization = nf4_config(getattr(torch, dtype), double_quant=True) if settings.method == "qlora" else None
        model = load_model(**{**self._spec.loading, "dtype": dtype}, quantization=quantization)
        if quantization is not None:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=torch.cuda.is_available())
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=language_linears(model),
            bias="none",
        )
        return get_peft_model(model, config)

    def _merge(self, model: PeftModel, processor, out: Path) -> None:
        # Merge into the original weights: merging into the NF4 ones would add their rounding error.
        adapter = out / "adapter"
        model.save_pretrained(str(adapter))
        source = local_folder(self._spec.path, self._spec.revision)
        stored = stored_dtype(self._spec.path, self._spec.revision)
        base = load_model(**{**self._spec.loading, "dtype": str(stored).removeprefix("torch.")}, device="cpu")
        merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        copy_companions(source, out)
        merged.to(stored).save_pretrained(out)
        publish_names(out)
        write_probe(out, probe_logits(merged, processor), str(stored).removeprefix("torch."))
        shutil.rmtree(adapter)


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


def _step(model, processor, examples: Sequence[Conversation], micro_batch: int, device) -> float:
    """Accumulate gradients of the mean loss per answer token over `chosen`; return that loss."""
    parts = [collate(processor, examples[i : i + micro_batch]) for i in range(0, len(examples), micro_batch)]
    tokens = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
    total = 0.0
    for part in parts:
        labels = part.pop("labels")[:, 1:].to(device)
        inputs = {k: v.to(device) for k, v in part.items()}
        logits = model(**inputs).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    return total
