"""What the page of a dataset's pictures asks of the real server: facts, small pictures, captions; what is refused."""

import io
import json
import shutil
import sys
import urllib.request
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from PIL import Image

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from test_routes import NAMES, ask

import dev

SMILEY = dev.ROOT / "models" / "tiny" / "smiley"


@pytest.fixture
def folder(server):
    place = server.base / "input" / "mine"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(SMILEY, place)
    yield place
    shutil.rmtree(place, ignore_errors=True)


def pictures(server, **query) -> tuple[int, dict]:
    asked = {"folder": "mine", "trigger": "zsmile", "resolution": 128, "more_resolutions": "", **query}
    return ask(server, "GET", f"/zturbo/pictures?{urlencode(asked)}")


def write(server, name: str, caption: str, was: str, folder: str = "mine", **headers) -> tuple[int, dict]:
    body = json.dumps({"folder": folder, "name": name, "caption": caption, "was": was}).encode()
    return ask(server, "POST", "/zturbo/caption", body, **headers)


def small(server, folder: str, name: str) -> bytes:
    query = urlencode({"folder": folder, "name": name})
    with urllib.request.urlopen(f"{server.address}/zturbo/picture?{query}", timeout=60) as answer:
        return answer.read()


def everything(server) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (server.base / "input").rglob("*") if path.is_file()}


def test_a_folder_is_told_as_the_node_will_train_it(server, folder):
    (folder / "smiley_03.txt").write_text("a plain caption")
    (folder / "smiley_04.txt").unlink()
    (folder / "broken.png").write_bytes(b"nothing")
    status, found = pictures(server, more_resolutions="64")
    assert status == 200 and found["total"] == found["wanted"] == 17 and found["writable"]
    by_name = {one["name"]: one for one in found["pictures"]}
    assert by_name["smiley_02.png"]["sizes"] == [[64, 80], [112, 144]]
    assert by_name["smiley_03.png"]["trained"] == "zsmile, a plain caption"
    assert {name: one["problems"] for name, one in by_name.items() if one["problems"]} == {
        "broken.png": ["broken"], "smiley_03.png": ["trigger"], "smiley_04.png": ["silent"],
    }  # fmt: skip
    assert found["counts"] == {"broken": 1, "small": 0, "cropped": 0, "alike": 0, "silent": 1, "trigger": 1}
    assert [one["name"] for one in pictures(server, only="silent")[1]["pictures"]] == ["smiley_04.png"]
    status, bundled = pictures(server, folder="bundled: smiley")
    assert status == 200 and bundled["total"] == 16 and not bundled["writable"]


def test_a_caption_is_written_and_trained_with(server, folder):
    status, answer = write(server, "smiley_01.png", "a [trigger] by hand ", "a large [trigger] on a white background")
    assert (status, answer) == (200, {"caption": "a [trigger] by hand"})
    assert (folder / "smiley_01.txt").read_text() == "a [trigger] by hand\n"
    assert pictures(server)[1]["pictures"][0]["trained"] == "a zsmile by hand"
    status, answer = write(server, "smiley_01.png", "late", "a large [trigger] on a white background")
    assert status == 409 and "was changed meanwhile: it is 'a [trigger] by hand' now" in answer["error"]
    assert answer["caption"] == "a [trigger] by hand"


def test_small_pictures_are_shown(server, folder):
    with Image.open(io.BytesIO(small(server, "mine", "smiley_02.png"))) as shown:
        assert shown.size == (112, 144) and shown.format == "JPEG"
    assert len(small(server, "bundled: smiley", "smiley_02.png")) > 500


def test_ways_out_of_the_folders_are_refused(server, folder):
    (server.base / "secret.txt").write_text("secret")
    before = everything(server)
    for name in NAMES:
        if isinstance(name, str) and name and name != "asked/..":  # which is the input folder itself
            assert pictures(server, folder=name)[0] == 400, name
        body = json.dumps({"folder": name, "name": "smiley_01.png", "caption": "x", "was": ""}).encode()
        assert ask(server, "POST", "/zturbo/caption", body)[0] == 400, name
    for place in ("../..", "/etc", str(server.base), "mine/../../.."):
        assert pictures(server, folder=place)[0] == 400, place
        assert ask(server, "GET", f"/zturbo/picture?folder={quote(place)}&name=secret.txt")[0] == 400
    for name in ("../secret.txt", "smiley_01.txt", "/etc/passwd", "", "../mine/smiley_01.png", "smiley_01.png/"):
        assert ask(server, "GET", f"/zturbo/picture?folder=mine&name={quote(name)}")[0] == 400, name
        assert write(server, name, "x", "")[0] == 400, name
    assert everything(server) == before


def test_what_is_none_is_refused(server, folder):
    before = everything(server)
    for query in ({"resolution": ""}, {"resolution": "many"}, {"more_resolutions": "8"}, {"resolution": "9" * 99}):
        assert pictures(server, **query)[0] == 400, query
    for body, expected in {
        b"": 400, b"[]": 400, b"\xff": 400, b"[" * 9000: 400, b'{"folder": "mine", "name": 7}': 400,
        b'{"caption": "' + b"x" * 200_000 + b'"}': 413, b"x" * 3_000_000: 413,
    }.items():  # fmt: skip
        assert ask(server, "POST", "/zturbo/caption", body)[0] == expected, body[:40]
    assert write(server, "smiley_01.png", "x" * 20_001, "")[0] == 400
    assert write(server, "smiley_01.png", "x", "", folder="bundled: smiley") == (
        403, {"error": "The bundled pictures stay as they are."},
    )  # fmt: skip
    assert write(server, "smiley_01.png", "x", "", Content_Type="text/plain")[0] == 415
    assert everything(server) == before


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "cross-site"}])
def test_another_site_is_refused(server, folder, headers):
    before = everything(server)
    for path in ("pictures?folder=mine&resolution=128", "picture?folder=mine&name=smiley_01.png"):
        assert ask(server, "GET", f"/zturbo/{path}", **headers)[0] == 403
    was = "a large [trigger] on a white background"
    assert write(server, "smiley_01.png", "x", was, **headers)[0] == 403
    assert everything(server) == before
