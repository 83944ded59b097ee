"""Curves as pictures."""

import numpy as np

from zturbo import plots


def test_curves_draw_each_line_where_its_numbers_are():
    picture = np.asarray(
        plots.curves({"up": [(0, 0.0), (10, 1.0)], "flat": [(0, 0.5), (10, 0.5)]}, "title", "step")
    ).astype(int)
    first, second = (tuple(bytes.fromhex(color[1:])) for color in plots.COLORS[:2])
    rows = {}
    for x in (100, 800):
        rows[x] = [
            np.flatnonzero((np.abs(picture[80:460, x] - color).sum(-1)) < 60).mean() for color in (first, second)
        ]
    assert rows[100][0] > rows[800][0] + 200 and abs(rows[100][1] - rows[800][1]) < 2
