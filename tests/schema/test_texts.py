"""The texts of our pages: each that js/ says is in locales/en/main.json, and none is left there unsaid."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "js").glob("*.js")))
SAID = set(re.findall(r'(?:say|has)\((?:[^"`()]*\? *)?"([a-z]+\.[a-z_]+)"', SCRIPTS))
SAID |= set(re.findall(r'[?:] "([a-z]+\.[a-z_]+)"', SCRIPTS))  # one of two
BEGUN = set(re.findall(r"(?:say|has)\(`([a-z]+\.)\$\{", SCRIPTS)) | set(re.findall(r"[?:] `([a-z]+\.)\$\{", SCRIPTS))
PLACE = re.compile(r"\{(\w+)\}")


def flat(texts: dict, before: str = "") -> Iterator[tuple[str, str]]:
    for name, text in texts.items():
        yield from [(before + name, text)] if isinstance(text, str) else flat(text, f"{before}{name}.")


def texts(language: str) -> dict[str, str]:
    path = ROOT / "locales" / language / "main.json"
    return dict(flat(json.loads(path.read_text(encoding="utf-8"))["zturbo"]))


def test_what_is_said_is_written_and_what_is_written_is_said():
    english = texts("en")
    assert len(SAID) > 40 and {"panel.", "phase.", "asked.", "end.", "notices."} <= BEGUN
    assert sorted(SAID - english.keys()) == []
    assert [key for key in english if key not in SAID and not key.startswith(tuple(BEGUN))] == []


def test_no_text_stands_in_the_scripts():
    """But for names and signs: what people read can be translated."""
    shown = re.findall(r'(?:textContent|title|ariaLabel|alt) = "([^"]*[a-z]{3}[^"]*)"', SCRIPTS)
    assert shown == []


def test_every_language_has_every_text_with_the_same_places():
    english = texts("en")
    for folder in sorted((ROOT / "locales").iterdir()):
        found = texts(folder.name)
        assert found.keys() == english.keys(), folder.name
        for key, text in found.items():
            assert sorted(PLACE.findall(text)) == sorted(PLACE.findall(english[key])), (folder.name, key)
