"""Are the engine's half-precision answers those of `generate` on physically pruned models, ties apart?

Rounding decides between two tokens only where their exact logits nearly tie. So every answer that differs is put to
the test at its first different token: the same rounded weights in float32, on the same prefix, must give the two tokens
logits no further apart than rounding can turn around.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.checkpoint.pruning import prune_checkpoint
from actors.engine.replica import LlavaReplica
from actors.specs import ModelSpec, Sample
from tests.tiny import plain_answer, plain_inputs, plain_model


@dataclass(frozen=True)
class Mismatch:
    """The first different token of two answers: `gap` between the two exact logits, `rounding` error of the logits."""

    place: int
    gap: float
    rounding: float

    @property
    def ratio(self) -> float:
        """Gap over rounding error; infinite where there is a gap and no rounding."""
        return self.gap / self.rounding if self.rounding else float("inf")

    @property
    def is_tie(self) -> bool:
        """Tell whether rounding can have decided: each of the two logits may be off by the error, so at most twice."""
        return self.ratio <= 2


def first_difference(mine: Sequence[int], plain: Sequence[int]) -> int:
    """Return where two different answers part; ValueError if one only goes on where the other ends."""
    for place, (one, other) in enumerate(zip(mine, plain, strict=False)):
        if one != other:
            return place
    raise ValueError(f"One answer is the beginning of the other: {len(mine)} and {len(plain)} tokens.")


def judged(place: int, mine: int, plain: int, rounded_V: torch.Tensor, true_V: torch.Tensor) -> Mismatch:
    """Return the mismatch of two tokens at a place, from its logits in half precision and in float32."""
    gap = (true_V[mine] - true_V[plain]).abs().item()
    return Mismatch(place, gap, (rounded_V.float() - true_V).abs().max().item())


@torch.inference_mode()
def mismatch(half, exact, inputs: dict, mine: Sequence[int], plain: Sequence[int]) -> Mismatch:
    """Compare two different answers to one question.

    half: the pruned model in half precision; exact: the same rounded weights in float32.
    """
    place = first_difference(mine, plain)
    prefix = torch.tensor([plain[:place]], dtype=torch.long)
    extended = {**inputs, "input_ids": torch.cat([inputs["input_ids"], prefix], dim=1)}
    extended["attention_mask"] = torch.ones_like(extended["input_ids"])
    rounded, true = (model(**extended, logits_to_keep=1).logits[0, -1] for model in (half, exact))
    return judged(place, mine[place], plain[place], rounded, true)


def compare(
    path: str, scratch: Path, dtype: str, samples: Sequence[Sample], removed_sets: Sequence[Sequence[int]], tokens: int
) -> tuple[int, list[Mismatch]]:
    """Return how many answers of the engine were compared with plain pruned models', and the mismatches."""
    replica = LlavaReplica(ModelSpec(path, dtype))
    rows = iter(replica.answers(samples, removed_sets, tokens))
    mine = {(row["sample_id"], tuple(row["removed"])): row["token_ids"] for row in rows}
    found = []
    for number, removed in enumerate(removed_sets):
        prune_checkpoint(path, str(scratch / str(number)), removed)
        half = plain_model(str(scratch / str(number)), getattr(torch, dtype))
        exact = copy.deepcopy(half).float()
        for sample in samples:
            answer, plain = mine[sample.id, tuple(removed)], plain_answer(half, replica.processor, sample, tokens)
            if answer != plain:
                found.append(mismatch(half, exact, plain_inputs(replica.processor, sample), answer, plain))
    return len(mine), found
