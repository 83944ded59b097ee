"""Latents and text features on the disk: found again, made again when damaged, shared by runs at once."""

import threading

import pytest
import torch

from zturbo.cache import Cache

VALUE = torch.randn(3, 4)


def never():
    raise AssertionError("it was made again")


def test_what_was_made_is_found_by_any_run_and_by_its_parts_only(tmp_path):
    first = Cache(tmp_path)
    assert torch.equal(first.get(("a", 1), lambda: VALUE), VALUE) and (first.found, first.made) == (0, 1)
    second = Cache(tmp_path)
    assert torch.equal(second.get(("a", 1), never), VALUE) and (second.found, second.made) == (1, 0)
    assert torch.equal(second.get(("a", 2), lambda: VALUE + 1), VALUE + 1)
    assert torch.equal(second.get(("a1",), lambda: VALUE + 2), VALUE + 2)
    assert "1 latents and texts found, 2 encoded" in second.report() and second.size() == sum(f.stat().st_size for f in tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "other"])
def test_a_damaged_entry_is_made_again(tmp_path, harm):
    Cache(tmp_path).get(("a",), lambda: VALUE)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes({"flip": bytes(content), "cut": bytes(content[:-9]), "empty": b"", "other": b"no safetensors at all"}[harm])
    cache = Cache(tmp_path)
    assert torch.equal(cache.get(("a",), lambda: VALUE), VALUE) and cache.made == 1
    assert torch.equal(Cache(tmp_path).get(("a",), never), VALUE)


def test_without_a_folder_or_without_room_everything_is_made(tmp_path, monkeypatch):
    assert torch.equal(Cache(None).get(("a",), lambda: VALUE), VALUE) and "No cache" in Cache(None).report()
    (tmp_path / "file").write_text("in the way")
    assert torch.equal(Cache(tmp_path / "file" / "cache").get(("a",), lambda: VALUE), VALUE)


def test_two_runs_at_once(tmp_path):
    wrong = []

    def run():
        for n in range(40):
            got = Cache(tmp_path).get((n,), lambda n=n: VALUE + n)
            if not torch.equal(got, VALUE + n):
                wrong.append(n)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(list(tmp_path.glob("*.safetensors"))) == 40 and not list(tmp_path.glob("*.part"))
