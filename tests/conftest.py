"""What all rooms' tests share: no cluster of yours, no vLLM unasked, Ray on loopback only whoever imports it first."""

import os
import signal

import pytest

from cluster.connection import connect, protect
from jobs.core.logs import configure

os.environ.pop("RAY_ADDRESS", None)
os.environ["PRUNELLA_VLLM"] = ""  # the gate starts vLLM in the tests that are about it alone
configure()  # what the rooms say is on sys.stderr, as it is under a job
protect()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it


@pytest.fixture(scope="session")
def private_ray():
    """A private local Ray with two cores, started by the first test that asks for it."""
    with connect(cpus=2):
        yield
