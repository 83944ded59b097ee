"""Latents and text features on the disk: found again, made again when damaged, shared by runs at once."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from zturbo import cache
from zturbo.cache import Cache
from zturbo.cache import key as cache_key
from zturbo.errors import CacheError

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
    assert "1 latents and texts found, 2 encoded" in second.report() and second.size() == sum(
        f.stat().st_size for f in tmp_path.iterdir()
    )


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "other"])
def test_a_damaged_entry_is_made_again(tmp_path, harm):
    Cache(tmp_path).get(("a",), lambda: VALUE)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(
        {"flip": bytes(content), "cut": bytes(content[:-9]), "empty": b"", "other": b"no safetensors at all"}[harm]
    )
    second = Cache(tmp_path)
    assert torch.equal(second.get(("a",), lambda: VALUE), VALUE) and second.made == 1
    assert torch.equal(Cache(tmp_path).get(("a",), never), VALUE)


def test_without_a_folder_or_without_room_everything_is_made(tmp_path, monkeypatch):
    assert torch.equal(Cache(None).get(("a",), lambda: VALUE), VALUE) and "No cache" in Cache(None).report()
    (tmp_path / "file").write_text("in the way")
    assert torch.equal(Cache(tmp_path / "file" / "cache").get(("a",), lambda: VALUE), VALUE)


def test_many_runs_at_once(tmp_path):
    def run(_):
        return all(torch.equal(Cache(tmp_path).get((n,), lambda n=n: VALUE + n), VALUE + n) for n in range(40))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(8)))
    assert len(list(tmp_path.glob("*.safetensors"))) == 40 and not list(tmp_path.glob("*.part"))


def test_what_nobody_used_for_long_goes(tmp_path):
    for n in range(3):
        Cache(tmp_path).get((n,), lambda: VALUE)
    (tmp_path / "x.1.part").write_bytes(b"half")
    for path, days in zip(sorted(tmp_path.glob("*.safetensors")), (61, 59, 61)):
        os.utime(path, (time.time() - days * 86400,) * 2)
    os.utime(tmp_path / "x.1.part", (0, 0))
    first = next(
        n for n in range(3) if (tmp_path / f"{cache_key((n,))}.safetensors").stat().st_mtime < time.time() - 60 * 86400
    )
    Cache(tmp_path).get((first,), never)  # used today
    Cache(tmp_path).tidy()
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_needed_later_is_made_once_and_read_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "AT_ONCE", 2)
    first = Cache(tmp_path)
    names = [first.need((n,), lambda n=n: VALUE + n) for n in range(5)]
    second, reads = Cache(tmp_path), []
    monkeypatch.setattr(cache, "read", lambda path, read=cache.read: reads.append(path.stem) or read(path))
    assert [second.need((n,), never) for n in range(5)] == names and (second.found, second.made) == (5, 0)
    assert reads == names[:2]
    assert all(torch.equal(second.read(name), VALUE + n) for n, name in enumerate(names)) and reads == names
    assert second.size_of(names[4]) >= VALUE.nbytes


def test_of_many_entries_only_so_many_bytes_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "ROOM", 2 * VALUE.nbytes)
    made = Cache(tmp_path)
    names = [made.need((n,), lambda n=n: VALUE + n) for n in range(5)]
    assert len(made.held) == 2 and all(torch.equal(made.read(name), VALUE + n) for n, name in enumerate(names))
    nowhere = Cache(None)  # what is on no disk stays
    names = [nowhere.need((n,), lambda n=n: VALUE + n) for n in range(5)]
    assert all(torch.equal(nowhere.read(name), VALUE + n) for n, name in enumerate(names))


@pytest.mark.parametrize("harm", [lambda file: file.write_bytes(b"no safetensors"), lambda file: file.unlink()])
def test_an_entry_that_is_harmed_while_it_is_used_is_said_and_made_anew_by_the_next_run(tmp_path, monkeypatch, harm):
    Cache(tmp_path).get(("a",), lambda: VALUE)
    monkeypatch.setattr(cache, "AT_ONCE", 0)
    second = Cache(tmp_path)
    name = second.need(("a",), never)
    harm(tmp_path / f"{name}.safetensors")
    with pytest.raises(CacheError, match="Queue again"):
        second.read(name)
    third = Cache(tmp_path)
    assert torch.equal(third.read(third.need(("a",), lambda: VALUE)), VALUE) and third.made == 1


def test_an_entry_that_is_needed_and_old_is_not_tidied_away(tmp_path, monkeypatch):
    Cache(tmp_path).get(("a",), lambda: VALUE)
    (file,) = tmp_path.iterdir()
    os.utime(file, (0, 0))
    monkeypatch.setattr(cache, "AT_ONCE", 0)
    second = Cache(tmp_path)
    name = second.need(("a",), never)
    second.tidy()
    assert torch.equal(second.read(name), VALUE)


def test_what_was_made_after_the_first_look_and_is_not_held_has_a_size(tmp_path):
    cache = Cache(tmp_path)
    cache.room = 0
    names = [cache.need((n,), lambda n=n: VALUE + n) for n in range(3)]
    assert not cache.held and len({cache.size_of(name) for name in names}) == 1
    assert torch.equal(cache.read(names[2]), VALUE + 2)
