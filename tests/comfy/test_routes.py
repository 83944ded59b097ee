"""What panel and runs tab ask of the real server: wishes to a run, the list of runs, and what is refused."""

import http.client
import json
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import prompts
from safetensors.torch import load_file
from test_server import events, wait_for_step

import dev

GETS = ("run?folder=asked", "run?name=asked", "runs", "recipe?folder=asked", "workflow?folder=asked")
POSTS = ("stop", "save", "pause", "go_on", "cancel", "delete", "take")


def ask(server, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict]:
    """(status, what the server answers)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    if method == "POST":
        headers.setdefault("Content_Type", "application/json")
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read()
    try:
        return answer.status, json.loads(text)
    except ValueError:
        return answer.status, {"error": text.decode(errors="replace")}


def post(server, wish: str, run: str, **more: str) -> tuple[int, dict]:
    return ask(server, "POST", f"/zturbo/{wish}", json.dumps({"run": run, **more}).encode())


@pytest.fixture(scope="module")
def run(server) -> Path:
    """A run that has ended, with previews."""
    prompt = prompts.training(name="asked", steps=4, preview_every=2)
    body = {"prompt": prompt, "client_id": server.client, "extra_data": {"extra_pnginfo": {"workflow": {"nodes": []}}}}
    entry = server.wait(server.post("/prompt", body)["prompt_id"])
    assert dev.error_message(entry) is None
    return server.base / "output" / "zturbo" / "asked"


def everything(server) -> dict[str, bytes]:
    """All files in output and in models/loras."""
    places = (server.base / "output", server.base / "models" / "loras")
    return {str(path): path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()}


def test_a_run_is_told_whole(server, run):
    status, facts = ask(server, "GET", "/zturbo/run?folder=asked")
    assert status == 200 and facts["run"] == "asked" and facts["how"] == "finished" and not facts["paused"]
    assert [step["step"] for step in facts["steps"]] == [1, 2, 3, 4]
    assert all({"loss", "lr", "seconds", "memory"} <= step.keys() for step in facts["steps"])
    assert [preview["step"] for preview in facts["previews"]] == [2, 4]
    assert all((run / "previews" / file).is_file() for preview in facts["previews"] for file in preview["files"])


def test_the_list_has_every_run_and_what_can_be_done_with_it(server, run):
    status, found = ask(server, "GET", "/zturbo/runs")
    facts = next(one for one in found["runs"] if one["run"] == "asked")
    assert status == 200 and facts["how"] == "finished" and (facts["step"], facts["total"]) == (4, 4)
    assert facts["saved"] == 4 and facts["checkpoints"] == [4] and facts["workflow"]
    assert facts["preview"].startswith("step_000004") and facts["loss"] > 0
    assert ".cache" not in [one["run"] for one in found["runs"]]
    assert "steps = 4" in ask(server, "GET", "/zturbo/recipe?folder=asked")[1]["recipe"]
    assert ask(server, "GET", "/zturbo/workflow?folder=asked") == (200, {"nodes": []})


def test_its_lora_is_copied_beside_what_is_there(server, run):
    files = [post(server, "take", "asked")[1]["file"] for _ in range(2)]
    assert files == ["asked.safetensors", "asked_2.safetensors"]
    for file in files:
        path = server.base / "models" / "loras" / file
        assert load_file(path).keys() == load_file(run / "lora.safetensors").keys()
        path.unlink()
    assert post(server, "take", "asked", lora="../secret") == (400, {"error": "The run asked has no ../secret LoRA."})


@pytest.mark.parametrize("path", [*(("GET", path) for path in GETS), *(("POST", path) for path in POSTS)])
@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "same-site"}])
def test_another_site_is_refused(server, run, path, headers):
    before = everything(server)
    status, answer = ask(server, path[0], f"/zturbo/{path[1]}", b'{"run": "asked"}', **headers)
    assert status == 403 and everything(server) == before
    if "Sec_Fetch_Site" in headers:
        assert answer["error"] == "Another site cannot ask for this."
        assert f"/zturbo/{path[1].split('?')[0]} from 127.0.0.1 was refused" in server.log.read_text(errors="replace")


NAMES = (
    "",
    "..",
    "../asked",
    "asked/..",
    "/etc",
    "C:\\",
    "asked\0",
    "nobody",
    ".cache",
    "a" * 300,
    None,
    7,
    ["asked"],
    {},
)


@pytest.mark.parametrize("wish", POSTS)
def test_a_name_that_is_no_runs_is_refused(server, run, wish):
    before = everything(server)
    for name in NAMES:
        status, answer = ask(server, "POST", f"/zturbo/{wish}", json.dumps({"run": name}).encode())
        assert status == 404 and "There is no run named" in answer["error"], name
    for name in filter(lambda name: isinstance(name, str), NAMES):
        for path in ("run", "recipe", "workflow"):
            assert ask(server, "GET", f"/zturbo/{path}?folder={quote(name)}")[0] == 404, name
    assert everything(server) == before


BODIES = {
    b"": 400,
    b"{": 400,
    b"[]": 400,
    b'"asked"': 400,
    b"\xff\xfe": 400,
    b"[" * 3000: 400,
    b'{"run": "asked", "more": "' + b"x" * 5000 + b'"}': 413,
    b"x" * 3_000_000: 413,
}


@pytest.mark.parametrize("wish", POSTS)
def test_a_body_that_is_none_is_refused(server, run, wish):
    before = everything(server)
    for body, expected in BODIES.items():
        status, answer = ask(server, "POST", f"/zturbo/{wish}", body)
        assert status == expected and answer["error"].startswith("The body is "), body[:40]
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask(server, "POST", f"/zturbo/{wish}", b'{"run": "asked"}', Content_Type=kind)[0] == 415
    assert ask(server, "GET", f"/zturbo/{wish}")[0] in (404, 405)
    assert everything(server) == before


def test_a_run_is_paused_goes_on_and_is_cancelled(server):
    """What is learnt is what an undisturbed run learns."""
    prompt_id = server.queue(prompts.training(name="paused", steps=60, preview_prompts=""))
    run = wait_for_step(server, "paused", 2)
    assert post(server, "pause", "paused")[0] == 200
    deadline = time.monotonic() + 20
    count, since = -1, time.monotonic()
    while time.monotonic() - since < 1.5 and time.monotonic() < deadline:  # nothing new for a while
        if len(events(run)) != count:
            count, since = len(events(run)), time.monotonic()
        time.sleep(0.05)
    assert time.monotonic() < deadline and count < 60
    assert ask(server, "GET", "/zturbo/run?folder=paused")[1]["paused"]
    assert post(server, "delete", "paused") == (
        400,
        {"error": "The run paused is being trained right now. Stop or cancel it first."},
    )
    assert (
        next(one for one in ask(server, "GET", "/zturbo/runs")[1]["runs"] if one["run"] == "paused")["how"] == "running"
    )
    assert post(server, "go_on", "paused")[0] == 200
    wait_for_step(server, "paused", count + 2)
    assert post(server, "cancel", "paused")[0] == 200
    server.wait(prompt_id)
    assert events(run)[-1]["how"] == "cancelled" and (run / "lora.safetensors").is_file()
    learnt = [event["loss"] for event in events(run) if "loss" in event]
    server.run(prompts.training(name="paused", steps=60, preview_prompts=""))
    assert [event["loss"] for event in events(run) if "loss" in event][: len(learnt)] == learnt
    assert events(run)[-1]["how"] == "finished" and not (run / "cancel").exists()


def test_a_run_is_deleted_whole(server):
    server.run(prompts.training(name="gone", steps=2, preview_prompts=""))
    run = server.base / "output" / "zturbo" / "gone"
    before = everything(server)
    assert post(server, "delete", "gone") == (200, {"run": "gone"})
    left = everything(server)
    assert not run.exists() and left == {name: value for name, value in before.items() if not name.startswith(str(run))}


def test_a_folder_that_is_no_run_is_not_deleted(server, run):
    place = server.base / "output" / "zturbo" / "pictures"
    place.mkdir()
    (place / "mine.png").write_bytes(b"a picture")
    assert post(server, "delete", "pictures")[0] == 400
    assert (place / "mine.png").read_bytes() == b"a picture"
    assert "pictures" not in [one["run"] for one in ask(server, "GET", "/zturbo/runs")[1]["runs"]]


def test_a_page_of_another_machine_is_refused_by_its_origin(server, run):
    """Where ComfyUI itself lets it pass: on a name of the local network."""
    headers = {"Host": "studio.lan:8188", "Origin": "http://evil.example"}
    status, answer = ask(server, "POST", "/zturbo/delete", b'{"run": "asked"}', **headers)
    assert status == 403 and answer["error"] == "Another site cannot ask for this." and run.is_dir()
    headers["Origin"] = "http://studio.lan:8188"
    assert ask(server, "GET", "/zturbo/runs", **headers)[0] == 200


def test_a_run_that_is_a_link_is_not_deleted(server, run, tmp_path):
    place = server.base / "output" / "zturbo" / "elsewhere"
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "kept.txt").write_text("kept")
    place.symlink_to(tmp_path / "real")
    try:
        status, answer = post(server, "delete", "elsewhere")
        assert status == 400 and "is no run's own folder" in answer["error"]
        assert (tmp_path / "real" / "kept.txt").read_text() == "kept"
    finally:
        place.unlink()
