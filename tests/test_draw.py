"""Pictures: which row shows which class, with which map, and the colours of masks."""

import numpy as np
import pytest

from semformer.draw import Line, Map, colored_mask, draw, figure4

IMAGE = np.full((40, 60, 3), 90, np.uint8)
NAMES = ("background", "cat", "dog", "cow")


def picture(maps: list[np.ndarray], classes=(1, 2), names=NAMES, **options) -> np.ndarray:
    of_kinds = {kind: np.stack(maps) for kind in ("activation", "attention", "both")}
    return np.array(figure4(IMAGE, of_kinds, classes, names, **{"threshold": 0.5, **options}))


def blob(left: int) -> np.ndarray:
    heat = np.zeros((40, 60), np.float32)
    heat[10:30, left : left + 20] = 1
    return heat


def test_each_row_shows_the_map_of_its_class():
    both, other = picture([blob(5), blob(35)]), picture([blob(5), blob(20)])
    middle = len(both) // 2
    assert np.array_equal(both[:middle], other[:middle])
    assert not np.array_equal(both[middle:], other[middle:])


def test_each_row_has_the_name_of_its_class():
    maps = [blob(5), blob(35)]
    told = picture(maps, classes=(1, 3))
    assert np.array_equal(told, picture(maps, classes=(1, 2), names=("background", "cat", "cow", "dog")))
    assert not np.array_equal(told, picture(maps, classes=(1, 2)))


def test_the_threshold_is_drawn_where_the_map_crosses_it():
    slope = np.tile(np.linspace(0, 1, 60, dtype=np.float32), (40, 1))
    low, high, never = (picture([slope], classes=(1,), threshold=t) for t in (0.2, 0.8, 1.5))
    columns = [np.flatnonzero((one != never).any(axis=(0, 2))).mean() for one in (low, high)]
    assert columns[0] < columns[1]


def test_a_heading_is_no_formula():
    draw([Line("a", IMAGE, [Map("with $\\bm{M}$", None, 0.5)])])


def test_an_image_without_objects_is_drawn():
    empty = {kind: np.zeros((0, 40, 60), np.float32) for kind in ("activation", "attention", "both")}
    assert np.ptp(np.array(figure4(IMAGE, empty, [], NAMES, threshold=0.5))) > 0


@pytest.mark.parametrize(("index", "colour"), [(0, (0, 0, 0)), (1, (128, 0, 0)), (2, (0, 128, 0)), (255, (255,) * 3)])
def test_masks_have_vocs_colours_and_white_where_no_score_counts(index, colour):
    assert np.array(colored_mask(np.full((1, 1), index, np.uint8)))[0, 0].tolist() == list(colour)
