"""How a batch is shared by the processes that train a run together."""

import pytest
import torch

from zturbo.objectives import Split
from zturbo.world import ALONE, World


class Member(World):
    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("at_once", [None, 1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
def test_each_row_of_a_batch_is_taken_once(processes, at_once):
    for size in range(1, 12):
        for turn in range(9):
            taken = []
            for rank in range(processes):
                parts = Split(at_once, Member(rank, processes), turn).rows(size)
                own = [row for part in parts for row in range(size)[part]]
                assert len(own) <= -(-size // processes)
                assert all(0 < part.stop - part.start <= (at_once or size) for part in parts)
                taken += own
            assert sorted(taken) == list(range(size))


def test_processes_take_turns_where_there_are_fewer_rows_than_processes():
    busy = [[rank for rank in range(2) if Split(None, Member(rank, 2), turn).rows(1)] for turn in range(4)]
    assert busy == [[1], [0], [1], [0]]


def test_one_process_alone_asks_nobody():
    number = torch.ones(())
    assert ALONE.main and ALONE.agree("stop", True) and ALONE.sum([], [number])[0] is number
