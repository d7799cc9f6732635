"""Exports hold what was trained, by what other programs compute with them; anything else is refused whole."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nestune.backends.adapters import CONFIG, METADATA, MLX_WEIGHTS, WEIGHTS
from nestune.backends.factory import make_backend
from nestune.base_model import resolve_base
from nestune.cli import STAGES, main
from nestune.cli_parser import FORMATS as OFFERED
from nestune.config import RunConfig
from nestune.errors import ConfigError, RunError
from nestune.export.check import check_logits, make_reference
from nestune.export.formats import FORMATS
from nestune.export.job import Job
from nestune.export.loaders import load_merged, mlx_logits
from nestune.files import read_json, write_json
from nestune.runs import RunPaths
from nestune.stages.export import export
from tests.contract.conftest import configuration
from tests.contract.exported import LORA, qwen2, random_base, train

torch = pytest.importorskip("torch")

FORMS = [
    pytest.param(
        to, marks=pytest.mark.skipif(not all(map(find_spec, FORMATS[to].extras)), reason=f"no package for {to}")
    )
    for to in OFFERED
]


def tensors_of(folder: Path) -> dict[str, Any]:
    """All tensors of a model folder, as PyTorch reads them."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    return found


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of three layers, wide awake: every matrix matters to its logits."""
    return random_base(tmp_path_factory.mktemp("export") / "base", qwen2(tie_word_embeddings=True))


def job_of(config: RunConfig, run: RunPaths) -> Job:
    return Job(run.candidate, resolve_base(config.model), config.lora)


def with_dtype(config: RunConfig, dtype: str) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


@pytest.mark.parametrize("to", FORMS)
def test_every_form_computes_what_the_backend_computes(to: str, backend_name: str, base: Path, tmp_path: Path) -> None:
    config, run = train(tmp_path, base, backend_name)
    result = export(config, run, to)
    assert result.check.deviation <= 1e-4
    assert result.check.effect > 0.1
    assert Path(result.folder) == run.root / "export" / to
    told = "\n".join(result.summary())
    assert f"deviation {result.check.deviation:.2g} nats" in told
    assert f"effect {result.check.effect:.2g}" in told
    assert json.loads(json.dumps(result.as_dict()))["check"]["effect"] == result.check.effect


def test_the_command_offers_every_form() -> None:
    assert tuple(FORMATS) == OFFERED
    assert not {"export", "run"} & set(STAGES)


def test_an_adapter_alone_has_the_files_and_keys_of_its_library_only(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    config, run = train(tmp_path, base)
    peft, mlx = (Path(export(config, run, to).folder) for to in ("peft", "mlx"))
    trained = run.candidate
    assert {path.name for path in peft.iterdir()} == {WEIGHTS, CONFIG, METADATA}
    assert {path.name for path in mlx.iterdir()} == {MLX_WEIGHTS, CONFIG, METADATA}
    assert (peft / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    assert (mlx / MLX_WEIGHTS).read_bytes() == (trained / MLX_WEIGHTS).read_bytes()
    of_mlx = {"fine_tune_type", "num_layers", "lora_parameters"}
    both = read_json(trained / CONFIG, "")
    assert read_json(mlx / CONFIG, "") == {key: both[key] for key in of_mlx}
    assert read_json(peft / CONFIG, "") == {key: value for key, value in both.items() if key not in of_mlx}


@pytest.mark.parametrize("to", FORMS[:2])
def test_an_adapter_alone_is_a_parent_for_nestune_and_bound_to_its_base(to: str, base: Path, tmp_path: Path) -> None:
    config, run = train(tmp_path, base)
    folder = Path(export(config, run, to).folder)
    backend = make_backend(config)
    backend.load_adapter(run.candidate)
    trained = backend.weights()
    backend.load_adapter(folder)
    assert all(np.array_equal(values, trained[name]) for name, values in backend.weights().items())
    with pytest.raises(ConfigError, match="it was trained on"):
        make_backend(configuration("torch", lora=LORA)).load_adapter(folder)


def test_merged_weights_are_w_plus_alpha_over_rank_b_a_and_the_rest_is_the_base(base: Path, tmp_path: Path) -> None:
    config, run = train(tmp_path, base)
    merged, untouched = tensors_of(Path(export(config, run, "merged").folder)), tensors_of(base)
    adapter = load_file(run.candidate / WEIGHTS)
    kept = {name: weight.double().numpy() for name, weight in untouched.items()}
    expected = dict(kept)
    for key in (key for key in adapter if "lora_A" in key):
        b, a = adapter[key.replace("lora_A", "lora_B")].astype(float), adapter[key].astype(float)
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        expected[name] = expected[name] + 12 / 4 * b @ a
        assert np.abs(b @ a).max() > 1e-3
    assert len(adapter) == 2 * 3 * 3
    assert merged.keys() == untouched.keys()
    for name, weight in merged.items():
        np.testing.assert_allclose(weight.numpy(), expected[name], rtol=0, atol=1e-6)
        assert torch.equal(weight, untouched[name]) == (expected[name] is kept[name])


def test_a_merged_folder_has_all_that_the_base_has(base: Path, tmp_path: Path) -> None:
    config, run = train(tmp_path, base)
    merged = Path(export(config, run, "merged").folder)
    kept = {path.name for path in base.iterdir()} - {"README.md", "config.json", "model.safetensors"}
    assert {path.name for path in merged.iterdir()} == kept | {METADATA, "config.json", "model.safetensors"}
    assert all((merged / name).read_bytes() == (base / name).read_bytes() for name in kept)


def test_the_files_of_a_base_stay_as_its_index_has_them(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", qwen2(tie_word_embeddings=False), max_shard_size="20KB")
    # Not in the index, so not part of the model.
    save_file({"model.norm.weight": np.zeros(16, np.float32)}, base / "model-old.safetensors")
    config, run = train(tmp_path, base)
    merged = Path(export(config, run, "merged").folder)
    index = read_json(base / "model.safetensors.index.json", "")
    written = read_json(merged / "model.safetensors.index.json", "")
    assert len(set(index["weight_map"].values())) > 1
    assert written["weight_map"] == index["weight_map"]
    assert written["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(merged).values())
    assert not (merged / "model-old.safetensors").exists()


@pytest.mark.parametrize("to", ["merged", "gguf"])
def test_an_adapter_that_rounding_swallows_is_refused_and_float32_keeps_it(to: str, tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", qwen2(), "bfloat16")
    config, run = train(tmp_path, base, learning_rate=2e-5)
    with pytest.raises(RunError, match=r"deviate by up to .* Rounding to bfloat16 .*--set model\.dtype=float32"):
        export(config, run, to)
    assert not (run.root / "export").exists()
    result = export(with_dtype(config, "float32"), run, to)
    assert result.check.deviation < 0.01 * result.check.effect


def test_merged_weights_are_stored_as_the_base_or_as_configured(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", qwen2(), "bfloat16")
    config, run = train(tmp_path, base)
    for dtype, stored in (("auto", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        merged = Path(export(with_dtype(config, dtype), run, "merged", force=True).folder)
        assert {tensor.dtype for tensor in tensors_of(merged).values()} == {stored}
        assert f"torch.{read_json(merged / 'config.json', '')['dtype']}" == str(stored)


def negate(values: np.ndarray) -> None:
    values[...] = -values


def silence(values: np.ndarray) -> None:
    values[...] = 0


def turn(values: np.ndarray) -> None:
    values[...] = values[::-1].copy()


def change_first_matrix(folder: Path, change: Callable[[np.ndarray], None]) -> None:
    """Change the first query matrix of what was written, wherever it is."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        names = [name for name in sorted(tensors) if "q_proj" in name and "lora_a" not in name.lower()]
        change(next(tensors[name] for name in names if tensors[name].ndim == 2))
        save_file(tensors, file, metadata={"format": "pt"})
    for file in folder.glob("*.gguf"):
        from gguf import GGUFReader

        change(next(tensor.data for tensor in GGUFReader(file, "r+").tensors if tensor.name == "blk.0.attn_q.weight"))


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("change", [None, negate, silence, turn])
def test_an_export_with_a_wrong_matrix_fails_its_check(
    to: str, change: Callable[[np.ndarray], None] | None, tmp_path: Path, base: Path
) -> None:
    config, run = train(tmp_path, base)
    job = job_of(config, run)
    reference = make_reference(make_backend(config), job.adapter, job.base.positions)
    folder = tmp_path / "written"
    folder.mkdir()
    FORMATS[to].write(job, folder)
    rounded_to = "float32" if FORMATS[to].merges else None
    if change is None:
        check_logits(FORMATS[to].load(job, folder), reference, rounded_to, "")
        return
    change_first_matrix(folder, change)
    with pytest.raises(RunError, match="something else than the adapter"):
        check_logits(FORMATS[to].load(job, folder), reference, rounded_to, "")


def test_an_export_is_replaced_only_when_asked_and_only_by_an_export(base: Path, tmp_path: Path) -> None:
    config, run = train(tmp_path, base)
    first = Path(export(config, run, "peft").folder)
    (first / "mark").touch()
    with pytest.raises(ConfigError, match="Pass --force"):
        export(config, run, "peft")
    assert (first / "mark").exists()
    export(config, run, "peft", force=True)
    assert not (first / "mark").exists()
    with pytest.raises(ConfigError, match="is no export of nestune"):
        export(config, run, "peft", out=run.candidate, force=True)
    assert (run.candidate / WEIGHTS).exists()


def test_an_export_is_recorded_with_the_run_and_says_what_it_was_made_of(base: Path, tmp_path: Path) -> None:
    config, run = train(tmp_path, base)
    folder = Path(export(config, run, "peft").folder)
    recorded = read_json(run.manifest, "")["export peft"]
    assert (folder / WEIGHTS).as_posix() in recorded["outputs"]
    assert (run.candidate / WEIGHTS).as_posix() in recorded["inputs"]
    metadata = read_json(folder / METADATA, "")
    assert metadata["adapter"]["source"] == (run.candidate).as_posix()
    assert metadata["adapter"]["sha256"] == recorded["inputs"][(run.candidate / WEIGHTS).as_posix()]
    assert metadata["base"]["sha256"] == resolve_base(config.model).sha256
    assert metadata["lora"] == {"rank": 4, "alpha": 12}


def test_any_adapter_of_the_base_is_exported_to_where_it_is_told(base: Path, tmp_path: Path) -> None:
    config, run = train(tmp_path, base)
    adapter = shutil.copytree(run.candidate, tmp_path / "elsewhere")
    shutil.rmtree(run.root)
    with pytest.raises(RunError, match="Run nestune train"):
        export(config, run, "peft")
    with pytest.raises(ConfigError, match="--out FOLDER"):
        export(config, run, "peft", adapter=str(adapter))
    result = export(config, run, "peft", adapter=str(adapter), out=tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert result.adapter == str(adapter)
    assert not run.root.exists()


def test_a_missing_package_is_named_with_the_extra_that_installs_it(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    config, run = train(tmp_path, base)
    for package in ("gguf", "mlx_lm"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"(?s)gguf.* is not installed.*pip install 'nestune\[gguf\]'"):
        export(config, run, "gguf")
    with pytest.raises(ConfigError, match=r"mlx_lm.*pip install 'nestune\[mlx\]'"):
        export(config, run, "mlx")
    assert not (run.root / "export").exists()


def test_rope_theta_is_written_where_mlx_lm_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    base = random_base(tmp_path / "base", qwen2(rope_parameters={"rope_type": "default", "rope_theta": 300.0}))
    settings = read_json(base / "config.json", "")
    del settings["rope_theta"]
    write_json(base / "config.json", settings)
    config, run = train(tmp_path, base)
    with pytest.raises(RunError, match=r"no rope_theta at top level.*--to merged"):
        export(config, run, "mlx")
    merged = Path(export(config, run, "merged").folder)
    assert read_json(merged / "config.json", "") == settings | {"rope_theta": 300.0}
    by_transformers, by_mlx_lm = load_merged(job_of(config, run), merged), mlx_logits(merged)
    np.testing.assert_allclose(by_mlx_lm([5, 7, 11, 13]), by_transformers([5, 7, 11, 13]), atol=1e-4)


def test_merging_on_quantized_weights_is_refused(base: Path, tmp_path: Path) -> None:
    quantized = shutil.copytree(base, tmp_path / "quantized")
    settings = read_json(base / "config.json", "")
    config = configuration("torch", base=quantized, lora=LORA)
    run = RunPaths(tmp_path / "run")
    write_json(quantized / "config.json", settings | {"quantization_config": {"quant_method": "bitsandbytes"}})
    for to in ("merged", "gguf"):
        with pytest.raises(ConfigError, match="merging into quantized weights would lose the adapter"):
            export(config, run, to)


def test_there_is_nothing_to_dequantize_that_mlx_has_not_quantized(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    config = configuration("torch", base=base, lora=LORA)
    with pytest.raises(ConfigError, match="--dequantize is for merging on a base quantized by MLX"):
        export(config, RunPaths(tmp_path / "run"), "merged", dequantize=True)


def test_on_a_base_that_mlx_quantized_an_adapter_is_merged_only_as_floats(tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    floats = random_base(tmp_path / "floats", qwen2(hidden_size=32, intermediate_size=32), "bfloat16")
    base = tmp_path / "quantized"
    mlx_lm.convert(str(floats), str(base), quantize=True, q_bits=4, q_group_size=32)
    config, run = train(tmp_path, base, "mlx")
    with pytest.raises(ConfigError, match=r"would lose the adapter.*--dequantize"):
        export(config, run, "merged")
    with pytest.raises(ConfigError, match=r"PEFT does not read.*--to mlx"):
        export(config, run, "peft")
    with pytest.raises(ConfigError, match="Leave it out"):
        export(config, run, "mlx", dequantize=True)
    assert not (run.root / "export").exists()

    assert export(config, run, "mlx").check.effect > 0.1
    merged = Path(export(config, run, "merged", dequantize=True).folder)
    assert not {"quantization", "quantization_config"} & read_json(merged / "config.json", "").keys()
    assert {tensor.dtype for tensor in tensors_of(merged).values()} == {torch.bfloat16}
    assert tensors_of(merged).keys() == tensors_of(floats).keys()
    exact = export(with_dtype(config, "float32"), run, "gguf", dequantize=True)
    assert exact.check.deviation < 0.001 * exact.check.effect


@pytest.fixture
def configured(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a configuration, in the folder where its run is; the current folder."""
    config, _ = train(tmp_path, base)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"registry"})))
    return path


def test_the_command_tells_what_it_wrote_and_what_the_check_found(
    configured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--config", str(configured), "--to", "merged"]) == 0
    told = capsys.readouterr().out
    assert "runs/contract/export/merged" in told
    assert "logit check passed: deviation" in told
    assert main(["export", "--config", str(configured), "--to", "peft", "--out", "mine", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["folder"] == "mine"
    assert result["check"]["deviation"] <= result["check"]["allowed"] == 1e-4
    assert Path("mine", WEIGHTS).exists()


def test_the_command_says_what_is_wrong_without_a_traceback(
    configured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["export", "--config", str(configured), "--to", "peft", "--out", "runs"]
    assert main(wrong) == 2
    assert main([*wrong, "--force"]) == 2
    assert main(["export", "--config", str(configured), "--to", "peft", "--checkpoint", "final"]) == 1
    assert main(["export", "--config", str(configured), "--to", "peft", "--set", "lora.targets=[q_proj]"]) == 2
    told = capsys.readouterr().err
    assert "Pass --force to replace it" in told
    assert "is no export of nestune" in told
    assert "there is no runs/contract/checkpoints/final" in told
    assert "set lora.targets to [" in told
    assert "Traceback" not in told
