"""Trials that share stages: each is made once, whatever fails, dies or is sampled."""

import json
import random
from collections import Counter

import psutil
import pytest

from cluster.tuning import Maker, Sampled, Task, run_trials

TOYS = "tests.cluster.toys:Stages"
NAN = "The loss is nan at step 3."


def chains(seconds: float = 0.1) -> dict[tuple[str, ...], list[Task]]:
    """Three roots below a common one, each with two leaves: one root fails, one leaf dies once."""
    found = {}
    for root in "abc":
        for leaf in "xy":
            common = Task("common", (seconds, "", 0.0))
            parent = Task(root, (seconds, NAN if root == "b" else "", 0.0))
            own = Task(root + leaf, (seconds, "dies" if root + leaf == "cy" else "", "abc".index(root) + 1.0))
            found[root, leaf] = [common, parent, own]
    return found


class KillsATrial:
    """Kills a coordinator as soon as a stage is being made for it."""

    def __init__(self):
        self.killed, self.events = 0, []

    def __call__(self, event: dict) -> None:
        self.events.append(event)
        if not self.killed:
            trials = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Implicit")]
            if trials:
                trials[0].kill()
                self.killed += 1


def test_shared_stages_are_made_once_and_failures_are_results(private_ray, tmp_path):
    watcher, log = KillsATrial(), tmp_path / "log.jsonl"
    maker = Maker(TOYS, {"folder": str(tmp_path)}, parallel=2)
    ends = run_trials(chains(), maker, tmp_path / "search" / "grid", log, watcher, ["tensorboard"])
    assert {key: end["error"] for key, end in ends.items()} == {key: NAN if key[0] == "b" else None for key in chains()}
    assert {key: end["number"] for key, end in ends.items() if not end["error"]} == {
        ("a", "x"): 1.0, ("a", "y"): 1.0, ("c", "x"): 3.0, ("c", "y"): 3.0
    }  # fmt: skip
    tries = Counter((tmp_path / "tries").read_text().split())
    assert tries == {"common": 1, "a": 1, "b": 1, "c": 1, "ax": 1, "ay": 1, "cx": 1, "cy": 2}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    made = {line["name"]: line for line in lines if line["event"] == "made"}
    assert sorted(made) == sorted(tries - Counter("b")) and len(lines) == len(tries)
    assert made["cy"]["tries"] == 2 and all(line["pid"] and line["seconds"] >= 0.1 for line in made.values())
    assert [line["error"] for line in lines if line["event"] == "failed"] == [NAN]
    assert watcher.killed == 1
    assert Counter(e["key"] for e in watcher.events if e["event"] == "trial") == Counter(dict.fromkeys(chains(), 1))
    assert list((tmp_path / "search" / "grid").glob("*/events.out.tfevents*"))


@pytest.mark.slow
def test_sampling_suggests_the_same_settings_again_whoever_ends_first(private_ray, tmp_path):
    seen: list[list] = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        tasks = {k: [t for t in chain if t.name != "cy"] for k, chain in chains(random.random()).items()}
        maker = Maker(TOYS, {"folder": str(folder)}, parallel=2)
        sampled = Sampled(12, {"number": "max"}, seed=1, batch=4)
        events: list[dict] = []
        ends = run_trials(tasks, maker, folder / "tune", folder / "log.jsonl", events.append, (), sampled)
        assert set(ends) <= set(tasks)
        assert max(Counter((folder / "tries").read_text().split()).values()) == 1
        seen.append(sorted(event["key"] for event in events if event["event"] == "trial"))
    assert len(seen[0]) == 12 and seen[0] == seen[1]


def test_a_class_that_cannot_be_built_fails_its_trials(private_ray, tmp_path):
    maker = Maker("tests.cluster.toys:NotThere", {}, parallel=1)
    ends = run_trials({("a",): [Task("a")]}, maker, tmp_path / "tune", tmp_path / "log.jsonl", print)
    assert "NotThere" in ends["a",]["error"]
