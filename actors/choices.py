"""ChoiceCritic: measures what a model loses when each decoder layer is removed, rounded to some bits, or unchanged.

A choice gives one option per layer: 0 (removed), the bits of its linears, or 16 (unchanged). The rounded layers are
those that a checkpoint would hold (actors.quantizers.mixed); they replace the loaded ones while they are measured.
Removed layers are switched off.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from actors.checkpoint.loading import language_model
from actors.conversations import reply_ids
from actors.critic import LayerCritic, reply_losses, reply_states
from actors.quantizers.mixed import read_option
from actors.specs import Conversation, DraftContext, ModelSpec

Choice = tuple[int, ...]
REMOVED, WHOLE = 0, 16


class ChoiceCritic:
    """One replica, and two measures of what it loses under a choice.

    options: the folder that actors.quantizers.mixed.MixedQuantizer.options wrote, with all bits that choices name. The
    other arguments are LayerCritic's.
    """

    def __init__(self, spec: ModelSpec, max_rows: int, max_new_tokens: int, embedder: str, seed: int, options: str):
        self._critic = LayerCritic(spec, max_rows, max_new_tokens, embedder, seed)
        self.replica, self._tokens, self._options = self._critic.replica, max_new_tokens, options

    def layer_count(self) -> int:
        """Return the number of decoder layers."""
        return self.replica.layer_count()

    def measure(
        self,
        name: str,
        samples: Sequence[Conversation],
        choices: Sequence[Sequence[int]],
        base: Sequence[int] = (),
        known: Sequence[DraftContext] | None = None,
    ) -> list[dict]:
        """Return rows {sample_id, choice, <columns of the measure>}, one per sample and choice.

        answers and reference have the columns of `LayerCritic.measure`; the whole model has 16 everywhere. known: the
        whole model's answers. ValueError: a choice has another number of layers than the model, or removes them all.
        """
        wanted = [tuple(choice) for choice in choices]
        for choice in wanted:
            if len(choice) != self.layer_count() or not any(choice):
                raise ValueError(
                    f"{choice} is not a choice for {self.layer_count()} layers: it needs an option for each, and one "
                    "layer must stay."
                )
        return {"answers": self._answers, "reference": self._reference}[name](samples, wanted, known)

    def _answers(self, samples, choices: list[Choice], known) -> list[dict]:
        if known is None:
            whole_rows = self.replica.answers(samples, [()], self._tokens)
            known = [DraftContext(row["answer"], row["token_ids"]) for row in whole_rows]
        whole = {sample.id: item.whole for sample, item in zip(samples, known, strict=True)}
        rows = []
        for choice, removed in self._each(choices):
            for row in self.replica.answers(samples, [removed], self._tokens, drafts=[item.draft for item in known]):
                rows.append({**{key: value for key, value in row.items() if key != "removed"}, "choice": list(choice)})
        cosines = self._critic.cosines([(row["answer"], whole[row["sample_id"]]) for row in rows])
        return [{**row, "loss": 1 - cosine} for row, cosine in zip(rows, cosines, strict=True)]

    @torch.inference_mode()
    def _reference(self, samples, choices: list[Choice], known) -> list[dict]:
        replica, model = self.replica, self.replica.model
        prompts = [replica.embedded(sample)[0] for sample in samples]
        replies = [reply_ids(replica.processor.tokenizer, sample.reference) for sample in samples]
        base_L = replica.keep([()])[0]

        def states(removed: tuple[int, ...]) -> list[torch.Tensor]:
            return reply_states(model, prompts, replies, base_L, replica.keep([removed]))

        full_N = [model.lm_head(states_N[0]) for states_N in states(())]
        rows = []
        for choice, removed in self._each(choices):
            losses = reply_losses(model, replies, states(removed), full_N)
            for sample, reply, [(nll, kl)] in zip(samples, replies, losses, strict=True):
                row = {"sample_id": sample.id, "choice": list(choice), "nll": nll, "kl": kl, "tokens": len(reply)}
                rows.append(row)
        return rows

    def _each(self, choices: Sequence[Choice]) -> Iterator[tuple[Choice, tuple[int, ...]]]:
        """Yield (choice, its removed layers) while its rounded layers are in the model."""
        for choice in choices:
            bits = {layer: option for layer, option in enumerate(choice) if option not in (REMOVED, WHOLE)}
            with self.rounded(bits):
                yield choice, tuple(layer for layer, option in enumerate(choice) if option == REMOVED)

    @contextmanager
    def rounded(self, bits: Mapping[int, int]) -> Iterator[None]:
        """Put the rounded weights of these layers into the model while the block runs."""
        layers, originals = language_model(self.replica.model).layers, []
        try:
            for number, each in bits.items():
                for name, tensor in read_option(self._options, number, each).items():
                    parameter = layers[number].get_parameter(name)
                    originals.append((parameter, parameter.device, parameter.data.cpu()))
                    parameter.data = tensor.to(parameter.device, parameter.dtype)
            yield
        finally:
            for parameter, device, before in originals:
                parameter.data = before.to(device)
