"""Images of the comparison, and what is asked about them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from comparison_helpers import TINY
from gspn2.training.comparison import Run, images, single, trainer
from gspn2.training.tasks import Task, answered, generate


def test_images_are_turned_and_nothing_else():
    square = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3).repeat(200, 1, 1, 1)
    turned = images.posed(square, images.poses(200, torch.Generator().manual_seed(0)))
    plain = square[0, 0]
    forms = [form.rot90(k) for form in (plain, plain.flip(0)) for k in range(4)]
    counts = [sum(torch.equal(one[0], form) for one in turned) for form in forms]
    assert sum(counts) == 200
    assert min(counts) > 0


def test_images_in_shards_are_made_alike_and_tests_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def made(split: str, folder: str) -> images.Images:
        source = images.Source(Task("maze", 32, 32), split, 12)
        with images.making(source, tmp_path / folder, None):
            assert not source.there(tmp_path / folder)
        return images.load(source, tmp_path / folder, torch.device("cpu"))

    train, again, test = made("train", "a"), made("train", "c"), made("test", "a")
    assert torch.equal(train.pixels, again.pixels)
    assert not torch.equal(train.pixels, test.pixels)
    assert train.pixels.shape == (12, 1, 32, 32)
    assert sorted(train.labels.unique().tolist()) == [0, 1, 2]
    monkeypatch.setattr(images, "SHARD", 8)
    sharded = made("test", "b")
    assert torch.equal(sharded.pixels[:8], test.pixels[:8])
    assert sharded.pixels.shape == test.pixels.shape


def test_digits_are_moved_for_training_and_never_mirrored(tmp_path: Path):
    run = Run("digits", 32, "vit", 0)
    sources = run.sources(dataclasses.replace(TINY, test_images=1000))
    assert {use: (it.task.size, it.images) for use, it in sources.items()} == {
        "train": (32, 16),
        "validation": (32, images.DIGITS_TESTS),
        "test": (32, images.DIGITS_TESTS),
        "scaled": (64, images.DIGITS_TESTS),
    }
    held = {}
    for use, source in sources.items():
        with images.making(source, tmp_path, None):
            pass
        held[use] = images.load(source, tmp_path, torch.device("cpu"))
    assert not held["train"].mirrored
    assert torch.equal(held["test"].labels, held["scaled"].labels)
    assert len(held["test"].labels.unique()) == 10
    shrunk = torch.nn.functional.avg_pool2d(held["scaled"].pixels.float(), 2)
    assert (shrunk - held["test"].pixels).abs().max() < 24
    brightness = [held[use].pixels.float().mean().item() for use in ("train", "test")]
    assert brightness[0] == pytest.approx(brightness[1], rel=0.2)


@pytest.mark.parametrize("levels", [None, (0.0, 1.0)])
def test_marks_of_a_maze_say_whether_there_is_a_way(levels: tuple[float, float] | None):
    from scipy.ndimage import label

    pixels, classes = answered(Task("maze", 64, 64), 1024, 7, levels)
    assert np.array_equal(classes > 0, pixels == 255)
    joined = classes.max((1, 2)) == 2
    assert joined.mean() == 0.5
    for image, is_joined in zip(pixels[::7], joined[::7], strict=True):
        parts, count = label(image > 0)
        assert count == 2
        assert (len(np.unique(parts[image == 255])) == 1) == is_joined
    # Marks are 3 x 3 pixels: sums over them are sums over marks.
    far = np.abs(np.arange(64) - 31.5)
    eccentric = (pixels == 255).sum(2) @ far + (pixels == 255).sum(1) @ far
    thresholds = np.quantile(eccentric, np.linspace(0.05, 0.95, 37))
    right = [((eccentric >= threshold) == joined).mean() for threshold in thresholds]
    most = 0.61 if levels is None else 0.65
    assert 1 - most < min(right) < max(right) < most, "where the marks lie tells too much"


def test_a_pathfinder_is_answered_at_its_marks():
    pixels, classes = answered(Task("pathfinder", 64, 64), 64, seed=7)
    marks = classes > 0
    assert pixels[marks].min() >= 128
    assert ((marks.sum((1, 2)) > 20) & (marks.sum((1, 2)) < 60)).all(), "two discs of 2.6 pixels"
    joined = classes.max((1, 2)) == 2
    assert np.array_equal(classes == 2, marks & joined[:, None, None])
    assert 20 < joined.sum() < 44
    plain, labels = generate(Task("pathfinder", 64, 64), 64, seed=7)
    assert np.array_equal(plain, pixels), "the same images have an answer of their own for `gspn2 train`"
    assert np.array_equal(labels == 1, joined)


def test_pixels_without_answer_do_not_count():
    logits = torch.tensor([[[[2.0, -1.0, 3.0]]]])
    losses, right, counts = trainer.judged(logits, torch.tensor([[[[2, 2, 0]]]], dtype=torch.uint8))
    assert losses.flatten().tolist() == pytest.approx([np.log1p(np.exp(-2)), np.log1p(np.exp(1)), 0])
    assert (right.sum().item(), counts.sum().item()) == (1, 2)


def test_contours_grow_in_the_course_of_training(tmp_path: Path):
    settings = dataclasses.replace(TINY, steps=100, train_images=1024)
    run = Run("pathfinder", 32, "vit", 0)
    held = {}
    for use in ("train", "test"):
        with images.making(run.sources(settings)[use], tmp_path, None):
            pass
        held[use] = images.load(run.sources(settings)[use], tmp_path, torch.device("cpu"))
    bright = held["train"].pixels.float().mean((1, 2, 3)).view(4, -1).mean(1).tolist()
    assert bright == sorted(bright)
    training = single.SingleRun(run, settings, held, tmp_path, torch.device("cpu"), lambda *_: None)
    chosen = training._block(100).chosen
    assert chosen[0].max() < 0.15 * 1024
    assert chosen[-25:].max() > 0.9 * 1024
    assert chosen[-25:].min() < 0.3 * 1024
