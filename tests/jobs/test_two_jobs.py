"""Two jobs on one run_dir, started in the same moment: no stage is made twice, and both end well."""

import json
import subprocess
import sys
import time

import pytest

from cluster.tables import read_table
from tests.jobs.commands import CONFIG, ROOT, options

ROUNDS = 20
# Makes a chain of two stages per round, at the moments that both processes were told.
RACER = """
import sys, time
from pathlib import Path
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.stage import Stage

folder, start, number = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
run = Run(load_config(None, [("run_dir", str(folder))]))

def build(run, folder, facts):
    with open(run.folder / "built.txt", "a") as log:
        log.write(facts.setdefault("note", folder.name.split(".")[0]) + "\\n")
    (folder / "data.txt").write_text("x" * 1000)
    time.sleep(0.03)

for number in range({rounds}):
    first = Stage("first", 1, {{"round": number}}, (), build)
    second = Stage("second", 1, {{"round": number}}, (first,), build)
    time.sleep(max(0.0, start + 0.25 * number - time.time()))
    made = run.make(second)
    assert (Path(made) / "data.txt").stat().st_size == 1000
print("ended")
"""


def test_twenty_starts_in_the_same_moment(tmp_path):
    start = str(time.time() + 3)
    command = [sys.executable, "-c", RACER.format(rounds=ROUNDS), str(tmp_path), start]
    racers = [
        subprocess.Popen([*command, str(n)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    for racer in racers:
        out, err = racer.communicate(timeout=120)
        assert racer.returncode == 0 and out == "ended\n", err
    built = (tmp_path / "built.txt").read_text().split()
    assert len(built) == len(set(built)) == 2 * ROUNDS
    left = [path.name for path in (tmp_path / "artifacts").iterdir() if path.name.startswith(".")]
    assert left == [] and len(list((tmp_path / "artifacts").glob("*/manifest.json"))) == 2 * ROUNDS


@pytest.mark.slow
def test_two_ablations_of_one_run_folder(tmp_path):
    """One measures, the other waits and reads; the table is whole."""
    command = [sys.executable, "-m", "jobs.ablate", "--config", CONFIG, *options(tmp_path, **{"ablate.compare": "[]"})]
    jobs = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    ends = [job.communicate(timeout=600) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], ends
    assert ends[0][0] == ends[1][0] and "rank  layer" in ends[0][0]
    assert sum("ablate: computing" in err for _, err in ends) == 1
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "artifacts").glob("ablate-*/manifest.json")]
    assert len(manifests) == 1
    for table in (tmp_path / "measurements").iterdir():
        keys = [(row["sample_id"], tuple(row["removed"])) for f in table.glob("*.parquet") for row in read_table(f)]
        assert len(keys) == len(set(keys)) > 0
