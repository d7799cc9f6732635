"""`adapter_config.json`: what it tells PEFT and mlx-lm, and what of theirs is taken or refused."""

import json
from pathlib import Path

import pytest

from nestune.backends.adapter_config import CONFIG, make_adapter_config, read_adapter_config
from nestune.base_model import BaseModel
from nestune.config import LoraConfig

BASE = BaseModel("demo/base", None, Path("demo/base"), "a" * 64, 256)
LORA = LoraConfig(rank=4, alpha=10.0)
OURS = make_adapter_config(["self_attn.q_proj", "mlp.down_proj", "self_attn.q_proj"], 3, LORA, BASE)
OF_MLX_LM = {"fine_tune_type": "lora", "num_layers": -1, "model": "demo/base"}


def faults(folder: Path, config: object, lora: LoraConfig = LORA) -> list[str]:
    (folder / CONFIG).write_text(json.dumps(config))
    return read_adapter_config(folder).misfits(lora)


def of_mlx_lm(rank: int, scale: float) -> dict[str, object]:
    return OF_MLX_LM | {"lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0}}


def test_both_libraries_are_told_the_same(tmp_path: Path) -> None:
    assert (OURS["peft_type"], OURS["r"], OURS["lora_alpha"]) == ("LORA", 4, 10)
    assert OURS["target_modules"] == ["down_proj", "q_proj"]
    assert (OURS["fine_tune_type"], OURS["num_layers"]) == ("lora", 3)
    keys = ["mlp.down_proj", "self_attn.q_proj"]
    assert OURS["lora_parameters"] == {"rank": 4, "scale": 10 / 4, "dropout": 0.0, "keys": keys}
    assert faults(tmp_path, OURS) == []


@pytest.mark.parametrize(("num_layers", "last"), [(2, 2), (16, 16), (0, None), (-1, None)])
def test_mlx_lm_counts_layers_from_the_last_and_means_all_by_none(
    tmp_path: Path, num_layers: int, last: int | None
) -> None:
    assert faults(tmp_path, of_mlx_lm(4, 2.5) | {"num_layers": num_layers}) == []
    assert read_adapter_config(tmp_path).last_layers == last


def test_rank_and_alpha_are_refused_with_what_to_set(tmp_path: Path) -> None:
    expected = [
        "its rank is 4, lora.rank is 8: set lora.rank to 4",
        "its alpha (scale x rank) is 10, lora.alpha is 16: set lora.alpha to 10",
    ]
    for config in (OURS, of_mlx_lm(4, 2.5)):
        assert faults(tmp_path, config, LoraConfig(rank=8, alpha=16.0)) == expected


def test_a_scale_written_with_few_digits_is_that_alpha(tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=4 / 3)
    assert faults(tmp_path, of_mlx_lm(4, 0.3333333), lora) == []
    assert "set lora.alpha to 1.332" in faults(tmp_path, of_mlx_lm(4, 0.333), lora)[0]


def test_keys_of_both_libraries_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    said = "contradict each other: rank 8 with alpha 10 and rank 4 with alpha 10"
    assert [fault.endswith(said) for fault in faults(tmp_path, OURS | {"r": 8})] == [True]
    assert "rank 4 with alpha 20 and rank 4 with alpha 10" in faults(tmp_path, OURS | {"lora_alpha": 20})[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "ADALORA"}, "peft_type: must be 'LORA' (seen: 'ADALORA')"),
        ({"use_dora": True}, "use_dora: nestune trains plain LoRA"),
        ({"use_rslora": True}, "use_rslora: nestune trains plain LoRA"),
        ({"bias": "all"}, "bias: nestune trains plain LoRA, without it (seen: 'all')"),
        ({"lora_bias": True}, "lora_bias: nestune trains plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: nestune trains plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: nestune trains plain LoRA"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern: nestune trains plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: it began by changing the base's weights"),
        ({"fine_tune_type": "dora"}, "fine_tune_type: must be 'lora' (seen: 'dora')"),
        ({"fine_tune_type": "full", "lora_parameters": None}, "fine_tune_type: must be 'lora' (seen: 'full')"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    assert any(fault.startswith(f"{CONFIG}: {says}") for fault in faults(tmp_path, OURS | changes))


def test_what_peft_writes_for_plain_lora_is_taken(tmp_path: Path) -> None:
    off = {"use_dora": False, "modules_to_save": None, "rank_pattern": {}, "init_lora_weights": True}
    assert faults(tmp_path, OURS | off | {"layers_pattern": None, "eva_config": None}) == []


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"peft_type": ["LORA"], "r": {}, "lora_alpha": [1]}',
        '{"peft_type": "LORA", "r": true, "lora_alpha": 10}',
        '{"peft_type": "LORA", "r": 4, "lora_alpha": "10"}',
        '{"peft_type": "LORA", "r": 1' + "0" * 4000 + ', "lora_alpha": 1' + "0" * 4000 + "}",
        '{"peft_type": "LORA", "r": -4, "lora_alpha": 10}',
        '{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}',
        '{"peft_type": "LORA", "r": 4, "lora_alpha": Infinity}',
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 10, "bias": {"a": []}, "init_lora_weights": [1]}',
        '{"lora_parameters": [1, 2], "num_layers": "all"}',
        '{"lora_parameters": {"rank": 4, "scale": 1e308}, "num_layers": 3}',
        '{"lora_parameters": {"rank": 1' + "0" * 4000 + ', "scale": 2.5}, "num_layers": 3}',
        '{"lora_parameters": {"rank": 4, "scale": -2.5}, "num_layers": 3}',
        '{"lora_parameters": {"rank": 4, "scale": 2.5}}',
        '{"fine_tune_type": ["lora"], "lora_parameters": null}',
    ],
)
def test_values_of_the_wrong_types_are_faults_that_name_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / CONFIG).write_text(content)
    found = read_adapter_config(tmp_path).misfits(LORA)
    assert found
    assert all(fault.startswith(f"{CONFIG}: ") and len(fault) < 300 for fault in found)


@pytest.mark.parametrize("content", ["", "[]", "nonsense", "[" * 100_000, "9" * 5000])
def test_what_is_no_json_object_is_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=rf"^{CONFIG} (is not JSON|holds no JSON object)"):
        read_adapter_config(tmp_path)
