import json

import numpy as np
import pytest
from safetensors.numpy import save
from tiny_tokenizer import build_tokenizer

from nestune.config import load_config, parse_config
from nestune.errors import DataError
from nestune.files import sha256_file
from nestune.runs import RunPaths
from nestune.stages.validate import validate


@pytest.fixture
def base(tmp_path):
    """A folder with a tokenizer; of the model only what names it, for nothing is computed here."""
    folder = tmp_path / "base"
    build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "model.safetensors").write_bytes(save({"w": np.zeros(1)}))
    return folder


def test_the_stage_writes_dataset_configuration_and_manifest(tmp_path, base, write):
    train = write("train.jsonl", [{"text": f"the sea is {number}"} for number in range(10)])
    told = {"name": "first", "model": {"base": str(base)}, "data": {"train": train}, "retention": {"recipe": "none"}}
    config = parse_config(told)
    run = RunPaths(tmp_path / "runs" / "first")
    result = validate(config, run)
    assert json.loads(json.dumps(result.as_dict()))["records"] == {"train": 9, "valid": 1}
    assert load_config(run.config) == config
    recorded = json.loads(run.manifest.read_text())["validate"]
    assert recorded["inputs"][train] == sha256_file(run.root.parent.parent / "train.jsonl")
    assert str(base / "tokenizer.json") in recorded["inputs"]
    assert recorded["outputs"][str(run.dataset / "report.json")] == sha256_file(run.dataset / "report.json")


def test_a_refused_dataset_leaves_the_run_as_it_was(tmp_path, base, write):
    train = write("train.jsonl", b"{")
    config = parse_config({"name": "first", "model": {"base": str(base)}, "data": {"train": train}})
    run = RunPaths(tmp_path / "runs" / "first")
    with pytest.raises(DataError, match="1 of 1 records"):
        validate(config, run)
    assert not list(run.root.rglob("*.*"))
