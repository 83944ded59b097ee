"""Which pictures, views and captions a batch is made of: functions of (recipe, seed, place)."""

from collections import Counter

import torch

from zturbo import trainer
from zturbo.dataset import Captions, Encoded
from zturbo.recipe import Data, Recipe


def made_of(captions, lengths, views=1, repeats=None, size=2):
    encoded = Encoded([torch.stack([torch.full((16, 2, 2), 10.0 * n + view) for view in range(views)]) for n in range(len(captions.of))], lengths)
    groups = trainer.group_pictures(encoded, captions, repeats or [1] * len(captions.of))
    return trainer.Pictures(encoded, captions, trainer.Batches(groups, size, 0))


def test_repeats_show_a_picture_that_often_an_epoch():
    pictures = made_of(Captions(("a",), ((0,),) * 3, None), [32], repeats=[1, 5, 2], size=1)
    assert pictures.batches.per_epoch == 8
    for epoch in range(3):
        shown = Counter(n for place in range(8) for n in pictures.batches.at(8 * epoch + place))
        assert shown == {0: 1, 1: 5, 2: 2}


def test_captions_are_dropped_for_whole_batches_at_the_given_rate():
    pictures = made_of(Captions(("zvk", "zvk, a"), ((1,),) * 4, 0), [32, 64])
    given = Recipe(data=Data(caption_dropout=0.25))
    chosen = [pictures.at(given, place)[1] for place in range(2000)]
    assert set(chosen) == {(0, 0), (1, 1)}
    assert abs(chosen.count((0, 0)) / 2000 - 0.25) < 0.04
    assert all(pictures.at(Recipe(data=Data(caption_dropout=0.0)), place)[1] == (1, 1) for place in range(50))


def test_views_and_tag_orders_change_by_chance_and_are_the_same_again():
    pictures = made_of(Captions(("a", "b", "c"), ((0, 1, 2), (2, 1)), None), [32] * 3, views=2)
    given = Recipe()
    first = [pictures.at(given, place) for place in range(400)]
    again = [pictures.at(given, place) for place in range(400)]
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first, again))
    seen = Counter((x0[i, 0, 0, 0].item(), captions[i]) for x0, captions in first for i in range(2))
    assert set(seen) == {(view, caption) for view in (0.0, 1.0) for caption in (0, 1, 2)} | {(view, caption) for view in (10.0, 11.0) for caption in (1, 2)}
    assert min(seen.values()) > 40


def test_orders_of_unequal_padded_length_never_share_a_batch():
    pictures = made_of(Captions(("a", "b", "long"), ((0, 2), (1, 2)), None), [32, 32, 64])
    chosen = {pictures.at(Recipe(), place)[1] for place in range(200)}
    assert chosen == {(0, 1), (1, 0), (2, 2)}
