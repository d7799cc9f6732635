"""The LoRA matrices of a PyTorch model, by the names that they have on every backend."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from nestune.errors import ConfigError
from nestune.tiers.parameters import LoraParameter, parse_parameter

REMEDIES = {
    "lora_magnitude": "Make the adapter without use_dora",
    "modules_to_save": "Make it without modules_to_save",
    "token_adapter": "Make it without trainable_token_indices",
    ".bias": 'Make it with bias="none" and without lora_bias',
    "lora_": "Let LoRA target modules of the layers by name, e.g. [q_proj, v_proj]: this one stands outside of them",
}
OTHER_REMEDY = "Freeze it"


@dataclass(frozen=True)
class LoraMatrix:
    """A matrix of an adapter: what it is, its PyTorch name in the model, and its values."""

    described: LoraParameter
    key: str
    values: nn.Parameter


def trainable_lora(model: nn.Module) -> list[LoraMatrix]:
    """The LoRA matrices that are to be trained, in the model's order.

    Raises ConfigError with all that keeps them from being divided among tiers: trainable parameters that are no LoRA
    matrix of a layer, names that two of them share, matrices of the adapter that require no gradient, experts that are
    held in one tensor, or no matrix there.
    """
    # PEFT lays the ranks of all experts out in one matrix, in another order in A than in B.
    experts = [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
    found: list[LoraMatrix] = []
    switched_off: list[LoraMatrix] = []
    others: list[str] = []
    for key, values in model.named_parameters():
        described = parse_parameter(key, tuple(values.shape))
        if described is not None:
            (found if values.requires_grad else switched_off).append(LoraMatrix(described, key, values))
        elif values.requires_grad:
            others.append(key)
    # Further adapters of a PEFT model are there too, switched off as a whole.
    adapters = {_adapter(matrix) for matrix in found}
    off = [matrix.key for matrix in switched_off if _adapter(matrix) in adapters]
    repeated = [name for name, times in Counter(matrix.described.name for matrix in found).items() if times > 1]
    faults = []
    if not found and not others:
        faults.append("it has no LoRA matrix that requires a gradient: make an adapter with peft.get_peft_model")
    if others:
        faults.append(
            f"trainable, but no LoRA matrix of a layer, so on no tier: {shorten(others)}. "
            + "; ".join(dict.fromkeys(_remedy(key) for key in others))
        )
    if experts:
        faults.append(
            f"experts in one tensor have no ranks of their own: {shorten(experts)}. Target the attention instead"
        )
    if repeated:
        faults.append(
            f"names that stand for several trainable matrices: {shorten(repeated)}. "
            "Train one adapter, on one stack of layers, at a time"
        )
    if off:
        faults.append(
            f"of its adapter these require no gradient: {shorten(off)}. An interrupted training leaves them so, and "
            "PEFT's model.set_adapter(...) switches them on; for less to train, make an adapter that targets less"
        )
    if faults:
        raise ConfigError("\n  ".join(["the model cannot be trained in tiers:", *(f"{fault}." for fault in faults)]))
    return found


def _remedy(key: str) -> str:
    """What to do about a trainable parameter that is no LoRA matrix of a layer, by what its name tells of its cause."""
    return next((remedy for part, remedy in REMEDIES.items() if part in key), OTHER_REMEDY)


def shorten(names: Sequence[str]) -> str:
    """The first three names, and how many there are."""
    return ", ".join(names[:3]) + (f" ... ({len(names)} in all)" if len(names) > 3 else "")


def _adapter(matrix: LoraMatrix) -> str:
    """What a key has behind its side, such as `default.weight`."""
    return matrix.key.lower().rpartition(f"_{matrix.described.side}.")[2]
