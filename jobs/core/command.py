"""The command line of every job: --config, dotted overrides, --help; one sentence for a user's mistake."""

import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from pydantic_core import PydanticUndefined

from cluster import lost
from jobs.config.schema import Config
from jobs.core.logs import FLAGS, configure, split_flags
from jobs.core.options import fields, load_config
from jobs.core.run import Run
from jobs.core.signals import interrupt_on_sigterm

LOG = logging.getLogger("jobs.core")

USAGE = """{doc}

Options:
  --config FILE        YAML file with any of the fields below (default: none)
  --<field> VALUE      override one field, e.g. --prune.layers 7; a BOOL alone means true
{shorthands}{flags}  --help               this text

Fields (unit in brackets; data has no defaults: start from a file in configs/):
{fields}

Set PRUNELLA_DEBUG=1 for tracebacks."""


def main(
    doc: str,
    job: Callable[[Run], None],
    shorthands: Mapping[str, str] = MappingProxyType({}),
    records: Callable[[Config], bool] = lambda config: True,
) -> None:
    """Run one job from the command line; exits 0, 2 for a user's mistake, 1 for a failure, 130 for Ctrl-C.

    shorthands: the job's own options, each a short name of a field. records: whether the config belongs to results, and
    is written into the run folder.
    """
    spec = sys.modules["__main__"].__spec__ if job.__module__ == "__main__" else None
    name = (spec.name if spec else job.__module__).split(".")[-1]
    flags, arguments = split_flags(sys.argv[1:])
    if {"-h", "--help"} & set(arguments):
        text = usage(doc, shorthands)
        try:
            print(text, flush=True)
        except BrokenPipeError:  # a reader that has seen enough (`--help | head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    configure(**flags)
    with one_sentence(name), Run(parse(arguments, shorthands)) as run:
        if records(run.config):
            run.record_config(name)
        job(run)


@contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """Turn an exception of the block into one sentence and an exit code; PRUNELLA_DEBUG=1 shows tracebacks."""
    debug = os.environ.get("PRUNELLA_DEBUG") == "1"
    interrupt_on_sigterm()
    try:
        yield
    except KeyboardInterrupt:
        _stop(name, "interrupted; what was finished is kept, the same command continues", 130)
    except Exception as error:
        message = None if debug else explain(error)
        if message is None:
            raise
        _stop(name, message, 1 if isinstance(error, RuntimeError) else 2)


_WRITABLE = "Give a --run_dir that you can write to."
_FULL = "Free space there, or give another --run_dir; what was finished is kept."
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.ENOENT: _WRITABLE,
    errno.ENOTDIR: _WRITABLE,
    errno.EEXIST: _WRITABLE,
}


_PARTIAL = re.compile(r"(/artifacts/[a-z]+-[0-9a-f]{16})(?:\.[^/'\"\s]*)?\.partial")


def explain(error: Exception) -> str | None:
    """Put a user's mistake, or a failure that a user can fix, in one sentence; None for a bug of ours.

    The folder of an unfinished artifact is given under the artifact's final name.
    """
    sentence = _explain(error)
    return None if sentence is None else _PARTIAL.sub(r"\1", sentence)


def _explain(error: Exception) -> str | None:
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return f"{error.strerror}: {error.filename or 'the run folder'}. {_REMEDIES[error.errno]}"
    if "No space left on device" in str(error):  # libraries that write checkpoints wrap it in their own errors
        return f"No space left on device: the run folder. {_FULL}"
    if sentence := lost.reason():
        return sentence
    if isinstance(error, ValueError | ConnectionError):
        return str(error)
    if isinstance(error, RuntimeError):
        return f"{error} (PRUNELLA_DEBUG=1 shows where)"
    return None


def parse(arguments: list[str], shorthands: Mapping[str, str] = MappingProxyType({})) -> Config:
    """Turn command-line arguments into a config; ValueError names the argument that is wrong."""
    path, overrides, rest = None, [], list(arguments)
    switches = {key for key, kind, *_ in fields() if kind == "bool"}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"Unexpected argument {word!r}: options look like --prune.layers 7 (see --help).")
        key, equals, value = word[2:].partition("=")
        field = shorthands.get(key, key.replace("-", "_"))
        if not equals:
            is_alone = not rest or rest[0].startswith("--")
            if is_alone and field not in switches:
                raise ValueError(f"--{key} lacks a value.")
            value = "true" if is_alone else rest.pop(0)
        if key == "config":
            path = value
        else:
            overrides.append((field, value))
    return load_config(path, overrides)


def usage(doc: str, shorthands: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return what --help prints of a job."""
    flags = "".join(f"  --{name:<18} {words}\n" for name, words in FLAGS.items())
    return USAGE.format(doc=doc.strip(), shorthands=_shorthand_help(shorthands), flags=flags, fields=_field_help())


def _shorthand_help(shorthands: Mapping[str, str]) -> str:
    return "".join(f"  --{name:<18} short for --{field}\n" for name, field in shorthands.items())


def _field_help() -> str:
    lines = []
    for key, kind, default, text in fields():
        value = "unset" if default is None else "required" if default is PydanticUndefined else default
        option = f"  {key}" if "[]" in key else f"  --{key}"
        lines.append(f"{option} {kind.upper() if ' ' not in kind else '{' + kind.replace(' ', '') + '}'}")
        lines.append(f"        {text.replace('(', '[').replace(')', ']') if '(' in text else text} (default: {value})")
    return "\n".join(lines)


def _stop(job: str, message: str, code: int) -> None:
    LOG.error(f"{job}: {message}")
    raise SystemExit(code)
