"""Which backend a configuration gets, on a machine where both are installed."""

import json
import shutil
from pathlib import Path

import pytest
from tests.contract.conftest import BASE, configuration

from nestune.backends.factory import choose_backend
from nestune.errors import ConfigError

pytest.importorskip("mlx")
pytest.importorskip("torch")


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A base that says of itself that MLX quantized it."""
    folder = shutil.copytree(BASE, tmp_path / "base")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization": {"group_size": 32, "bits": 4}}))
    return folder


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_what_is_asked_for_is_taken(name: str) -> None:
    assert str(choose_backend(configuration(name))) == f"{name} (as configured)"


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("Darwin", "arm64", "mlx (auto: Apple silicon)"),
        ("Darwin", "x86_64", "torch (auto: no Apple silicon)"),
        ("Linux", "aarch64", "torch (auto: no Apple silicon)"),
    ],
)
def test_auto_takes_mlx_on_apple_silicon_only(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, expected: str
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert str(choose_backend(configuration("auto"))) == expected


def test_auto_takes_the_only_backend_that_reads_the_base(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert str(choose_backend(configuration("auto", base=quantized))) == "mlx (auto: the base is quantized by MLX)"


@pytest.mark.parametrize(
    ("asked", "absent", "told"),
    [
        ("mlx", {"mlx_lm"}, r"the mlx backend needs mlx_lm; install it with: pip install 'nestune\[mlx\]'"),
        ("torch", {"torch", "peft"}, r"the torch backend needs torch and peft; .*nestune\[cuda\]"),
        ("auto", {"torch", "mlx"}, r"no backend is installed; .*nestune\[cuda\].*nestune\[mlx\]"),
    ],
)
def test_packages_that_are_not_installed_are_told_with_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch, asked: str, absent: set[str], told: str
) -> None:
    monkeypatch.setattr("nestune.backends.factory.find_spec", lambda package: None if package in absent else package)
    with pytest.raises(ConfigError, match=told):
        choose_backend(configuration(asked))


@pytest.mark.parametrize(("absent", "expected"), [("torch", "mlx (auto: PyTorch"), ("mlx", "torch (auto: no Apple")])
def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch, absent: str, expected: str) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("nestune.backends.factory.find_spec", lambda package: None if package == absent else package)
    assert str(choose_backend(configuration("auto"))).startswith(expected)
