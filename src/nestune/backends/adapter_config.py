"""`adapter_config.json`: an adapter in the words of PEFT, of mlx-lm, or of both; only plain LoRA is taken."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import ConfigDict, Field, ValidationError

from nestune.base_model import BaseModel
from nestune.config import LoraConfig
from nestune.config.faults import explain, shown
from nestune.foreign_files import parse_json, read_bounded

CONFIG = "adapter_config.json"
# What PEFT can add to plain LoRA: other matrices, or another use of the same ones.
BEYOND_LORA = (
    *("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "use_qalora", "use_bdlora"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
OFF: tuple[object, ...] = (None, False, "none", [], {})
# PEFT's other ways to begin take out of the base's weights what the adapter begins with.
BEGUN_BESIDE_THE_BASE = (None, True, False, "gaussian", "orthogonal", "eva")


class Size(NamedTuple):
    """The numbers that decide an adapter's effect."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class AdapterConfig:
    """What an `adapter_config.json` says.

    sizes: in PEFT's words and in mlx-lm's, as far as they are there; last_layers: how many layers,
    counted from the last one, it adapts, None: all; faults: why it is not plain LoRA.
    """

    sizes: tuple[Size, ...]
    last_layers: int | None
    faults: tuple[str, ...]

    def misfits(self, lora: LoraConfig | None = None) -> list[str]:
        """Its faults, and what to set for it to fit; without `lora`, any rank and alpha do."""
        if len(self.sizes) == 2 and not _agree(*self.sizes):
            said = " and ".join(f"rank {rank} with alpha {alpha:.12g}" for rank, alpha in self.sizes)
            return [*self.faults, f"{CONFIG}: PEFT's keys and mlx-lm's contradict each other: {said}"]
        found = list(self.faults)
        if lora is None:
            return found
        for rank, alpha in self.sizes[:1]:
            if rank != lora.rank:
                found.append(f"its rank is {rank}, lora.rank is {lora.rank}: set lora.rank to {rank}")
            if not _same_alpha(alpha, lora.alpha):
                found.append(
                    f"its alpha (scale x rank) is {alpha:.12g}, lora.alpha is {lora.alpha:.12g}: "
                    f"set lora.alpha to {alpha:.12g}"
                )
        return found


def make_adapter_config(modules: Iterable[str], layers: int, lora: LoraConfig, base: BaseModel) -> dict[str, Any]:
    """The keys of both libraries; `modules` are paths within a layer such as `self_attn.q_proj`."""
    keys = sorted(set(modules))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.reference,
        "revision": base.revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted({key.rpartition(".")[2] for key in keys}),
        "bias": "none",
        "inference_mode": True,
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {
            "rank": lora.rank,
            "scale": lora.alpha / lora.rank,
            "dropout": lora.dropout,
            "keys": keys,
        },
    }


def read_adapter_config(folder: Path) -> AdapterConfig:
    """What the file in a folder says, right or wrong; raises OSError or ValueError when it holds no JSON object."""
    try:
        content = parse_json(read_bounded(folder / CONFIG), any_number=True)
    except ValueError as error:
        raise ValueError(f"{CONFIG} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{CONFIG} holds no JSON object")
    sizes: list[Size] = []
    last_layers: int | None = None
    faults: list[str] = []
    try:
        if "peft_type" in content:
            peft = _PeftKeys.model_validate(content)
            sizes.append(Size(peft.r, peft.lora_alpha))
    except ValidationError as error:
        faults += explain(error, _PeftKeys)
    try:
        if "lora_parameters" in content or "fine_tune_type" in content:
            mlx = _MlxKeys.model_validate(content)
            rank, scale = mlx.lora_parameters.rank, mlx.lora_parameters.scale
            sizes.append(Size(rank, scale * rank))
            last_layers = mlx.num_layers if mlx.num_layers > 0 else None
    except ValidationError as error:
        faults += explain(error, _MlxKeys)
    if not sizes and not faults:
        faults.append("neither PEFT's keys (peft_type, r, lora_alpha) nor mlx-lm's (lora_parameters, num_layers)")
    faults += [
        f"{key}: nestune trains plain LoRA, without it (seen: {shown(content[key])})"
        for key in BEYOND_LORA
        if content.get(key) not in OFF
    ]
    start = content.get("init_lora_weights")
    if start not in BEGUN_BESIDE_THE_BASE:
        faults.append(
            f"init_lora_weights: it began by changing the base's weights, which are others here ({shown(start)})"
        )
    return AdapterConfig(tuple(sizes), last_layers, tuple(f"{CONFIG}: {fault}" for fault in faults))


def _agree(one: Size, other: Size) -> bool:
    return one.rank == other.rank and _same_alpha(one.alpha, other.alpha)


def _same_alpha(one: float, other: float) -> bool:
    # A scale may be written with fewer digits than alpha / rank has.
    return math.isclose(one, other, rel_tol=1e-6)


_Rank = Annotated[int, Field(gt=0, lt=1e9)]
_Factor = Annotated[float, Field(gt=0, lt=1e9)]


class _Keys(pydantic.BaseModel):
    model_config = ConfigDict(strict=True)


class _PeftKeys(_Keys):
    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: _Factor


class _MlxLoraParameters(_Keys):
    rank: _Rank
    scale: _Factor


class _MlxKeys(_Keys):
    fine_tune_type: Literal["lora"] = "lora"
    # As mlx-lm takes it: 0 and below mean all layers.
    num_layers: int
    lora_parameters: _MlxLoraParameters
