"""Damaged captions and metadata.jsonl. Kinds for `bench fuzz`."""

import codecs
import json
import posixpath
import random
from collections import Counter
from pathlib import PurePosixPath

from bench.fuzz_damage import STRINGS, damage, value
from bench.fuzz_pictures import TRIGGER, encoded, folder, must, trained
from bench.fuzz_watch import Damaged, Place
from zturbo.recipe import Data
from zturbo.words import is_text


def caption_files(rng: random.Random, place: Place) -> Damaged:
    """A caption that is no UTF-8, or UTF-8 that nobody expects."""
    text = rng.choice(
        (
            "a zvk cat, sitting",
            "Ein Kätzchen, müde",
            "猫, 座る",
            "x, " * 50,
            "\u2028a\u2029b",
            "[trigger] \x07",
            "a\x00b",
            *STRINGS,
        )
    )
    raw = text.encode("utf-8", "surrogatepass")
    what = rng.choice(
        (
            "as it is",
            "utf-16",
            "utf-16-le",
            "utf-32",
            "latin-1",
            "cp1252",
            "bom",
            "damage",
            "huge",
            "folder",
            "caption",
            "crlf",
        )
    )
    if what in ("utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"):
        raw = text.encode(what, "replace")
    elif what == "bom":
        raw = b"\xef\xbb\xbf" + raw
    elif what == "damage":
        more, raw = damage(raw, rng)
        what += " " + more
    elif what == "huge":
        raw = (raw or b"x, ") * (20_000_000 // max(3, len(raw)))
    elif what == "crlf":
        raw = raw + b"\r\nsecond line\r\n"
    folder(place, "a.png", encoded("PNG"), None)
    path = place.input / "set" / ("a.caption" if what == "caption" else "a.txt")
    path.mkdir() if what == "folder" else path.write_bytes(raw)
    options = Data(shuffle_tags=rng.random() < 0.3, keep_tags=rng.randrange(3))

    def feed():
        good = what in ("as it is", "bom", "caption", "crlf") and "\x00" not in text and is_text(text)
        caption = (must if good else trained)(place, options).items[0].caption
        if what.startswith("damage"):
            return
        wanted = ""
        if what != "folder":
            plain = readable(raw).replace("\r\n", "\n").replace("\r", "\n")
            wanted = plain.strip().replace("[trigger]", TRIGGER)
        assert caption in (wanted, f"{TRIGGER}, {wanted}", TRIGGER if not wanted else None), (
            f"{caption[:60]!r} instead of {wanted[:60]!r}"
        )

    return Damaged(f"{what}: {raw[:60]!r}", feed)


NAMES = (
    "a.png",
    "b.png",
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\a.png",
    "C:\\a.png",
    "\\\\server\\share\\a.png",
    "a.png\x00.txt",
    "x" * 5000,
    "",
    ".",
    "..",
    "set/../a.png",
    "../secret.txt",
    "\ud800.png",
    "CON",
    "a.png/",
)


def metadata_lines(rng: random.Random, place: Place) -> Damaged:
    """A metadata.jsonl with a line that is none."""
    row: dict = {"file_name": "a.png", "text": "a listed, thing", "caption_dropout": 0.5}
    what = rng.choice(
        (
            "file_name",
            "file_name",
            "text",
            "dropout",
            "value",
            "damage",
            "deep",
            "twice",
            "long",
            "digits",
            "separator",
            "encoding",
        )
    )
    line = None
    if what == "file_name":
        row["file_name"] = rng.choice(NAMES)
    elif what == "text":
        row[rng.choice(("text", "caption"))] = value(rng)
    elif what == "dropout":
        row["caption_dropout"] = value(rng)
    elif what == "value":
        row = value(rng)
    elif what == "deep":
        line = rng.choice(
            ('{"a":' * 100_000, "[" * 100_000, '{"file_name": "a.png", "text": ' + "[" * 3000 + "]" * 3000 + "}")
        )
    elif what == "twice":
        line = '{"file_name": "a.png", "file_name": 3, "text": "x"}'
    elif what == "long":
        row["text"] = "word, " * 2_000_000
    elif what == "digits":
        line = '{"file_name": "a.png", "text": "x", "caption_dropout": ' + "9" * 6000 + "}"
    elif what == "separator":
        line = json.dumps({"file_name": "a.png", "text": "a\u2028b\u0085c"}, ensure_ascii=False)
    line = json.dumps(row) if line is None else line
    raw = (json.dumps({"file_name": "b.png", "text": "another"}) + "\n" + line + "\n").encode()
    if what == "damage":
        more, raw = damage(raw, rng)
        what += " " + more
    elif what == "encoding":
        raw = raw.decode().encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")))
    for name in ("a.png", "b.png"):
        folder(place, name, encoded("PNG"), None)
    (place.input / "set" / "metadata.jsonl").write_bytes(raw)

    def feed():
        options = Data(shuffle_tags=rng.random() < 0.1)
        found = {item.name: item for item in trained(place, options).items}
        if what.startswith("damage"):
            return
        wanted = meant([json.loads(line) for line in readable(raw).split("\n") if line.strip()])
        for name in ("a.png", "b.png"):
            said = wanted.get(name, {})
            text = words_of(said)
            assert found[name].caption in (text, f"{TRIGGER}, {text}", TRIGGER), (
                f"{found[name].caption[:60]!r} instead of {text[:60]!r}"
            )
            assert (
                text in found[name].caption
                and found[name].dropout == number(said.get("caption_dropout"))
                and not isinstance(found[name].dropout, bool)
            )

    return Damaged(f"{what}: {raw[-100:]!r}", feed)


def readable(raw: bytes) -> str:
    """By its mark, else UTF-8, else Windows' old one."""
    for mark, encoding in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16")):
        if raw.startswith(mark):
            return raw.decode(encoding)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252")


def meant(rows: list[dict]) -> dict[str, dict]:
    """The row of each picture: that with its very name, the last; else the only one whose path ends in it."""
    ways = [(PurePosixPath(posixpath.normpath(row["file_name"].replace("\\", "/"))), row) for row in rows]
    exact = {str(way).lower(): row for way, row in ways if len(way.parts) == 1}
    ends = Counter(way.name.lower() for way, _ in ways if len(way.parts) > 1)
    return {way.name.lower(): row for way, row in ways if ends[way.name.lower()] == 1} | exact


def number(given) -> float | None:
    """A dropout, which may be written as a text."""
    return (float(given.replace(",", ".")) if given.strip() else None) if isinstance(given, str) else given


def words_of(row: dict) -> str:
    for key in ("text", "caption", "prompt", "tags"):
        value = row.get(key)
        text = ", ".join(value) if isinstance(value, list) and all(isinstance(word, str) for word in value) else value
        if isinstance(text, str) and text.strip():
            return text.strip()
    return ""


KINDS = [caption_files, metadata_lines]
