"""Paths and shared parts. ComfyUI comes from COMFYUI_PATH; ZTURBO_REQUIRE=1 turns a missing part into a failure."""

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = os.environ.get("COMFYUI_PATH") or None
REQUIRE = os.environ.get("ZTURBO_REQUIRE") == "1"
PACK = "zimage_turbo_lora_pack"

sys.path += [str(ROOT), str(ROOT / "tests")]
if COMFYUI:
    sys.path.insert(0, COMFYUI)  # in front: the pack's nodes/ must not hide ComfyUI's nodes.py
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()


NEEDS_COMFYUI = "needs ComfyUI: run `python dev.py test --comfyui FOLDER`, or put one at ~/comfy/ComfyUI"


class WithoutComfyUI(pytest.Module):
    """Stands in for a module of tests/comfy or tests/card, which imports ComfyUI at its top."""

    def collect(self):
        pytest.skip(NEEDS_COMFYUI, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if not COMFYUI and module_path.parent.name in ("card", "comfy"):
        return WithoutComfyUI.from_parent(parent, path=module_path)


def missing(sentence: str):
    """Skip with a sentence that says how to get what is missing; where everything is required, fail with it."""
    (pytest.fail if REQUIRE else pytest.skip)(sentence)


@pytest.fixture(scope="session")
def comfyui() -> Iterator[Path]:
    """Where it is. Its tokenizer is read once: read anew for each test it takes most of many a test's time."""
    if not COMFYUI:
        missing(NEEDS_COMFYUI)
    from transformers import Qwen2Tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2Tokenizer, "from_pretrained", functools.cache(Qwen2Tokenizer.from_pretrained))
        yield Path(COMFYUI)


@pytest.fixture(scope="session")
def pack(comfyui):
    """The pack imported as ComfyUI imports it, as a package of another name."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def schemas(pack):
    """Schemas of the pack's nodes by id."""
    import asyncio

    import comfy_api.latest  # noqa: F401  registers io before the nodes ask for it
    from server import PromptServer

    loop = asyncio.new_event_loop()
    if getattr(PromptServer, "instance", None) is None:
        PromptServer(loop)
    extension = loop.run_until_complete(pack.comfy_entrypoint())
    nodes = loop.run_until_complete(extension.get_node_list())
    return {schema.node_id: schema for schema in (node.define_schema() for node in nodes)}


@pytest.fixture
def output(comfyui, tmp_path, monkeypatch):
    """ComfyUI's output folder, empty and for one test."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "output"


@pytest.fixture
def tiny(output):
    """(MODEL, CLIP, VAE) of the bundled tiny turbo, freshly loaded.

    It is done as a loader node does it, under inference mode.
    """
    import torch

    from zturbo.hosts import comfy_load, comfy_tiny

    with torch.inference_mode():
        return comfy_tiny.load_model(comfy_tiny.MODEL), comfy_tiny.load_clip(), comfy_load.load_vae(comfy_tiny.VAE)


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """A real ComfyUI with the pack, for the whole session."""
    import dev

    with dev.Server(comfyui, Path(sys.executable), tmp_path_factory.mktemp("comfyui"), "--disable-metadata") as running:
        running.object_info = running.get("/object_info")
        yield running


@pytest.fixture(scope="module")  # no longer: while it is there no other event loop can run
def browser():
    from ui.browser import chromium

    yield from chromium()


@pytest.fixture(params=[False, True], ids=["classic", "nodes2"])
def canvas(browser, server, request):
    """ComfyUI's page, empty, in both ways to draw nodes."""
    from ui.browser import Canvas

    made = Canvas(browser, server, request.param)
    yield made
    made.context.close()
