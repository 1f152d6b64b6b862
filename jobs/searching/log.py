"""run_dir/search/log.jsonl: what a search made and what failed, a line for each event."""

import json
from collections.abc import Mapping

from jobs.core.run import Run
from jobs.searching.stages import SEARCH

EVENTS = "log.jsonl"
MEASURED_FOR = "measured"  # event: what jobs.joint measured for its choices


def read_log(run: Run) -> list[dict]:
    """Return what was made and what failed, in order; a line that a kill cut short is left out."""
    path = run.folder / SEARCH / EVENTS
    events = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def write_log(run: Run, event: Mapping) -> None:
    """Add an event to the log."""
    path = run.folder / SEARCH / EVENTS
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as log:
        log.write(json.dumps(event) + "\n")
