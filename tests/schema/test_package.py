"""What ComfyUI's registry, pip and the Manager's scanner read of this folder."""

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path

import pathspec
import pytest
import tomllib
from conftest import COMFYUI
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = {  # at the top of what the registry gives out
    *(
        "__init__.py",
        "nodes",
        "zturbo",
        "js",
        "locales",
        "models",
        "workflows",
        "subgraphs",
        "docs",
        "requirements.txt",
    ),
    *("pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_dependencies_are_requirements_txt():
    wanted = [
        line.strip()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert project()["project"]["dependencies"] == wanted


def test_dependencies_can_change_nothing_that_comfyui_has():
    """Packages that it requires itself, with no other bound than its own."""
    wanted = project()["project"]["dependencies"]
    assert all(re.fullmatch(r"[a-z]+(>=[\d.]+)?", one) for one in wanted)
    if COMFYUI:
        its = (Path(COMFYUI) / "requirements.txt").read_text(encoding="utf-8").lower().split()
        assert set(wanted) <= set(its)


def test_registry_fields():
    facts = project()
    assert facts["project"]["name"] == "zimage-turbo-lora"
    assert facts["project"]["license"] == {"file": "LICENSE"} and "Apache License" in (ROOT / "LICENSE").read_text()
    assert facts["tool"]["comfy"]["DisplayName"] and "PublisherId" in facts["tool"]["comfy"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", facts["project"]["version"])
    assert f"## [{facts['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_icon_and_banner_are_where_the_registry_looks_and_of_its_sizes():
    facts = project()
    for field, size in (("Icon", (400, 400)), ("Banner", (21 * 80, 9 * 80))):
        below = f"{facts['project']['urls']['Repository']}/raw/main/"
        assert facts["tool"]["comfy"][field].startswith(below)
        with Image.open(ROOT / facts["tool"]["comfy"][field].removeprefix(below)) as image:
            assert image.format == "PNG" and image.size == size


def ignored(name: str) -> pathspec.GitIgnoreSpec:
    return pathspec.GitIgnoreSpec.from_lines((ROOT / name).read_text(encoding="utf-8").splitlines())


def test_an_installed_pack_holds_what_it_needs_and_no_more():
    """What is new at the top of the folder is given out or listed in .comfyignore: say here which."""
    here = {path.name: f"{path.name}/" if path.is_dir() else path.name for path in ROOT.iterdir()}
    tracked = {name for name, path in here.items() if not ignored(".gitignore").match_file(path)}
    left_out = ignored(".comfyignore")
    assert {name for name in tracked if not left_out.match_file(here[name])} == INSTALLED
    within = [path.relative_to(ROOT).as_posix() for name in INSTALLED for path in (ROOT / name).rglob("*.*")]
    assert {path for path in within if left_out.match_file(path) and not path.startswith("docs/results/")} == set()


def test_what_is_installed_imports_nothing_that_is_not():
    for path in [ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"), *(ROOT / "zturbo").rglob("*.py")]:
        assert not {name.split(".")[0] for name in imports(path)} & {"dev", "lab", "bench", "tests", "prompts"}, path


def test_the_oldest_comfyui_is_the_same_wherever_it_is_said():
    import dev

    oldest = re.fullmatch(r">=((\d+)\.(\d+))\.0", project()["tool"]["comfy"]["requires-comfyui"])
    for page in ("README.md", "CONTRIBUTING.md"):
        said = re.findall(r"ComfyUI (\d+\.\d+) or newer", (ROOT / page).read_text(encoding="utf-8"))
        assert said == [oldest[1]], page
    tested = [int(part) for part in dev.COMFYUI_TAG.lstrip("v").split(".")]
    assert tested >= [int(oldest[2]), int(oldest[3]), 0]


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
    """A class with the direct base io.ComfyNode and a literal node_id of its own name; each has its help page."""
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
    assert len(found) == 18 and sorted(found) == sorted(page.stem for page in (ROOT / "js" / "docs").glob("*.md"))


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
