"""Choose which layers to remove together, by measuring sets of them: greedy, beam, or evolutionary search.

One shot takes the layers with the best scores of single removals. But their losses do not add up: greedy search scores
again after each removal, beam search does so for several sets at once, and evolutionary search (EvoPress, Sieberling et
al. 2024) swaps layers in the best set so far; KL on the reference answers discards most of a generation's sets, and the
criterion itself decides among the survivors. Measurements of `jobs.ablate` are reused.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from actors.criteria import CRITERIA
from actors.maths.losses import compare_losses
from actors.maths.subsets import extend_set, mutate_set, select_best, select_earliest, start_stream
from jobs.core.facts import AblateFacts
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.core.text import format_score
from jobs.ranking.calibration import open_measurements
from jobs.ranking.measurements import Measurements, Removed, check_ranked
from jobs.ranking.rows import STEPS, SearchStep

LOG = logging.getLogger("jobs.ranking")


def stage(run: Run, model: Stage | Source, data: Stage, scores: Stage) -> Stage:
    """Return the stage that searches for the set of `prune.layers` layers; `scores` is the ablation."""
    prune = run.config.prune
    options = {
        "greedy": (),
        "beam": ("beam_width",),
        "evolution": ("generations", "offspring", "survivors"),
    }[prune.search]
    settings = {name: getattr(prune, name) for name in ("search", "layers", *options)}
    if prune.search == "evolution":
        settings["seed"] = run.config.seed
    return Stage(
        "select", 1, settings, (model, data, scores), lambda r, f, facts: build(r, model, data, scores, f, facts)
    )


def one_shot(run: Run, scores: Stage) -> Removed:
    """Return the `prune.layers` layers with the best scores of single removals; ValueError: there are fewer."""
    order, layers = run.facts(scores, AblateFacts)["order"], run.config.prune.layers
    if layers > len(order):
        raise ValueError(
            f"prune.layers is {layers}, but only {len(order)} layers may be removed "
            f"(ablate.candidates: {run.config.ablate.candidates})."
        )
    return tuple(sorted(order[:layers]))


def build(run: Run, model: Stage | Source, data: Stage, scores: Stage, folder: Path, facts: dict) -> None:
    """Search, and compare the chosen set with the one-shot set."""
    prune, criterion = run.config.prune, run.config.ablate.criterion
    order, ranked = run.facts(scores, AblateFacts)["order"], one_shot(run, scores)
    with open_measurements(run, model, data, [criterion]) as (measured, _):
        measured.failed.update(run.facts(scores, AblateFacts)["failed"])
        steps: list[SearchStep] = []

        def note(kind: str, sets: list[Removed], losses: list[float]) -> None:
            steps.extend(
                {"round": kind, "removed": list(removed), "loss": loss}
                for removed, loss in zip(sets, losses, strict=True)
            )

        if prune.search == "evolution":
            chosen = evolve(run, measured, order, ranked, note)
        else:
            chosen = beam(run, measured, order, prune.beam_width if prune.search == "beam" else 1, note)
        pair = measured.losses(criterion, [chosen, ranked], label="against one shot")
    STEPS.write(folder, steps)
    to_unit = CRITERIA[criterion].to_unit
    score, one_shot_score = pair.means_K.tolist()
    gain, low, high = compare_losses(pair)
    facts.update(
        removed=list(chosen),
        one_shot=list(ranked),
        score=to_unit(score),
        one_shot_score=to_unit(one_shot_score),
        gain=gain,
        gain_interval=[low, high],
        sets_measured=len({tuple(step["removed"]) for step in steps}),
        failed=measured.failed,
    )
    resolved = "" if low > 0 or high < 0 else ", unresolved"
    LOG.info(
        f"select: {prune.search} removes {list(chosen)} ({format_score(facts['score'])}), one shot {list(ranked)} "
        f"({format_score(facts['one_shot_score'])}); loss lower by "
        f"{format_score(gain)} [{format_score(low)}, {format_score(high)}]{resolved}",
    )


def beam(run: Run, measured: Measurements, order: list[int], width: int, note: Callable) -> Removed:
    """Remove one layer per round, keeping the `width` best sets; a set's children share work and drafts."""
    sets: list[Removed] = [()]
    layers, criterion = run.config.prune.layers, run.config.ablate.criterion
    for done in range(layers):
        label = f"{run.config.prune.search} {done + 1}/{layers}"
        children: dict[Removed, None] = {}
        for parent in sets:
            children_of_set = extend_set(parent, order)
            measured.losses(criterion, children_of_set, base=parent, label=label)
            children.update(dict.fromkeys(children_of_set))
        losses = measured.losses(criterion, list(children), label=label).ranked_K.tolist()
        note(label, list(children), losses)
        check_ranked(criterion, losses)
        sets = select_best(losses, list(children), width)
    return sets[0]


def evolve(run: Run, measured: Measurements, order: list[int], start: Removed, note: Callable) -> Removed:
    """Mutate the best set, `offspring` times a generation; the best of the survivors replaces it if it loses less."""
    prune, criterion = run.config.prune, run.config.ablate.criterion
    random = start_stream(run.config.seed)
    best = start
    for generation in range(prune.generations):
        label = f"evolution {generation + 1}/{prune.generations}"
        children = mutate_set(random, best, order, prune.offspring)
        if not children:  # there is no other set
            break
        if criterion == "answer_similarity":
            cheap = measured.losses("kl", children, base=best, label=f"{label}, KL").ranked_K.tolist()
            note(f"{label}, KL", children, cheap)
            children = select_earliest(cheap, children, prune.survivors)
        losses = measured.losses(criterion, [best, *children], base=best, label=label).ranked_K.tolist()
        note(label, [best, *children], losses)
        check_ranked(criterion, losses)
        (best,) = select_earliest(losses, [best, *children], 1)  # of equals, the old one stays
    return best
