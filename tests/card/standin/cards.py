"""The card of a test, and the tiny turbo loaded for it.

The card is this machine's own where ZTURBO_CARD=real, else one that a CPU stands in for.
"""

import os
from contextlib import contextmanager

import pytest

REAL = os.environ.get("ZTURBO_CARD") == "real"
KINDS = ("dynamic", "plain")


def opened(kind: str):
    """Context manager of a card of this kind."""
    import emulation

    return real_card(kind) if REAL else emulation.card(kind)


@contextmanager
def real_card(kind: str):
    """This machine's own card, with core's dynamic VRAM or without."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control
    import emulation
    import torch

    mm, one = comfy.model_management, emulation.Card(kind)
    one.fit = lambda share=1.0, eager=False: (
        share == 1.0 and not eager or pytest.skip("what fits on a real card is its driver's business")
    )
    before = comfy.model_patcher.CoreModelPatcher, comfy.memory_management.aimdo_enabled
    if kind == "dynamic":
        if not comfy_aimdo.control.init_devices((device.index, 0) for device in mm.get_all_torch_devices()):
            pytest.skip("comfy-aimdo does not know this card")
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    try:
        yield one
    finally:
        with torch.inference_mode():
            mm.unload_all_models()
        comfy.model_patcher.CoreModelPatcher, comfy.memory_management.aimdo_enabled = before


def load_tiny():
    import torch

    from zturbo.hosts import comfy_load, comfy_tiny

    with torch.inference_mode():
        return (
            comfy_tiny.load_model(comfy_tiny.MODEL, torch.float32),
            comfy_tiny.load_clip(),
            comfy_load.load_vae(comfy_tiny.VAE),
        )
