"""Pictures of the CUDA kernels whose warps copy for others, and of those that cut images into tiles."""

from __future__ import annotations

from picture import Picture


def strips() -> Picture:
    """Right and left, a warp a strip of rows."""
    p = Picture("strips: a warp holds rows of a column, other warps copy, strips meet every 16 lines", 470)
    p.text(20, 24, "A block: rows of a plane, and who holds them", "h")
    for row in range(16):
        for column in range(14):
            kind = "q" if column == 5 else "p" if 4 <= column < 12 else "o"
            p.box(20 + 14 * column, 40 + 14 * row, 14, 14, kind)
    p.path([(76, 280), (188, 280)], "a")
    p.text(132, 298, "a tile: 64 bytes of every row", "m f")
    for number, (first, last, kind) in enumerate(((0, 6, "r"), (5, 11, "t"), (10, 16, "s"))):
        x = 232 + 58 * number
        p.box(x, 40 + 14 * first, 52, 14 * (last - first), "z")
        inner_first = first + (1 if number else 0)
        inner_last = last - (1 if number < 2 else 0)
        p.box(x, 40 + 14 * inner_first, 52, 14 * (inner_last - inner_first), kind)
        p.text(x + 26, 44 + 7 * (first + last), f"strip {number}", "m")
    p.text(240, 284, "a warp each; grey:", "f")
    p.text(240, 302, "neighbours' rows", "f")
    p.text(420, 24, "A lane: three neighbouring rows", "h")
    for lane in range(4):
        for row in range(3):
            p.box(430 + 98 * lane, 44 + 24 * row, 64, 24, "q" if row == 1 else "p")
        p.text(462 + 98 * lane, 134, f"lane {lane}", "m f")
    for lane in range(3):
        p.path([(494 + 98 * lane, 104), (526 + 98 * lane, 60)], "k")
        p.path([(528 + 98 * lane, 52), (496 + 98 * lane, 96)], "k")
    p.paragraph(
        420,
        160,
        "A line takes two shuffles for all three rows. 16 bytes of each row and operand, 8 columns of "
        "bfloat16, are in registers; the next 16 bytes are read while these are scanned.",
        width=385,
    )
    p.text(420, 236, "Every 16 lines: the true states of the grey rows", "w")
    p.paragraph(
        420,
        256,
        "In a block through shared memory, across a cluster by st.async, which counts on an mbarrier "
        "where it arrives. No line has a barrier.",
        width=385,
    )
    p.text(20, 336, "Who copies", "h")
    for number, (words, kind) in enumerate(
        (("tile i + 1 arrives", "o"), ("tile i is scanned", "q"), ("results of tile i", "t"))
    ):
        p.box(20 + 180 * number, 350, 160, 30, kind)
        p.text(100 + 180 * number, 370, words, "m")
        if number < 2:
            p.path([(180 + 180 * number, 365), (200 + 180 * number, 365)], "a")
    p.paragraph(
        20,
        408,
        "Warps that scan do nothing else. Others ask for tiles by asynchronous copies, which complete an "
        "mbarrier themselves, and write results from shared memory, whole pieces of rows. Two tiles are "
        "on their way; those of several planes follow each other without a gap.",
    )
    return p


def strips_vertical() -> Picture:
    """Down and up, a warp a strip of columns."""
    p = Picture("strips_vertical: a warp holds a strip of a line, other warps copy", 372)
    p.text(20, 24, "A block: 128 columns of its own, 16 lines a tile", "h")
    for row in range(8):
        for column in range(28):
            own = 4 <= column < 24
            kind = ("s" if row == 3 else "p") if own else "z"
            p.box(20 + 16 * column, 40 + 16 * row, 16, 16, kind)
    p.path([(480, 44), (480, 164)], "k")
    p.text(488, 108, "lines", "w")
    for number, (first, last, kind) in enumerate(((0, 16, "r"), (12, 28, "t"))):
        y = 184 + 30 * number
        p.box(20 + 16 * first, y, 16 * (last - first), 22, "z")
        p.box(20 + 16 * (first + 4), y, 16 * (last - first - 8), 22, kind)
        p.text(20 + 8 * (first + last), y + 16, f"warp {number}", "m")
    p.text(20, 266, "grey: neighbours' columns, good until the next exchange", "f")
    p.text(560, 24, "A line of a warp", "h")
    for lane in range(5):
        p.boxes(560 + 48 * lane, 44, (20, 24), 2, 1, "p")
        p.boxes(560 + 48 * lane, 104, (20, 24), 2, 1, "s")
        if lane < 4:
            p.path([(600 + 48 * lane, 70), (614 + 48 * lane, 102)], "k")
            p.path([(608 + 48 * lane, 70), (594 + 48 * lane, 102)], "k")
    p.text(560, 148, "line i: shuffle, multiply-adds", "f")
    p.paragraph(
        560,
        176,
        "Two places a lane in 16 bits, four in float32. Operands are read a line ahead, addresses are "
        "registers and constants.",
        width=245,
    )
    p.text(20, 304, "Exchange", "h")
    p.paragraph(
        20,
        324,
        "Every 16 or 32 lines strips send each other the states that have gone wrong, in the block and "
        "across the cluster. Between these a warp waits for nobody but the copy of its next tile. A line "
        "of up to 128 places is one warp's alone.",
    )
    return p


def tiles() -> Picture:
    """Channels innermost, tiles by themselves."""
    p = Picture("tiles: each tile alone, what enters it, each tile again", 398)
    for number, words in enumerate(("1. Each tile alone", "2. What enters", "3. Each tile again")):
        p.text(20 + 272 * number, 24, words, "h")
    for number in range(3):
        left = 20 + 272 * number
        for row in range(3):
            for column in range(4):
                x, y = left + 58 * column, 44 + 58 * row
                p.box(x, y, 52, 52, ("p", "o", "p")[number])
                if number == 0:
                    p.box(x, y + 46, 52, 6, "s")
                    p.box(x, y, 6, 46, "r")
                    p.box(x + 46, y, 6, 46, "r")
                    p.path([(x + 26, y + 8), (x + 26, y + 40)], "a")
                if number == 1:
                    p.box(x, y + 46, 52, 6, "s")
                    p.box(x, y, 6, 46, "r")
                    p.box(x + 46, y, 6, 46, "r")
                if number == 2:
                    for dx, dy in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                        middle = (x + 26 + 8 * dy, y + 26 + 8 * dx)
                        start = (middle[0] - 16 * dx, middle[1] - 16 * dy)
                        end = (middle[0] + 16 * dx, middle[1] + 16 * dy)
                        p.path([start, end], "k")
        if number == 1:
            p.path([(left + 26, 50), (left + 26, 208)], "k")
            p.path([(left + 142, 50), (left + 142, 208)], "k")
    for number in range(2):
        p.path([(260 + 272 * number, 130), (286 + 272 * number, 130)], "a")
    p.paragraph(
        20,
        240,
        "x, lam and logits once, whole runs of pixels. Weights are made. All directions, as if nothing "
        "came from outside: states p. Left: p at the borders (orange), and the weights.",
        width=240,
    )
    p.paragraph(
        292,
        240,
        "The whole image line by line, from weights and borders alone. What is missing from p follows "
        "the recurrence without input, q = W q, and takes the neighbours' true states at borders. Left: "
        "true states there.",
        width=240,
    )
    p.paragraph(
        564,
        240,
        "x, lam, gate and weights again. All directions from true states at the borders; gates; the sum "
        "over directions stays in shared memory; y is written once.",
        width=240,
    )
    p.paragraph(
        20,
        372,
        "Backward: the same for states and for what the later lines hand back, then all gradients of a tile.",
        kind="f",
    )
    return p


def planes_tiles() -> Picture:
    """Planes: walks leave what enters tiles."""
    p = Picture("planes_tiles: walks over the plane leave what enters tiles; every tile is then alone", 440)
    p.text(20, 24, "Walks, one direction each", "h")
    left, top, cell = 20, 44, 11
    for row in range(16):
        for column in range(24):
            kind = "s" if row % 8 == 7 else "r" if column % 8 in (0, 7) else "p"
            p.box(left + cell * column, top + cell * row, cell, cell, kind)
    for line in (1, 2):
        p.path([(left, top + 88 * line), (left + 264, top + 88 * line)], "l")
    for line in (1, 2):
        p.path([(left + 88 * line, top), (left + 88 * line, top + 176)], "l")
    p.path([(298, 50), (298, 214)], "k")
    p.text(306, 120, "down", "w")
    p.paragraph(
        20,
        242,
        "A walk scans whole lines, from the weights, x and lam, and writes nothing but what tiles need: the "
        "line before each half of a tile (dark), and for each line what comes from beside the tile "
        "(light), 4 numbers for 32 places.",
        width=330,
    )
    p.text(400, 24, "A tile of 32 x 32: a warp takes 16 lines", "h")
    p.box(420, 50, 150, 150, "p")
    p.box(420, 50, 150, 75, "r")
    p.text(495, 92, "warp 0: down,", "m")
    p.text(495, 110, "lines 0 to 15", "m")
    p.text(495, 168, "warp 1", "m")
    p.box(620, 50, 150, 150, "p")
    p.box(620, 50, 75, 150, "t")
    p.text(657, 118, "warp 4:", "m")
    p.text(657, 136, "right", "m")
    p.text(732, 128, "warp 5", "m")
    p.path([(495, 36), (495, 48)], "k")
    p.path([(606, 125), (618, 125)], "k")
    p.paragraph(
        400,
        228,
        "A lane has a place of the line. Backward: states on the way there stay in registers, all "
        "gradients are made on the way back. The warps of all directions read the same x and dy; what "
        "they have of dx meets in shared memory. Gradients of shared taps are summed in registers over "
        "all channels of the group.",
        width=405,
    )
    p.text(20, 366, "What travels", "h")
    p.paragraph(
        20,
        386,
        "Each operand is read by one walk in each of its directions, and once by the tiles; weights are made "
        "once for all channels that share taps. Neither states nor sums of a whole plane are ever in "
        "memory.",
    )
    return p
