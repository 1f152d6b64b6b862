"""The floor: what any exact way to answer for a model and its removals must compute, at this machine's best rates.

Four parts, in seconds. prompts: every token that prompts about one image do not share, through all layers for the
whole model, and for a removal through the layers above it (below, it equals the whole model). checked: the tokens in
which a removal says what the whole model says, through the layers above the removal, all at once. decoded: the whole
model's tokens, and every other token, one after the other: their arithmetic, or reading the weights once per token of
the longest answer, whichever takes longer. vocabulary: the output head for every token. Arithmetic runs at the rate of
large matrix products, reading at the bandwidth of a long sum. Attention, norms and the tower are left out.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile

from actors.checkpoint.loading import language_model
from actors.specs import Llava
from tests.benchmarks.machine import bandwidth, matmul_rate


def floor_parts(
    model: Llava, prompts: Sequence[tuple[str, tuple[int, ...]]], answers: Mapping[tuple[int, ...], list[list[int]]]
) -> dict[str, float]:
    """Return the seconds of every part; prompts: (image, token ids); answers: by removed set, () and single layers."""
    layers = language_model(model).layers
    unshared = len({(image, ids[:end]) for image, ids in prompts for end in range(1, len(ids) + 1)})
    own_layers = {removed: len(layers) - 1 - removed[0] if removed else len(layers) for removed in answers}
    prompt_layers = unshared * sum(own_layers.values())
    checked_layers = decoded_layers = 0
    for removed, rows in answers.items():
        for answer, whole in zip(rows, answers[()], strict=True):
            same = 0
            if removed:
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer, whole, strict=False)))
            fed = max(0, len(answer) - 1)  # what follows the last token is never asked
            same = min(same, fed)
            checked_layers += same * own_layers[removed]
            decoded_layers += (fed - same) * (len(layers) - len(removed))
    weights = [p.detach() for p in layers[0].parameters() if p.dim() == 2]
    per_layer, head = sum(p.numel() for p in weights), model.lm_head.weight.detach()
    rate, longest = matmul_rate(weights), max(len(row) for rows in answers.values() for row in rows)
    tokens = sum(len(row) for rows in answers.values() for row in rows)
    read = longest * (per_layer * len(layers) + head.numel()) * head.element_size()
    return {
        "prompts": 2 * per_layer * prompt_layers / rate,
        "checked": 2 * per_layer * checked_layers / rate,
        "decoded": max(2 * per_layer * decoded_layers / rate, read / bandwidth(head.device)),
        "vocabulary": 2 * head.numel() * tokens / rate,
    }
