"""Registered versions: what is in them, how they are found again, and what answers they give."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_folders import EvaluatedRun, scale_adapter, start_tracking

from nestune.backends.factory import make_backend
from nestune.base_model import resolve_base
from nestune.config import RegistryConfig, RunConfig
from nestune.data.tokens import load_tokenizer
from nestune.errors import ConfigError, RunError
from nestune.files import read_json, sha256_file, write_json
from nestune.registry.connection import connect
from nestune.registry.promotion import promote_version
from nestune.registry.versions import (
    champion,
    fitting_champion,
    pin_adapter,
    register_version,
    resolve_adapter,
)
from nestune.runs import RunPaths

PROMPTS = ["Where does Ada live?", "2 + 2 =", "ä€😀"]


@pytest.fixture
def version(config: RunConfig, adapter: Path, tmp_path: Path) -> str:
    run_id = start_tracking(config, RunPaths(tmp_path / "run"), {}).run_id
    return register_version(config, run_id, adapter, {"dataset_sha256": "abc"})


@pytest.fixture
def mlflow(registry: RegistryConfig) -> Iterator[Any]:
    """MLflow as a user has it who set the tracking address."""
    import mlflow

    mlflow.set_tracking_uri(registry.tracking_uri)
    yield mlflow
    mlflow.set_tracking_uri(None)


def aliases(registry: RegistryConfig) -> dict[str, str]:
    found = connect(registry).get_registered_model("nestune").aliases
    return {alias: str(version) for alias, version in found.items()}


def peft_answers(base: Path, adapter: Path, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Greedy answers of plain Transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    answers = []
    for prompt in prompts:
        chat = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        tokens = tokenizer(chat, return_tensors="pt")
        written = model.generate(**tokens, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0)
        answers.append(tokenizer.decode(written[0, tokens.input_ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


def test_the_champion_answers_as_plain_peft_with_that_adapter_does(
    config: RunConfig, version: str, base: Path, adapter: Path, mlflow: Any, tmp_path: Path
) -> None:
    promote_version(config.registry, version, None)
    model = mlflow.pyfunc.load_model("models:/nestune@champion")
    expected = peft_answers(base, adapter, PROMPTS, config.evaluation.max_answer_tokens)
    assert model.predict(PROMPTS) == expected
    assert len(set(expected)) == len(PROMPTS)
    other = shutil.copytree(adapter, tmp_path / "other")
    scale_adapter(other, 0.0)
    assert peft_answers(base, other, PROMPTS, config.evaluation.max_answer_tokens) != expected


def test_a_version_says_that_it_takes_questions_of_any_form_and_how_long_an_answer_may_be(
    version: str, mlflow: Any
) -> None:
    signature = mlflow.models.get_model_info(f"models:/nestune/{version}").signature
    assert [str(column.type) for column in (*signature.inputs, *signature.outputs)] == ["Any", "DataType.string"]
    assert signature.params.to_dict() == [{"name": "max_tokens", "type": "long", "default": 12, "shape": None}]


def test_a_version_holds_the_adapter_and_code_only_no_weights_of_the_base_and_no_pickle(
    config: RunConfig, version: str, base: Path, adapter: Path
) -> None:
    client = connect(config.registry)
    folder = Path(client.get_model_version_download_uri("nestune", version))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) == {
        "MLmodel",
        "conda.yaml",
        "python_env.yaml",
        "requirements.txt",
        "served_model.py",
        "artifacts/adapter/adapter_config.json",
        "artifacts/adapter/adapter_model.safetensors",
        "artifacts/adapter/adapters.safetensors",
        "artifacts/adapter/metadata.json",
    }
    assert all(path.stat().st_size < 1_000_000 for path in files.values())
    weights = sha256_file(files["artifacts/adapter/adapter_model.safetensors"])
    assert weights == sha256_file(adapter / "adapter_model.safetensors")
    assert client.get_model_version("nestune", version).tags == {"dataset_sha256": "abc", "adapter_sha256": weights}
    flavor = yaml.safe_load(files["MLmodel"].read_text())["flavors"]["python_function"]
    assert "python_model" not in flavor  # the key under which MLflow notes a pickled model


@pytest.mark.parametrize(("backend", "packages"), [("torch", ["torch", "peft"]), ("mlx", ["mlx[cpu]", "mlx-lm"])])
def test_a_version_asks_for_the_packages_of_the_backend_that_trained_it_and_of_no_other(
    config: RunConfig, adapter: Path, tmp_path: Path, backend: str, packages: list[str]
) -> None:
    pytest.importorskip(backend)
    checkpoint = shutil.copytree(adapter, tmp_path / "best")
    write_json(checkpoint / "metadata.json", read_json(checkpoint / "metadata.json", "") | {"backend": backend})
    run_id = start_tracking(config, RunPaths(tmp_path / "run"), {}).run_id
    version = register_version(config, run_id, checkpoint, {})
    source = connect(config.registry).get_model_version_download_uri("nestune", version)
    required = Path(source, "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in required] == ["mlflow", "transformers", *packages]
    assert all(re.fullmatch(r"[^=]+==[0-9.]+", line) for line in required)


def test_a_version_answers_the_same_where_only_mlx_is_installed(
    config: RunConfig, version: str, base: Path, adapter: Path
) -> None:
    pytest.importorskip("mlx_lm")
    program = (
        "import json, sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "sys.modules.update(dict.fromkeys(['torch', 'peft']))\n"
        "import mlflow\n"
        f"mlflow.set_tracking_uri({config.registry.tracking_uri!r})\n"
        f"model = mlflow.pyfunc.load_model('models:/nestune/{version}')\n"
        "assert 'mlx.core' in sys.modules\n"
        "with ThreadPoolExecutor(3) as clients:\n"
        f"    print(json.dumps(list(clients.map(lambda prompt: model.predict([prompt])[0], {PROMPTS!r}))))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers == peft_answers(base, adapter, PROMPTS, config.evaluation.max_answer_tokens)


def test_a_version_answers_in_the_precision_in_which_it_was_evaluated(
    config: RunConfig, base: Path, adapter: Path, mlflow: Any, tmp_path: Path
) -> None:
    training = config.training.model_copy(update={"precision": "bfloat16"})
    rounded = config.model_copy(update={"training": training})
    run_id = start_tracking(rounded, RunPaths(tmp_path / "run"), {}).run_id
    version = register_version(rounded, run_id, adapter, {})
    backend = make_backend(rounded)
    backend.load_adapter(adapter)
    tokenizer = load_tokenizer(base)
    prompts = [tokenizer(f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n").input_ids for p in PROMPTS]
    expected = [tokenizer.decode(backend.generate([p], 12)[0], skip_special_tokens=True).strip() for p in prompts]
    assert mlflow.pyfunc.load_model(f"models:/nestune/{version}").predict(PROMPTS) == expected
    assert expected != peft_answers(base, adapter, PROMPTS, 12)


def test_another_base_is_refused_when_a_version_is_loaded(
    version: str, base: Path, mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    monkeypatch.setenv("NESTUNE_BASE", str(other))
    with pytest.raises(ConfigError, match=r"trained on .*base.* is another model.*Set NESTUNE_BASE"):
        mlflow.pyfunc.load_model(f"models:/nestune/{version}")


def test_a_base_that_has_moved_is_found_through_the_environment(
    version: str, base: Path, adapter: Path, mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    settings = {"base": str(tmp_path / "gone" / "base")}
    with pytest.raises(ConfigError, match=r"the base of this adapter is not here: .*Set NESTUNE_BASE"):
        mlflow.pyfunc.load_model(f"models:/nestune/{version}", model_config=settings)
    monkeypatch.setenv("NESTUNE_BASE", str(moved))
    model = mlflow.pyfunc.load_model(f"models:/nestune/{version}", model_config=settings)
    assert model.predict(PROMPTS[:1]) == peft_answers(base, adapter, PROMPTS[:1], 12)


def test_candidate_is_the_newest_version_and_champion_the_promoted_one(
    config: RunConfig, evaluated_run: EvaluatedRun
) -> None:
    versions = []
    for _ in range(2):
        run = evaluated_run()
        run_id = start_tracking(config, run, {}).run_id
        versions.append(register_version(config, run_id, run.candidate, {}))
        promote_version(config.registry, "1", None)
    assert versions == ["1", "2"]
    assert aliases(config.registry) == {"candidate": "2", "champion": "1"}


def test_registering_the_same_adapter_of_the_same_run_twice_makes_one_version(
    config: RunConfig, evaluated_run: EvaluatedRun
) -> None:
    run = evaluated_run()
    run_id = start_tracking(config, run, {}).run_id
    first = register_version(config, run_id, run.candidate, {})
    assert register_version(config, run_id, run.candidate, {}) == first
    scale_adapter(run.candidate, 2.0)
    assert register_version(config, run_id, run.candidate, {}) == "2"


def test_there_is_no_champion_before_the_first_promotion(config: RunConfig, registry: RegistryConfig) -> None:
    assert champion(registry) is None


def test_the_champion_is_its_number_and_its_adapter(config: RunConfig, version: str, adapter: Path) -> None:
    assert champion(config.registry) is None
    promote_version(config.registry, version, None)
    found = champion(config.registry)
    assert found is not None
    assert found.version == version
    for file in ("adapter_model.safetensors", "adapters.safetensors", "adapter_config.json", "metadata.json"):
        assert (found.folder / file).read_bytes() == (adapter / file).read_bytes()


def test_a_champion_of_another_rank_can_be_compared_with_but_none_of_another_kind(
    config: RunConfig, version: str, adapter: Path
) -> None:
    promote_version(config.registry, version, None)
    base = resolve_base(config.model)
    other = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 5})})
    found = fitting_champion(other, base)
    assert found is not None
    assert found.version == version
    settings = found.folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": True}))
    with pytest.raises(ConfigError, match=rf"version {version}, cannot be compared.*use_dora.*registered_model"):
        fitting_champion(other, base)


@pytest.mark.parametrize("compared_with", [None, "2"])
def test_a_version_is_not_promoted_when_another_champion_was_compared_with(
    config: RunConfig, version: str, compared_with: str | None, evaluated_run: EvaluatedRun
) -> None:
    promote_version(config.registry, version, None)
    run = evaluated_run()
    later = register_version(config, start_tracking(config, run, {}).run_id, run.candidate, {})
    assert not promote_version(config.registry, later, compared_with)
    assert aliases(config.registry)["champion"] == version
    assert promote_version(config.registry, later, version)
    assert aliases(config.registry)["champion"] == later


def test_an_adapter_is_found_by_folder_alias_and_version(config: RunConfig, version: str, adapter: Path) -> None:
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    for reference in (str(adapter), "models:/nestune@candidate", f"models:/nestune/{version}"):
        folder = resolve_adapter(reference, config.registry)
        assert (folder / "adapter_model.safetensors").read_bytes() == weights
    assert pin_adapter("models:/nestune@candidate", config.registry) == f"models:/nestune/{version}"
    assert pin_adapter(str(adapter), config.registry) == str(adapter)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("models:/nestune@champion", "has of nestune only /1, @candidate"),
        ("models:/nestune/2", "has of nestune only /1, @candidate"),
        ("models:/other@champion", "has no model other"),
        ("models:/nestune", "Name a folder, models:/<name>@<alias> or models:/<name>/<version>"),
        ("no/such/folder", "no such folder"),
    ],
)
def test_an_adapter_that_does_not_exist_is_an_error_that_names_what_does(
    config: RunConfig, version: str, reference: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve_adapter(reference, config.registry)


def test_weights_that_changed_after_registering_are_refused(config: RunConfig, version: str) -> None:
    scale_adapter(resolve_adapter(f"models:/nestune/{version}", config.registry), 3.0)
    with pytest.raises(RunError, match="registered was"):
        resolve_adapter(f"models:/nestune/{version}", config.registry)
