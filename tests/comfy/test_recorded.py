"""What is learnt, logged, shown and saved, to the bit as it was recorded.

There are many recipes on both hosts, in processes of their own.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
import recorded

HERE = Path(__file__).parent
HOSTS = ("comfy", "diffusers")


def before(host: str) -> dict:
    return json.loads((HERE / f"recorded_{host}.json").read_text(encoding="utf-8"))


@cache
def now(host: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(HERE / "recorded.py"), host],
        env=recorded.plain(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", recorded.recipes())
@pytest.mark.parametrize("host", HOSTS)
def test_a_recipe_gives_the_bits_that_were_recorded(host, name):
    on = before(host)["on"]
    if now(host)["on"] != on and not os.environ.get("ZTURBO_REQUIRE"):
        pytest.skip(f"was recorded on {on}: run it there, or record main anew with tests/comfy/recorded.py")
    assert now(host)[name] == before(host)[name]


def test_every_kind_of_run_is_recorded():
    assert all(set(before(host)) == {"on", *recorded.recipes()} for host in HOSTS)
