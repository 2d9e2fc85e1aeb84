"""Draw the pictures of docs/backends.md that show how the CUDA kernels divide their work.

    python docs/images/cuda_pictures.py        writes cuda_*.svg beside this file

Needs nothing but Python. A picture is a function below; its numbers are chosen to be seen, not the planner's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cuda_tile_pictures import planes_tiles, strips, strips_vertical, tiles
from picture import Picture

HERE = Path(__file__).parent


def resident() -> Picture:
    """Whole images in shared memory."""
    p = Picture("resident: an image stays in shared memory and is scanned four ways at once", 372)
    p.text(20, 24, "Memory", "h")
    p.text(214, 24, "Shared memory of a block: one image, some channels", "h")
    p.text(700, 24, "Memory", "h")
    for row in range(4):
        for column in range(4):
            x, y = 20 + 33 * column, 44 + 33 * row
            p.box(x, y, 30, 30, "z")
            for part, kind in enumerate("ppppsst"):
                p.box(x + 2 + 3.8 * part, y + 4, 3.8, 22, kind)
    p.paragraph(20, 196, "pixels: records of lam, gate, taps", width=130, kind="f")
    p.path([(156, 110), (206, 110)])
    p.paragraph(160, 84, "slabs of rows", width=60, kind="f", step=15)
    directions = [("down", (0, 1)), ("up", (0, -1)), ("right", (1, 0)), ("left", (-1, 0))]
    for number, (name, (right, down)) in enumerate(directions):
        x, y = 214 + 116 * number, 62
        p.text(x + 48, y - 8, name, "m")
        p.box(x, y, 96, 96, "p")
        p.box(x, y + 104, 96, 22, "s")
        p.text(x + 48, y + 119, "weights", "m")
        middle = (x + 48, y + 48)
        for shift in (-30, 0, 30):
            start = (middle[0] - 32 * right + shift * down, middle[1] - 32 * down + shift * right)
            end = (middle[0] + 32 * right + shift * down, middle[1] + 32 * down + shift * right)
            p.path([start, end], "k")
    p.paragraph(
        214,
        212,
        "For each direction its lam and gate, and its weights, normalised once by all threads. Right "
        "and left lie with rows and columns exchanged, so that a line is a row in all four. x lies "
        "both ways. One warp scans one direction of one unit of channels: a whole line in registers, "
        "neighbours by shuffle, no barrier. gate h replaces, in float32, the lam and gate that nobody"
        " needs any more.",
        width=580,
    )
    p.boxes(700, 66, (22, 22), 4, 4, "t")
    p.path([(682, 110), (696, 110)])
    p.text(700, 172, "y: the sum,", "f")
    p.text(700, 190, "rounded once", "f")
    p.text(20, 306, "Few images", "h")
    p.paragraph(
        20,
        326,
        "The directions of a task go to 2 or 4 blocks of a cluster; each adds up its share of the "
        "pixels, reading the others' results in their shared memory.",
    )
    return p


def lines() -> Picture:
    """Aligned planes."""
    p = Picture("lines: rings of single threads, tiles of single warps, states sent between blocks", 590)
    _rings(p)
    _tiles(p)
    _clusters(p)
    return p


def _rings(p: Picture) -> None:
    p.text(20, 24, "Down and up: a thread's ring", "h")
    kinds = ("p", "r", "t") * 2
    for warp in range(2):
        p.text(162 + 158 * warp, 40, f"warp {warp}", "m f")
    for line, name in enumerate(("line i + 3", "line i + 2", "line i + 1")):
        p.text(20, 67 + 24 * line, name, "f")
        for thread, kind in enumerate(kinds):
            x = 92 + 48 * thread + 14 * (thread // 3)
            p.boxes(x, 51 + 24 * line, (11, 20), 4, 1, kind)
    p.box(137, 47, 50, 76, "dim")
    p.text(20, 154, "line i", "f")
    for thread in range(len(kinds)):
        x = 92 + 48 * thread + 14 * (thread // 3)
        p.path([(x + 22, 123), (x + 22, 135)], "a")
        p.boxes(x, 138, (11, 22), 4, 1, "s")
    p.path([(226, 145), (249, 145)], "k")
    p.path([(257, 153), (234, 153)], "k")
    p.text(241, 178, "edges of warps: one barrier a line", "m w")
    p.paragraph(
        20,
        206,
        "A thread copies its own places of the next lines into a part of the ring that nobody else "
        "reads: operands need no barrier. States stay in registers; neighbours are met by shuffle, "
        "those in another warp through shared memory.",
        width=375,
    )


def _tiles(p: Picture) -> None:
    p.text(430, 24, "Right and left: a warp's tile", "h")
    for sheet, kind in ((2, "t"), (1, "r"), (0, "p")):
        p.box(446 + 8 * sheet, 62 - 8 * sheet, 176, 96, kind)
    for row in range(8):
        for column in range(16):
            kind = "s" if row == 3 and column < 8 else "q" if row == 3 and column < 12 else "p"
            p.box(446 + 11 * column, 62 + 12 * row, 11, 12, kind)
    p.path([(534, 104), (588, 104)], "k")
    p.text(656, 76, "x, taps, lam, gate", "f")
    p.text(656, 108, "a thread: one row", "w")
    p.text(656, 140, "results in place of x", "f")
    p.text(534, 178, "64 bytes of each of 32 rows", "m f")
    p.paragraph(
        430,
        206,
        "A warp copies pieces of its rows and reads them back a thread a row, 16 bytes at a time: "
        "nothing is transposed and no other warp is waited for. The results take the place of x, "
        "and whole pieces are written.",
        width=375,
    )


def _clusters(p: Picture) -> None:
    p.text(20, 316, "Long lines: the blocks of a cluster", "h")
    for block, kind in enumerate(("p", "r", "t")):
        top = 334 + 80 * block
        p.box(20, top, 100, 80, kind)
        p.text(70, top + 45, f"block {block}", "m")
        x = 170 + 76 * block
        if block > 0:
            p.box(x, top - 20, 52, 20, "z")
        p.box(x, top, 52, 80, kind)
        if block < 2:
            p.box(x, top + 80, 52, 20, "z")
    p.path([(130, 374), (160, 374)], "a")
    for block in range(2):
        x, border = 170 + 76 * block, 414 + 80 * block
        p.path([(x + 52, border - 10), (x + 74, border - 10)], "k")
        p.path([(x + 76, border + 10), (x + 54, border + 10)], "k")
    p.text(412, 352, "16 states each way, every 16 lines", "w")
    p.path([(406, 358), (302, 402)], "l")
    p.path([(406, 358), (378, 482)], "l")
    p.paragraph(
        412,
        380,
        "Each block also computes 16 rows beyond its own (grey). One more of them goes wrong with each "
        "line, from the outside, until the neighbour sends what it should be: stores into the other "
        "block's shared memory, each of which counts on a barrier there. Only the threads that hold "
        "these rows wait for it, and nobody waits for what was written to memory.",
        width=395,
    )
    p.paragraph(
        412,
        536,
        "Down and up each block of the cluster scans a plane of its own, or all cut the rows of one "
        "in the same way.",
        width=395,
    )


def vertical() -> Picture:
    """Planes, down and up."""
    p = Picture("planes, down and up: a line over warps, which exchange states every few lines", 486)
    p.text(20, 24, "One line of a plane, over the warps of a block (and the blocks of a cluster)", "h")
    names, kinds = ("warp 0", "warp 1", "warp 2"), ("p", "r", "t")
    for number, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        p.box(40 + 240 * number, 40, 240, 26, kind)
        p.text(160 + 240 * number, 58, name, "m")
    for number, kind in enumerate(kinds):
        left, right = max(40, 40 + 240 * number - 40), min(760, 280 + 240 * number + 40)
        p.box(left, 78 + 30 * number, right - left, 22, "z")
        p.box(40 + 240 * number, 78 + 30 * number, 240, 22, kind)
    p.paragraph(
        40,
        188,
        "Each warp also holds some places beyond its own (grey), which another warp computes as well.",
        kind="f",
    )
    p.text(20, 232, "What warp 1 knows, line after line", "h")
    places, first, own = 40, 4, 36
    for line in range(9):
        for place in range(places):
            good = line % 4 <= place < places - line % 4
            mine = first <= place < own
            kind = "r" if mine else "z" if good else "o"
            p.box(40 + 10 * place, 246 + 15 * line, 10, 15, kind)
    p.path([(470, 306), (446, 306)], "k")
    p.path([(470, 366), (446, 366)], "k")
    p.text(476, 311, "exchange through shared memory,", "w")
    p.text(476, 328, "one barrier", "w")
    p.text(476, 371, "the next one", "w")
    p.paragraph(
        476,
        256,
        "A place beyond whose neighbour is missing goes wrong (white), one more each line.",
        width=310,
    )
    p.text(20, 418, "Operands", "h")
    p.paragraph(
        20,
        438,
        "Stages of several lines come into a ring in shared memory by asynchronous or bulk copies: "
        "one stage is computed while the next are on their way. Per place: three taps, x, lam, gate, "
        "and the float32 sum of the directions before. Blocks of a cluster exchange in the same way, "
        "less often, over more places.",
    )
    return p


def horizontal() -> Picture:
    """Planes, right and left."""
    p = Picture("planes, right and left: a thread takes 16 bytes of its rows, column by column", 380)
    p.text(20, 24, "A plane: memory runs along the scan", "h")
    rows, columns, size = 12, 30, 13
    for row in range(rows):
        for column in range(columns):
            kind = "p" if 8 <= column < 24 else "o"
            if row in (4, 5) and 8 <= column < 16:
                kind = "s"
            p.box(20 + size * column, 44 + size * row, size, size, kind)
    p.path([(20 + 8 * size, 216), (20 + 24 * size, 216)])
    p.text(20 + 16 * size, 234, "a stage: 64 bytes of every row", "m f")
    p.path([(40, 258), (390, 258)], "k")
    p.text(215, 276, "right: the lines are columns", "m w")
    p.text(450, 24, "A thread: two rows, a vector of columns", "h")
    x, y, cell = 462, 60, 36
    for column in range(8):
        for row in range(2):
            p.box(x + cell * column, y + 46 * row, cell, 34, "s" if column > 2 else "q")
        p.text(x + cell * column + 18, y + 104, str(column), "m f")
    p.text(x - 10, y - 10, "h", "f")
    for column in range(7):
        p.path([(x + cell * column + 22, y + 17), (x + cell * column + 50, y + 17)], "a")
        p.path([(x + cell * column + 22, y + 63), (x + cell * column + 50, y + 63)], "a")
        p.path([(x + cell * column + 22, y + 26), (x + cell * column + 50, y + 54)], "l")
        p.path([(x + cell * column + 22, y + 54), (x + cell * column + 50, y + 26)], "l")
    p.paragraph(
        450,
        196,
        "16 bytes of each operand and row go to registers; 8 columns of bfloat16 are computed from "
        "there, rows beyond the thread's two by shuffle. Results fill 16 bytes again and are stored "
        "whole.",
        width=350,
    )
    p.text(20, 312, "Nothing is transposed", "h")
    p.paragraph(
        20,
        332,
        "Neighbouring threads read neighbouring rows. In shared memory the vectors of a row are "
        "permuted by its number, so that eight threads meet eight different banks, and whole sectors "
        "are fetched from memory.",
    )
    return p


def pixels() -> Picture:
    """Channels innermost."""
    p = Picture("pixels: a vector of channels a thread; opposite directions meet in the middle", 432)
    p.text(20, 24, "A line: places, channels adjacent", "h")
    for place in range(6):
        for vector in range(2):
            x, y = 20 + 66 * place, 42 + 70 * vector
            for channel in range(4):
                p.box(x + 14 * channel, y, 14, 40, "s" if (place, vector) == (2, 0) else "p")
        p.text(48 + 66 * place, 172, f"place {place}", "m f")
    p.path([(152 - 10, 62), (152 - 30, 62)], "k")
    p.path([(208 + 12, 62), (208 + 32, 62)], "k")
    p.paragraph(
        20,
        202,
        "A thread: one vector of channels (up to 16 bytes) at one place, or at 2 or 4 neighbouring "
        "ones. Its operands come through a ring of its own, several lines deep: nobody waits for "
        "them. States at its edges meet the neighbours' in shared memory, with one barrier a line. "
        "Shared taps are normalised once for all channels, several lines together, by all threads.",
        width=390,
    )
    p.text(440, 24, "Opposite directions, two blocks of a cluster", "h")
    for number, words in enumerate(("first half of the time", "second half")):
        x = 452 + 186 * number
        p.box(x, 44, 150, 75, "p")
        p.box(x, 119, 150, 75, "r")
        p.text(x + 75, 214, words, "m f")
    p.path([(500, 50), (500, 112)], "k")
    p.path([(555, 188), (555, 126)], "k")
    p.text(508, 80, "block 0, down", "")
    p.text(473, 166, "block 1, up", "")
    p.path([(686, 112), (686, 50)], "k")
    p.path([(741, 126), (741, 188)], "k")
    p.text(694, 80, "block 0, up", "")
    p.text(646, 166, "block 1, down", "")
    p.paragraph(
        440,
        244,
        "They meet in the middle, hand over their states, and turn round: each block goes back over "
        "the half that it has just read, so x and the float32 sums come from the cache. With few "
        "images both axes run at the same time (four blocks) and their sums are added at the end.",
        width=370,
    )
    p.text(20, 366, "Long lines", "h")
    p.paragraph(
        20,
        386,
        "A line is split over more blocks of the cluster. Each computes 8 places more on either side "
        "and exchanges states every 8 lines, as warps do in planes.",
    )
    return p


def generic() -> Picture:
    """Any strides."""
    p = Picture("generic: any strides, two lines of states in turn, one barrier a line", 262)
    p.text(20, 24, "A block: some channels of one image, one direction after another", "h")
    p.text(20, 60, "line i - 1", "f")
    p.text(20, 150, "line i", "f")
    for place in range(14):
        p.box(100 + 30 * place, 42, 30, 28, "p")
        p.box(100 + 30 * place, 132, 30, 28, "s" if place == 6 else "p")
    for place, kind in ((5, "a"), (6, "k"), (7, "a")):
        p.path([(115 + 30 * place, 72), (115 + 180 + 5 * (place - 6), 129)], kind)
    p.text(100, 104, "states, float32", "f")
    p.text(100, 119, "in shared memory", "f")
    p.paragraph(
        548,
        60,
        "x, lam, gate and taps: read through their strides, the next line's while this one is computed",
        kind="f",
        width=250,
    )
    p.path([(540, 92), (318, 132)])
    p.paragraph(
        20,
        194,
        "Threads run along whichever axis is adjacent in memory. Two lines of states take turns, one "
        "barrier each; a line that is too long for shared memory has them in global memory. The sum "
        "over directions is float32 in y itself, or in scratch memory for 16-bit tensors, and is "
        "rounded by the last direction.",
    )
    return p


def backward() -> Picture:
    """Lines and segments of the adjoint."""
    p = Picture("backward: states are kept at every segment and computed again inside it", 330)
    p.text(20, 24, "One direction, its lines from the first to the last", "h")
    for line in range(48):
        kind = "z" if line // 8 % 2 else "o"
        p.box(40 + 15 * line, 40, 15, 26, kind)
    for segment in range(6):
        p.text(100 + 120 * segment, 84, f"segment {segment}", "m f")
    p.text(40, 122, "1. Forward, keeping only the state that enters each segment", "")
    p.path([(40, 138), (758, 138)], "a")
    for segment in range(1, 6):
        p.box(36 + 120 * segment, 132, 8, 12, "s")
    p.text(40, 182, "2. Segment after segment, the last one first:", "")
    for number, segment in enumerate((5, 4, 3)):
        x, y = 40 + 120 * segment, 200 + 26 * number
        p.path([(x, y), (x + 116, y)], "a")
        p.path([(x + 116, y + 10), (x, y + 10)], "k")
        if number < 2:
            p.path([(x, y + 12), (x - 4, y + 24)], "l")
    p.text(40, 216, "forward again, its states stay on the chip,")
    p.text(40, 234, "then back, with what the later lines hand on:", "w")
    p.text(40, 252, "gradients of x, lam, gate and taps", "w")
    p.paragraph(
        40,
        298,
        "Extra memory: one line of float32 states for each segment, and float32 sums over directions "
        "(dx) and over the channels of a group (taps). Nothing is added by atomics: the order of "
        "every sum is fixed.",
    )
    return p


PICTURES: dict[str, Callable[[], Picture]] = {
    "cuda_resident": resident,
    "cuda_lines": lines,
    "cuda_planes_vertical": vertical,
    "cuda_planes_horizontal": horizontal,
    "cuda_strips": strips,
    "cuda_strips_vertical": strips_vertical,
    "cuda_pixels": pixels,
    "cuda_tiles": tiles,
    "cuda_planes_tiles": planes_tiles,
    "cuda_generic": generic,
    "cuda_backward": backward,
}


def main() -> None:
    for name, draw in PICTURES.items():
        path = HERE / f"{name}.svg"
        path.write_text(draw().svg(), encoding="utf-8")
        print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
