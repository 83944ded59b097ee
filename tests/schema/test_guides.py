"""What the guides in docs/ name is there: inputs of nodes, workflows, settings of the command line, pages."""

import argparse
import json
import re
from pathlib import Path

import pytest

from zturbo import cli, recipefile

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted(
    ROOT / "docs" / f"{name}.md"
    for name in ("recipes", "steps-and-rank", "memory", "when-turbo-breaks", "own-adapter", "moving")
)
NODES = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
INPUTS = {node["display_name"]: set(node["inputs"]) for node in NODES.values()}


def rows(page: Path) -> list[list[str]]:
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_links_lead_somewhere_and_pages_are_short(page):
    text = page.read_text(encoding="utf-8")
    assert 40 <= len(text.splitlines()) <= 120
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_workflows_that_are_named_are_there(page):
    words = re.findall(r"\*\*([a-z_0-9]+_[a-z_0-9]+)\*\*", page.read_text(encoding="utf-8"))
    assert all((ROOT / "workflows" / f"{word}.json").is_file() or word in every_input() for word in words), words


def every_input() -> set[str]:
    return set().union(*INPUTS.values())


@pytest.mark.parametrize("name", ["recipes", "own-adapter"])
def test_a_row_of_a_node_names_an_input_of_it(name):
    found = 0
    titles = {title.replace(" (Turbo)", ""): names for title, names in INPUTS.items()}
    for node, setting, *_ in (row for row in rows(ROOT / "docs" / f"{name}.md") if len(row) > 2):
        if node in titles:
            for one in re.findall(r"`([^`]+)`", setting):
                found += 1
                assert one in titles[node], (node, one)
    assert found >= 7


@pytest.mark.parametrize("name", ["recipes", "steps-and-rank", "memory", "when-turbo-breaks", "own-adapter"])
def test_every_name_like_a_setting_is_an_input(name):
    text = re.sub(r"```.*?```", "", (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    for word in re.findall(r"`([a-z]+(?:_[a-z]+)*)`", text):
        assert word in every_input() | {"plan"}, word


def test_names_on_our_side_of_the_tables_for_others_are_inputs():
    for row in rows(ROOT / "docs" / "moving.md"):
        if len(row) == 3 and row[0].startswith("`"):
            for word in re.findall(r"`([a-z_]+)`", row[1]):
                assert word in every_input(), row


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_commands_are_understood(page):
    """By their parser; their settings by the recipe."""
    for line in re.findall(r"python -m zturbo [^`\n]+", page.read_text(encoding="utf-8")):
        words = line.split()[3:]
        assert parsed(words).json is False, line
        recipefile.with_settings("", [words[at + 1] for at, word in enumerate(words) if word == "--set"])


def parsed(words: list[str]) -> argparse.Namespace:
    """What the command line makes of it, with nothing run."""
    kept = []
    real = argparse.ArgumentParser.parse_args

    def parse(self, arguments):
        kept.append(real(self, arguments))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(KeyboardInterrupt):
            cli.main(words)
    return kept[0]
