"""MLX's wheel for Linux brings the reference BLAS, some 20 times slower than the one this puts in its place."""

import ctypes
import logging
import os
import sys
from functools import cache
from pathlib import Path

LIBRARIES = ("libgfortran.so.5", "libopenblas.so.0")
CORE = "OPENBLAS_CORETYPE"
CPUINFO = Path("/proc/cpuinfo")

log = logging.getLogger(__name__)


@cache
def load_fast_blas() -> None:
    """Load OpenBLAS into this process, so that MLX, imported next, takes its matrix products from there.

    Linux only: on Apple silicon MLX has its own. Where it is not installed, that is logged with the remedy.
    PyTorch, when it is imported later on, takes products from there too, with other rounding than its own.

    Where the processor has AVX-512, OpenBLAS is told to use its kernels for AVX2, unless the environment says
    otherwise: those for AVX-512 round the same product in different ways (seen with 0.3.21), so that training with all
    tiers due would not have the bits of an ordinary loop.
    """
    if sys.platform != "linux":
        return
    steadied = CORE not in os.environ and _has_avx512()
    if steadied:
        os.environ[CORE] = "Haswell"
    try:
        for library in LIBRARIES:
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    except OSError as error:
        log.warning("MLX will compute slowly: %s. Install OpenBLAS, on Debian: apt-get install libopenblas0", error)
    finally:
        if steadied:
            # It has been read; what this process starts decides for itself.
            del os.environ[CORE]


def _has_avx512() -> bool:
    try:
        return "avx512f" in CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return False
