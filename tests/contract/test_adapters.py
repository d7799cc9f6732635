"""Saved adapters: loaded by PEFT as they are, only LoRA, bound to their base, refused when they do not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nestune.backends.adapters import METADATA, WEIGHTS
from nestune.backends.base import Backend
from nestune.base_model import resolve_base
from nestune.config import ModelConfig
from nestune.data.batches import Batch
from nestune.errors import ConfigError
from nestune.runs import sha256_file
from nestune.tiers.schedule import TierSchedule
from tests.contract.conftest import BASE, VOCABULARY, MakeBackend, random_batch

PROMPTS = [[5, 17, 30], [7, 9, 11, 13, 40]]


@pytest.fixture
def trained(make: MakeBackend) -> Backend:
    backend = make()
    for step in range(1, 9):
        backend.train_step([random_batch(step)], frozenset({0, 1, 2}), 5e-3)
    return backend


@pytest.fixture
def saved(trained: Backend, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    trained.save_adapter(folder)
    return folder


def test_plain_peft_loads_the_folder_with_the_same_losses(trained: Backend, saved: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    batch = random_batch(99)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    tokens = torch.from_numpy(batch.tokens).long()
    attention = torch.arange(tokens.shape[1]) < torch.from_numpy(batch.lengths)[:, None]

    def nats(model: torch.nn.Module) -> float:
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=attention.long()).logits[:, :-1]
        where = torch.from_numpy(batch.supervised)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[where], tokens[:, 1:][where], reduction="sum")
        return float(loss)

    untouched = nats(base)
    adapted = nats(PeftModel.from_pretrained(base, saved))
    ours = trained.loss([batch]).nats
    assert ours == pytest.approx(adapted, rel=1e-6)
    assert abs(ours - untouched) > 0.1


def test_an_adapter_trained_in_stacked_tiers_gives_plain_peft_the_same_logits(
    make: MakeBackend, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    backend = make(tiers={"strategy": "stacked", "update_every": [1, 2, 4]})
    schedule = TierSchedule((1, 2, 4))
    for step in range(1, 9):
        backend.train_step([random_batch(step)], schedule.due(step), 5e-3)
    backend.save_adapter(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    prompt = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        untouched = base(prompt).logits[0, -1].log_softmax(-1)
        adapted = PeftModel.from_pretrained(base, tmp_path)(prompt).logits[0, -1].log_softmax(-1)
    # A backend tells losses: that of one next token is minus its log-probability.
    next_tokens = list(range(3, VOCABULARY, 5))
    ours = [-backend.loss([one_next_token(PROMPTS[1], token)]).nats for token in next_tokens]
    np.testing.assert_allclose(ours, adapted[next_tokens].numpy(), rtol=1e-5)
    assert (adapted - untouched).abs().max() > 0.1


def one_next_token(prompt: list[int], token: int) -> Batch:
    """A row of which only the token after the prompt is supervised."""
    tokens = np.array([[*prompt, token]], np.int32)
    return Batch(tokens, np.arange(tokens.shape[1])[None] == len(prompt), np.array([tokens.shape[1]], np.int32))


def test_only_lora_matrices_are_saved(trained: Backend, saved: Path) -> None:
    weights = load_file(saved / WEIGHTS)
    assert len(weights) == len(trained.lora_parameters()) == 6 * 7 * 2
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in weights)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)


def test_training_leaves_the_base_untouched(make: MakeBackend) -> None:
    before = sha256_file(BASE / "model.safetensors")
    backend = make()
    batch = random_batch(99)
    untrained = backend.loss([batch]).nats
    backend.train_step([random_batch(1)], frozenset({0, 1, 2}), 5e-3)
    assert backend.loss([batch]).nats != untrained
    backend.load_adapter(None)
    assert backend.loss([batch]).nats == untrained
    assert sha256_file(BASE / "model.safetensors") == before


def test_a_loaded_adapter_has_the_bits_that_were_saved(trained: Backend, saved: Path, make: MakeBackend) -> None:
    other = make(training={"seed": 1})
    other.load_adapter(saved)
    assert {n: w.tobytes() for n, w in other.weights().items()} == {
        n: w.tobytes() for n, w in trained.weights().items()
    }
    assert other.generate(PROMPTS, 5) == trained.generate(PROMPTS, 5)


def test_saving_twice_gives_the_same_bytes(trained: Backend, saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    trained.save_adapter(again)
    assert sha256_file(again / WEIGHTS) == sha256_file(saved / WEIGHTS)


def write_base(folder: Path, sha256: str) -> None:
    (folder / METADATA).write_text(json.dumps({"base": {"reference": "demo/base", "sha256": sha256}}))


def test_an_adapter_of_another_base_is_refused(trained: Backend, saved: Path) -> None:
    write_base(saved, "0" * 64)
    with pytest.raises(ConfigError, match=r"(?s)it was trained on demo/base .*Use the base and the lora block"):
        trained.load_adapter(saved)


def test_an_adapter_of_this_base_is_taken(trained: Backend, saved: Path) -> None:
    write_base(saved, resolve_base(ModelConfig(base=str(BASE))).sha256)
    trained.load_adapter(saved)
    assert trained.weights().keys() == {p.name for p in trained.lora_parameters()}


def test_every_mismatch_is_told_at_once(trained: Backend, saved: Path) -> None:
    weights = load_file(saved / WEIGHTS)
    first, second, *_ = sorted(weights)
    del weights[first]
    weights[second] = np.zeros((3, 3), np.float32)
    weights["base_model.model.surplus"] = np.zeros(1, np.float32)
    save_file(weights, saved / WEIGHTS)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(ConfigError) as caught:
        trained.load_adapter(saved)
    text = str(caught.value)
    assert "r is 4, the configuration says lora.rank 8" in text
    assert f"{first} is missing" in text
    assert f"{second} has shape [3, 3]" in text
    assert "base_model.model.surplus is not part of this model" in text


def test_a_truncated_file_is_refused(trained: Backend, saved: Path) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="the adapter is broken"):
        trained.load_adapter(saved)


def test_a_folder_that_is_no_adapter_is_refused(trained: Backend, saved: Path) -> None:
    shutil.rmtree(saved)
    with pytest.raises(ConfigError, match="is no adapter: cannot read"):
        trained.load_adapter(saved)


def test_answers_of_a_batch_equal_those_of_each_prompt_alone(trained: Backend) -> None:
    assert trained.generate(PROMPTS, 6) == [trained.generate([prompt], 6)[0] for prompt in PROMPTS]


def test_targets_that_match_nothing_are_refused_with_the_known_modules(make: MakeBackend) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets.*down_proj.*q_proj"):
        make(lora={"targets": ["nothing_like_it"]})


def test_a_target_outside_of_the_layers_is_refused(make: MakeBackend) -> None:
    with pytest.raises(ConfigError, match="no LoRA matrix of a layer"):
        make(lora={"targets": ["lm_head", "q_proj"]})
