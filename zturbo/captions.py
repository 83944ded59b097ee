"""Captions: the trigger word in them, the orders of their tags, every text that training may show, and what is none."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from . import flow, words
from .errors import DatasetError
from .words import is_text

ORDERS = 8  # of shuffled tags, for each caption: each is encoded once
COMMAS = re.compile("[,\uff0c\u3001]")  # between tags, the Chinese and Japanese ones too


class Captioned(Protocol):
    """A picture with its caption. regularisation: see `dataset.Item`."""

    @property
    def name(self) -> str: ...

    @property
    def caption(self) -> str: ...

    @property
    def regularisation(self) -> bool: ...


@dataclass(frozen=True)
class Captions:
    """Every text that training may show, once.

    texts: all that there are. of: for each picture the numbers of the texts it may be shown with. dropped: number of
    the text that stands in for a dropped caption.
    """

    texts: tuple[str, ...]
    of: tuple[tuple[int, ...], ...]
    dropped: int | None


def tags_of(caption: str) -> list[str]:
    """What stands between commas, Western or Chinese."""
    return [tag.strip() for tag in COMMAS.split(caption) if tag.strip()]


def tag_orders(caption: str, keep: int) -> tuple[str, ...]:
    """The caption and up to seven other orders of its tags, the first `keep` in front.

    A function of the caption alone.
    """
    tags = tags_of(caption)
    front, rest = tags[:keep], tags[keep:]
    orders = [", ".join(tags)]
    for n in range(ORDERS - 1):
        mixed = [rest[i] for i in torch.randperm(len(rest), generator=flow.generator("tags", caption, n)).tolist()]
        orders.append(", ".join([*front, *mixed]))
    return tuple(dict.fromkeys(orders))


def one_line(trigger: str) -> str:
    """A trigger word without white space around it, and single spaces in it."""
    return " ".join(trigger.split())


def apply_trigger(caption: str, trigger: str) -> str:
    """The trigger word where `[trigger]` stands, else in front, unless the caption already has it."""
    if not trigger:
        return caption.strip()
    if words.PLACE.search(caption):
        return words.filled(caption, trigger).strip()
    if words.has_word(caption, trigger):
        return caption.strip()
    return f"{trigger}, {caption.strip()}" if caption.strip() else trigger


def need_words(items: Sequence[Captioned]):
    """Raise DatasetError for captions that are none. The pictures are either all for regularisation or none of them."""
    beside = any(item.regularisation for item in items)
    if marked := [item.name for item in items if words.PLACE.search(item.caption)]:
        raise DatasetError(_open_place_beside(marked) if beside else _open_place(marked))
    if cut := [item.name for item in items if not is_text(item.caption)]:
        raise DatasetError(_half_a_character(cut))
    if silent := [item.name for item in items if not item.caption]:
        raise DatasetError(_silent_beside(silent) if beside else _silent(silent, len(items)))


# What is said of captions. names: those of the pictures that it is true of


def _open_place(names: list[str]) -> str:
    return (
        f"{len(names)} captions have [trigger] in them (for example that of {names[0]}), "
        "but there is no trigger word. Set one."
    )


def _open_place_beside(names: list[str]) -> str:
    return (
        f"{len(names)} captions of regularisation pictures have [trigger] in them (for example that of {names[0]}), "
        "but these pictures have no trigger word. Take it out."
    )


def _half_a_character(names: list[str]) -> str:
    return (
        f"{len(names)} captions have half a character in them (a cut emoji; for example that of {names[0]}). "
        "Write them, or the trigger word, anew."
    )


def _silent(names: list[str], pictures: int) -> str:
    return (
        f"{len(names)} of {pictures} pictures have no caption (for example {', '.join(names[:3])}). "
        "Set a trigger word, or write a .txt file with the same name beside each picture."
    )


def _silent_beside(names: list[str]) -> str:
    return (
        f"{len(names)} regularisation pictures have no caption (for example {', '.join(names[:3])}). "
        "Write a .txt file without the trigger word beside each."
    )
