"""Tiers in other people's loops: a tier map of a PEFT model, its optimizer, and a callback for Trainer and SFTTrainer.

    base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = nestune.tiered_optimizer(model, nestune.tier_map(model, update_every=[1, 2, 4]), lr=2e-4)
    callback = nestune.TierCallback(optimizer)
    SFTTrainer(model, train_dataset=rows, optimizers=(optimizer, None), callbacks=[callback]).train()

A loop of one's own calls `optimizer.require_gradients()` before the forward pass of every step, so that nothing is
computed for tiers that are not due; else it is an ordinary loop. Without that call, and clipping by `max_grad_norm` of
the optimizer, it trains the same at full cost; clipping of its own would count gradients that are not applied.
"""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from nestune.backends.lora_modules import shorten, trainable_lora
from nestune.backends.tiered_optimizer import TieredOptimizer
from nestune.config import TierConfig
from nestune.config.faults import explain
from nestune.errors import ConfigError
from nestune.tiers.parameters import LoraParameter, split_name
from nestune.tiers.tier_map import TierMap, assign_tiers, find_fault, read_tier_map

OPTIMIZER_OPTIONS = ("inactive_gradients", "lr_scale")


def tier_map(model: nn.Module, **tiers: Any) -> TierMap:
    """Divide a model's trainable LoRA matrices among tiers.

    tiers: the options of a configuration's block `tiers`, e.g. `update_every=[1, 8, 64], strategy="stacked"`, but for
    `lr_scale` and `inactive_gradients`, which are the optimizer's. What the map's `warnings` say is warned of. Raises
    ConfigError with every fault of them at once, for a model with other trainable parameters, and for strategy
    parameter_importance: its measurements are those of a run, whose `tiers.json` `tiered_optimizer` takes.
    """
    misplaced = [f"{name}: give it to tiered_optimizer." for name in OPTIMIZER_OPTIONS if name in tiers]
    config = _tier_config({name: value for name, value in tiers.items() if name not in OPTIMIZER_OPTIONS}, misplaced)
    divided = assign_tiers([matrix.described for matrix in trainable_lora(model)], config)
    for warning in divided.warnings:
        warnings.warn(warning, stacklevel=2)
    return divided


def tiered_optimizer(
    model: nn.Module,
    tier_map: TierMap | str | os.PathLike[str],
    *,
    lr: float,
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    inactive_gradients: Literal["drop", "accumulate"] = "drop",
    lr_scale: Literal["equal", "inverse_period"] | Sequence[float] = "equal",
    max_grad_norm: float | None = None,
    **options: Any,
) -> TieredOptimizer:
    """A `torch.optim.Optimizer` that moves each tier of a map at the steps that are multiples of its period.

    tier_map: what `nestune.tier_map` returns, or the `tiers.json` of a run. lr: learning rate of one update, times
    the tier's lr_scale. optimizer: a class of torch.optim; it gets `options`, e.g. `weight_decay=0.01`.
    max_grad_norm: clips the global norm of what a step applies; None: no clipping here. Raises ConfigError when
    the map does not fit the model or an option is wrong, and RunError when the file holds no map.
    """
    if isinstance(tier_map, str | os.PathLike):
        tier_map = read_tier_map(Path(tier_map))
    if not isinstance(tier_map, TierMap):
        raise ConfigError(
            f"tier_map is a {type(tier_map).__name__}; give what nestune.tier_map returns, or a tiers.json."
        )
    matrices = trainable_lora(model)
    _check_fit(tier_map, [matrix.described for matrix in matrices])
    faults = []
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 <= lr < math.inf:
        faults.append(f"lr: must be a number, at least 0 (seen: {lr!r}).")
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        faults.append(f"optimizer: must be a class such as torch.optim.AdamW (seen: {optimizer!r}).")
    if max_grad_norm is not None and max_grad_norm <= 0:
        faults.append(f"max_grad_norm: must be above 0, or None for no clipping here (seen: {max_grad_norm}).")
    # A tier that never moves has no period: any will do for its learning rate, which is never used.
    slowest = max(period or 1 for period in tier_map.update_every)
    config = _tier_config(
        {
            "update_every": [period or slowest for period in tier_map.update_every],
            "inactive_gradients": inactive_gradients,
            "lr_scale": lr_scale,
        },
        faults,
    )
    try:
        return TieredOptimizer(
            {matrix.described.name: matrix.values for matrix in matrices},
            tier_map.tier_of,
            tier_map.update_every,
            lr=lr,
            lr_scales=config.lr_scales,
            inactive_gradients=config.inactive_gradients,
            max_grad_norm=max_grad_norm,
            optimizer=optimizer,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{optimizer.__name__} takes other options than {options}: {error}") from error


class TierCallback(TrainerCallback):
    """Switches gradients of tiers that are not due off while a Trainer, or one of TRL's, trains with a TieredOptimizer.

    Under `drop` the backward pass then ends at the lowest layer that is due, gradient checkpointing or not. (For
    checkpointing, trainers make the output of the embeddings require a gradient; as these are frozen, that is undone
    while training runs, but for the reentrant kind, which needs it: a warning tells what it costs.) What the trainer
    clips is what moves. The trainer's log gets `tiers/updates_<k>`: how often each tier has moved.

    Learning rate and weight decay are the optimizer's own, not those of the trainer's arguments. Training does not
    begin, and ConfigError tells all the reasons, when the trainer has another optimizer or model, when it would clip
    each step's part of a window, or when distributed training would wait for gradients that never come.
    """

    def __init__(self, optimizer: TieredOptimizer) -> None:
        if not isinstance(optimizer, TieredOptimizer):
            raise ConfigError(
                f"TierCallback takes what nestune.tiered_optimizer returns, not a {type(optimizer).__name__}."
            )
        self._optimizer = optimizer
        self._policy = optimizer.param_groups[0]["inactive_gradients"]
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        model = kw["model"]
        faults = self._faults_of_wiring(model, kw["optimizer"]) + self._faults_of_arguments(args, model)
        if faults:
            raise ConfigError("\n  ".join(["training in tiers cannot begin:", *faults]))
        if not _reentrant_checkpointing(model):
            if hasattr(model, "get_input_embeddings"):
                self._hooks.append(model.get_input_embeddings().register_forward_hook(_detach))
        elif self._policy == "drop":
            warnings.warn(
                "reentrant gradient checkpointing runs the backward pass down to the embeddings at every step, so "
                "tiers that are not due save little: set gradient_checkpointing_kwargs={'use_reentrant': False}.",
                stacklevel=2,
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._optimizer.require_gradients()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if "loss" in kw["logs"]:
            counts = {f"tiers/updates_{tier}": count for tier, count in enumerate(self._optimizer.update_counts)}
            kw["logs"].update(counts)
            state.log_history[-1].update(counts)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._optimizer.require_gradients(frozenset(range(len(self._optimizer.param_groups))))
        while self._hooks:
            self._hooks.pop().remove()

    def _faults_of_wiring(self, model: nn.Module, used: Optimizer) -> list[str]:
        faults = []
        used = getattr(used, "optimizer", used)  # Accelerate wraps it.
        if used is not self._optimizer:
            faults.append(
                f"the trainer's optimizer is {type(used).__name__}, not the one of this callback: "
                "give the trainer optimizers=(optimizer, None); DeepSpeed and FSDP make their own."
            )
        held = {id(matrix) for matrix in self._optimizer.matrices}
        if not held <= {id(parameter) for parameter in model.parameters()}:
            faults.append(
                "the optimizer was made of another model: make the PEFT model first, of that the optimizer, and give "
                "it to the trainer without peft_config."
            )
        strays = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
        if strays:
            faults.append(f"trainable, but on no tier: {shorten(strays)}. Freeze them.")
        return faults

    def _faults_of_arguments(self, args: TrainingArguments, model: nn.Module) -> list[str]:
        faults = []
        if self._policy == "accumulate" and args.max_grad_norm > 0:
            faults.append(
                f"max_grad_norm is {args.max_grad_norm}: the trainer clips the gradient of each step, not the mean "
                "that a tier moves by. Set it to 0 there, and give max_grad_norm to tiered_optimizer."
            )
        finds_unused = args.ddp_find_unused_parameters
        if finds_unused is None:  # The trainer's own rule.
            finds_unused = not (isinstance(model, PreTrainedModel) and args.gradient_checkpointing)
        without_gradients = self._policy == "drop" or None in self._optimizer.schedule.update_every
        if without_gradients and args.parallel_mode == ParallelMode.DISTRIBUTED and not finds_unused:
            faults.append(
                "distributed training waits for the gradients of tiers that are not due: "
                "set ddp_find_unused_parameters=True."
            )
        return faults


def _tier_config(options: dict[str, Any], faults: list[str]) -> TierConfig:
    """The checked options; raises ConfigError with these faults and theirs."""
    try:
        config = TierConfig.model_validate(options)
    except ValidationError as error:
        faults = faults + explain(error, TierConfig)
    if faults:
        raise ConfigError("\n  ".join([f"tiers: {len(faults)} fault(s)", *faults]))
    return config


def _check_fit(tier_map: TierMap, parameters: Sequence[LoraParameter]) -> None:
    """Raise ConfigError with all that keeps a map from being one of these parameters."""
    ours, mapped = {p.name for p in parameters}, {split_name(name)[0] for name in tier_map.tier_of}
    faults = [
        f"{what}: {shorten(sorted(names))}"
        for what, names in (("no matrix of the model", mapped - ours), ("on no tier", ours - mapped))
        if names
    ]
    fault = None if faults else find_fault(tier_map.tier_of, parameters)
    if faults or fault:
        lines = ["the tier map was made for another model or adapter:", *faults, *([fault] if fault else [])]
        raise ConfigError("\n  ".join([*lines, "Make one with nestune.tier_map(model, ...), or take another run's."]))


def _reentrant_checkpointing(model: nn.Module) -> bool:
    """Whether a layer is checkpointed in the way in which it has gradients only if its input requires one."""
    functions = [m._gradient_checkpointing_func for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    # PyTorch's default is the reentrant kind.
    return any(getattr(function, "keywords", {}).get("use_reentrant") is not False for function in functions)


def _detach(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.detach()
