"""LayerCritic: measures what a model loses without sets of decoder layers; all measures have one interface.

Every measure returns one row per sample and removed set; in every column high means that much is lost.
Axes: R rows, T tokens, D width, V vocabulary, L layers, N samples, S removed sets.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from actors.answer_states import weigh_gradients
from actors.checkpoint.loading import language_model, pick_device
from actors.conversations import collate, reply_ids
from actors.embedder import Embedder
from actors.engine.replica import LlavaReplica, group_by_image
from actors.engine.rows import PromptPass
from actors.engine.verification import LOGITS_AT_ONCE, Verification, pack_prompts
from actors.maths.criteria import token_cosines, token_kl, token_nll
from actors.specs import Conversation, DraftContext, ModelSpec


class LayerCritic:
    """One replica and the measures of what it loses without layers.

    embedder: the sentence-transformer of the measure "answers", None if that is not used; it is loaded before the
    model, so that a wrong name fails at once (ValueError). seed: of the measure "random".
    """

    def __init__(self, spec: ModelSpec, max_rows: int, max_new_tokens: int, embedder: str | None, seed: int):
        self._embedder = Embedder(embedder, pick_device() if spec.gpus else "cpu") if embedder else None
        self.replica = LlavaReplica(spec, max_rows)
        self.max_new_tokens, self.seed = max_new_tokens, seed

    def layer_count(self) -> int:
        """Return the number of decoder layers."""
        return self.replica.layer_count()

    def measure(
        self,
        name: str,
        samples: Sequence[Conversation],
        removed_sets: Sequence[Sequence[int]],
        base: Sequence[int] = (),
        known: Sequence[DraftContext] | None = None,
    ) -> list[dict]:
        """Return rows {sample_id, removed, <columns of the measure>}, one per sample and removed set.

        answers: `loss` = 1 - cos(E(answer without the set), E(the whole model's answer)) (paper, eq. 2-4);
        reference: `nll`, `kl` of the reference answer's tokens, `tokens` their number (Shortened LLaMA);
        influence: block influence over `all`, `image` and `text` tokens with their numbers (ShortGPT), summed
        over the set; taylor: sum of |w dL/dw| over the set's weights; magnitude: sum of |w|; random: a draw per
        layer. base and known save work and change no number: what the model without `base` computes is shared, and
        known answers are not generated again.
        """
        return MEASURES[name](self, samples, [tuple(removed) for removed in removed_sets], tuple(base), known)

    def cosines(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Return the cosine between the embeddings of every pair of texts, 1 for equal ones."""
        assert self._embedder is not None, "made without an embedder"
        different = [pair for pair in pairs if pair[0] != pair[1]]
        by_pair = dict(zip(different, self._embedder.similarities(different), strict=True))
        return [by_pair.get(pair, 1.0) for pair in pairs]


def _answers(critic: LayerCritic, samples, sets, base, known) -> list[dict]:
    if known:
        rows = critic.replica.answers(samples, sets, critic.max_new_tokens, base, [item.draft for item in known])
        whole = {sample.id: item.whole for sample, item in zip(samples, known, strict=True)}
    else:
        guesses = [reply_ids(critic.replica.processor.tokenizer, sample.reference) for sample in samples]
        asked = critic.replica.answers(samples, [(), *sets], critic.max_new_tokens, base, guesses=guesses)
        whole = {row["sample_id"]: row["answer"] for row in asked[:: len(sets) + 1]}
        rows = [row for i, row in enumerate(asked) if i % (len(sets) + 1)]
    pairs = [(row["answer"], whole[row["sample_id"]]) for row in rows]
    return [{**row, "loss": 1 - cosine} for row, cosine in zip(rows, critic.cosines(pairs), strict=True)]


@torch.inference_mode()
def _by_reference(critic: LayerCritic, samples, sets, base, columns: Callable) -> list[dict]:
    """Return rows of what `columns` finds in the states that predict the reference answer's tokens, and `tokens`.

    Called as columns(model, replies, states_N): per sample its reply's token ids, and the states [1 + S, T, D] after
    the final norm, those of the whole model first. Returns per sample and removed set the columns as a dict.
    """
    replica = critic.replica
    tokenizer = replica.processor.tokenizer
    prompts = [replica.embedded(sample)[0] for sample in samples]
    replies = [reply_ids(tokenizer, sample.reference) for sample in samples]
    replica.plan(max(map(len, prompts)) + max(map(len, replies)))
    base_L, keep_SL = replica.keep([base])[0], replica.keep([(), *sets])

    def run(part: list[int], chosen: list[int]) -> list:
        with_whole = [0, *(1 + v for v in chosen)]
        given = [replies[i] for i in part]
        states_N = reply_states(replica.model, [prompts[i] for i in part], given, base_L, keep_SL[with_whole])
        found = columns(replica.model, given, states_N)
        return [((i, v), found[n][c]) for n, i in enumerate(part) for c, v in enumerate(chosen)]

    groups = group_by_image(samples, [len(p) + len(r) for p, r in zip(prompts, replies, strict=True)])
    found: dict = dict(replica.batched(groups, list(range(len(sets))), run))
    return [
        {**_key(sample, removed), **found[i, v], "tokens": len(replies[i])}
        for i, sample in enumerate(samples)
        for v, removed in enumerate(sets)
    ]


def _reference(critic: LayerCritic, samples, sets, base, known) -> list[dict]:
    return _by_reference(critic, samples, sets, base, _forced)


@torch.inference_mode()
def _influence(critic: LayerCritic, samples, sets, base, known) -> list[dict]:
    replica = critic.replica
    decoder, texts, images = language_model(replica.model), [], []
    for sample in samples:
        embeds, is_image = replica.embedded(sample)
        reply = torch.tensor(reply_ids(replica.processor.tokenizer, sample.reference), device=embeds.device)
        texts.append(torch.cat([embeds, decoder.embed_tokens(reply)]))
        images.append(torch.cat([is_image.cpu(), torch.zeros(len(reply), dtype=torch.bool)]))
    rows = []
    for sample, is_image, cosines_LT in zip(samples, images, layer_cosines(replica.model, texts), strict=True):
        parts = {"all": torch.ones_like(is_image), "image": is_image, "text": ~is_image}
        means = {part: (1 - cosines_LT[:, places]).mean(1).tolist() for part, places in parts.items()}
        counts = {f"{part}_tokens": int(places.sum()) for part, places in parts.items()}
        rows += [
            {**_key(sample, removed), **{p: sum(means[p][b] for b in removed) for p in parts}, **counts}
            for removed in sets
        ]
    return rows


def _taylor(critic: LayerCritic, samples, sets, base, known) -> list[dict]:
    rows = []
    for sample in samples:
        batch = collate(critic.replica.processor, [sample])
        scores_L = taylor_scores(critic.replica.model, batch)
        rows += [{**_key(sample, removed), "taylor": sum(scores_L[b] for b in removed)} for removed in sets]
    return rows


def _magnitude(critic: LayerCritic, samples, sets, base, known) -> list[dict]:
    layers = language_model(critic.replica.model).layers
    scores_L = [
        sum(p.detach().abs().sum(dtype=torch.float64).item() for p in layer.parameters() if p.dim() >= 2)
        for layer in layers
    ]
    return [{**_key(s, removed), "magnitude": sum(scores_L[b] for b in removed)} for s in samples for removed in sets]


def _random(critic: LayerCritic, samples, sets, base, known) -> list[dict]:
    scores_L = np.random.default_rng(critic.seed).random(critic.layer_count()).tolist()
    return [{**_key(s, removed), "random": sum(scores_L[b] for b in removed)} for s in samples for removed in sets]


def _key(sample: Conversation, removed: tuple[int, ...]) -> dict:
    return {"sample_id": sample.id, "removed": list(removed)}


def _forced(model, replies, states_N) -> list[list[dict]]:
    """Return [N][S] of the mean nll and the mean KL to the first states' model over the reply's tokens, in nats."""
    full_N = (model.lm_head(states[0]) for states in states_N)
    losses_NS = reply_losses(model, replies, (states[1:] for states in states_N), full_N)
    return [[{"nll": nll, "kl": kl} for nll, kl in losses] for losses in losses_NS]


def reply_states(model, prompts, replies, base_L, keep_SL) -> list[torch.Tensor]:
    """Return per input the states [S, T, D] that predict its reply's T tokens, for every set of layers.

    They are those after the final norm, which the head reads.
    """
    states_N: dict[int, torch.Tensor] = {}
    for pack in pack_prompts(model, prompts, replies):
        check = Verification(model, pack, prompts, base_L, keep_SL)
        for n in check.inputs:
            rows, first = [check.row(n, v) for v in range(len(keep_SL))], check.end(n)
            states_N[n] = check.hidden_RQD[rows, first : first + len(replies[n])]
    return [states_N[n] for n in range(len(prompts))]


def reply_losses(model, replies, states_N, full_N) -> list[list[tuple[float, float]]]:
    """Return [N][S] of (mean nll, mean KL to the logits full_N[n] [T, V]) over the reply's tokens, in nats."""
    result = []
    for reply, states, full in zip(replies, states_N, full_N, strict=True):
        ids = torch.tensor(reply, device=full.device)
        losses: list[tuple[float, float]] = []
        step = max(1, LOGITS_AT_ONCE // full.numel())
        for start in range(0, len(states), step):
            logits = model.lm_head(states[start : start + step])
            nll = token_nll(logits, ids.expand(len(logits), -1)).mean(-1)
            kl = token_kl(full.expand_as(logits), logits).mean(-1)
            losses += zip(nll.tolist(), kl.tolist(), strict=True)
        result.append(losses)
    return result


@torch.inference_mode()
def layer_cosines(model, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return per embedded prompt [T, D] the cosine between every layer's input and output, [L, T] on the CPU."""
    layers = language_model(model).layers
    cosines: list[torch.Tensor] = []

    def note(module, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        cosines.append(token_cosines(before, after).cpu())

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        keep = torch.ones(len(prompts), len(layers), dtype=torch.bool)
        PromptPass(model, keep).forward(model, pad_sequence(list(prompts), batch_first=True))
    finally:
        for handle in handles:
            handle.remove()
    found_RLT = torch.stack(cosines, dim=1)
    return [found_RLT[row, :, : len(prompt)] for row, prompt in enumerate(prompts)]


def taylor_scores(model, batch: dict[str, torch.Tensor]) -> list[float]:
    """Return the sum of |w dL/dw| over every decoder layer's matrices; L: mean loss per answer token (nats).

    batch: what `collate` gives. One layer's gradients are in memory at a time. ValueError: quantized weights.
    """
    layers = language_model(model).layers
    weights = {p: b for b, layer in enumerate(layers) for p in layer.parameters() if p.dim() >= 2}
    if not all(p.is_floating_point() for p in weights) or hasattr(model.config, "quantization_config"):
        raise ValueError("taylor+ needs gradients of the weights, and this model's are quantized.")
    scores = [0.0] * len(layers)

    def note(weight: torch.nn.Parameter, products: torch.Tensor) -> None:
        scores[weights[weight]] += products.sum(dtype=torch.float64).item()

    weigh_gradients(model, batch, weights, note)
    return scores


# Name -> function(critic, samples, removed sets, base, known), which returns the rows of LayerCritic.measure.
MEASURES: dict[str, Callable[..., list[dict]]] = {
    "answers": _answers,
    "reference": _reference,
    "influence": _influence,
    "taylor": _taylor,
    "magnitude": _magnitude,
    "random": _random,
}
