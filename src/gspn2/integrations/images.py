"""PNG and TIFF files written in strips, so that a picture never has to be in memory as a whole.

Strips are compressed by several threads. PNG: each strip is a run of deflate blocks that ends at a byte and
refers to nothing before it (a full flush), and all runs in a row are one valid stream. TIFF: strips are
independent by the format; files that may pass 4 GiB are BigTIFF.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.uint8]  # (rows, width, 3)

SUFFIXES = (".png", ".tif", ".tiff")
LARGEST_SIDE = 1 << 29
"""Pixels: a row has to fit into a chunk of a PNG, of less than 2^31 bytes."""
_STRIP_BYTES = 4 << 20
_LEVEL = 4
# Above this a classic TIFF's 32-bit offsets might not do, even where nothing can be compressed.
_BIG = 4_000_000_000


def draft_of(path: Path) -> Path:
    """Where a picture is until it is whole; no other file beside it has as long a name."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


class ImageFile:
    """An RGB picture of 8 bits a channel that is written from top to bottom.

    Use as a context. `path` appears when the context ends well and all rows have come; else nothing is left.

    Args:
        path: ends in .png, .tif or .tiff.
        width, height: in pixels.
        threads: that compress.

    Raises:
        ValueError: another suffix, no such size, or rows that do not fit.
    """

    def __init__(self, path: str | Path, width: int, height: int, *, threads: int | None = None) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"path: expected a name that ends in {', '.join(SUFFIXES)}, got {self.path.name!r}"
            )
        if not 1 <= min(width, height) <= max(width, height) <= LARGEST_SIDE:
            raise ValueError(
                f"width, height: expected at least 1 and at most {LARGEST_SIDE}, got {width} and {height}"
            )
        self.width, self.height = width, height
        self.rows_per_strip = max(1, min(height, _STRIP_BYTES // (3 * width)))
        self._threads = threads or min(8, os.cpu_count() or 1)
        self._temporary = draft_of(self.path)

    def __enter__(self) -> ImageFile:
        self._rest: list[Rows] = []
        self._waiting = 0
        self._written = 0
        self._file: BinaryIO = open(self._temporary, "wb")
        png = self.path.suffix.lower() == ".png"
        self._format = (_Png if png else _Tiff)(self._file, self.width, self.height, self.rows_per_strip)
        self._pool = ThreadPoolExecutor(self._threads)
        self._ahead: deque[Future[bytes]] = deque()
        return self

    def write(self, rows: Rows) -> None:
        """The next rows, any number: (rows, width, 3), uint8."""
        if rows.dtype != np.uint8 or rows.ndim != 3 or rows.shape[1:] != (self.width, 3):
            raise ValueError(f"rows: expected uint8 (rows, {self.width}, 3), got {rows.dtype} {rows.shape}")
        if self._written + self._waiting + len(rows) > self.height:
            raise ValueError(f"rows: expected {self.height} in all, got more")
        self._rest.append(rows)
        self._waiting += len(rows)
        while self._waiting >= self.rows_per_strip:
            self._compress(self.rows_per_strip)

    def _compress(self, count: int) -> None:
        """Send `count` of the rows that wait to the threads, and write what those have done."""
        waiting = np.concatenate(self._rest) if len(self._rest) > 1 else self._rest[0]
        strip, rest = waiting[:count], waiting[count:]
        self._rest, self._waiting = ([rest] if len(rest) else []), len(rest)
        self._written += count
        job = self._format.job(strip, last=self._written == self.height)
        self._ahead.append(self._pool.submit(job))
        while len(self._ahead) > 2 * self._threads:
            self._format.append(self._ahead.popleft().result())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._written + self._waiting != self.height:
            raise ValueError(f"rows: expected {self.height} in all, got {self._written + self._waiting}")
        if self._waiting:
            self._compress(self._waiting)
        while self._ahead:
            self._format.append(self._ahead.popleft().result())
        self._format.finish()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)


class _Png:
    """PNG (ISO/IEC 15948): one zlib stream over all rows, each filtered by the row above it ("Up")."""

    def __init__(self, file: BinaryIO, width: int, height: int, rows_per_strip: int) -> None:
        self._file = file
        self._above: Rows = np.zeros((1, width * 3), np.uint8)
        self._checksum = 1
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
        self._first = True

    def job(self, rows: Rows, *, last: bool) -> Callable[[], bytes]:
        """What a thread has to do; called in order."""
        flat = rows.reshape(len(rows), -1)
        filtered = np.empty((len(flat), 1 + flat.shape[1]), np.uint8)
        filtered[:, 0] = 2
        np.subtract(flat, np.concatenate([self._above, flat[:-1]]), out=filtered[:, 1:])
        self._above = flat[-1:].copy()
        data = filtered.tobytes()
        self._checksum = zlib.adler32(data, self._checksum)
        tail = struct.pack(">I", self._checksum) if last else b""

        def compress() -> bytes:
            packer = zlib.compressobj(_LEVEL, wbits=-15)
            body = packer.compress(data)
            return body + packer.flush(zlib.Z_FINISH if last else zlib.Z_FULL_FLUSH) + tail

        return compress

    def append(self, data: bytes) -> None:
        """Write a strip."""
        self._chunk(b"IDAT", (b"\x78\x01" if self._first else b"") + data)
        self._first = False

    def finish(self) -> None:
        """Write what comes after the last strip."""
        self._chunk(b"IEND", b"")

    def _chunk(self, kind: bytes, data: bytes) -> None:
        checksum = zlib.crc32(data, zlib.crc32(kind))
        self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum))


class _Tiff:
    """TIFF 6.0, or BigTIFF for large pictures: deflated strips of horizontal differences."""

    def __init__(self, file: BinaryIO, width: int, height: int, rows_per_strip: int) -> None:
        self._file = file
        self._width, self._height, self._rows = width, height, rows_per_strip
        self._big = width * height * 3 > _BIG
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        # The place of the directory is filled in at the end.
        file.write(
            struct.pack("<2s3HQ", b"II", 43, 8, 0, 0) if self._big else struct.pack("<2sHI", b"II", 42, 0)
        )

    def job(self, rows: Rows, *, last: bool) -> Callable[[], bytes]:
        """What a thread has to do."""

        def compress() -> bytes:
            differences = rows.copy()
            np.subtract(rows[:, 1:], rows[:, :-1], out=differences[:, 1:])
            return zlib.compress(differences.tobytes(), _LEVEL)

        return compress

    def append(self, data: bytes) -> None:
        """Write a strip."""
        self._offsets.append(self._file.tell())
        self._sizes.append(len(data))
        self._file.write(data)

    def finish(self) -> None:
        """Write the directory, and where it is."""
        offset_type, inline = (16, 8) if self._big else (4, 4)
        entries = [
            (256, 4, [self._width]),
            (257, 4, [self._height]),
            (258, 3, [8, 8, 8]),
            (259, 3, [8]),
            (262, 3, [2]),
            (273, offset_type, self._offsets),
            (277, 3, [3]),
            (278, 4, [self._rows]),
            (279, offset_type, self._sizes),
            (284, 3, [1]),
            (317, 3, [2]),
        ]
        codes = {3: "H", 4: "I", 16: "Q"}
        fields = []
        for tag, kind, values in entries:
            data = struct.pack(f"<{len(values)}{codes[kind]}", *values)
            if len(data) > inline:
                self._align()
                place = self._file.tell()
                self._file.write(data)
                data = struct.pack("<Q" if self._big else "<I", place)
            count = struct.pack("<Q" if self._big else "<I", len(values))
            fields.append(struct.pack("<2H", tag, kind) + count + data.ljust(inline, b"\0"))
        self._align()
        place = self._file.tell()
        self._file.write(struct.pack("<Q" if self._big else "<H", len(fields)))
        self._file.write(b"".join(fields) + bytes(inline))
        self._file.seek(8 if self._big else 4)
        self._file.write(struct.pack("<Q" if self._big else "<I", place))

    def _align(self) -> None:
        self._file.write(bytes(-self._file.tell() % 8))
