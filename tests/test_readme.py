"""README shows what was run: each Python block prints the text block behind it."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\n\n```(?:text|python)\n(.*?)```", README, re.DOTALL)


def printed(code, folder):
    """What a block prints as a program of its own, named `example.py`."""
    path = folder / "example.py"
    path.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_blocks():
    assert len(BLOCKS) == 8


@pytest.mark.parametrize("index", [*range(5), 7])
def test_block_prints_what_readme_shows(index, tmp_path):
    code, shown = BLOCKS[index]
    # Later JAX has an equation of its own for what tanh's derivative takes; README shows the newest JAX.
    if "one_minus_square" in shown and not hasattr(jax.lax, "one_minus_square"):
        code, shown = code.partition("gm = jhop.backward_graph")[0], shown.partition("\n")[0] + "\n"
    text = printed(code, tmp_path).replace("device(type='cuda', index=0)", "device(type='cpu')")  # README's is a CPU
    text = text.replace(f"{tmp_path}/", "")
    assert re.sub(r"[ ]+\n", "\n", text).strip() == shown.strip()
