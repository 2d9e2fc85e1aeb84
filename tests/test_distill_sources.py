"""`gspn2 distill` from shards, data sets and streams: the steps of a folder, and what is left out."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import datasets
from PIL import Image

import diffusion_helpers as tiny
from distill_helpers import listed, losses, settings
from gspn2.cli.main import main
from gspn2.integrations.diffusers.distill import distill
from gspn2.integrations.diffusers.pairs import fitted, pixels_of
from gspn2.training.errors import DataError, UserError
from gspn2.training.samples import read_source

SIZES = {"a": (48, 96), "b": (64, 64), "c": (100, 60), "d": (70, 66)}


pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures():
    """Name, caption and bytes."""
    rng = np.random.default_rng(0)
    drawn = {
        name: Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for name, s in SIZES.items()
    }
    return [(name, f"picture {name}", encoded(image)) for name, image in drawn.items()]


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory, pictures):
    """A pipeline, and the same pictures in a folder, shards, a table of files and a data set."""
    root = tmp_path_factory.mktemp("sources")
    tiny.sd15_pipeline(root).save_pretrained(root / "pipeline")
    (root / "folder").mkdir()
    for name, caption, content in pictures:
        (root / "folder" / f"{name}.png").write_bytes(content)
        (root / "folder" / f"{name}.txt").write_text(caption)
    for number, part in enumerate((pictures[:3], pictures[3:])):
        members = []
        for name, caption, content in part:
            described = json.dumps({"id": 7, "text": caption}).encode()
            text = (f"{name}.json", described) if number else (f"{name}.txt", f" {caption}\n".encode())
            members += [(f"{name}.png", content), text]
        write_tar(root / "shards" / f"{number:03}.tar", members)
    columns = {"image": [{"bytes": content, "path": None} for *_, content in pictures]}
    columns |= {"text": [[caption, "another"] for _, caption, _ in pictures], "other": list(range(4))}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.save_to_disk(root / "rows")
    return root


def sources(root):
    return {
        "shards": str(root / "shards"),
        "pattern": str(root / "shards" / "{000..001}.tar"),
        "whole": f"hf:{root / 'rows'}",
        "stream": f"hf-stream:{root / 'rows'}",
    }


def config(root, data, out, **changes):
    return settings(root / "pipeline", data, out, **changes)


@pytest.fixture(scope="module")
def expected(root, tmp_path_factory):
    """Losses of a run on the folder, all steps in one pass."""
    out = tmp_path_factory.mktemp("expected") / "run"
    distill(config(root, root / "folder", out))
    return losses(out)


@pytest.mark.parametrize("kind", ["shards", "whole", "stream"])
def test_a_run_killed_and_resumed_takes_the_steps_of_one_on_a_folder(root, tmp_path, expected, kind):
    """The resumed run takes its list and encodings, and makes none."""

    def killed(what, done, total, found):
        if what == "steps" and done == 3:
            raise MemoryError

    run = config(root, sources(root)[kind], tmp_path / "run", save_every=2)
    with pytest.raises(MemoryError):
        distill(run, killed)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "cache").iterdir()}
    assert sum(path.name.startswith("list-") for path in kept) == 1
    distill(run, resume=True)
    assert losses(tmp_path / "run") == expected
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "cache").iterdir()} == kept
    assert not (tmp_path / "run" / "unreadable.txt").exists()
    with pytest.raises(UserError, match="pictures is 3, was None"):
        distill(config(root, sources(root)[kind], tmp_path / "run", pictures=3), resume=True)


def test_passes_add_up_to_the_whole_batch(root, tmp_path, expected):
    """Also when the encodings are another source's: pictures of data sets and shards go by their bytes."""
    cache = tmp_path / "cache"
    distill(config(root, sources(root)["whole"], tmp_path / "one", steps=2, cache=cache))
    made = {path.name for path in cache.glob("latents-*")}
    distill(config(root, sources(root)["shards"], tmp_path / "two", steps=2, cache=cache, accumulate=2))
    assert {path.name for path in cache.glob("latents-*")} == made
    for one, two in zip(expected[:2], losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_sources_list_and_bring_the_same_pictures(root, tmp_path, pictures):
    for kind, data in sources(root).items():
        source, listing = listed(data, tmp_path)
        assert not listing.faults
        found = [(p.caption, (p.height, p.width)) for p in listing.pictures]
        assert found == [(caption, SIZES[name]) for name, caption, _ in pictures], kind
        chosen = listing.pictures[1::2]
        for picture, stored in zip(chosen, source.open(chosen), strict=True):
            content = next(c for _, caption, c in pictures if caption == picture.caption)
            assert read_source(stored).tobytes() == Image.open(io.BytesIO(content)).tobytes(), kind
        assert len(listed(data, tmp_path, pictures=3)[1].pictures) == 3


def test_columns_by_name(root, tmp_path, pictures):
    members = []
    for name, _, content in pictures:
        members += [(f"x/{name}.png", content), (f"x/{name}.txt", b"plain")]
        members += [(f"x/{name}.json", json.dumps({"short": name, "caption": "long"}).encode())]
    shard = write_tar(tmp_path / "one.tar", members)
    assert {p.caption for p in listed(shard, tmp_path)[1].pictures} == {"plain"}
    named = listed(shard, tmp_path, caption_column="short")[1]
    assert [p.caption for p in named.pictures] == list(SIZES)
    rows = datasets.Dataset.from_dict({"blob": [c for *_, c in pictures], "title": [n for n, *_ in pictures]})
    rows.save_to_disk(tmp_path / "rows")
    for prefix in ("hf:", "hf-stream:"):
        data = f"{prefix}{tmp_path / 'rows'}"
        _, listing = listed(data, tmp_path, image_column="blob", caption_column="title")
        assert [p.caption for p in listing.pictures] == list(SIZES)
        with pytest.raises(DataError, match=r"images, got blob, title; name it with --image-column"):
            listed(data, tmp_path)
        with pytest.raises(DataError, match=r"column of captions, got .* --caption-column"):
            listed(data, tmp_path, image_column="blob")
        with pytest.raises(DataError, match=r"caption_column: .* has no column words, but blob, title"):
            listed(data, tmp_path, image_column="blob", caption_column="words")


def test_what_cannot_be_read_is_left_out_and_listed(root, tmp_path, pictures, capsys):
    """No image, half an image (its header is whole), no caption, a caption that is no JSON."""
    (_, _, first), *_ = pictures
    members = [
        ("cut.png", first[: len(first) // 2]),
        ("cut.txt", b"half"),
        ("no.png", b"x"),
        ("no.txt", b"y"),
    ]
    members += [("mute.png", first), ("odd.png", first), ("odd.json", b"{")]
    for name, caption, content in pictures:
        members += [(f"{name}.png", content), (f"{name}.txt", caption.encode())]
    shard, out = write_tar(tmp_path / "some.tar", members), tmp_path / "run"
    fixed = ["--pipeline", str(root / "pipeline"), "--device", "cpu", "--resolution", "64", "--out", str(out)]
    sizes = ["--steps", "1", "--batch-size", "2", "--accumulate", "2", "--sample-every", "0"]
    assert main(["distill", *fixed, *sizes, "--data", str(shard)]) == 0
    assert f"left out 4 unreadable pictures: {out / 'unreadable.txt'}" in capsys.readouterr().out
    faults = (out / "unreadable.txt").read_text().splitlines()
    assert [line.removeprefix(f"{shard}/").split(":")[0] for line in faults] == [
        "no.png",
        "mute.png",
        "odd.png",
        "cut.png",
    ]
    assert faults[0].endswith("not an image")
    assert faults[1].endswith("no caption")
    capsys.readouterr()
    write_tar(tmp_path / "none.tar", members[:2])
    options = ["--data", str(tmp_path / "none.tar"), "--out", str(tmp_path / "other")]
    assert main(["distill", *fixed, *sizes, *options]) == 2
    assert "not one picture can be read" in capsys.readouterr().err
    assert not (tmp_path / "other" / "last.safetensors").exists()


def test_pictures_are_turned_as_their_exif_tag_says(tmp_path):
    """A photograph taken upright: stored lying, 60 x 100, with its top to the left."""
    lying = np.zeros((60, 100, 3), np.uint8)
    lying[:, :50] = 255
    tag = Image.Exif()
    tag[0x0112] = 6
    (tmp_path / "photo.jpg").write_bytes(encoded(Image.fromarray(lying), "JPEG", exif=tag, quality=95))
    (tmp_path / "photo.txt").write_text("upright")
    source, listing = listed(tmp_path, tmp_path)
    (picture,) = listing.pictures
    assert (picture.height, picture.width) == (100, 60)
    pixels = pixels_of(fitted(picture, [(80, 48), (48, 80)]), read_source(next(source.open([picture]))))
    assert pixels.shape == (1, 3, 80, 48)
    assert pixels[..., :35, :].min() > 0.9
    assert pixels[..., 45:, :].max() < -0.9


def test_a_damaged_list_is_made_anew_and_a_changed_source_is_listed_again(tmp_path, pictures):
    (_, _, first), (_, _, second), *_ = pictures
    shard = write_tar(tmp_path / "one.tar", [("a.png", first), ("a.txt", b"one")])
    _, before = listed(shard, tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    file.write_text(file.read_text()[:-9])
    assert listed(shard, tmp_path / "kept")[1] == before
    write_tar(shard, [("a.png", first), ("a.txt", b"one"), ("b.png", second), ("b.txt", b"two")])
    assert [p.caption for p in listed(shard, tmp_path / "kept")[1].pictures] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no tar file at all", "not an uncompressed tar file"),
        (None, "no readable picture with a caption in .*one.tar$"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path, content, message):
    shard = write_tar(tmp_path / "one.tar", [("readme.txt", b"words")])
    if content is not None:
        shard.write_bytes(content)
    with pytest.raises(DataError, match=message):
        listed(shard, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
