"""On Linux MLX gets a fast BLAS before it is imported, and where there is none, that is told with the remedy."""

import ctypes.util
import logging
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
