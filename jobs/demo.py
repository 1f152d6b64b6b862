"""Run the whole pipeline on the embedded derm-tiny: start a private Ray, then submit jobs to it as to a cluster.

    make demo
    python -m jobs.demo

Results go to runs/derm-tiny. It takes minutes on two cores; a second run reuses everything and takes seconds.
"""

import argparse
import logging
import re
import subprocess
import sys
import time
from collections import deque

from jobs import compress, report
from jobs.core.command import one_sentence
from jobs.core.logs import parse_and_configure
from jobs.core.options import load_config
from jobs.core.run import Run

LOG = logging.getLogger("jobs")

CONFIG = "configs/derm-tiny.yaml"
JOBS = ("prepare", "ablate", "compress", "report")
NEXT = """
What next? Describe your model and images in a copy of configs/llava-1.5-7b-dermnet.yaml, say configs/mine.yaml, then
  here:          .venv/bin/python -m jobs.compress --config configs/mine.yaml
  on a cluster:  .venv/bin/ray job submit --address http://HEAD:8265 --working-dir . -- \\
                   python -m jobs.compress --config configs/mine.yaml --run_dir /shared/mine"""


def main() -> None:
    """Run the demo from the command line."""
    parse_and_configure(
        argparse.ArgumentParser(
            prog="python -m jobs.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    with one_sentence("demo"):
        demo()


def demo() -> None:
    """Make the missing stages, then print the table and the path of the report."""
    started = time.monotonic()
    run_dir = str(Run(load_config(CONFIG, [])).folder)
    with Run(load_config(CONFIG, [("run_dir", run_dir)])) as run:
        if _has_missing_stages(run):
            _submit_jobs(run_dir)
        else:
            LOG.info("demo: every artifact exists already; nothing to compute")
            report.job(run)
        rows = compress.make_summary(run, compress.plan(run))
    print(f"\n{compress.format_rows(rows)}")
    print(f"\nThe report: {run_dir}/{report.HTML}  (took {time.monotonic() - started:.0f} s)\n{NEXT}")


def _has_missing_stages(run: Run) -> bool:
    planned = compress.plan(run)
    return bool(run.missing([*(stage for pair in planned.values() for stage in pair), *compress.studies(run)]))


def _submit_jobs(run_dir: str) -> None:
    from cluster.head import RAY, private_head

    LOG.info("demo: starting a private Ray on this machine (loopback only)")
    with private_head() as head:
        for name in JOBS:
            entrypoint = [sys.executable, "-m", f"jobs.{name}", "--config", CONFIG, "--run_dir", run_dir]
            entrypoint += ["--verbose"] if LOG.isEnabledFor(logging.DEBUG) else []
            LOG.info(f"demo: ray job submit --working-dir . -- python -m {' '.join(entrypoint[2:])}")
            submit = [
                str(RAY),
                "job",
                "submit",
                "--address",
                head.address,
                "--working-dir",
                ".",
                "--log-style",
                "record",
            ]
            process = subprocess.Popen(
                [*submit, "--", *entrypoint],
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
    """Relay a line of a job's log: a warning as a warning, a stage's line as info, all else as debug."""
    if match := _LINE.match(line):
        _, warning, text = match.groups()
        level = logging.WARNING if warning else logging.INFO if _STAGE.match(text) else logging.DEBUG
        LOG.log(level, f"  {text}")


_LINE = re.compile(r"(\d\d:\d\d:\d\d )?(WARNING )?(.*)")
_STAGE = re.compile(r"(prepare|data|ablate|select|prune|recover|quantize|evaluate|compare|ranges|compress|report):")

if __name__ == "__main__":
    main()
