"""What every test here is given: a card, and the tiny turbo.

It is loaded for the card as a loader node loads it, under inference mode.
"""

import sys
from pathlib import Path

import pytest

# not this folder itself: its conftest is not the one that others ask for
sys.path.extend(str(Path(__file__).parents[1] / place) for place in ("card/standin", "comfy", "workflows", "."))
import cards


@pytest.fixture(params=cards.KINDS)
def card(comfyui, request):
    with cards.opened(request.param) as one:
        yield one
        assert one.pins == 0, "a weight was borrowed and not given back"


@pytest.fixture
def tiny(card, output):
    """(MODEL, CLIP, VAE) of the bundled tiny turbo in fp32 on the card."""
    return cards.load_tiny()
