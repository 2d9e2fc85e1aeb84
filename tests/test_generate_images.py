"""Pictures written in strips."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from gspn2.integrations import images
from gspn2.integrations.images import ImageFile


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    smooth = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.5, 1, height)[:, None, None]
    return (smooth + rng.integers(0, 20, (height, width, 3)).clip(0, 255)).astype(np.uint8)


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    monkeypatch.setattr(images, "_STRIP_BYTES", 1000)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
@pytest.mark.parametrize("size", [(1, 1), (7, 400), (50, 33), (64, 64)])
def test_what_is_written_is_read(tmp_path, suffix, size):
    pixels = picture(*size)
    path = tmp_path / f"image{suffix}"
    with ImageFile(path, size[1], size[0]) as file:
        for start in range(0, size[0], 5):
            file.write(pixels[start : start + 5])
        assert not path.exists()
    with Image.open(path) as image:
        image.load()
        assert (np.asarray(image) == pixels).all()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_large_pictures_are_bigtiff(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_BIG", 0)
    pixels = picture(50, 33)
    with ImageFile(tmp_path / "image.tif", 33, 50) as file:
        file.write(pixels)
    assert (tmp_path / "image.tif").read_bytes()[:4] == b"II\x2b\x00"
    with Image.open(tmp_path / "image.tif") as image:
        assert (np.asarray(image) == pixels).all()


@pytest.mark.parametrize("threads", [1, 4])
def test_the_bytes_do_not_depend_on_threads_or_calls(tmp_path, threads):
    pixels = picture(40, 30)
    with ImageFile(tmp_path / "one.png", 30, 40, threads=2) as file:
        file.write(pixels)
    with ImageFile(tmp_path / "two.png", 30, 40, threads=threads) as file:
        for row in pixels:
            file.write(row[None])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_failure_leaves_nothing_behind(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"what was there before")
    for rows in (3, 41):
        with pytest.raises(ValueError, match="expected 40 in all"), ImageFile(path, 30, 40) as file:
            file.write(picture(rows, 30))
    with pytest.raises(ValueError, match="expected uint8"), ImageFile(path, 30, 40) as file:
        file.write(picture(39, 31))
    assert [each.name for each in tmp_path.iterdir()] == ["image.png"]
    assert path.read_bytes() == b"what was there before"


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.png, \.tif, \.tiff, got 'image\.jpg'"):
        ImageFile(tmp_path / "image.jpg", 3, 3)
    with pytest.raises(ValueError, match="at least 1"):
        ImageFile(tmp_path / "image.png", 3, 0)
    with pytest.raises(ValueError, match="at most 536870912, got 1073741824 and 3"):
        ImageFile(tmp_path / "image.png", 1 << 30, 3)
    with pytest.raises(ValueError, match="expected uint8"), ImageFile(tmp_path / "a.png", 3, 3) as file:
        file.write(np.zeros((3, 3, 3), np.float32))
    assert not list(tmp_path.iterdir())
