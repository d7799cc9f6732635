"""Base models from anywhere: loaded, or refused with a remedy before memory is spent; none of their code is run."""

import json
import os
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file, save_file

from nestune.backends.base import Backend
from nestune.backends.factory import make_backend
from nestune.base_model import BaseModel, resolve_base
from nestune.base_sizes import read_shapes, size_faults
from nestune.config import ModelConfig
from nestune.data.tokens import load_tokenizer
from nestune.errors import ConfigError
from tests.contract.conftest import configuration
from tests.fuzz.hostile import ROOT, altered, as_json, damaged, fuzz, outcome
from tests.fuzz.test_run_files import SAFETENSORS

DEMO = ROOT / "demo" / "base"
CONFIG = json.loads((DEMO / "config.json").read_text())
TOKENIZER = json.loads((DEMO / "tokenizer.json").read_text())
TOKENIZER_CONFIG = json.loads((DEMO / "tokenizer_config.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """Importing them takes longer than anything here may."""
    for name in ("torch", "mlx"):
        if find_spec(name):
            import_module(f"nestune.backends.{name}_backend")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    shutil.copytree(DEMO, tmp_path / "base")
    return tmp_path / "base"


def configured(base: Path, **changes: Any) -> None:
    (base / "config.json").write_bytes(as_json({**CONFIG, **changes}))


def resolved(base: Path) -> BaseModel | str:
    return outcome(lambda: resolve_base(ModelConfig(base=str(base))))


def loaded(base: Path, backend: str) -> Backend | str:
    pytest.importorskip(backend)
    return outcome(lambda: make_backend(configuration(backend, base=base)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 10**9}, "hidden_size is 1e+09, and the widest weight has 512"),
        ({"vocab_size": 2**40}, "vocab_size is 1.09951e+12"),
        ({"intermediate_size": 513}, "intermediate_size is 513, and the widest weight has 512"),
        ({"num_attention_heads": 10**7}, "num_attention_heads"),
        ({"head_dim": 2**31}, "head_dim"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 1e+08, and there are only 74 weights"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings is 1.09951e+12, and at most 16777216 can be"),
        ({"text_config": {"hidden_size": 10**9}}, "text_config.hidden_size"),
        ({"a": {"b": {"moe_intermediate_size": [1, 10**9]}}}, "a.b.moe_intermediate_size"),
        ({"hidden_size": 1e300}, "hidden_size is 1e+300"),
        ({"seen": 2**62}, "seen is 4611686018427387904, which is no size of a model"),
        ({"hidden_size": 10**400}, "at most 64 are read"),
        ({"text_config": "none"}, "is no model configuration"),
        ({"quantization": 4}, "is no model configuration"),
        ({"model_file": "evil.py"}, "code of its own (model_file 'evil.py')"),
        ({"attn_implementation": "somebody/kernel"}, "code of its own (attn_implementation 'somebody/kernel')"),
    ],
)
def test_a_configuration_that_cannot_be_that_of_its_weights_is_refused(base: Path, changes: Any, told: str) -> None:
    configured(base, **changes)
    assert told in str(resolved(base))


def test_all_wrong_sizes_are_told_at_once(base: Path) -> None:
    configured(base, hidden_size=10**9, num_hidden_layers=10**9, max_position_embeddings=10**9)
    told = str(resolved(base))
    assert all(key in told for key in ("hidden_size", "num_hidden_layers", "max_position_embeddings"))


def test_sizes_as_large_as_the_weights_allow_are_taken() -> None:
    shapes = read_shapes([DEMO / "model.safetensors"])
    assert size_faults({"hidden_size": 512, "num_hidden_layers": 74, "n_positions": 2**24}, shapes) == []
    # Packed, a weight is wider than its header says; learned positions are as many as their weight has rows.
    assert size_faults({"hidden_size": 512 * 32, "quantization": {"bits": 4}}, shapes) == []
    assert size_faults({"n_positions": 1025}, {"wpe.weight": (1024, 8)}) == [
        "n_positions is 1025, and at most 1024 can be"
    ]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 9000, b'{"a":' * 9000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_config_that_is_none_is_refused(base: Path, content: bytes) -> None:
    (base / "config.json").write_bytes(content)
    assert "is no model configuration" in str(resolved(base))


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_weights_that_are_no_such_file_are_refused(base: Path, content: bytes) -> None:
    (base / "model.safetensors").write_bytes(content)
    assert isinstance(loaded(base, "torch"), str)


def test_weights_that_are_a_named_pipe_are_refused_and_not_waited_for(base: Path) -> None:
    os.mkfifo(base / "more.safetensors")
    assert "is a named pipe" in str(resolved(base))


def test_an_index_cannot_name_weights_that_are_not_hashed(base: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../other.safetensors"}}
    (base / "model.safetensors.index.json").write_bytes(as_json(index))
    assert "names files that are not beside it, such as '../other.safetensors'" in str(resolved(base))


def test_an_adapter_beside_a_base_is_refused_as_it_would_take_the_place_of_its_weights(base: Path) -> None:
    (base / "adapter_config.json").write_bytes(as_json({"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"}))
    assert "adapter_config.json beside a model" in str(resolved(base))


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_base_with_values_of_other_types_is_loaded_or_refused(base: Path, backend: str) -> None:
    assert not isinstance(loaded(base, backend), str)

    @settings(fuzz, max_examples=40)
    @given(content=altered(CONFIG))
    def check(content: Any) -> None:
        (base / "config.json").write_bytes(as_json(content))
        loaded(base, backend)

    check()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5, "num_key_value_heads": 3},
        {"model_type": "../../evil"},
        {"model_type": ["qwen2"]},
        {"model_type": "base"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 1e308}},
        {"rope_parameters": 7, "rope_theta": "x"},
        {"eos_token_id": "2"},
        {"eos_token_id": [2, "x"]},
        {"layer_types": ["full_attention"] * 50_000},
        {"dtype": "float1"},
        {"quantization": {"bits": 0, "group_size": 0}},
        {"quantization_config": {"quant_method": "gptq", "bits": 1e9}},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_configuration_made_by_hand_is_loaded_or_refused(base: Path, backend: str, changes: Any) -> None:
    configured(base, **changes)
    loaded(base, backend)


EVIL = "from pathlib import Path\nPath({!r}).write_text('ran')\nraise SystemExit\n"


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("asked", ["auto_map", "model_file", "auto_map of the tokenizer", "auto_map of a known type"])
def test_code_that_comes_with_a_base_is_never_run(base: Path, backend: str, asked: str) -> None:
    ran = base.parent / "ran"
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "qwen2.py"):
        (base / name).write_text(EVIL.format(str(ran)))
    classes = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    }
    tokenizer = dict(TOKENIZER_CONFIG)
    if asked == "auto_map":
        configured(base, model_type="evil", architectures=["Evil"], auto_map=classes)
    elif asked == "model_file":
        configured(base, model_file="evil.py")
    elif asked == "auto_map of a known type":
        configured(base, auto_map=classes)
    else:
        tokenizer |= {"auto_map": {"AutoTokenizer": classes["AutoTokenizer"]}, "tokenizer_class": "Evil"}
    (base / "tokenizer_config.json").write_bytes(as_json(tokenizer))
    read = loaded(base, backend)
    assert not ran.exists()
    if asked in ("auto_map", "model_file"):
        assert "code of its own" in str(read)
        assert "trust_remote_code" not in str(read)
    elif asked == "auto_map of a known type":
        assert not isinstance(read, str), "the library's own code is used"


def tokenized(base: Path) -> Any:
    def read() -> Any:
        tokenizer = load_tokenizer(base)
        tokenizer("the sea is blue")
        return tokenizer

    return outcome(read)


def test_a_tokenizer_with_values_of_other_types_is_loaded_or_refused(base: Path) -> None:
    assert not isinstance(tokenized(base), str)

    @settings(fuzz, max_examples=60)
    @given(content=altered(TOKENIZER))
    def check(content: Any) -> None:
        (base / "tokenizer.json").write_bytes(as_json(content))
        tokenized(base)

    check()


def test_a_tokenizer_with_altered_settings_is_loaded_or_refused(base: Path) -> None:
    @settings(fuzz, max_examples=60)
    @given(content=altered(TOKENIZER_CONFIG))
    def check(content: Any) -> None:
        (base / "tokenizer_config.json").write_bytes(as_json(content))
        tokenized(base)

    check()


def test_a_damaged_tokenizer_is_loaded_or_refused(base: Path) -> None:
    @settings(fuzz, max_examples=60)
    @given(content=damaged((DEMO / "tokenizer.json").read_bytes()))
    def check(content: bytes) -> None:
        (base / "tokenizer.json").write_bytes(content)
        tokenized(base)

    check()


def test_a_tokenizer_of_a_gigabyte_is_refused_unread(base: Path) -> None:
    with (base / "tokenizer.json").open("ab") as file:
        file.truncate(2**30)
    assert "tokenizer.json" in str(tokenized(base))
    assert "is larger than" in str(tokenized(base))


@pytest.mark.parametrize(
    "reference", ["..", "../x", "a/..", "a/../b", "models:/../x", "~nobody-here/x", "a b", "", "\0", "/", "x" * 5000]
)
def test_a_reference_that_is_no_base_is_refused(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert isinstance(outcome(lambda: resolve_base(ModelConfig(base=reference))) if reference else "", str)


@pytest.mark.parametrize("revision", ["../../x", "a/../../b", "/etc/passwd", "", "a b", "-x", "x" * 300])
def test_a_revision_that_is_a_path_is_refused(revision: str) -> None:
    with pytest.raises(ValueError, match="must be a commit hash, tag or branch"):
        ModelConfig(base="org/base", revision=revision)
    assert ModelConfig(base="org/base", revision="refs/pr/1").revision == "refs/pr/1"


@pytest.fixture
def small(base: Path) -> Path:
    """The base without the rows of its last tokens, as it would be with a tokenizer of another model."""
    weights = load_file(base / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(weights | {name: np.ascontiguousarray(weights[name][:40])}, base / "model.safetensors", {"format": "pt"})
    configured(base, vocab_size=40)
    return base


def test_tokens_that_the_model_does_not_know_are_refused_when_data_is_read(small: Path, tmp_path: Path) -> None:
    from nestune.config import DataConfig, RetentionConfig
    from nestune.data.validation import build_dataset

    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"text": f"the sea is blue {number}"}) + "\n" for number in range(4)))
    data, resolved = DataConfig.model_validate({"train": str(train)}), resolve_base(ModelConfig(base=str(small)))
    with pytest.raises(ConfigError, match=r"as token \d+, and the model knows 40 tokens \(vocab_size\)\. Take a copy"):
        build_dataset(data, RetentionConfig(), load_tokenizer(small), tmp_path / "dataset", resolved.vocabulary)
    assert not (tmp_path / "dataset").exists()


def test_padding_that_the_model_does_not_know_becomes_its_end_token(small: Path) -> None:
    from nestune.data.tokens import pad_id_of

    tokenizer = load_tokenizer(small)
    tokenizer.pad_token_id = 50
    assert pad_id_of(tokenizer, 512) == 50
    assert pad_id_of(tokenizer, 40) == tokenizer.eos_token_id
    with pytest.raises(ConfigError, match="Take a copy of the base"):
        pad_id_of(tokenizer, 1)
