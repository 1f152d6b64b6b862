"""Trials that share stages: each is made once, whatever fails, dies or is sampled."""

import importlib.util
import json
import random
from collections import Counter

import psutil
import pytest
import ray
from ray.tune.search import Searcher

from cluster.pool import ATTEMPTS
from cluster.suggesting import Suggestions
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
    assert list((tmp_path / "search" / "grid").glob("start-1/*/events.out.tfevents*"))


@pytest.mark.slow
def test_a_stage_that_is_killed_each_time_is_given_up_and_the_others_go_on(private_ray, tmp_path):
    tasks = {(end,): [Task(end, (0.1, end, 1.0))] for end in ("killed", "dies")}  # as by the kernel, out of memory
    maker = Maker(TOYS, {"folder": str(tmp_path)}, parallel=1)
    ends = run_trials(tasks, maker, tmp_path / "grid", tmp_path / "log.jsonl", lambda event: None)
    assert "died" in ends["killed",]["error"] and ends["dies",]["error"] is None
    assert Counter((tmp_path / "tries").read_text().split()) == {"killed": ATTEMPTS, "dies": 2}
    failed = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if "failed" in line]
    assert [(line["name"], line["tries"]) for line in failed] == [("killed", ATTEMPTS)]


def test_a_logger_that_is_missing_is_told_of_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ray, "remote", lambda *_, **__: pytest.fail("a broker was started"))
    maker = Maker(TOYS, {"folder": str(tmp_path)})
    with pytest.raises(ValueError, match="The logger mlflow is not installed"):
        run_trials(chains(), maker, tmp_path / "grid", tmp_path / "log.jsonl", print, ["mlflow"])


@pytest.mark.slow
def test_mlflow_has_a_run_of_every_trial(private_ray, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    import mlflow

    tasks = {key: chain for key, chain in chains(0.0).items() if key[1] == "x" and key[0] != "c"}
    maker = Maker(TOYS, {"folder": str(tmp_path)}, parallel=2)
    for start in (1, 2):  # a search that goes on writes into the same store
        run_trials(tasks, maker, tmp_path / "grid", tmp_path / "log.jsonl", lambda event: None, ["mlflow"])
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/grid/mlflow.db")
        (experiment,) = [one for one in client.search_experiments() if one.name == "grid"]
        found = {tuple(run.data.params.values()): [] for run in client.search_runs([experiment.experiment_id])}
        for run in client.search_runs([experiment.experiment_id]):
            found[tuple(run.data.params.values())].append((run.info.status, run.data.metrics["failed"]))
            assert run.data.metrics.get("number") == (1.0 if run.data.metrics["failed"] == 0 else None)
        assert found == {("a", "x"): start * [("FINISHED", 0.0)], ("b", "x"): start * [("FINISHED", 1.0)]}


GRID = [(depth, way, bits) for depth in "0123456789" for way in ("none", "lora") for bits in "2348"]


BOTH = {"score": "max", "gib": "min"}


def suggested(keys, ends=lambda key: value(key), objectives=BOTH, shuffled: int | None = None, seed: int = 0) -> list:
    """Ask for settings, and tell what each found (None: it failed), in an order of its own if shuffled."""
    searcher = Suggestions(keys, objectives, 40, 4, seed)
    found: list = []
    waiting: list = []
    for number in range(10**4):
        given = searcher.suggest(str(number))
        if given is None or given == Searcher.FINISHED:
            if shuffled is not None:
                random.Random(shuffled).shuffle(waiting)
            for name, key in waiting:
                result = ends(key)
                searcher.on_trial_complete(name, result and dict(zip(BOTH, result, strict=True)))
            waiting.clear()
            if given == Searcher.FINISHED:
                return found
            continue
        key = tuple(given["setting"].values())
        found.append(key)
        waiting.append((str(number), key))
    raise AssertionError("it never ends")


def value(key) -> tuple[float, float]:
    """Best with few layers out, and with recovery."""
    return 90.0 - 5 * int(key[0]) + 4 * (key[1] == "lora"), 4.0


def test_every_suggestion_exists_and_comes_once():
    keys = [key for key in GRID if (int(key[0]) + int(key[2])) % 3]  # a third is over the budget
    found = suggested(keys)
    assert len(found) == len(set(found)) == 40 and set(found) <= set(keys)
    assert sorted(suggested(keys[:9])) == sorted(keys[:9])  # fewer than trials: all of them


def test_suggestions_do_not_depend_on_who_ends_first():
    first, *others = (suggested(GRID, shuffled=seed) for seed in (None, 1, 2))
    assert others == [first, first]


def test_it_learns_from_what_it_sees_and_from_what_fails():
    """Against the mean of the space, over four seeds, after the first eight suggestions."""
    score = {"score": "max"}
    good = [one for seed in range(4) for one in suggested(GRID, objectives=score, seed=seed)[8:24]]
    assert sum(value(key)[0] for key in good) / len(good) > sum(value(key)[0] for key in GRID) / len(GRID) + 3
    found = [suggested(GRID, lambda key: None if key[2] == "8" else value(key), score, seed=seed) for seed in range(4)]
    failed = sum(key[2] == "8" for one in found for key in one[8:])
    assert failed < 0.8 * 4 * 32 / 4  # a quarter of the space fails


def test_what_failed_counts_as_the_worst_that_was_seen():
    searcher = Suggestions([("a",), ("b",), ("c",)], BOTH, 3, 2, 0)
    first, second = (searcher.suggest(name)["setting"]["0"] for name in ("one", "two"))
    assert searcher.suggest("three") is None
    searcher.on_trial_complete("two", {"score": 5, "gib": 2})
    assert searcher.suggest("three") is None
    searcher.on_trial_complete("one", {"error": "nan"})
    (third,) = {"a", "b", "c"} - {first, second}
    assert searcher.suggest("three")["setting"]["0"] == third
    assert [trial.values for trial in searcher._study.trials[:2]] == [[5, 2], [5, 2]]
    assert searcher.suggest("four") == Searcher.FINISHED


@pytest.mark.slow
def test_sampling_suggests_the_same_settings_again_whoever_ends_first(private_ray, tmp_path):
    seen: list[list] = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        tasks = {k: [t for t in chain if t.name != "cy"] for k, chain in chains(random.random()).items()}
        maker = Maker(TOYS, {"folder": str(folder)}, parallel=2)
        sampled = Sampled(5, {"number": "max"}, seed=1, batch=2)
        events: list[dict] = []
        ends = run_trials(tasks, maker, folder / "tune", folder / "log.jsonl", events.append, (), sampled)
        assert set(ends) <= set(tasks)
        assert max(Counter((folder / "tries").read_text().split()).values()) == 1
        seen.append(sorted(event["key"] for event in events if event["event"] == "trial"))
    assert len(set(seen[0])) == len(seen[0]) == 5 and seen[0] == seen[1]


def test_a_class_that_cannot_be_built_fails_its_trials(private_ray, tmp_path):
    earlier = tmp_path / "tune" / "start-1" / "events.out.tfevents"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    maker = Maker("tests.cluster.toys:NotThere", {}, parallel=1)
    ends = run_trials({("a",): [Task("a")]}, maker, tmp_path / "tune", tmp_path / "log.jsonl", print)
    assert "NotThere" in ends["a",]["error"]
    assert earlier.is_file() and (tmp_path / "tune" / "start-2").is_dir()  # what an earlier start logged is kept
