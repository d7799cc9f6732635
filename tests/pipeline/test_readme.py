"""The README's Python runs as it stands there, and prints what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    ("about", "printed"),
    [("nestune.tiered_optimizer", "[20, 10, 5]"), ("nestune.cms", "{'fast': 50, 'medium': 6, 'slow': 3}")],
)
def test_the_example_prints_what_the_readme_says(about: str, printed: str, tmp_path: Path) -> None:
    (example,) = (block for block in BLOCKS if about in block)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == printed
