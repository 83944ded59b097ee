"""Damaged entries of the disk cache, and damaged files of what is known of pictures. Kinds for `bench fuzz`."""

import random

import torch
from safetensors.torch import load, save

from bench.fuzz_damage import damage
from bench.fuzz_watch import Damaged, Place
from zturbo import cache, known

VALUE = torch.arange(48, dtype=torch.float32).reshape(2, 4, 6)
PARTS = ("latent", "a vae", (64, 64, 3), b"pixels")


def entry(place: Place) -> cache.Cache:
    """A cache with one entry, which is `VALUE`."""
    made = cache.Cache(place.runs / ".cache")
    made.get(PARTS, lambda: VALUE)
    return made


def find(place: Place):
    """Whatever lies there: what is found is what was made from these parts, and the entry is whole again afterwards."""
    again = cache.Cache(place.runs / ".cache")
    assert torch.equal(again.get(PARTS, lambda: VALUE), VALUE), "another tensor was found"
    assert again.size() >= 0 and again.report()
    again.tidy()
    last = cache.Cache(place.runs / ".cache")
    assert torch.equal(last.get(PARTS, lambda: VALUE), VALUE)


def cache_bytes(rng: random.Random, place: Place) -> Damaged:
    """An entry with damaged bytes."""
    entry(place)
    path = place.runs / ".cache" / f"{cache.key(PARTS)}.safetensors"
    what, raw = damage(path.read_bytes(), rng)
    path.write_bytes(raw)
    return Damaged(f"{what}: {raw[:60]!r}", lambda: find(place))


def cache_contents(rng: random.Random, place: Place) -> Damaged:
    """A whole safetensors file under the entry's name with something else in it, or something that is no file."""
    entry(place)
    path = place.runs / ".cache" / f"{cache.key(PARTS)}.safetensors"
    other = VALUE + 1
    ways = {
        "another tensor, its checksum the first one's": lambda: path.write_bytes(
            save({cache.TENSOR: other}, {"sha256": cache.checksum(VALUE)})
        ),
        "another shape": lambda: path.write_bytes(
            save({cache.TENSOR: VALUE.reshape(6, 8)}, {"sha256": cache.checksum(VALUE)})
        ),
        "another dtype": lambda: path.write_bytes(
            save({cache.TENSOR: VALUE.half()}, {"sha256": cache.checksum(VALUE)})
        ),
        "no checksum": lambda: path.write_bytes(save({cache.TENSOR: other})),
        "another name": lambda: path.write_bytes(save({"other": VALUE}, {"sha256": cache.checksum(VALUE)})),
        "nothing": lambda: path.write_bytes(save({}, {"sha256": cache.checksum(VALUE)})),
        "an empty tensor": lambda: path.write_bytes(
            save({cache.TENSOR: VALUE[:0].clone()}, {"sha256": cache.checksum(VALUE)})
        ),
        "gone": lambda: path.unlink(),
        "a half-written one beside it": lambda: path.with_name(path.name + ".1.part").write_bytes(
            save(load(path.read_bytes()))[: rng.randrange(100)]
        ),
        "rubbish beside it": lambda: (path.parent / f"{rng.randrange(10**9)}.safetensors").write_bytes(
            rng.randbytes(rng.randrange(300))
        ),
    }
    what = rng.choice(list(ways))
    ways[what]()
    return Damaged(what, lambda: find(place))


def known_bytes(rng: random.Random, place: Place) -> Damaged:
    """What is known of pictures, damaged: all of it is found, or nothing."""
    kept = {"a.png": ([100, 1, 2], {"size": [64, 96], "sha256": "0" * 64}), "b.png": ([7, 1, 2], {"transparent": True})}
    made = known.Known(place.runs / ".cache", place.runs)
    made.now, made.read = dict(kept), 1
    made.save()
    whole = made.file.read_bytes()
    what, raw = damage(whole, rng)
    made.file.write_bytes(raw)

    def find():
        found = {path: tuple(entry) for path, entry in known.Known(place.runs / ".cache", place.runs).before.items()}
        assert found == (kept if raw == whole else {}), "something else was found"

    return Damaged(f"{what}: {raw[:60]!r}", find)


KINDS = (cache_bytes, cache_contents, known_bytes)
