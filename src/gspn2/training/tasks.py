"""Images made up on the spot, whose class is a matter of global context: Pathfinder and a maze. For the
comparison they also come with an answer for pixels instead of one for the image, and with them a third task,
aligned marks, which has no answer for an image (`gspn2.training.aligned`).

Both come in blocks, each from a seed of its own, so that the first images of a set do not depend on how many
follow. Classes are equally frequent, and the distance of the two marks, which a classifier could otherwise
read off without following anything, has the same distribution in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .aligned import aligned
from .errors import DataError
from .rng import derive_seed

Floats = NDArray[np.float32]
BLOCK = 256
CLASSES = {"pathfinder": ("apart", "joined"), "maze": ("apart", "joined")}
ALIGNED = "aligned"


class Task(NamedTuple):
    """A task and its scale.

    Args:
        kind: "pathfinder" or "maze"; for answers of pixels also "aligned".
        canvas: side of the scene, in units of its own: longer ways, more distractors.
        size: side of the image in pixels, a multiple of `canvas`.
    """

    kind: str
    canvas: int
    size: int


def is_task(data: str) -> bool:
    """Does a name mean generated images?"""
    return data.partition(":")[0] in CLASSES


def parse_task(data: str) -> Task:
    """ "pathfinder:64", or "pathfinder:64@128" for the scenes of 64 drawn on 128 pixels.

    Raises:
        DataError: no such task, or a size that it does not come in.
    """
    match = re.fullmatch(r"(pathfinder|maze|aligned):(\d+)(?:@(\d+))?", data)
    if not match:
        raise DataError(f"{data}: expected pathfinder:SIZE or maze:SIZE, with @PIXELS for other sizes")
    canvas = int(match[2])
    size = int(match[3] or canvas)
    if canvas < 32 or size % canvas:
        raise DataError(f"{data}: expected a size of at least 32 and a multiple of it in pixels")
    return Task(match[1], canvas, size)


def generate(task: Task, count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (count, size, size) and labels (count,): 1 where the two marks are joined."""
    make: Callable[[Generator, int, int, int], tuple[NDArray[np.uint8], NDArray[np.int64]]]
    make = _pathfinder if task.kind == "pathfinder" else _maze
    images = np.empty((count, task.size, task.size), np.uint8)
    labels = np.empty(count, np.int64)
    for number, start in enumerate(range(0, count, BLOCK)):
        rng = np.random.default_rng(derive_seed(seed, task.kind, task.canvas, number))
        made, truth = make(rng, BLOCK, task.canvas, task.size // task.canvas)
        end = min(start + BLOCK, count)
        images[start:end], labels[start:end] = made[: end - start], truth[: end - start]
    return images, labels


def answered(
    task: Task, count: int, seed: int, levels: tuple[float, float] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (count, size, size) as of `generate`, and what their marks say, of the same shape: 0 where there
    is no mark, 1 for a mark that is apart from the other, 2 for one that is joined with it; of "aligned" see
    `gspn2.training.aligned`.

    Args:
        task, count, seed: which, how many.
        levels: difficulty of the first image and behind the last one, from 0 (contours of two dashes and
            nothing else; marks side by side, no walls but between the two parts) to 1 (the longest contours
            and all distractors; marks anywhere); None for those that models are tested with. Mazes have
            at most `_WALLS` of the walls that those of `generate` have.
    """
    images = np.empty((count, task.size, task.size), np.uint8)
    classes = np.empty_like(images)
    for number, start in enumerate(range(0, count, BLOCK)):
        rng = np.random.default_rng(derive_seed(seed, task.kind, task.canvas, number))
        end = min(start + BLOCK, count)
        level = None
        if levels is not None:
            level = levels[0] + (start + end) / (2 * count) * (levels[1] - levels[0])
        scene = task.canvas, task.size // task.canvas, level
        if task.kind == ALIGNED:
            made, truth = aligned(rng, BLOCK, *scene)
        else:
            make = _marked_contours if task.kind == "pathfinder" else _marked_maze
            made, labels, marks = make(rng, BLOCK, *scene)
            truth = np.where(marks, 1 + labels[:, None, None], 0)
        images[start:end], classes[start:end] = made[: end - start], truth[: end - start]
    return images, classes


# -- Pathfinder: are two dots the ends of the same dashed contour? (the idea: arXiv 1805.08315)

_DASH, _GAP = 4.0, 2.5
_TURN = 0.45
_PROPOSALS = 24
_THICK, _DOT = 0.8, 2.6


def _pathfinder(
    rng: Generator, count: int, canvas: int, scale: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images, labels, _ = _marked_contours(rng, count, canvas, scale, None)
    return images, labels


def _marked_contours(
    rng: Generator, count: int, canvas: int, scale: int, level: float | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """Images, labels, and where the marks are."""
    longest, short = round(canvas / 7.0), max(3, round(canvas / 21.0))
    distractors = round(canvas / 10)
    # A length for each block: short contours are what a model learns first, long ones build on them.
    if level is None:
        long = int(rng.integers(short + 1, longest + 1))
    else:
        long = min(2 + int(level * (longest - 1)), longest)
        distractors = round(level * distractors)
    occupied = np.zeros((count, canvas, canvas), bool)
    first, _, _ = _contours(rng, occupied, long, None)
    span = np.linalg.norm(_ends(first)[:, 0] - _ends(first)[:, 1], axis=-1)
    second, crossed, _ = _contours(rng, occupied, long, (_ends(first), span))
    drawn = [first, second]
    fits = [np.ones(count, bool)] * 2
    for _ in range(distractors):
        more, _, fit = _contours(rng, occupied, short, None, must=False)
        drawn.append(more)
        fits.append(fit)
    labels = rng.permuted(np.arange(count) % 2)
    dots = np.where(labels[:, None, None] == 1, _ends(first), crossed)
    images = np.zeros((count, canvas * scale, canvas * scale), np.float32)
    for dashes, fit in zip(drawn, fits, strict=True):
        for k in range(dashes.shape[1]):
            _draw(images, dashes[:, k, 0], dashes[:, k, 1], _THICK, scale, fit)
    marks = np.zeros_like(images)
    for end in range(2):
        _draw(marks, dots[:, end], dots[:, end], _DOT, scale, np.ones(count, bool))
    images = np.maximum(images, marks)
    return (images * 255).round().astype(np.uint8), labels.astype(np.int64), marks > 0.5


def _ends(dashes: Floats) -> Floats:
    """Both ends of contours (N, K, 2, 2): (N, 2, 2)."""
    return np.stack((dashes[:, 0, 0], dashes[:, -1, 1]), axis=1)


def _contours(
    rng: Generator,
    occupied: NDArray[np.bool_],
    dashes: int,
    partner: tuple[Floats, Floats] | None,
    must: bool = True,
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """A smooth dashed contour for each image, clear of what is occupied, which it then is, too.

    Args:
        occupied: (N, side, side), changed.
        dashes: how many, K.
        partner: ends (N, 2, 2) of another contour, and a distance (N,) wanted between one of them and an end
            of this contour.
        must: go on until there is one.

    Returns:
        Dashes (N, K, 2, 2), start and end as (y, x); with a partner the two ends at the distance wanted
        (N, 2, 2), else zeros; and where a contour was found (N,).
    """
    count, side = len(occupied), occupied.shape[1]
    chosen = np.zeros((count, dashes, 2, 2), np.float32)
    dots = np.zeros((count, 2, 2), np.float32)
    found = np.zeros(count, bool)
    for attempt in range(200):
        rows = np.flatnonzero(~found)
        paths = _propose(rng, len(rows), dashes, side)
        clear = _clear(occupied[rows], paths)
        if partner is None:
            cost = np.where(clear, 0.0, np.inf)
            pairs = None
        else:
            cost, pairs = _match(paths, partner[0][rows], partner[1][rows])
            # Rather a distance that is off than none: what is asked for grows looser.
            cost = np.where(clear & (cost < side * (0.03 + 0.01 * attempt)), cost, np.inf)
        best = cost.argmin(1)
        pick = np.arange(len(rows))
        good = np.isfinite(cost[pick, best])
        chosen[rows[good]] = paths[pick, best][good]
        if pairs is not None:
            dots[rows[good]] = pairs[pick, best][good]
        found[rows[good]] = True
        if attempt >= 20 and not good.any() and partner is not None:
            # Boxed in: let it cross others.
            occupied[rows] = False
        if found.all() or not must:
            break
    else:
        raise RuntimeError(f"no place for {dashes} dashes on {side} x {side} after 200 attempts")
    _occupy(occupied, chosen, found)
    return chosen, dots, found


def _propose(rng: Generator, count: int, dashes: int, side: int) -> Floats:
    """Paths (count, proposals, K, 2, 2) that turn a little at each dash; not all of them stay inside."""
    shape = (count, _PROPOSALS)
    bend = rng.normal(0, _TURN / 2, (*shape, 1)) + rng.normal(0, _TURN / 2, (*shape, dashes))
    heading = rng.uniform(0, 2 * np.pi, (*shape, 1)) + np.cumsum(np.clip(bend, -_TURN, _TURN), axis=-1)
    along = np.stack((np.sin(heading), np.cos(heading)), axis=-1)
    steps = np.cumsum(along * (_DASH + _GAP), axis=2)
    starts = rng.uniform(4, side - 4, (*shape, 1, 2)) + steps - along * (_DASH + _GAP)
    return np.stack((starts, starts + along * _DASH), axis=3).astype(np.float32)


def _points(paths: Floats) -> Floats:
    """Three points of every dash: (..., K, 2, 2) -> (..., 3 K, 2)."""
    start, end = paths[..., 0, :], paths[..., 1, :]
    return np.concatenate((start, (start + end) / np.float32(2), end), axis=-2, dtype=np.float32)


def _clear(occupied: NDArray[np.bool_], paths: Floats) -> NDArray[np.bool_]:
    """Which of (N, P) paths stay inside and clear of what is occupied, and of themselves."""
    side = occupied.shape[1]
    points = _points(paths)
    inside = ((points > 3) & (points < side - 3)).all((-1, -2))
    y, x = np.moveaxis(points.clip(0, side - 1).astype(np.int64), -1, 0)
    hits = occupied[np.arange(len(occupied))[:, None, None], y, x].any(-1)
    middles = paths.mean(3)
    dashes = middles.shape[2]
    apart = np.ones_like(inside)
    for gap in range(2, dashes):
        distance = np.linalg.norm(middles[:, :, gap:] - middles[:, :, :-gap], axis=-1)
        apart &= (distance > 1.3 * (_DASH + _GAP)).all(-1)
    return inside & ~hits & apart


def _match(paths: Floats, ends: Floats, wanted: Floats) -> tuple[Floats, Floats]:
    """How far off (N, P) the best pair of ends is from the distance wanted, and those pairs (N, P, 2, 2)."""
    own = np.stack((paths[:, :, 0, 0], paths[:, :, -1, 1]), axis=2)
    distance = np.linalg.norm(own[:, :, :, None] - ends[:, None, None], axis=-1)
    off = np.abs(distance - wanted[:, None, None, None]).reshape(*distance.shape[:2], 4)
    best = off.argmin(-1)
    mine = np.take_along_axis(own, (best // 2)[..., None, None], axis=2)[:, :, 0]
    theirs = ends[np.arange(len(ends))[:, None], best % 2]
    return off.min(-1), np.stack((mine, theirs), axis=2)


def _occupy(occupied: NDArray[np.bool_], paths: Floats, found: NDArray[np.bool_], reach: int = 5) -> None:
    side = occupied.shape[1]
    rows = np.flatnonzero(found)
    offsets = np.arange(-reach, reach + 1)
    disc = (offsets[:, None] ** 2 + offsets**2) <= reach**2
    dy, dx = (grid[disc] for grid in np.meshgrid(offsets, offsets, indexing="ij"))
    points = _points(paths[rows]).astype(np.int64)
    y = (points[..., 0, None] + dy).clip(0, side - 1)
    x = (points[..., 1, None] + dx).clip(0, side - 1)
    occupied[rows[:, None, None], y, x] = True


def _draw(
    images: Floats, start: Floats, end: Floats, radius: float, scale: int, wanted: NDArray[np.bool_]
) -> None:
    """Lines with round ends into images (N, side, side), the brighter of old and new; one line an image."""
    rows = np.flatnonzero(wanted)
    side = images.shape[1]
    a, b = start[rows] * scale, end[rows] * scale
    reach = int(np.ceil((_DASH / 2 + radius + 1) * scale))
    offsets = np.arange(-reach, reach + 1)
    centre = np.floor((a + b) / 2).astype(np.int64)
    y = centre[:, 0, None] + offsets
    x = centre[:, 1, None] + offsets
    pixels = np.stack(np.broadcast_arrays(y[:, :, None], x[:, None, :]), axis=-1) + 0.5
    along = b - a
    length = np.maximum((along**2).sum(-1), 1e-6)[:, None, None]
    share = ((pixels - a[:, None, None]) * along[:, None, None]).sum(-1) / length
    nearest = a[:, None, None] + share.clip(0, 1)[..., None] * along[:, None, None]
    distance = np.linalg.norm(pixels - nearest, axis=-1)
    value = (radius * scale + 0.5 - distance).clip(0, 1).astype(np.float32)
    inside = ((y >= 0) & (y < side))[:, :, None] & ((x >= 0) & (x < side))[:, None, :]
    n, i, j = np.nonzero(inside & (value > 0))
    place = (rows[n], y[n, i], x[n, j])
    images[place] = np.maximum(images[place], value[n, i, j])


# -- the maze: is there a way from one mark to the other, after one passage was walled up?

_CELLS = (4, 6, 8, 12)
"""Units from a cell to the next; a block has one of them. Large cells make small mazes."""
_MARK = 3
_CUTS = 16
_PAIRS = 24
_WALLS = 0.7


def _maze(rng: Generator, count: int, canvas: int, scale: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    # At least 5 x 5 cells.
    cell = int(rng.choice([cell for cell in _CELLS if (canvas - 1) // cell >= 5]))
    images, labels, _ = _walled(rng, count, canvas, scale, cell, (0.25, 0.75), 1.0)
    return images, labels


def _marked_maze(
    rng: Generator, count: int, canvas: int, scale: int, level: float | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """Images, labels, and where the marks are."""
    full = 1.0 if level is None else min(1.0, level / 0.7)
    # Marks are two cells apart at least: near ones need small cells.
    cells = [cell for cell in _CELLS if (canvas - 1) // cell >= 5 and 2 * cell <= 10 + 40 * full]
    reach = 0.25 * full, 0.1 + 0.65 * full
    return _walled(rng, count, canvas, scale, int(rng.choice(cells)), reach, _WALLS * full)


def _walled(
    rng: Generator,
    count: int,
    canvas: int,
    scale: int,
    cell: int,
    reach: tuple[float, float],
    walls: float,
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """Images of mazes in two parts, are the marks in the same one, and where they are.

    Args:
        cell: units from a cell to the next.
        reach: distance of the marks over the side, its least and its largest.
        walls: the share that is left of those inside a part.
    """
    side = (canvas - 1) // cell
    passages = _spanning_trees(rng, count, side)
    kept, region = _cut(rng, passages, side)
    labels = rng.permuted(np.arange(count) % 2)
    marks = _marks(rng, region, labels, side, reach)
    if walls < 1:
        first, second = _edges(side)
        kept |= (region[:, first] == region[:, second]) & (rng.random(kept.shape) > walls)
    images = np.zeros((count, canvas, canvas), np.uint8)
    margin = (canvas - (cell * side + 1)) // 2
    for dy in range(cell - 1):
        for dx in range(cell - 1):
            _cells(images, margin + 1 + dy, margin + 1 + dx, side, cell)[:] = 128
    _open(images, kept, margin, side, cell)
    for mark in np.moveaxis(marks, 1, 0):
        _place(images, mark, side, cell, margin)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    return images, labels.astype(np.int64), images == 255


def _place(images: NDArray[np.uint8], mark: NDArray[np.int64], side: int, cell: int, margin: int) -> None:
    """Draw a mark into a cell of each image: as large in all mazes, in the middle of its cell."""
    n = np.arange(len(images))
    top, left = (margin + 1 + (cell - 4) // 2 + place * cell for place in (mark // side, mark % side))
    for dy in range(_MARK):
        for dx in range(_MARK):
            images[n, top + dy, left + dx] = 255


def _edges(side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The two cells of every passage that there could be: to the right, then down."""
    cells = np.arange(side * side).reshape(side, side)
    right = cells[:, :-1].ravel(), cells[:, 1:].ravel()
    down = cells[:-1].ravel(), cells[1:].ravel()
    return np.concatenate((right[0], down[0])), np.concatenate((right[1], down[1]))


def _components(count: int, side: int, n: NDArray[np.int64], edge: NDArray[np.int64]) -> NDArray[np.int64]:
    """Region of each cell (count, cells) where the passages `edge` of images `n` are open."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = _edges(side)
    cells = side * side
    shape = (count * cells, count * cells)
    graph = coo_array((np.ones(len(n), np.int8), (n * cells + first[edge], n * cells + second[edge])), shape)
    return connected_components(graph, directed=False)[1].reshape(count, cells)


def _spanning_trees(rng: Generator, count: int, side: int) -> NDArray[np.bool_]:
    """Open passages (count, edges) of mazes with exactly one way between any two cells."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import minimum_spanning_tree

    first, second = _edges(side)
    cells, edges = side * side, len(first)
    base = np.arange(count)[:, None] * cells
    weights = rng.uniform(1, 2, (count, edges))
    place = (base + first).ravel(), (base + second).ravel()
    tree = minimum_spanning_tree(coo_array((weights.ravel(), place), (count * cells, count * cells))).tocoo()
    number = np.zeros((cells, 2), np.int64)
    number[first[: edges // 2], 0] = np.arange(edges // 2)
    number[first[edges // 2 :], 1] = np.arange(edges // 2, edges)
    low, high = np.minimum(tree.row, tree.col), np.maximum(tree.row, tree.col)
    is_open = np.zeros((count, edges), bool)
    is_open[low // cells, number[low % cells, (high - low == side).astype(np.int64)]] = True
    return is_open


def _cut(
    rng: Generator, passages: NDArray[np.bool_], side: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Wall up one passage, of a few the one that leaves the most equal halves: passages and regions."""
    count = len(passages)
    best = np.full(count, -1.0)
    kept = passages.copy()
    region = np.zeros((count, side * side), np.int64)
    n = np.arange(count)
    for _ in range(_CUTS):
        trial = passages.copy()
        trial[n, np.where(passages, rng.random(passages.shape), -1.0).argmax(1)] = False
        regions = _components(count, side, *np.nonzero(trial))
        part = regions == regions[:, :1]
        balance = np.minimum(part.mean(1), 1 - part.mean(1))
        better = balance > best
        best = np.where(better, balance, best)
        kept[better], region[better] = trial[better], part[better]
    return kept, region


def _marks(
    rng: Generator,
    region: NDArray[np.int64],
    labels: NDArray[np.int64],
    side: int,
    reach: tuple[float, float],
) -> NDArray[np.int64]:
    """Two cells (count, 2) in the same region or not, at a distance drawn without regard to which."""
    count, cells = region.shape
    n = np.arange(count)[:, None]
    first = rng.integers(0, cells, (count, _PAIRS))
    wanted_region = region[n, first] ^ (1 - labels[:, None])
    chances = rng.random((count, _PAIRS, cells), np.float32)
    second = np.where(region[:, None] == wanted_region[..., None], chances, np.float32(-1)).argmax(-1)
    distance = np.hypot(first // side - second // side, first % side - second % side)
    wanted = rng.uniform(*reach, (count, 1)) * side
    best = np.where(distance > 1, np.abs(distance - wanted), np.inf).argmin(1)[:, None]
    return np.concatenate((first[n, best], second[n, best]), axis=1)


def _cells(images: NDArray[np.uint8], top: int, left: int, side: int, cell: int) -> NDArray[np.uint8]:
    return images[:, top : top + cell * side : cell, left : left + cell * side : cell]


def _open(images: NDArray[np.uint8], passages: NDArray[np.bool_], margin: int, side: int, cell: int) -> None:
    """Draw open passages between cells."""
    right = passages[:, : side * (side - 1)].reshape(-1, side, side - 1)
    down = passages[:, side * (side - 1) :].reshape(-1, side - 1, side)
    wall = margin + cell
    for along in range(cell - 1):
        start = margin + 1 + along
        image = images[:, start : start + cell * side : cell, wall : wall + cell * (side - 1) : cell]
        image[right] = 128
        image = images[:, wall : wall + cell * (side - 1) : cell, start : start + cell * side : cell]
        image[down] = 128
