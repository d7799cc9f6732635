"""The adapter's folder: what is written for each library, what is read of either, and what is refused and why."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from nestune.backends.adapter_config import CONFIG
from nestune.backends.adapters import (
    METADATA,
    MLX_WEIGHTS,
    WEIGHTS,
    adapter_files,
    misfits,
    read_adapter,
    read_adapter_of_any_size,
    weights_file,
    write_adapter,
)
from nestune.base_model import BaseModel
from nestune.config import LoraConfig
from nestune.errors import ConfigError
from nestune.tiers.parameters import LoraParameter

BASE = BaseModel("demo/base", None, Path("demo/base"), "a" * 64, 256)
LORA = LoraConfig(rank=4, alpha=10.0, targets=("q_proj", "down_proj"))
LAYERS = 3
SIZES = {"self_attn.q_proj": (6, 8), "mlp.down_proj": (12, 6)}
EXPECTED = [
    LoraParameter(layer, module, side, (LORA.rank, inputs) if side == "a" else (outputs, LORA.rank))
    for layer in range(LAYERS)
    for module, (inputs, outputs) in SIZES.items()
    for side in ("a", "b")
]
FIRST = "layers.0.self_attn.q_proj.lora_a"
PEFT_FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MLX_FIRST = "model.layers.0.self_attn.q_proj.lora_a"

Weights = dict[str, NDArray[Any]]


@pytest.fixture
def weights() -> Weights:
    generator = np.random.default_rng(0)
    return {p.name: generator.normal(size=p.shape).astype(np.float32) for p in EXPECTED}


def write(folder: Path, weights: Weights, base: BaseModel = BASE, lora: LoraConfig = LORA) -> Path:
    folder.mkdir(exist_ok=True)
    modules = {p.name: f"model.layers.{p.layer}.{p.module}" for p in EXPECTED}
    write_adapter(folder, weights, modules, LAYERS, lora, base)
    metadata = {"base": {"reference": base.reference, "revision": None, "sha256": base.sha256}}
    (folder / METADATA).write_text(json.dumps(metadata))
    return folder


@pytest.fixture
def folder(weights: Weights, tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", weights)


@pytest.fixture
def of_mlx_lm(folder: Path) -> Path:
    """The same adapter as mlx-lm's own trainer leaves it."""
    (folder / WEIGHTS).unlink()
    (folder / METADATA).unlink()
    settings = {"rank": LORA.rank, "scale": LORA.alpha / LORA.rank, "dropout": 0.0}
    arguments = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": settings, "model": "demo/base"}
    (folder / CONFIG).write_text(json.dumps(arguments))
    return folder


def read(folder: Path, lora: LoraConfig = LORA, base: BaseModel = BASE) -> Weights:
    return read_adapter(folder, EXPECTED, lora, base)


def refusal(folder: Path, lora: LoraConfig = LORA, base: BaseModel = BASE) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, lora, base)
    return str(caught.value)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, edit: Callable[[Weights], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def bits(weights: Mapping[str, NDArray[Any]]) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    return {name: (values.shape, str(values.dtype), values.tobytes()) for name, values in weights.items()}


def test_each_library_finds_its_own_file_and_keys_one_holding_the_transposes_of_the_other(
    folder: Path, weights: Weights
) -> None:
    peft, mlx = load_file(folder / WEIGHTS), load_file(folder / MLX_WEIGHTS)
    assert set(peft) == {
        f"base_model.model.model.layers.{p.layer}.{p.module}.lora_{p.side.upper()}.weight" for p in EXPECTED
    }
    assert set(mlx) == {f"model.{p.name}" for p in EXPECTED}
    np.testing.assert_array_equal(peft[PEFT_FIRST], weights[FIRST])
    np.testing.assert_array_equal(mlx[MLX_FIRST], weights[FIRST].T)


def test_the_same_weights_give_the_same_bytes_in_whatever_order_they_come(
    folder: Path, weights: Weights, tmp_path: Path
) -> None:
    again = write(tmp_path / "again", dict(reversed(weights.items())))
    assert [file.read_bytes() for file in adapter_files(again)] == [file.read_bytes() for file in adapter_files(folder)]


@pytest.mark.parametrize("missing", [None, WEIGHTS, MLX_WEIGHTS])
def test_both_files_or_either_give_the_bits_that_were_written(
    folder: Path, weights: Weights, missing: str | None
) -> None:
    if missing:
        (folder / missing).unlink()
    assert bits(read(folder)) == bits(weights)
    assert misfits(folder, BASE) == []


def test_an_adapter_of_mlx_lms_own_trainer_is_read_though_it_cannot_tell_its_base(
    of_mlx_lm: Path, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert bits(read(of_mlx_lm)) == bits(weights)
    assert "it cannot be told which base it was trained on" in caplog.text


def test_matrices_are_found_whatever_stands_before_the_layers_and_behind_the_side(
    folder: Path, weights: Weights
) -> None:
    (folder / MLX_WEIGHTS).unlink()
    peft = {
        key.replace("model.model", "language_model").replace(".weight", ".default.weight"): values
        for key, values in load_file(folder / WEIGHTS).items()
    }
    save_file(peft, folder / WEIGHTS)
    assert bits(read(folder)) == bits(weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_floating_types_are_read_as_float32(folder: Path, weights: Weights, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors import torch as of_torch

    (folder / MLX_WEIGHTS).unlink()
    stored = {key: values.to(getattr(torch, dtype)) for key, values in of_torch.load_file(folder / WEIGHTS).items()}
    of_torch.save_file(stored, folder / WEIGHTS)
    found = read(folder)[FIRST]
    np.testing.assert_array_equal(found, stored[PEFT_FIRST].float().numpy())
    np.testing.assert_allclose(found, weights[FIRST], rtol=2**-8)
    assert found.dtype == np.float32


def test_the_last_layers_alone_are_an_adapter_where_mlx_lm_says_so(
    of_mlx_lm: Path, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    edit_weights(of_mlx_lm / MLX_WEIGHTS, lambda t: [t.pop(f"model.{p.name}") for p in EXPECTED if p.layer < 2])
    assert f"8 fault(s)\n  {FIRST} is missing" in refusal(of_mlx_lm)
    edit_config(of_mlx_lm, num_layers=2)
    assert "4 fault(s)\n  layers.1.self_attn.q_proj.lora_a is missing" in refusal(of_mlx_lm)
    edit_config(of_mlx_lm, num_layers=1)
    with caplog.at_level(logging.WARNING):
        found = read(of_mlx_lm)
    assert bits(found) == bits({p.name: weights[p.name] for p in EXPECTED if p.layer == 2})
    assert "adapts the last 1 of 3 layers; layers 0 to 1 start untrained" in caplog.text


def test_a_matrix_of_a_layer_that_mlx_lm_says_is_not_adapted_is_refused(of_mlx_lm: Path) -> None:
    edit_config(of_mlx_lm, num_layers=2)
    assert f"{FIRST} is not part of this model's adapter" in refusal(of_mlx_lm)


@pytest.mark.parametrize("num_layers", [0, -1, LAYERS, 99])
def test_as_many_layers_as_there_are_or_none_named_mean_all_of_them(
    of_mlx_lm: Path, num_layers: int, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(of_mlx_lm, num_layers=num_layers)
    assert set(read(of_mlx_lm)) == {p.name for p in EXPECTED}
    assert "untrained" not in caplog.text


def test_rank_and_alpha_are_refused_with_what_to_set(folder: Path) -> None:
    other = LORA.model_copy(update={"rank": 8, "alpha": 16.0})
    text = refusal(folder, other)
    assert "its rank is 4, lora.rank is 8: set lora.rank to 4\n" in text
    assert "its alpha (scale x rank) is 10, lora.alpha is 16: set lora.alpha to 10\n" in text
    assert misfits(folder, BASE) == []


def test_mlx_lms_default_scale_of_20_is_an_alpha_of_20_times_its_rank(of_mlx_lm: Path) -> None:
    edit_config(of_mlx_lm, lora_parameters={"rank": 4, "scale": 20.0, "dropout": 0.0})
    assert "its alpha (scale x rank) is 80, lora.alpha is 10: set lora.alpha to 80" in refusal(of_mlx_lm)
    assert read(of_mlx_lm, LORA.model_copy(update={"alpha": 80.0}))


@pytest.mark.parametrize("file", [WEIGHTS, MLX_WEIGHTS])
def test_two_files_of_other_values_are_refused_with_which_to_delete(folder: Path, file: str) -> None:
    def touch(tensors: Weights) -> None:
        values = tensors[min(tensors)]
        values[0, 0] = np.nextafter(values[0, 0], np.float32(np.inf))

    edit_weights(folder / file, touch)
    text = refusal(folder)
    assert "1 fault(s)" in text
    assert f"{WEIGHTS} and {MLX_WEIGHTS} differ in 1 matrices, such as layers.0.mlp.down_proj.lora_a" in text
    assert f"delete {MLX_WEIGHTS} to use what PEFT loads, {WEIGHTS} to use what mlx-lm loads" in text


def test_every_fault_is_told_at_once(folder: Path) -> None:
    (folder / MLX_WEIGHTS).unlink()
    last = "base_model.model.model.layers.2.mlp.down_proj.lora_"

    def spoil(tensors: Weights) -> None:
        del tensors[PEFT_FIRST]
        tensors[f"{last}B.weight"] = np.zeros((3, 3), np.float32)
        tensors[f"{last}A.weight"][0, 0] = np.nan
        tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 6), np.float32)
        tensors["base_model.model.model.layers.3.mlp.down_proj.lora_A.weight"] = np.zeros((4, 12), np.float32)
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] = np.zeros((4, 12), np.int32)

    edit_weights(folder / WEIGHTS, spoil)
    edit_config(folder, use_dora=True)
    text = refusal(folder, LORA.model_copy(update={"alpha": 4.0}), BaseModel("other", None, Path(), "b" * 64, None))
    assert text.splitlines()[0] == f"the adapter {folder} does not fit: 9 fault(s)"
    for fault in (
        "use_dora: nestune trains plain LoRA",
        "set lora.alpha to 10",
        "it was trained on demo/base (sha256 aaaaaaaaaaaa), model.base is other (sha256 bbbbbbbbbbbb)",
        f"{WEIGHTS}: base_model.model.lm_head.lora_A.weight is no LoRA matrix of a layer",
        f"{WEIGHTS}: {last}A.weight holds values that are not finite",
        f"{WEIGHTS}: base_model.model.model.layers.1.mlp.down_proj.lora_A.weight holds I32, not floating-point numbers",
        f"{FIRST} is missing",
        "layers.3.mlp.down_proj.lora_a is not part of this model's adapter",
        "layers.2.mlp.down_proj.lora_b has shape [3, 3], expected [6, 4]",
    ):
        assert text.count(fault) == 1, fault
    assert text.splitlines()[-1].startswith("Use the base and the lora block that it was trained with")


def test_of_many_faults_ten_are_shown_and_the_rest_counted(folder: Path) -> None:
    (folder / MLX_WEIGHTS).unlink()
    edit_weights(folder / WEIGHTS, lambda t: [t.update({key: values[:2, :2]}) for key, values in t.items()])
    lines = refusal(folder).splitlines()
    assert lines[0].endswith("12 fault(s)")
    assert len(lines) == 1 + 10 + 1 + 1
    assert lines[11] == "  ... and 2 more"


def test_two_tensors_of_one_name_are_refused(folder: Path) -> None:
    (folder / MLX_WEIGHTS).unlink()
    double = PEFT_FIRST.replace("model.model", "draft")
    edit_weights(folder / WEIGHTS, lambda tensors: tensors.update({double: tensors[PEFT_FIRST].copy()}))
    assert f"1 fault(s)\n  {WEIGHTS}: {double} and {PEFT_FIRST} are the same matrix" in refusal(folder)


@pytest.mark.parametrize(
    ("targets", "modules", "what"),
    [
        ("q_proj", ["self_attn.q_proj"], "it adapts mlp.down_proj too"),
        ("all-linear", [*SIZES, "mlp.up_proj"], "it does not adapt mlp.up_proj"),
        (
            "up_proj",
            ["mlp.up_proj"],
            "it adapts mlp.down_proj, self_attn.q_proj too, and it does not adapt mlp.up_proj",
        ),
    ],
)
def test_other_targets_are_one_fault_with_what_to_set(
    folder: Path, targets: str, modules: list[str], what: str
) -> None:
    lora = LoraConfig.model_validate({"rank": 4, "alpha": 10.0, "targets": targets})
    wider = [*EXPECTED, *(LoraParameter(layer, "mlp.up_proj", "a", (4, 6)) for layer in range(LAYERS))]
    with pytest.raises(ConfigError) as caught:
        read_adapter(folder, [p for p in wider if p.module in modules], lora, BASE)
    asked = targets if targets == "all-linear" else f"[{targets}]"
    fault = f"lora.targets is {asked}, but {what}: set lora.targets to [down_proj, q_proj]"
    assert f"1 fault(s)\n  {fault}\n" in str(caught.value)


def test_a_file_without_a_matrix_of_a_layer_is_refused(folder: Path) -> None:
    (folder / MLX_WEIGHTS).unlink()
    save_file({"weight": np.zeros(1, np.float32)}, folder / WEIGHTS)
    assert "it holds no LoRA matrix of a layer" in refusal(folder)


@pytest.mark.parametrize("file", [WEIGHTS, MLX_WEIGHTS])
@pytest.mark.parametrize("kept", [0, 6, 200, -1])
def test_a_truncated_file_is_broken(folder: Path, file: str, kept: int) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:kept])
    assert f"{folder}: the adapter is broken: {file}: " in refusal(folder)


@pytest.mark.parametrize("content", ["[]", "nonsense", "[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_broken(folder: Path, content: str) -> None:
    (folder / CONFIG).write_text(content)
    assert f"{folder}: the adapter is broken: {CONFIG} " in refusal(folder)
    assert misfits(folder, BASE)[0].startswith(f"it cannot be read: {CONFIG} ")


@pytest.mark.parametrize("missing", [[CONFIG], [WEIGHTS, MLX_WEIGHTS]])
def test_a_folder_without_weights_or_configuration_is_no_adapter(folder: Path, missing: list[str]) -> None:
    for file in missing:
        (folder / file).unlink()
    assert (
        refusal(folder)
        == f"{folder} is no adapter: it needs {CONFIG}, and {WEIGHTS} or {MLX_WEIGHTS}. Name another folder."
    )
    with pytest.raises(ConfigError, match="is no adapter"):
        weights_file(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"base": []}', '{"base": {"reference": 1, "sha256": [2]}}', "[" * 9999])
def test_metadata_that_names_no_base_are_refused(folder: Path, content: str) -> None:
    (folder / METADATA).write_text(content)
    assert "1 fault(s)\n  metadata.json does not name a base with its sha256" in refusal(folder)
    assert misfits(folder, BASE) == ["metadata.json does not name a base with its sha256"]


def test_an_adapter_of_another_base_is_refused_and_does_not_compare(folder: Path) -> None:
    other = BaseModel("other", None, Path(), "b" * 64, None)
    assert "it was trained on demo/base (sha256 aaaaaaaaaaaa), model.base is other" in refusal(folder, base=other)
    assert len(misfits(folder, other)) == 1


def test_an_adapter_is_known_by_pefts_file_or_mlx_lms_where_it_stands_alone(folder: Path) -> None:
    assert weights_file(folder) == folder / WEIGHTS
    assert adapter_files(folder) == [folder / name for name in (WEIGHTS, MLX_WEIGHTS, CONFIG, METADATA)]
    (folder / WEIGHTS).rename(folder / "aside")
    assert weights_file(folder) == folder / MLX_WEIGHTS
    (folder / "aside").rename(folder / WEIGHTS)
    (folder / MLX_WEIGHTS).unlink()
    assert weights_file(folder) == folder / WEIGHTS
    assert adapter_files(folder) == [folder / name for name in (WEIGHTS, CONFIG, METADATA)]


@pytest.mark.parametrize(("rank", "alpha"), [(1, 3.0), (4, 10.0), (12, 30.0)])
def test_of_any_size_an_adapter_is_read_with_its_own_scale(tmp_path: Path, rank: int, alpha: float) -> None:
    generator = np.random.default_rng(1)
    weights = {p.name: generator.normal(size=shape).astype(np.float32) for p, shape in of_rank(rank)}
    folder = write(tmp_path / "other", weights, lora=LORA.model_copy(update={"rank": rank, "alpha": alpha}))
    adapter = read_adapter_of_any_size(folder, EXPECTED, LORA, BASE)
    assert bits(adapter.weights) == bits(weights)
    assert (adapter.rank, adapter.scale, adapter.alpha) == (rank, alpha / rank, alpha)
    assert misfits(folder, BASE) == []


def test_of_any_size_every_other_fault_is_told_as_before(folder: Path) -> None:
    (folder / MLX_WEIGHTS).unlink()
    edit_weights(folder / WEIGHTS, lambda t: [t.pop(PEFT_FIRST), t.update(extra=np.zeros((2, 2), np.float32))])
    edit_config(folder, r=5, lora_alpha=5.0, use_dora=True)
    edit_config(folder, lora_parameters={"rank": 5, "scale": 1.0})
    with pytest.raises(ConfigError) as caught:
        read_adapter_of_any_size(folder, EXPECTED, LORA, BaseModel("other", None, Path(), "b" * 64, None))
    text = str(caught.value)
    for fault in ("use_dora", "it was trained on demo/base", "extra is no LoRA matrix", f"{FIRST} is missing"):
        assert text.count(fault) == 1, fault
    assert "lora_b has shape [6, 4], expected [6, 5]" in text


def test_a_rank_beyond_the_largest_module_is_refused_before_its_file_is_read(tmp_path: Path) -> None:
    # The largest has 12 outputs.
    weights = {p.name: np.zeros(shape, np.float32) for p, shape in of_rank(13)}
    folder = write(tmp_path / "large", weights, lora=LORA.model_copy(update={"rank": 13}))
    with pytest.raises(ConfigError, match="its rank is 13, and no module of this model has more than 12 inputs or"):
        read_adapter_of_any_size(folder, EXPECTED, LORA, BASE)


def of_rank(rank: int) -> list[tuple[LoraParameter, tuple[int, int]]]:
    """The matrices that are expected, with the shape that they have at another rank."""
    return [(p, (rank, p.shape[1]) if p.side == "a" else (p.shape[0], rank)) for p in EXPECTED]
