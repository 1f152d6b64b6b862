"""Reading a configuration: a YAML file gives the values, dotted options on the command line override them.

The key `base` of a file names another one, relative to it, whose values hold where the file has none. Unknown keys are
refused with the nearest valid name.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from jobs.config.schema import ClassConfig, Config, QuestionConfig
from jobs.config.search import GridConfig
from jobs.config.section import OneOf


def load_config(path: str | None, overrides: list[tuple[str, str]]) -> Config:
    """Read a YAML file (None: all defaults) and apply dotted overrides ("prune.layers", "7").

    ValueError: no such file, not YAML, a base in a circle, an unknown key (with the nearest valid one), a value of the
    wrong kind.
    """
    values = _read(Path(path)) if path is not None else {}
    for key, text in overrides:
        _set(values, key, text)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def _read(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a file's values over those of its `base`, a path relative to the file; readers: the files before it."""
    name = str(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"Cannot read the config {name!r}: {error.strerror}. The examples are in configs/.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"The config {name!r} is not text in UTF-8 ({error.reason}).") from None
    except yaml.YAMLError as error:
        raise ValueError(f"The config {name!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"The config {name!r} is not a mapping of keys to values.")
    base = values.pop("base", None)
    if base is None:
        return values
    below = (path.parent / str(base)).resolve()
    if below in (*readers, path.resolve()):
        raise ValueError(f"The config {name!r} has the base {str(base)!r}, which is based on it: remove one of them.")
    return _merge(_read(below, (*readers, path.resolve())), values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return all values of both; sections are merged key by key, of all else the one above holds."""
    merged = dict(below)
    for key, value in above.items():
        is_section = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merge(below[key], value) if is_section else value
    return merged


def _set(values: dict, key: str, text: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"--{key}: {parent!r} is a single value, not a section.")
        values = child
    if {name: kind for name, kind, *_ in fields()}.get(key) == "str" and text not in ("null", "~"):
        values[last] = text  # as it is: YAML would read 1234567 or 2026-11-22 as something else
        return
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        values[last] = text
    if isinstance(values[last], str):
        try:  # YAML 1.1 reads 2e-4 as text
            values[last] = float(text)
        except ValueError:
            pass


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    path = list(first["loc"])
    keys = set(valid_keys())
    while len(path) > 1 and ".".join(map(str, path[:-1])) in keys and not isinstance(path[-1], int):
        path.pop()  # pydantic names the member of a union that did not fit
    key = ".".join(map(str, path))
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        return f"Unknown config key {key!r}: did you mean {_nearest(path)!r}? (--help lists them all)"
    if first["type"] == "missing":
        return f"The config lacks {key!r}."
    return f"Config key {key!r}: {first['msg']} (given: {first['input']!r})."


def _nearest(path: list) -> str:
    items: dict[tuple, type[BaseModel]] = {
        ("data", "classes"): ClassConfig,
        ("data", "questions"): QuestionConfig,
        ("search", "also"): GridConfig,
    }
    item = items.get(tuple(path[:2]))
    prefix = ".".join(map(str, path[:3])) + "."
    candidates = [prefix + name for name in item.model_fields] if item and len(path) > 3 else valid_keys()
    sections = {key.rpartition(".")[0] for key in candidates} - {""}
    return difflib.get_close_matches(".".join(map(str, path)), [*candidates, *sections], n=1, cutoff=0.0)[0]


def fields(section: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, Any, str]]:
    """List every field as (dotted key, kind, default, description)."""
    rows = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += fields(kind, f"{prefix}{name}.")
            continue
        choice = next((each for each in field.metadata if isinstance(each, OneOf)), None)
        kind_text = " | ".join(map(str, choice.names())) if choice else _kind(kind)
        rows.append((prefix + name, kind_text, field.default, field.description or ""))
        for item in get_args(kind):
            if isinstance(item, type) and issubclass(item, BaseModel):
                rows += fields(item, f"{prefix}{name}[].")
    return rows


def valid_keys() -> list[str]:
    """List the dotted names of the fields that an option can set (not those inside lists)."""
    return [key for key, *_ in fields() if "[]" not in key]


def _kind(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(args[0])
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (list, dict) or annotation in (list, dict):
        return "YAML"
    if args:
        return " | ".join(_kind(part) for part in args if part is not type(None))
    return getattr(annotation, "__name__", str(annotation))
