"""Tier maps and optimizers for a model of one's own, and when the callback lets a trainer begin."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

import nestune
from nestune.backends.lora_modules import trainable_lora
from nestune.backends.tiered_optimizer import TieredOptimizer
from nestune.config import TierConfig
from nestune.errors import ConfigError, RunError
from nestune.tiers.tier_map import assign_tiers, write_tier_map

BASE = Path(__file__).parents[2] / "demo" / "base"


@pytest.fixture
def model() -> PeftModel:
    return adapted()


def adapted(**options: Any) -> PeftModel:
    config = LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
    assert isinstance(model, PeftModel)
    return model


def test_importing_the_package_imports_no_framework() -> None:
    code = "import sys, nestune; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules); nestune.tier_map"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' in sys.modules"], check=True)


def test_the_package_knows_its_exports_and_no_others() -> None:
    assert all(callable(getattr(nestune, name)) for name in nestune.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = nestune.nothing_like_it  # type: ignore[attr-defined]


@pytest.mark.parametrize("strategy", ["layer_depth_reversed", "layer_depth", "module_type", "stacked", "random"])
def test_a_map_is_that_of_a_run_with_the_same_options(model: PeftModel, strategy: str) -> None:
    options: Any = {"strategy": strategy, "update_every": [1, 4] if strategy != "module_type" else [1]}
    described = [matrix.described for matrix in trainable_lora(model)]
    expected = assign_tiers(described, TierConfig.model_validate(options))
    assert nestune.tier_map(model, **options) == expected
    assert set(expected.tier_of.values()) == set(range(len(expected.update_every)))


def test_wrong_options_are_told_all_at_once(model: PeftModel) -> None:
    with pytest.raises(ConfigError) as refused:
        nestune.tier_map(model, update_every=[4, 1], strateg="stacked", inactive_gradients="drop", lr_scale="equal")
    told = str(refused.value)
    for part in ("4 fault(s)", "must ascend", "did you mean strategy?", "inactive_gradients: give it to", "lr_scale"):
        assert part in told


def test_importance_is_to_come_from_a_run(model: PeftModel) -> None:
    with pytest.raises(ConfigError, match=r"nestune tiers.*tiers\.json of a run"):
        nestune.tier_map(model, strategy="parameter_importance")


def test_a_map_in_a_file_makes_the_optimizer_of_that_map(model: PeftModel, tmp_path: Path) -> None:
    tiers = nestune.tier_map(model, update_every=[1, 8, 64])
    write_tier_map(tiers, tmp_path / "tiers.json")
    optimizer = nestune.tiered_optimizer(model, str(tmp_path / "tiers.json"), lr=0.1, weight_decay=0.2)
    assert [group["param_names"] for group in optimizer.param_groups] == [tiers.members(tier) for tier in range(3)]
    assert [group["update_every"] for group in optimizer.param_groups] == [1, 8, 64]
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.1, 0.2)}
    with pytest.raises(RunError, match=r"nowhere\.json"):
        nestune.tiered_optimizer(model, tmp_path / "nowhere.json", lr=0.1)


@pytest.mark.parametrize(
    ("lr_scale", "rates"), [("equal", [0.8, 0.8]), ("inverse_period", [0.8, 0.1]), ([0.5, 0.25], [0.4, 0.2])]
)
def test_lr_scale_scales_each_tiers_rate(model: PeftModel, lr_scale: Any, rates: list[float]) -> None:
    tiers = nestune.tier_map(model, update_every=[1, 8])
    optimizer = nestune.tiered_optimizer(model, tiers, lr=0.8, lr_scale=lr_scale)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)


def test_a_tier_that_never_moves_has_no_gradients(model: PeftModel) -> None:
    tiers = nestune.tier_map(model, update_every=[1, 2], strategy="frozen_slow")
    optimizer = nestune.tiered_optimizer(
        model, tiers, lr=0.1, lr_scale="inverse_period", inactive_gradients="accumulate", optimizer=torch.optim.SGD
    )
    optimizer.require_gradients()
    off = [matrix.described.layer for matrix in trainable_off(model)]
    assert off == [0] * 4 + [1] * 4 + [2] * 4
    assert "momentum" in optimizer.defaults


def trainable_off(model: PeftModel) -> list[Any]:
    """The LoRA matrices that require no gradient now."""
    off = {name for name, p in model.named_parameters() if "lora" in name and not p.requires_grad}
    model.set_adapter("default")
    return [matrix for matrix in trainable_lora(model) if matrix.key in off]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"target_modules": ["q_proj"]}, ["on no tier: layers.0.self_attn.v_proj.lora_a", "(12 in all)"]),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, ["no matrix of the model: layers.0.self_attn.k_proj"]),
        ({"target_modules": ["q_proj", "k_proj"]}, ["on no tier: layers.0.self_attn.v_", "no matrix of the model: "]),
        ({"r": 8}, ["ranks [0, 1, 2, 3, 4, 5, 6, 7]"]),
    ],
    ids=["fewer modules", "more modules", "other modules", "other rank"],
)
def test_a_map_of_another_adapter_is_refused_with_all_that_does_not_fit(
    model: PeftModel, other: dict[str, Any], told: list[str]
) -> None:
    tiers = nestune.tier_map(adapted(**other), update_every=[1, 2], strategy="stacked")
    with pytest.raises(ConfigError) as refused:
        nestune.tiered_optimizer(model, tiers, lr=0.1)
    assert all(part in str(refused.value) for part in told), refused.value


def test_wrong_options_of_the_optimizer_are_told_all_at_once(model: PeftModel) -> None:
    wrong: Any = {"inactive_gradients": "keep", "lr_scale": [1.0], "max_grad_norm": 0}
    with pytest.raises(ConfigError) as refused:
        nestune.tiered_optimizer(model, nestune.tier_map(model, update_every=[1, 2]), lr=0.1, **wrong)
    assert all(
        part in str(refused.value) for part in ("3 fault(s)", "'drop'", "1 factors for 2 tiers", "max_grad_norm")
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": -1}, "lr: must be a number, at least 0 (seen: -1)"),
        ({"lr": "1e-3"}, "(seen: '1e-3')"),
        ({"optimizer": "adamw"}, "a class such as torch.optim.AdamW (seen: 'adamw')"),
        ({"decay": 0.1}, "AdamW takes other options than {'decay': 0.1}"),
        ({"tier_map": {}}, "tier_map is a dict"),
    ],
)
def test_an_option_that_torch_would_stumble_over_is_told(model: PeftModel, options: Any, told: str) -> None:
    good: Any = {"tier_map": nestune.tier_map(model, update_every=[1, 2]), "lr": 0.1}
    with pytest.raises(ConfigError) as refused:
        nestune.tiered_optimizer(model, **(good | options))
    assert told in str(refused.value)


def test_what_a_map_warns_of_is_warned_of(model: PeftModel) -> None:
    with pytest.warns(UserWarning, match=r"12 parameters on no tier go to the slowest"):
        tiers = nestune.tier_map(model, update_every=[1, 2], strategy="manual", assignments={"*q_proj*": 0})
    assert len(tiers.warnings) == 1


def test_the_callback_takes_a_tiered_optimizer_only(model: PeftModel) -> None:
    wrong: Any = model
    with pytest.raises(ConfigError, match="not a PeftModel"):
        nestune.TierCallback(wrong)


class Distributed(TrainingArguments):
    parallel_mode = ParallelMode.DISTRIBUTED


def begin(callback: Any, model: Any, optimizer: Any, kind: Any = TrainingArguments, **arguments: Any) -> None:
    """What the trainer calls when training begins."""
    args = kind("unused", report_to="none", use_cpu=True, **arguments)
    callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model, optimizer=optimizer)


def made(model: PeftModel, policy: Any = "drop") -> TieredOptimizer:
    return nestune.tiered_optimizer(
        model, nestune.tier_map(model, update_every=[1, 2, 4]), lr=0.1, inactive_gradients=policy
    )


def another_optimizer(model: PeftModel) -> None:
    begin(nestune.TierCallback(made(model)), model, torch.optim.AdamW(model.parameters()))


def another_model(model: PeftModel) -> None:
    optimizer = made(model)
    begin(nestune.TierCallback(optimizer), adapted(), optimizer)


def trainable_base(model: PeftModel) -> None:
    optimizer = made(model)
    model.get_input_embeddings().requires_grad_(True)
    begin(nestune.TierCallback(optimizer), model, optimizer)


def clipped_windows(model: PeftModel) -> None:
    optimizer = made(model, "accumulate")
    begin(nestune.TierCallback(optimizer), model, optimizer)


def distributed(model: PeftModel) -> None:
    optimizer = made(model)
    begin(nestune.TierCallback(optimizer), model, optimizer, Distributed, ddp_find_unused_parameters=False)


def distributed_by_the_trainers_own_rule(model: PeftModel) -> None:
    """An adapter that Transformers itself added, with checkpointing: then the trainer does not look for unused ones."""
    native = AutoModelForCausalLM.from_pretrained(BASE)
    native.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    optimizer = made(native)
    begin(nestune.TierCallback(optimizer), native, optimizer, Distributed, activation_checkpointing=True)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (another_optimizer, r"is AdamW.*optimizers=\(optimizer, None\)"),
        (another_model, "made of another model.*peft_config"),
        (trainable_base, r"on no tier: .*embed_tokens"),
        (clipped_windows, "max_grad_norm is 1.0.*tiered_optimizer"),
        (distributed, "ddp_find_unused_parameters=True"),
        (distributed_by_the_trainers_own_rule, "ddp_find_unused_parameters=True"),
    ],
)
def test_training_that_would_not_be_in_tiers_does_not_begin(
    model: PeftModel, wrong: Callable[[PeftModel], None], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        wrong(model)


def test_reentrant_checkpointing_is_warned_of_and_keeps_its_gradients(model: PeftModel) -> None:
    model.activation_checkpointing_enable({"use_reentrant": True})
    optimizer = made(model)
    with pytest.warns(UserWarning, match="use_reentrant"):
        begin(nestune.TierCallback(optimizer), model, optimizer)
    optimizer.require_gradients()
    model.train()
    tokens = torch.arange(10)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert sum(p.grad is not None for p in model.parameters()) == 8
