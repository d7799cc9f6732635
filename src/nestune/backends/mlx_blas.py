"""MLX's wheel for Linux brings the reference BLAS, some 20 times slower than the one this puts in its place."""

import ctypes
import logging
import sys
from functools import cache

LIBRARIES = ("libgfortran.so.5", "libopenblas.so.0")

log = logging.getLogger(__name__)


@cache
def load_fast_blas() -> None:
    """Load OpenBLAS into this process, so that MLX, imported next, takes its matrix products from there.

    Linux only: on Apple silicon MLX has its own. Where it is not installed, that is logged with the remedy.
    PyTorch, when it is imported later on, takes products from there too, with other rounding than its own.
    """
    if sys.platform != "linux":
        return
    try:
        for library in LIBRARIES:
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    except OSError as error:
        log.warning("MLX will compute slowly: %s. Install OpenBLAS, on Debian: apt-get install libopenblas0", error)
