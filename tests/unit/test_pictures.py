"""Which pictures, views and captions a batch is made of: functions of (recipe, seed, place)."""

import time
from collections import Counter

import pytest
import torch

from zturbo import batches, flow
from zturbo.captions import Captions
from zturbo.dataset import Encoded
from zturbo.recipe import Recipe


def made_of(captions, views=1, repeats=None, size=2, dropout=0.0, masks=None, weight=1.0):
    encoded = Encoded(
        [
            torch.stack([torch.full((16, 2, 2), 10.0 * n + view) for view in range(views)])
            for n in range(len(captions.of))
        ]
    )
    groups = batches.group_pictures(encoded, repeats or [1] * len(captions.of))
    count = len(captions.of)
    return batches.Pictures(
        encoded,
        captions,
        batches.Batches(groups, size, 0),
        masks or [None] * count,
        [dropout] * count,
        [weight] * count,
    )


def test_repeats_show_a_picture_that_often_an_epoch():
    pictures = made_of(Captions(("a",), ((0,),) * 3, None), repeats=[1, 5, 2], size=1)
    assert pictures.batches.per_epoch == 8
    for epoch in range(3):
        shown = Counter(n for place in range(8) for n in pictures.batches.at(8 * epoch + place))
        assert shown == {0: 1, 1: 5, 2: 2}


def ordered_anew(made: batches.Batches, index: int) -> tuple[int, ...]:
    """What a step sees, written out: each epoch mixes every group, cuts it into batches, and mixes those."""
    epoch, place = divmod(index, made.per_epoch)
    random, cut = flow.generator(made.seed, "order", epoch), []
    for group in made.groups:
        order = [group[i] for i in torch.randperm(len(group), generator=random).tolist()]
        cut += [tuple(order[i : i + made.size]) for i in range(0, len(order), made.size)]
    return cut[int(torch.randperm(len(cut), generator=random)[place])]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("groups", [((0,),), ((0, 1, 2, 3, 4),), ((4, 4, 4), (0, 2), (1,), tuple(range(5, 40)))])
def test_an_epoch_is_ordered_by_seed_and_number_alone(groups, size):
    made = batches.Batches(groups, size, seed=5)
    places = range(3 * made.per_epoch + 1)
    for index in (*places, *reversed(places), 1000, 0):  # as a run that is rolled back asks
        assert made.at(index) == ordered_anew(made, index)


def test_a_step_costs_as_much_with_many_pictures_as_with_few():
    """Processor time of steps within one epoch. Ordered anew at each step, the large set costs a hundred times more."""

    def seconds(pictures: int) -> float:
        made = batches.Batches((tuple(range(pictures)),), 1, 0)
        made.at(0)
        turns = []
        for _ in range(5):
            started = time.process_time()
            for place in range(200):
                made.at(place % pictures)
            turns.append(time.process_time() - started)
        return min(turns)

    assert seconds(100_000) < 3 * seconds(200)


def test_captions_are_dropped_a_picture_at_a_time_at_the_given_rate():
    captions = Captions(("zvk", "zvk, a"), ((1,),) * 4, 0)
    chosen = [caption for place in range(1000) for caption in made_of(captions, dropout=0.25).at(0, place).captions]
    assert abs(chosen.count(0) / 2000 - 0.25) < 0.04
    assert all(made_of(captions).at(0, place).captions == (1, 1) for place in range(50))


def test_views_and_tag_orders_change_by_chance_and_are_the_same_again():
    pictures = made_of(Captions(("a", "b", "c"), ((0, 1, 2), (2, 1)), None), views=2)
    first = [pictures.at(0, place) for place in range(400)]
    again = [pictures.at(0, place) for place in range(400)]
    assert all(torch.equal(a.x0, b.x0) and a.captions == b.captions for a, b in zip(first, again))
    seen = Counter((batch.x0[i, 0, 0, 0].item(), batch.captions[i]) for batch in first for i in range(2))
    assert set(seen) == {(view, caption) for view in (0.0, 1.0) for caption in (0, 1, 2)} | {
        (view, caption) for view in (10.0, 11.0) for caption in (1, 2)
    }
    assert min(seen.values()) > 40


def test_masks_follow_their_pictures_and_views_and_weights_their_pictures():
    mask = torch.stack([torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 1.5)])
    pictures = made_of(Captions(("a",), ((0,), (0,)), None), views=2, masks=[None, mask], weight=0.3)
    for place in range(20):
        batch = pictures.at(0, place)
        assert batch.weight.tolist() == pytest.approx([0.3, 0.3])
        for x0, given in zip(batch.x0, batch.mask):
            number, view = divmod(int(x0[0, 0, 0]), 10)
            assert (given == (1.0 if number == 0 else mask[view])).all()
    assert made_of(Captions(("a",), ((0,), (0,)), None)).at(Recipe(), 0).mask is None
