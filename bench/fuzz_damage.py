"""Ways to damage bytes and values that know nothing of what they damage."""

import random
from collections.abc import Callable

STRINGS = (
    "",
    " ",
    "3",
    "nan",
    "true",
    "None",
    "\x00",
    "a\x00b",
    "\x7f",
    "\ud800",
    "\u202e",
    "🙂" * 40,
    "x" * 3000,
    "../../etc/passwd",
    "{}",
    "\n",
    "٣",
    "²",
)
NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**30,
    -(10**30),
    1e308,
    -1e308,
    1e-308,
    0.5,
    float("nan"),
    float("inf"),
    float("-inf"),
)


def damage(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was done, the content so damaged): one of WAYS."""
    way = rng.choice(WAYS)
    return way.__name__, way(content, rng)


def flip(content: bytes, rng: random.Random) -> bytes:
    """A few bits, most of them near the front, where headers are."""
    held = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20, 200))):
        if held:
            top = len(held) if rng.random() < 0.5 else min(len(held), 300)
            held[rng.randrange(top)] ^= 1 << rng.randrange(8)
    return bytes(held)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice((0, 1, 7, 8, 9, len(content) - 1, rng.randrange(len(content) + 1)))]


def overwrite(content: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(content) + 1), rng.choice((1, 4, 8, 64, 1000))
    fill = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return (content[:at] + fill + content[at + size :])[: max(len(content), at + size)]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.choice((1, 3, 100))) + content[at:]


def remove(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[at + rng.choice((1, 3, 100)) :]


def repeat(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[at // 2 :]


def garbage(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 8, 16, 1000, len(content))))


def text(content: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        (
            b"",
            b"\n",
            b"{}",
            b"[]",
            b"null",
            b'""',
            b"\x00" * 20,
            b"\xef\xbb\xbf",
            b"<html>404 Not Found</html>",
            b"[" * 200000,
            b'{"a":' * 100000,
            b"version https://git-lfs.github.com/spec/v1\n",
        )
    )


WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip,
    flip,
    flip,
    cut,
    cut,
    overwrite,
    overwrite,
    insert,
    remove,
    repeat,
    garbage,
    text,
)


def value(rng: random.Random, depth: int = 2):
    """A value of any JSON type."""
    kinds = [
        lambda: rng.choice(STRINGS),
        lambda: rng.choice(NUMBERS),
        lambda: rng.random() < 0.5,
        lambda: None,
        lambda: rng.randrange(-1000, 1000),
    ]
    if depth:
        kinds += [
            lambda: [value(rng, depth - 1) for _ in range(rng.randrange(3))],
            lambda: {rng.choice(STRINGS): value(rng, depth - 1) for _ in range(rng.randrange(3))},
        ]
    return rng.choice(kinds)()
