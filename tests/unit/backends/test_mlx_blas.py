"""On Linux MLX gets a fast BLAS before it is imported, and where there is none, that is told with the remedy."""

import ctypes.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nestune.backends import mlx_blas

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="MLX has a BLAS of its own elsewhere")
NOWHERE = ("libnestune_nowhere.so",)


@on_linux
@pytest.mark.skipif(ctypes.util.find_library("openblas") is None, reason="OpenBLAS is not installed")
def test_openblas_is_in_the_process_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    mlx_blas.load_fast_blas.cache_clear()
    mlx_blas.load_fast_blas()
    assert "libopenblas" in Path("/proc/self/maps").read_text()
    assert caplog.messages == []


@on_linux
def test_where_it_is_missing_that_is_told_once_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlx_blas, "LIBRARIES", NOWHERE)
    mlx_blas.load_fast_blas.cache_clear()
    with caplog.at_level(logging.WARNING):
        mlx_blas.load_fast_blas()
        mlx_blas.load_fast_blas()
    mlx_blas.load_fast_blas.cache_clear()
    (told,) = caplog.messages
    assert "libnestune_nowhere.so" in told
    assert "apt-get install libopenblas0" in told


def test_on_apple_silicon_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(mlx_blas, "LIBRARIES", NOWHERE)
    monkeypatch.setattr(sys, "platform", "darwin")
    mlx_blas.load_fast_blas.cache_clear()
    mlx_blas.load_fast_blas()
    mlx_blas.load_fast_blas.cache_clear()
    assert caplog.messages == []


@on_linux
@pytest.mark.skipif(ctypes.util.find_library("openblas") is None, reason="OpenBLAS is not installed")
def test_on_avx512_the_kernels_for_avx2_are_taken_and_the_environment_stays(tmp_path: Path) -> None:
    """OpenBLAS itself says which kernels it took, in a process of its own."""
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512f\n")
    code = (
        "import ctypes, os, pathlib, sys\n"
        "from nestune.backends import mlx_blas\n"
        "mlx_blas.CPUINFO = pathlib.Path(sys.argv[1])\n"
        "mlx_blas.load_fast_blas()\n"
        "assert 'OPENBLAS_CORETYPE' not in os.environ\n"
        "name = ctypes.CDLL(mlx_blas.LIBRARIES[-1]).openblas_get_corename\n"
        "name.restype = ctypes.c_char_p\n"
        "print(name().decode())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    command = [sys.executable, "-c", code, str(tmp_path / "cpuinfo")]
    took = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert took == "Haswell"
