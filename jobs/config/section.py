"""What the sections of the configuration are made of."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "float16", "bfloat16"]
Quantizer = Literal["none", "awq", "nf4", "int8", "hqq", "rtn"]
Bits = Literal[2, 3, 4, 8, 16]
Recovery = Literal["lora", "qlora"]


class Section(BaseModel):
    """A group of fields: unknown keys are refused, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
