"""Applications that a killed driver left behind: their names hold its Ray job, and the next driver ends them."""

import logging
import re
import secrets

from cluster.connection import protect
from cluster.text import one_line

protect()
import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray._private.state import jobs  # noqa: E402 (of the cluster's own table: ray.util.state needs a dashboard)

LOG = logging.getLogger("cluster.serving")

_OWN = re.compile(r"-job([0-9a-f]+)-[0-9a-f]{6}$")


def own_name(name: str) -> str:
    """Return a unique name for an application, which holds this driver's Ray job."""
    return f"{name}-job{ray.get_runtime_context().get_job_id()}-{secrets.token_hex(3)}"


def end_left() -> None:
    """End the applications named by `own_name` whose driver has ended, since nobody uses their cores and GPUs."""
    job_of = {name: match[1] for name in serve.status().applications if (match := _OWN.search(name))}
    dead = {job["JobID"] for job in jobs() if job["IsDead"]} if job_of else set()
    for name in [name for name, job in job_of.items() if job in dead]:
        LOG.info(f"serving: {name} was left by a job that has ended; it is ended now")
        end(name)


def end(name: str) -> None:
    """Remove an application; a failure is logged, not raised."""
    try:
        serve.delete(name)
    except Exception as error:
        LOG.warning(f"serving: {name} could not be ended ({one_line(error)})")
