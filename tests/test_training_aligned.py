"""Aligned marks, the task that asks for nothing but reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import find_objects, label

from gspn2.training.comparison.images import posed
from gspn2.training.tasks import Task, answered

GREY, DARK, BRIGHT = 128, 0, 255


def _marks(image: np.ndarray, value: int, scale: int = 1) -> list[tuple[int, int]]:
    """Upper left corners, in units, of the marks of a value, each of 4 x 4 units."""
    found = find_objects(label(image == value)[0])
    assert all(rows.stop - rows.start == columns.stop - columns.start == 4 * scale for rows, columns in found)
    return [(rows.start // scale, columns.start // scale) for rows, columns in found]


def _check(image: np.ndarray, classes: np.ndarray, scale: int = 1) -> list[int]:
    """Every grey mark has one partner, which is what its pixels are answered with; the distances."""
    assert np.array_equal(classes > 0, image == GREY)
    grey, dark, bright = (_marks(image, value, scale) for value in (GREY, DARK, BRIGHT))
    distances = []
    for y, x in grey:
        others = [place for place in (*grey, *dark, *bright) if place != (y, x)]
        shared = [(v, u) for v, u in others if (v == y) != (u == x)]
        assert len(shared) == 1
        assert all(min(abs(v - y), abs(u - x)) >= 8 for v, u in others if (v, u) != shared[0])
        assert (classes[y * scale, x * scale] == 2) == (shared[0] in bright)
        distances.append(max(abs(shared[0][0] - y), abs(shared[0][1] - x)))
    return distances


@pytest.mark.parametrize(("size", "pairs"), [(64, 2), (128, 4)])
def test_the_one_mark_in_line_is_the_answer(size: int, pairs: int):
    images, classes = answered(Task("aligned", size, size), 40, seed=5)
    found = [_check(*it) for it in zip(images, classes, strict=True)]
    assert {len(distances) for distances in found} == {pairs}
    assert size // 2 <= min(min(distances) for distances in found)
    assert max(max(distances) for distances in found) <= size - 4


def test_brightness_of_a_mark_says_nothing_but_itself():
    _, classes = answered(Task("aligned", 64, 64), 1024, seed=6)
    assert (classes == 2).sum() / (classes > 0).sum() == pytest.approx(0.5, abs=0.05)
    # Neither is it a matter of the place: a quarter of the image is as good as another.
    for quarter in (classes[:, :32, :32], classes[:, 32:, :32], classes[:, :32, 32:], classes[:, 32:, 32:]):
        assert (quarter == 2).sum() / (quarter > 0).sum() == pytest.approx(0.5, abs=0.08)


def test_training_begins_with_marks_side_by_side():
    images, classes = answered(Task("aligned", 64, 64), 1024, 5, (0.0, 1.0))
    means = [
        np.mean([np.mean(_check(images[n], classes[n])) for n in range(k, k + 256, 16)])
        for k in (0, 256, 512, 768)
    ]
    assert means == sorted(means)
    assert means[0] < 14 < 24 < means[-1]


def test_more_pixels_are_the_same_scene_and_turns_keep_it_true():
    small, classes = answered(Task("aligned", 64, 64), 4, seed=7)
    large, theirs = answered(Task("aligned", 64, 128), 4, seed=7)
    assert np.array_equal(large, small.repeat(2, axis=1).repeat(2, axis=2))
    for image, truth in zip(large, theirs, strict=True):
        _check(image, truth, scale=2)
    poses = torch.tensor([[True], [False], [True]]).expand(3, 4)
    turned = [posed(torch.from_numpy(it)[:, None], poses)[:, 0].numpy() for it in (small, classes)]
    for image, truth in zip(*turned, strict=True):
        _check(image, truth)
