"""Starting and ending Ray Serve itself, which has one HTTP setting for the whole cluster."""

import logging
import socket

from cluster.connection import is_private, protect
from cluster.text import one_line

protect()
import ray  # noqa: E402
from ray import serve  # noqa: E402

LOG = logging.getLogger("cluster.serving")

QUIET = {"log_level": "WARNING", "enable_access_log": False}


def is_running() -> bool:
    """Tell whether somebody started Serve on this cluster."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def start(port: int | None) -> None:
    """Start Serve unless it runs, with HTTP on the head's 127.0.0.1:port or without; RuntimeError: it cannot."""
    try:
        serve.start(**http_options(port), logging_config=QUIET)
    except Exception as error:
        raise RuntimeError(f"Ray Serve did not start ({one_line(error)}).") from error


def check_port(port: int | None) -> None:
    """Raise ValueError if 127.0.0.1:port is taken on this machine; on a cluster Serve reports a taken port."""
    if port is None or not is_private():
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"127.0.0.1:{port} cannot be used ({error.strerror}): give another port.") from None


def http_options(port: int | None) -> dict:
    """Return Serve's settings for HTTP."""
    if port is None:
        return {"proxy_location": "Disabled"}
    return {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}


def check_http(port: int | None) -> None:
    """Raise ValueError if Serve, which has one HTTP setting for the whole cluster, runs with another one."""
    if port is None:
        return
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    options = details.get("http_options") or {}
    if not details.get("proxies") or (options.get("host"), options.get("port")) != ("127.0.0.1", port):
        now = f"on {options.get('host')}:{options.get('port')}" if details.get("proxies") else "without HTTP"
        raise ValueError(
            f"Serve runs on this cluster already, {now}, and cannot offer 127.0.0.1:{port} as well: end what it "
            "serves (serve shutdown), or use another cluster."
        )


def shut_down() -> None:
    """End Serve if it serves nothing, so that the next job may choose another HTTP setting."""
    try:
        if not serve.status().applications:
            serve.shutdown()
    except Exception as error:  # the cluster is gone; the job's results are not
        LOG.warning(f"serving: Ray Serve could not be ended ({one_line(error)})")
