"""Every shipped workflow through a real server whose core works as on a card of either kind.

Of these tiny_demo three times in one session.
"""

import os
import sys
from pathlib import Path

import pytest
from cards import KINDS, REAL
from test_workflows import NAMES, run_small

import dev

LEARNT = {"tiny_demo": 3}  # how often it runs


@pytest.fixture(scope="module", params=KINDS)
def card_server(comfyui, request, tmp_path_factory):
    base = tmp_path_factory.mktemp(f"comfyui-{request.param}")
    dev.make_base(base)
    if not REAL:
        (base / "custom_nodes" / "card").symlink_to(Path(__file__).parent / "server", target_is_directory=True)
    more = ["--disable-dynamic-vram"] if REAL and request.param == "plain" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "ZTURBO_CARD_KIND", request.param)
        with dev.Server(comfyui, Path(sys.executable), base, "--disable-metadata", *more) as running:
            yield running
    if not REAL:
        assert f"as on a {request.param} card" in running.log.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(card_server, name):
    for number in range(LEARNT.get(name, 1)):
        assert run_small(card_server, name, seed=number)
