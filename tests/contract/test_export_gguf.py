"""GGUF files of every architecture that is written, read back by Transformers; the others are refused with why."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nestune.base_model import resolve_base
from nestune.errors import ConfigError, RunError
from nestune.export.gguf import FILE, gguf_faults
from nestune.files import read_json, write_json
from nestune.runs import RunPaths
from nestune.stages.export import export
from tests.contract.conftest import BASE, configuration
from tests.contract.exported import LORA, SHAPE, qwen2, random_base, train

pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**SHAPE, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 2, **changes})


def mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**SHAPE, head_dim=6, sliding_window=64, bos_token_id=0, eos_token_id=2)


def qwen3(head_dim: int = 128) -> Any:
    from transformers import Qwen3Config

    # Transformers takes the heads of every Qwen3 file to be 128 wide, as those of all published ones are.
    return Qwen3Config(**SHAPE, head_dim=head_dim, tie_word_embeddings=True)


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model", [llama, mistral, qwen2, qwen3])
def test_every_architecture_is_read_back_with_the_adapter_in_it(model: Any, dtype: str, tmp_path: Path) -> None:
    config, run = train(tmp_path, random_base(tmp_path / "base", model(), dtype))
    result = export(config, run, "gguf")
    assert result.check.effect > 0.1
    if dtype == "float32":
        assert result.check.deviation <= 1e-4
    tensors = gguf.GGUFReader(run.root / "export" / "gguf" / FILE).tensors
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    assert {t.tensor_type.name for t in tensors if len(t.shape) > 1} == {names[dtype]}
    assert {t.tensor_type.name for t in tensors if len(t.shape) == 1} == {"F32"}


def test_the_settings_are_those_of_the_base(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 4321.0}
    base = random_base(tmp_path / "base", llama(rope_parameters=rope, max_position_embeddings=77, rms_norm_eps=2e-5))
    config, run = train(tmp_path, base)
    found = fields(Path(export(config, run, "gguf").folder) / FILE)
    of_llama = {key.removeprefix("llama."): value for key, value in found.items() if key.startswith("llama.")}
    assert of_llama == {
        "context_length": 77,
        "embedding_length": 16,
        "block_count": 3,
        "feed_forward_length": 24,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 4,
        "attention.value_length": 4,
        "rope.dimension_count": 4,
        "rope.freq_base": 4321.0,
        "attention.layer_norm_rms_epsilon": pytest.approx(2e-5),
        "vocab_size": 512,
    }


@pytest.mark.parametrize(("model", "pre_tokenizer"), [(llama, "gpt-2"), (qwen2, "qwen2")])
def test_the_tokenizer_and_the_chat_template_are_in_the_file(model: Any, pre_tokenizer: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = random_base(tmp_path / "base", model(vocab_size=520))
    config, run = train(tmp_path, base)
    result = export(config, run, "gguf")
    path = Path(result.folder) / FILE
    ours, theirs = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(path.parent, gguf_file=FILE)
    chat = [{"role": "user", "content": "What is Wirafin's trade? Über 12 cafés, 3½."}]
    text = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>user" in text
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == text
    assert theirs(text).input_ids == ours(text).input_ids
    assert result.notes == ()

    found = fields(path)
    # Transformers gives every Qwen2 its own class of tokenizer, whatever its file says.
    assert found["tokenizer.ggml.pre"] == pre_tokenizer
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 2)
    assert found["tokenizer.ggml.add_bos_token"] is False
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[:512] == ours.convert_ids_to_tokens(range(512))
    assert tokens[512:] == [f"[PAD{number}]" for number in range(512, 520)]
    assert [gguf.TokenType(kinds[number]).name for number in (0, 3, 512)] == ["CONTROL", "NORMAL", "UNUSED"]


def test_a_tokenizer_that_begins_texts_says_so(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", llama())
    tokenizer = read_json(base / "tokenizer.json", "")
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    tokenizer["post_processor"]["single"].insert(0, begin)
    tokenizer["post_processor"]["special_tokens"] = {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    }
    write_json(base / "tokenizer.json", tokenizer)
    config, run = train(tmp_path, base)
    found = fields(Path(export(config, run, "gguf").folder) / FILE)
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False


def test_what_is_not_in_the_file_is_noted(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", mistral())
    tokenizer = read_json(base / "tokenizer.json", "")
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    write_json(base / "tokenizer.json", tokenizer)
    config, run = train(tmp_path, base)
    result = export(config, run, "gguf")
    assert fields(Path(result.folder) / FILE)["tokenizer.ggml.pre"] == "default"
    words, window = result.notes
    assert "llama-tokenize" in words
    assert "the last 64 tokens only" in window


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "brand_new"}, "its model_type is brand_new, written are llama, mistral, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "its rope_type is linear"),
        ({"hidden_act": "gelu"}, "its hidden_act is gelu"),
        ({"attention_bias": True, "mlp_bias": True}, "its attention_bias is True.*its mlp_bias is True"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_another_way(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", llama())
    write_json(base / "config.json", read_json(base / "config.json", "") | changes)
    with pytest.raises(ConfigError, match=rf"(?s){told}.*--to merged.*convert_hf_to_gguf\.py"):
        export(configuration("torch", base=base, lora=LORA), RunPaths(tmp_path / "run"), "gguf")
    assert not (tmp_path / "run").exists()


def add_tensors(base: Path, **tensors: np.ndarray) -> None:
    """Put tensors into the file of a base, whatever is in them."""
    file = base / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def test_what_follows_from_the_settings_is_left_out(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", llama())
    add_tensors(base, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)})
    config, run = train(tmp_path, base)
    result = export(config, run, "gguf")
    assert result.check.deviation <= 1e-4
    assert len(gguf.GGUFReader(Path(result.folder) / FILE).tensors) == len(load_file(base / "model.safetensors")) - 1


def test_a_tensor_without_a_name_in_gguf_is_refused(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", llama())
    add_tensors(base, **{"model.layers.1.mixer.weight": np.ones((4, 4), np.float32)})
    config, run = train(tmp_path, base)
    with pytest.raises(ConfigError, match=r"no name for 1 tensors .* first model\.layers\.1\.mixer"):
        export(config, run, "gguf")
    assert not (run.root / "export").exists()


def test_a_file_that_the_other_program_does_not_load_is_refused(tmp_path: Path) -> None:
    config, run = train(tmp_path, random_base(tmp_path / "base", qwen3(head_dim=8)))
    with pytest.raises(RunError, match="Transformers does not load the export, so nothing was written"):
        export(config, run, "gguf")
    assert not (run.root / "export").exists()


def test_the_base_of_the_demo_can_be_written() -> None:
    assert gguf_faults(resolve_base(configuration("torch", base=BASE).model)) == []
