"""The base class of the configuration's sections, and the types of their fields."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from actors.criteria import CRITERIA, WIDTH_CRITERIA
from actors.quantizers.table import METHODS, known_bits


@dataclass(frozen=True)
class OneOf:
    """Marks a name or a number that must be one of those that a table holds when the value is read."""

    names: Callable[[], Collection[str | int]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str | int) -> str | int:
        *others, last = map(repr, self.names())
        if value not in self.names():
            raise PydanticCustomError("literal_error", f"Input should be {', '.join(others)} or {last}")
        return value


def _quantizer_names() -> tuple[str, ...]:
    return "none", *METHODS


Count = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "float16", "bfloat16"]
Quantizer = Annotated[str, OneOf(_quantizer_names)]
Criterion = Annotated[str, OneOf(lambda: CRITERIA)]
WidthCriterion = Annotated[str, OneOf(lambda: WIDTH_CRITERIA)]
Bits = Annotated[int, OneOf(known_bits)]


class Section(BaseModel):
    """A group of fields: unknown keys are refused, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
