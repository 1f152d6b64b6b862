"""Run the whole pipeline on a model that we bring: start a private Ray, then submit jobs to it as to a cluster.

    make demo           # python -m jobs.demo, the embedded model of 10 layers: 4 minutes on two cores
    make demo-smol      # python -m jobs.demo derm-smol, a language model of 30 layers, with a search over depths

Results go to runs/NAME. The same command continues after a stop; when nothing is missing it takes seconds.
"""

import argparse
import logging
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs import compress, report, search
from jobs.core.command import one_sentence
from jobs.core.logs import parse_and_configure
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.reporting import search as search_report
from jobs.searching.rows import read_rows
from jobs.searching.space import space
from jobs.searching.stages import SEARCH, plans

LOG = logging.getLogger("jobs")


@dataclass(frozen=True)
class Demo:
    """A demo: its configuration and the jobs to submit, in order."""

    config: str
    jobs: tuple[str, ...]


DEMOS = {
    "derm-tiny": Demo("configs/derm-tiny.yaml", ("prepare", "ablate", "compress", "report")),
    "derm-smol": Demo("configs/derm-smol.yaml", ("prepare", "ablate", "compress", "report", "search")),
}
NEXT = """
What next? Describe your model and images in a copy of configs/llava-1.5-7b-dermnet.yaml, say configs/mine.yaml, then
  here:          .venv/bin/python -m jobs.compress --config configs/mine.yaml
  on a cluster:  .venv/bin/ray job submit --address http://HEAD:8265 --working-dir . -- \\
                   python -m jobs.compress --config configs/mine.yaml --run_dir /shared/mine"""


def main() -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=DEMOS, default="derm-tiny", help="the model (default: %(default)s)")
    options = parse_and_configure(parser)
    with one_sentence("demo"):
        demo(DEMOS[options.name])


def demo(chosen: Demo) -> None:
    """Make the missing stages, then print the tables and the paths of the reports."""
    started = time.monotonic()
    given = load_config(chosen.config, [])
    model = Path(given.model.path).resolve()
    if not model.is_dir():
        _build_model(model)
    paths = [("run_dir", str(Run(given).folder)), ("model.path", str(model))]  # jobs run in a copy of this folder
    with Run(load_config(chosen.config, paths)) as run:
        if _has_missing_stages(run, chosen):
            _submit_jobs(chosen, [word for name, value in paths for word in (f"--{name}", value)])
        else:
            LOG.info("demo: every artifact exists already; nothing to compute")
            report.job(run)
        print(f"\n{compress.format_rows(compress.make_summary(run, compress.plan(run)))}")
        pages = [run.folder / report.HTML]
        if "search" in chosen.jobs:
            print(f"\n{search.format_rows(read_rows(run))}")
            pages.append(run.folder / SEARCH / search_report.HTML)
    for page in pages:
        print(f"\nThe report: {page}")
    print(f"\nThe demo took {time.monotonic() - started:.0f} s.\n{NEXT}")


def _build_model(folder: Path) -> None:
    """Put derm-smol together in a process of its own: the libraries that read it print banners."""
    LOG.info("demo: putting the model together")
    command = [sys.executable, "-m", "jobs.make_derm_smol", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise RuntimeError(f"The model cannot be put together: {last}")


def _has_missing_stages(run: Run, chosen: Demo) -> bool:
    stages = [stage for pair in compress.plan(run).values() for stage in pair] + compress.studies(run)
    if "search" in chosen.jobs:
        if not read_rows(run):
            return True
        stages += [plan.evaluation for plan in plans(run, space(run.config))]
    return bool(run.missing(stages))


def _submit_jobs(chosen: Demo, options: Sequence[str]) -> None:
    from cluster.head import RAY, private_head

    LOG.info("demo: starting a private Ray on this machine (loopback only)")
    with private_head() as head:
        for name in chosen.jobs:
            entrypoint = [sys.executable, "-m", f"jobs.{name}", "--config", chosen.config, *options]
            entrypoint += ["--verbose"] if LOG.isEnabledFor(logging.DEBUG) else []
            LOG.info(f"demo: ray job submit --working-dir . -- python -m {' '.join(entrypoint[2:])}")
            submit = [str(RAY), "job", "submit", "--working-dir", ".", "--log-style", "record"]
            submit += ["--address", head.address, "--"]
            process = subprocess.Popen(
                [*submit, *entrypoint],
                env=head.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            tail: deque[str] = deque(maxlen=15)
            for line in process.stdout or ():
                tail.append(line)
                relay(line)
            if process.wait() != 0:
                raise RuntimeError(
                    f"the job {name} failed; what was finished is kept. The end of its log:\n{''.join(tail)}"
                )


def relay(line: str) -> None:
    """Relay a line of a job's log: a warning as a warning, a stage's or its progress as info, all else as debug."""
    if match := _LINE.match(line):
        _, warning, text = match.groups()
        shown = _STAGE.match(text) or _PROGRESS.match(text)
        level = logging.WARNING if warning else logging.INFO if shown else logging.DEBUG
        LOG.log(level, f"  {text}")


_LINE = re.compile(r"(\d\d:\d\d:\d\d )?(WARNING )?(.*)")
_STAGE = re.compile(
    r"(prepare|data|ablate|select|prune|narrow|states|patch|recover|quantize|evaluate|compare|ranges|compress|report|search):"
)
_PROGRESS = re.compile(r".+: \d+/\d+ \(.+ s left\)")

if __name__ == "__main__":
    main()
