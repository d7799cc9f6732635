"""Configurations from anywhere: read as they say, or refused with what to do."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from nestune.cli import main
from nestune.config import RunConfig, dump_config, load_config
from tests.fuzz.hostile import NASTY, altered, as_json, damaged, fuzz, outcome

DATA = Path(__file__).parents[2] / "demo" / "base" / "config.json"
CONTENT: dict[str, Any] = {
    "name": "r",
    "model": {"base": "org/base", "adapter": "models:/m@champion", "revision": "main"},
    "lora": {"rank": 8, "alpha": 16.0, "targets": ["q_proj"]},
    "data": {"train": [str(DATA)], "valid": 0.1, "retention": {"old": [str(DATA)]}, "max_seq_length": 64},
    "tiers": {"strategy": "manual", "update_every": [1, 2, 4], "assignments": {"*": 2, "layers.0.*": 0}},
    "retention": {"replay": {"files": [str(DATA)], "rows_per_step": 4}},
    "training": {"steps": 8, "learning_rate": 1e-3, "early_stopping": {"patience": 2}, "max_grad_norm": None},
    "registry": {"tracking_uri": "sqlite:///x.db", "experiment": "e"},
}
VALID = yaml.safe_dump(CONTENT).encode()
HEAD = b"name: r\nmodel: {base: org/base}\ndata: {train: " + str(DATA).encode() + b"}\n"
LAUGHS = b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n".encode() for k in range(1, 30)
)
MERGES = b"m0: &m0 {x: 1}\n" + b"".join(f"m{k}: &m{k} {{<<: [*m{k - 1}, *m{k - 1}]}}\n".encode() for k in range(1, 60))
HAND_MADE = {
    "empty": b"",
    "NUL": b"\0",
    "UTF-16": "name: r".encode("utf-16"),
    "not UTF-8": b"name: \xff\xfe",
    "byte order mark": b"\xef\xbb\xbf" + HEAD,
    "CRLF": HEAD.replace(b"\n", b"\r\n"),
    "CR alone": HEAD.replace(b"\n", b"\r"),
    "a list": b"- a\n- b\n",
    "a text": b"just words",
    "two documents": HEAD + b"---\n" + HEAD,
    "billion laughs": HEAD + LAUGHS,
    "billion laughs as a value": HEAD + LAUGHS + b"tiers: *a29\n",
    "merges without end": HEAD + MERGES,
    "an alias of itself": HEAD + b"tiers: &a [*a]\n",
    "an alias of itself as a key": HEAD + b"tiers: &a {? *a : 1}\n",
    "a merge of itself": HEAD + b"tiers: &a {<<: *a}\n",
    "an unknown alias": HEAD + b"tiers: *" + b"a" * 9000 + b"\n",
    "deep lists": HEAD + b"tiers: " + b"[" * 5000,
    "deep closed lists": HEAD + b"tiers: " + b"[" * 100 + b"]" * 100,
    "deep mappings": HEAD + b"tiers: " + b"{a: " * 5000,
    "deep indents": HEAD + b"".join(b" " * k + b"a:\n" for k in range(300)),
    "deep keys": HEAD + b"? " * 3000,
    "a number of 5000 digits": HEAD + b"training: {steps: " + b"9" * 5000 + b"}\n",
    "a hexadecimal number": HEAD + b"training: {steps: 0x" + b"F" * 6000 + b"}\n",
    "a binary number": HEAD + b"training: {steps: 0b" + b"1" * 6000 + b"}\n",
    "an octal number": HEAD + b"training: {seed: 0" + b"7" * 6000 + b"}\n",
    "a sexagesimal number": HEAD + b"training: {steps: 1" + b":59" * 40_000 + b"}\n",
    "many underscores": HEAD + b"training: {steps: 1" + b"_" * 200_000 + b"}\n",
    "400 digits": HEAD + b"training: {steps: " + b"9" * 400 + b"}\n",
    "40 digits": HEAD + b"training: {steps: " + b"9" * 40 + b", seed: " + b"9" * 40 + b"}\n",
    "a float of 40 digits": HEAD
    + b"training: {learning_rate: "
    + b"9" * 40
    + b"}\nlora: {alpha: 0x"
    + b"F" * 50
    + b"}\n",
    "infinity": HEAD + b"training: {learning_rate: .inf}\n",
    "nan": HEAD + b"lora: {alpha: .nan}\n",
    "exponents": HEAD + b"lora: {alpha: 1e999}\ntraining: {learning_rate: 1.0e+999}\n",
    "a bad date": HEAD + b"training: 2024-13-45\n",
    "a good date": b"name: 2024-01-01\n" + HEAD[8:],
    "a date of a tag": HEAD + b"training: !!timestamp x\n",
    "an empty number": HEAD + b"training: {steps: !!int ''}\nlora: {alpha: !!float ''}\n",
    "a truth value of a tag": HEAD + b"data: !!bool x\n",
    "binary": HEAD + b"training: !!binary '%'\n",
    "a set": HEAD + b"training: !!set {a, b}\n",
    "pairs": HEAD + b"training: !!omap [a: 1]\n",
    "a map that is a tag's text": HEAD + b"training: !!map x\n",
    "a text that is a tag's map": HEAD + b"training: !!str {a: 1}\n",
    "an object of Python": HEAD + b"training: !!python/object/apply:os.system ['true']\n",
    "a name of Python": HEAD + b"training: !!python/name:os.system\n",
    "a tag of its own": HEAD + b"training: !x {a: 1}\n",
    "a long tag": HEAD + b"training: !" + b"x" * 9000 + b" 1\n",
    "an equals sign": HEAD + b"training: =\n",
    "a merge as a value": HEAD + b"training: <<\n",
    "a merge of a text": HEAD + b"training: {<<: x}\n",
    "a key that is a list": HEAD + b"training: {[1, 2]: 3}\n",
    "a key that is a mapping": HEAD + b"training: {{a: 1}: 3}\n",
    "keys that are numbers": HEAD + b"1: 2\ndata: {1.5: 2, true: 3, null: 4}\n",
    "the same key": HEAD + b"name: r\n",
    "the same key in another way": HEAD + b"'name': r\n",
    "half a surrogate pair": HEAD + b'registry: {experiment: "\\ud800"}\n',
    "NUL in a text": HEAD + b'registry: {experiment: "a\\0b"}\n',
    "a character that is none": HEAD + b'registry: {experiment: "\\UFFFFFFFF"}\n',
    "an unended text": HEAD + b'registry: {experiment: "a',
    "a directive": b"%YAML 9" + b"9" * 5000 + b".1\n---\n" + HEAD,
    "a tag directive": b"%TAG ! tag:yaml.org,2002:python/\n---\n" + HEAD,
    "nobody's home": HEAD + b"tiers: {}\nretention: {replay: {files: '~nobody-here/x'}}\n",
    "a name too long for a file": HEAD + b"retention: {replay: {files: " + b"a" * 5000 + b"}}\n",
    "a long key": HEAD + b"a" * 900 + b": 1\n",
    "many unknown keys": HEAD + b"".join(f"k{k}: 1\n".encode() for k in range(5000)),
    "too large": HEAD + b"# " + b"x" * 300_000,
}
SOUND = ("byte order mark", "CRLF", "CR alone", "a tag directive", "a float of 40 digits")
OVERRIDES = [
    *(
        "",
        "=",
        ".=1",
        "a",
        "a..b=1",
        "a." * 3000 + "a=1",
        "name.x=1",
        "data.retention=" + "[" * 3000,
        "training.steps=0x" + "F" * 9000,
    ),
    *(
        "data.retention.a.b.c.d.e.f=1",
        "training.steps=" + "1" * 300_000,
        "tiers=&a [*a]",
        "lora.rank=!!int ''",
        "training=2024-13-45",
    ),
    *(
        'registry.experiment="\\ud800"',
        "\ud800.x=1",
        "model.base=\ud800",
        "data.train=\0",
        "lora.targets={1: 2}",
        "tiers.assignments={1: 0}",
    ),
    *(
        "data.train=~nobody-here/x",
        "data.train=" + "a/" * 3000,
        "model.revision=../../x",
        "model.adapter=models:/../../x@y",
    ),
    *(
        "training.seed=99999999999999999999",
        "training.learning_rate=" + "9" * 50,
        "lora.dropout=-0.0",
        "data.valid=1e-400",
    ),
]


def read(path: Path, *overrides: str) -> RunConfig | str:
    """The configuration, or its error; an accepted one is the same again when it is written and read."""
    config = outcome(lambda: load_config(path, overrides))
    if isinstance(config, RunConfig):
        path.with_name("again.yaml").write_text(dump_config(config), encoding="utf-8")
        assert load_config(path.with_name("again.yaml")) == config
    return config


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "run.yaml"


def test_the_file_that_is_damaged_is_a_valid_one(path: Path) -> None:
    path.write_bytes(VALID)
    assert isinstance(read(path), RunConfig)


@pytest.mark.parametrize("content", HAND_MADE.values(), ids=HAND_MADE)
def test_a_file_made_by_hand_is_read_or_refused_with_a_remedy(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    accepted = isinstance(read(path), RunConfig)
    assert accepted == any(content == HAND_MADE[name] for name in SOUND)


@fuzz
@given(content=damaged(VALID))
def test_a_damaged_file_is_read_or_refused_with_a_remedy(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    read(path)


@fuzz
@given(content=altered(CONTENT))
def test_values_of_other_types_are_read_or_refused_with_a_remedy(path: Path, content: Any) -> None:
    path.write_bytes(as_json(content))
    read(path)


@pytest.mark.parametrize("override", OVERRIDES, ids=range(len(OVERRIDES)))
def test_an_override_made_by_hand_is_read_or_refused_with_a_remedy(path: Path, override: str) -> None:
    path.write_bytes(VALID)
    read(path, override)


@fuzz
@given(
    key=st.sampled_from([f"{block}.{key}" for block in CONTENT if block != "name" for key in CONTENT[block]]),
    value=st.sampled_from(NASTY),
)
@example(key="name", value="../x")
def test_an_override_of_any_field_is_read_or_refused_with_a_remedy(path: Path, key: str, value: Any) -> None:
    path.write_bytes(VALID)
    read(path, f"{key}={yaml.safe_dump(value, default_flow_style=True)}")


@pytest.mark.parametrize("name", ["billion laughs", "an alias of itself", "a hexadecimal number", "deep keys", "NUL"])
def test_the_command_line_shows_no_traceback(path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(HAND_MADE[name])
    assert main(["validate", "--config", str(path)]) == 2
    told = capfd.readouterr()
    assert told.err.startswith("error: ")
    assert "Traceback" not in told.err + told.out


@pytest.mark.parametrize("what", ["a named pipe", "a folder", "a device"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, what: str) -> None:
    path = tmp_path / "run.yaml"
    if what == "a named pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    assert what in str(read(path))
