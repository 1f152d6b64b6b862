"""The gate as the tests call it."""

from actors.gate import Gate
from actors.specs import ModelSpec


def check(folder, parent=None, removed=None, **options) -> dict:
    return Gate().check(ModelSpec(str(folder)), ModelSpec(str(parent)) if parent else None, removed, **options)
