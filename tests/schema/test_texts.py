"""The texts of nodes and pages in all languages: none is missing, and none falls behind the English one.

Each that js/ says is in locales/en/main.json, and none is left there unsaid. locales/translated.json says, by a short
hash, from which English text each translation was made. Where the English one changes, translate anew, then run with
ZTURBO_WRITE_LOCALES=1.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ROOT / "locales"
TRANSLATED = LOCALES / "translated.json"
LANGUAGES = ("de", "es", "fr", "ja", "ko", "zh")
SCRIPTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "js").glob("*.js")))
SAID = set(re.findall(r'(?:say|has)\((?:[^"`()]*\? *)?"([a-z]+\.[a-z_]+)"', SCRIPTS))
SAID |= set(re.findall(r'[?:] "([a-z]+\.[a-z_]+)"', SCRIPTS))  # one of two
BEGUN = set(re.findall(r"(?:say|has)\(`([a-z]+\.)\$\{", SCRIPTS)) | set(re.findall(r"[?:] `([a-z]+\.)\$\{", SCRIPTS))
PLACE = re.compile(r"\{(\w+)\}")


def flat(texts: dict, before: str = "") -> Iterator[tuple[str, str]]:
    for name, text in texts.items():
        yield from [(before + name, text)] if isinstance(text, str) else flat(text, f"{before}{name}.")


def texts(language: str) -> dict[str, str]:
    path = LOCALES / language / "main.json"
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


def node_texts(language: str) -> dict[str, str]:
    return dict(flat(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))))


def english() -> dict[str, str]:
    return {f"main.{key}": text for key, text in texts("en").items()} | node_texts("en")


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def test_the_languages_are_these():
    assert sorted(path.name for path in LOCALES.iterdir() if path.is_dir()) == sorted(("en", *LANGUAGES))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_there_with_the_same_places_and_numbers(language):
    found = {f"main.{key}": text for key, text in texts(language).items()} | node_texts(language)
    wanted = english()
    assert found.keys() == wanted.keys()
    for key, text in found.items():
        assert text.strip() and sorted(PLACE.findall(text)) == sorted(PLACE.findall(wanted[key])), key
        if not key.startswith("main."):
            # digits as they stand: 0.4 GB, 1024, +1
            assert set(re.findall(r"\d+(?:\.\d+)?", wanted[key])) <= set(re.findall(r"\d+(?:\.\d+)?", text)), key


@pytest.mark.parametrize("language", LANGUAGES)
def test_tooltips_and_descriptions_are_translated(language):
    found, wanted = node_texts(language), node_texts("en")
    assert [key for key in found if key.endswith((".tooltip", ".description")) and found[key] == wanted[key]] == []


def test_no_translation_is_of_an_older_text():
    now = {key: short(text) for key, text in english().items()}
    if os.environ.get("ZTURBO_WRITE_LOCALES"):
        TRANSLATED.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    assert json.loads(TRANSLATED.read_text(encoding="utf-8")) == now
