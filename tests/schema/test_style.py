"""ruff and mypy, as `pyproject.toml` sets them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "mypy"])
def test_it_has_nothing_to_say(command):
    pytest.importorskip(command.split()[0], reason="install requirements-dev.txt")
    said = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
