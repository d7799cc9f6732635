"""What is exported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nestune.base_model import BaseModel
from nestune.config import LoraConfig


@dataclass(frozen=True)
class Job:
    """An adapter that is to be exported.

    adapter: its folder, as `nestune.backends.adapters` writes it. dtype: the type in which merged weights are stored;
    auto: as the base's are. dequantize: a base quantized by MLX is merged as floats.
    """

    adapter: Path
    base: BaseModel
    lora: LoraConfig
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    dequantize: bool = False
