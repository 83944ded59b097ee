"""What ComfyUI's registry, pip and the Manager's scanner read of this folder."""

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_dependencies_are_requirements_txt():
    wanted = [
        line.strip()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert project()["project"]["dependencies"] == wanted


def test_registry_fields():
    facts = project()
    assert facts["project"]["name"] == "zimage-turbo-lora"
    assert facts["project"]["license"] == {"file": "LICENSE"} and "Apache License" in (ROOT / "LICENSE").read_text()
    assert facts["tool"]["comfy"]["DisplayName"] and "PublisherId" in facts["tool"]["comfy"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", facts["project"]["version"])
    assert f"## [{facts['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_importing_the_folder_needs_no_comfyui():
    spec = importlib.util.spec_from_file_location(
        "bare_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    spec.loader.exec_module(module)
    assert not {name for name in set(sys.modules) - before if name.startswith(("comfy", "torch"))}
    assert module.WEB_DIRECTORY == "./js" and not hasattr(module, "NODE_CLASS_MAPPINGS")


def test_node_classes_are_as_the_managers_scanner_wants_them():
    """A class with the direct base io.ComfyNode and a literal node_id of its own name."""
    found = []
    for path in (ROOT / "nodes").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for class_ in [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.ClassDef) and any(ast.unparse(base) == "io.ComfyNode" for base in n.bases)
        ]:
            ids = [k.value.value for k in ast.walk(class_) if isinstance(k, ast.keyword) and k.arg == "node_id"]
            assert ids == [class_.name]
            found += ids
    assert len(found) == 18


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    plain = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    return plain | {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level}


def test_only_the_hosts_know_comfyui_or_diffusers():
    for path in (ROOT / "zturbo").glob("*.py"):
        known = {name.split(".")[0] for name in imports(path)}
        assert not known & {"comfy", "comfy_api", "folder_paths", "server", "nodes", "diffusers", "transformers"}, (
            path.name
        )


def test_nodes_know_only_comfyuis_public_api_and_zturbo():
    for path in (ROOT / "nodes").glob("*.py"):
        known = {name.split(".")[0] for name in imports(path)}
        others = known - {"comfy_api", "folder_paths", "server", "aiohttp"}
        assert others <= sys.stdlib_module_names, path.name


def test_nothing_loads_pickles_or_runs_text():
    for room in ("zturbo", "nodes"):
        for path in (ROOT / room).rglob("*.py"):
            code = "\n".join(
                line.split("#")[0] for line in path.read_text(encoding="utf-8").splitlines() if '"""' not in line
            )
            assert not re.search(r"(?<!\.)\b(eval|exec)\(|\bpickle\b|torch\.load\(", code), path


def test_nothing_written_for_people_waits_for_its_words():
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "js" / "docs").rglob("*.md"),
        ROOT / "lab" / "README.md",
    ]
    assert len(pages) > 10
    for page in pages:
        text = page.read_text(encoding="utf-8")
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        assert not re.findall(r"\b(?:TODO|FIXME|XXX)\b|\{\{", text), page.name
        assert not re.findall(r"\b(?!CONTRIBUTING\b)[A-Z]{10,}\b", prose), page.name


def test_the_tiny_model_is_small():
    files = [path for path in (ROOT / "models" / "tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6


LEARNING = (
    *("trainer", "session", "phases", "objectives", "step", "hooks", "batches", "roles", "family", "state"),
    *("flow", "lowrank", "health", "turbo", "network", "dataset", "captions", "buckets", "checkpoint", "runfolder"),
)


@pytest.mark.parametrize("room", LEARNING)
def test_what_is_trained_knows_no_host(room):
    text = (ROOT / "zturbo" / f"{room}.py").read_text(encoding="utf-8").lower()
    assert "comfy" not in text and "diffusers" not in text


def test_only_hosts_import_them():
    """comfy in zturbo/hosts/comfy*, diffusers and transformers in zturbo/hosts/diffusers*."""
    for path in (ROOT / "zturbo").rglob("*.py"):
        for host, modules in (
            ("comfy", "comfy|folder_paths|server|latent_preview"),
            ("diffusers", "diffusers|transformers"),
        ):
            found = re.findall(
                rf"^ *(?:import|from) ((?:{modules})[\w.]*)", path.read_text(encoding="utf-8"), re.MULTILINE
            )
            assert not found or (path.parent.name == "hosts" and path.name.startswith(host)), (
                f"{path.name} imports {found}"
            )


def test_the_panel_has_a_word_for_each_phase():
    from zturbo.roles import PAUSED, PHASES

    texts = json.loads((ROOT / "locales" / "en" / "main.json").read_text(encoding="utf-8"))["zturbo"]
    assert set(texts["phase"]) == {*PHASES, PAUSED}
