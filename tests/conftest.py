"""What all rooms' tests share: no test uses a cluster of yours, and Ray is loopback only whoever imports it first."""

import os
import signal

import pytest

from cluster.connection import connect, protect

os.environ.pop("RAY_ADDRESS", None)
protect()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it


@pytest.fixture(scope="session")
def private_ray():
    """A private local Ray with two cores, started by the first test that asks for it."""
    with connect(cpus=2):
        yield
