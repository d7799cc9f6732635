"""A tiny base with a chat template, a random adapter on it, and an empty MLflow store."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from run_folders import EvaluatedRun, write_evaluated_run

from nestune.backends.adapters import write_adapter
from nestune.base_model import resolve_base
from nestune.config import LoraConfig, ModelConfig, RegistryConfig, RunConfig
from nestune.files import write_json
from nestune.registry.connection import connect
from nestune.runs import RunPaths

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LORA = {"rank": 4, "alpha": 16, "targets": ["q_proj", "down_proj"]}
SPECIAL = ["<|im_end|>", "<|im_start|>"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Qwen2 of two layers that reads and writes single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    # Transformers writes it in a block of its own, where mlx-lm does not look for it.
    settings = json.loads((folder / "config.json").read_text())
    settings["rope_theta"] = settings["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on the base, as a training writes it."""
    folder = tmp_path_factory.mktemp("run") / "best"
    folder.mkdir()
    generator = np.random.default_rng(1)
    weights, modules = {}, {}
    for layer in range(2):
        for module, inputs, outputs in (("self_attn.q_proj", 32, 32), ("mlp.down_proj", 64, 32)):
            for side, shape in (("a", (LORA["rank"], inputs)), ("b", (outputs, LORA["rank"]))):
                name = f"layers.{layer}.{module}.lora_{side}"
                weights[name] = generator.normal(0, 0.2, shape).astype(np.float32)
                modules[name] = f"model.layers.{layer}.{module}"
    resolved = resolve_base(ModelConfig(base=str(base)))
    write_adapter(folder, weights, modules, 2, LoraConfig.model_validate(LORA), resolved)
    of_base = {"reference": str(base), "revision": None, "sha256": resolved.sha256}
    write_json(folder / "metadata.json", {"step": 7, "base": of_base, "backend": "torch"})
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as MLflow sets it up, which takes it a second."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(RegistryConfig(tracking_uri=f"sqlite:///{path}"))
    return path


@pytest.fixture
def registry(tmp_path: Path, empty_store: Path) -> RegistryConfig:
    home = tmp_path / "mlflow"
    home.mkdir()
    shutil.copyfile(empty_store, home / "mlflow.db")
    return RegistryConfig(tracking_uri=f"sqlite:///{home}/mlflow.db")


@pytest.fixture
def config(base: Path, registry: RegistryConfig, tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "week.1",
            "model": {"base": str(base)},
            "lora": LORA,
            "data": {"train": [str(tmp_path / "train.jsonl")], "retention": {"old": [str(tmp_path / "old.jsonl")]}},
            "evaluation": {"max_answer_tokens": 12},
            "registry": registry.model_dump(),
        }
    )


@pytest.fixture
def evaluated_run(adapter: Path, tmp_path: Path) -> EvaluatedRun:
    """Makes a run's folder as the stages before `register` leave it; every call another adapter."""
    made = 0

    def make(passed: bool = True, champion_version: str | None = None) -> RunPaths:
        nonlocal made
        made += 1
        run = RunPaths(tmp_path / "runs" / f"run{made}")
        write_evaluated_run(run, adapter, 1 + made / 8, passed, champion_version)
        return run

    return make
