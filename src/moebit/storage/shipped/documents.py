"""What texts inside of quantized checkpoints may say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from moebit.storage.documents import Count, Finite


class BlockState(BaseModel):
    """bitsandbytes' JSON beside a matrix of 4 bits."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    quant_type: Literal["nf4", "fp4"]
    blocksize: Count
    dtype: Literal["float16", "bfloat16", "float32"]
    shape: Annotated[list[Count], Field(min_length=2, max_length=3)]
    nested_blocksize: Count = 256
    nested_offset: Finite = 0.0
