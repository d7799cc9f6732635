"""To be imported before MLX: skips a module of tests where MLX is not installed, and gives MLX a fast BLAS.

PyTorch comes first, so that it keeps its own: see `nestune.backends.mlx_blas`.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("mlx")

from nestune.backends.mlx_blas import load_fast_blas

load_fast_blas()
