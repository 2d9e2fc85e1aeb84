"""What else the CPU kernel could have been written with: one problem, one thread, several technologies.

    python benchmarks/technology.py         all that can run here, about two minutes

One direction with given taps, so that each contender is a few lines. Every result is compared with the
reference in float64 before anything is timed; contenders are then timed in turn. The first result is measured
in a fresh process with empty caches, PyTorch imported: further imports, compilation and the call.
The table in docs/cpu.md is made from benchmarks/results/cpu/technology.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common import interleaved, rotating_copy, save

SIZE = (1, 8, 512, 512)
# torch.compile unrolls the loop over lines; it may try for so long before it gets a piece of it instead.
COMPILE_SECONDS = 60
PIECE_LINES = 32
Scan = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, lam (B, C, H, W), w (B, 1, 3, H, W) -> h (B, C, H, W)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """x, lam and row-stochastic w, the same in every process."""
    torch.manual_seed(0)
    batch, _, height, width = SIZE
    w = torch.rand(batch, 1, 3, height, width)
    return torch.randn(SIZE), torch.randn(SIZE), w / w.sum(dim=2, keepdim=True)


def lines_loop(h: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """From state h (B, C, W) over the lines of u (B, C, L, W) and w (B, 1, 3, L, W): every state."""
    states = []
    for u_i, w_i in zip(u.unbind(2), w.unbind(3), strict=True):
        before = F.pad(h, (1, 1))
        left, centre, right = w_i.unbind(2)
        h = left * before[..., :-2] + centre * before[..., 1:-1] + right * before[..., 2:] + u_i
        states.append(h)
    return torch.stack(states, dim=2)


def eager() -> Scan:
    return lambda x, lam, w: lines_loop(torch.zeros_like(x[:, :, 0]), lam * x, w)


def compiled(lines: int) -> Scan:
    """The loop compiled for `lines` lines, carrying the state from one piece of the image to the next."""
    piece = torch.compile(lines_loop, fullgraph=True, dynamic=False)

    def scan(x: Tensor, lam: Tensor, w: Tensor) -> Tensor:
        u = lam * x
        done = [torch.zeros_like(u[:, :, :lines])]
        for first in range(0, x.shape[2], lines):
            here = slice(first, first + lines)
            # A copy of the state, because it would otherwise come with other strides than the first one.
            done.append(piece(done[-1][:, :, -1].clone(), u[:, :, here], w[:, :, :, here]))
        return torch.cat(done[1:], dim=2) if len(done) > 2 else done[1]

    return scan


def numba_scalar() -> Scan:
    """Plain loops over arrays; whether they become vector instructions is up to LLVM."""
    import numba

    @numba.njit(nogil=True)
    def kernel(x, lam, w, h):  # type: ignore[no-untyped-def]
        batch, channels, height, width = x.shape
        for b in range(batch):
            for c in range(channels):
                for j in range(width):
                    h[b, c, 0, j] = lam[b, c, 0, j] * x[b, c, 0, j]
                for i in range(1, height):
                    before, here = h[b, c, i - 1], h[b, c, i]
                    x_i, lam_i = x[b, c, i], lam[b, c, i]
                    left, centre, right = w[b, 0, 0, i], w[b, 0, 1, i], w[b, 0, 2, i]
                    for j in range(1, width - 1):
                        s = left[j] * before[j - 1] + centre[j] * before[j] + right[j] * before[j + 1]
                        here[j] = s + lam_i[j] * x_i[j]
                    last = width - 1
                    s = centre[0] * before[0] + right[0] * before[1]
                    here[0] = s + lam_i[0] * x_i[0]
                    s = left[last] * before[last - 1] + centre[last] * before[last]
                    here[last] = s + lam_i[last] * x_i[last]

    def scan(x: Tensor, lam: Tensor, w: Tensor) -> Tensor:
        h = torch.empty_like(x)
        kernel(x.numpy(), lam.numpy(), w.numpy(), h.numpy())
        return h

    return scan


def numba_vectors() -> Scan:
    """What gspn2 ships."""
    import gspn2

    return lambda x, lam, w: gspn2.line_scan(x, lam, w, direction="down", backend="cpu")


C_SOURCE = """
static void line(const float *restrict before, const float *restrict x, const float *restrict lam,
                 const float *restrict left, const float *restrict centre, const float *restrict right,
                 float *restrict h, long width)
{
    h[0] = centre[0] * before[0] + right[0] * before[1] + lam[0] * x[0];
    for (long j = 1; j < width - 1; j++)
        h[j] = left[j] * before[j - 1] + centre[j] * before[j] + right[j] * before[j + 1] + lam[j] * x[j];
    long last = width - 1;
    h[last] = left[last] * before[last - 1] + centre[last] * before[last] + lam[last] * x[last];
}

void scan(const float *x, const float *lam, const float *w, float *h,
          long batch, long channels, long height, long width)
{
    long plane = height * width;
    for (long b = 0; b < batch; b++)
        for (long c = 0; c < channels; c++) {
            const float *taps = w + 3 * b * plane;
            long at = (b * channels + c) * plane;
            for (long j = 0; j < width; j++)
                h[at + j] = lam[at + j] * x[at + j];
            for (long i = 1; i < height; i++) {
                long row = i * width;
                line(h + at + row - width, x + at + row, lam + at + row,
                     taps + row, taps + plane + row, taps + 2 * plane + row, h + at + row, width);
            }
        }
}
"""


def c_loop() -> Scan:
    """Plain loops in C with restrict pointers, which the compiler vectorizes."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "scan.c"), Path(folder, "scan.so")
        source.write_text(C_SOURCE)
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        kernel = ctypes.CDLL(str(library)).scan
    kernel.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 4
    kernel.restype = None

    def scan(x: Tensor, lam: Tensor, w: Tensor) -> Tensor:
        h = torch.empty_like(x)
        kernel(x.data_ptr(), lam.data_ptr(), w.data_ptr(), h.data_ptr(), *x.shape)
        return h

    return scan


CONTENDERS: dict[str, tuple[str, str, Callable[[], Scan]]] = {
    "eager": ("PyTorch, eager loop over lines", "nothing", eager),
    "compiled": (
        "torch.compile of that loop, unrolled",
        "a C++ compiler on the user's machine",
        lambda: compiled(SIZE[2]),
    ),
    "compiled-piece": (
        f"torch.compile of {PIECE_LINES} lines of that loop, {SIZE[2] // PIECE_LINES} calls",
        "a C++ compiler on the user's machine",
        lambda: compiled(PIECE_LINES),
    ),
    "c": (
        "C, plain loops, cc -O3 -march=native",
        "a C compiler on the user's machine, or a wheel for every system and Python",
        c_loop,
    ),
    "numba-scalar": ("Numba, plain loops", "Numba, a wheel", numba_scalar),
    "numba-vectors": ("Numba, explicit vectors (gspn2)", "Numba, a wheel", numba_vectors),
}


def first_call(name: str, caches: Path, limit: float) -> float | None:
    """Seconds to the first result in a fresh process with empty caches; None past `limit`."""
    caches.mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--first", name, "--caches", str(caches)]
    # A session of its own, because a compilation has children, which have to go with it.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return None
    if process.returncode:
        raise SystemExit(f"{name} failed in a fresh process")
    return float(json.loads(output.splitlines()[-1]))


def use_caches(caches: Path) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(caches / "inductor")
    os.environ["NUMBA_CACHE_DIR"] = str(caches / "numba")


def report_first_call(name: str) -> None:
    inputs = operands()
    begin = time.perf_counter()
    with torch.no_grad():
        CONTENDERS[name][2]()(*inputs)
    print(json.dumps(time.perf_counter() - begin))


def refuse_if_wrong(name: str, scan: Scan, inputs: tuple[Tensor, ...], truth: Tensor) -> None:
    error = float((scan(*inputs) - truth).norm() / truth.norm())
    if not error < 1e-6:
        raise SystemExit(f"{name} is wrong: relative error {error:.2e}; nothing was timed")


def compare(caches: Path) -> None:
    import gspn2

    use_caches(caches)
    limits = dict.fromkeys(CONTENDERS, 10 * COMPILE_SECONDS) | {"compiled": COMPILE_SECONDS}
    tried: list[str] = []
    first: dict[str, float] = {}
    for name, limit in limits.items():
        if (name == "c" and not shutil.which("cc")) or (name == "compiled-piece" and "compiled" in first):
            continue
        tried.append(name)
        seconds = first_call(name, caches, limit)
        if seconds is None:
            print(f"{name}: given up after {limit} s", flush=True)
        else:
            print(f"{name}: first result after {seconds:.1f} s", flush=True)
            first[name] = seconds

    inputs = operands()
    x, lam, w = (tensor.double() for tensor in inputs)
    truth = gspn2.line_scan(x, lam, w, direction="down", backend="reference")
    with torch.no_grad():
        scans = {name: CONTENDERS[name][2]() for name in first}
        for name, scan in scans.items():
            refuse_if_wrong(name, scan, inputs, truth)
        size = sum(tensor.nbytes for tensor in inputs) + truth.numel() * 4
        calls = {name: (lambda scan=scan: scan(*inputs)) for name, scan in scans.items()}
        times = interleaved({**calls, "copy": rotating_copy(size)}, seconds=12)

    rows = []
    for name in tried:
        title, needs, _ = CONTENDERS[name]
        done = name in first
        rows.append(
            {
                "name": title,
                "forward_ms": times[name]["median_ms"] if done else None,
                "fastest_ms": times[name]["fastest_ms"] if done else None,
                "first_call_seconds": first.get(name),
                "note": f"needs {needs}" + ("" if done else f"; given up after {limits[name]} s"),
            }
        )
        if done:
            print(f"{title:60} {times[name]['median_ms']:8.2f} ms, first result {first[name]:6.1f} s")
    print(f"{'a copy of the same bytes':60} {times['copy']['median_ms']:8.2f} ms")
    problem = (
        f"line_scan, direction down, x and lam {SIZE}, one group of taps, float32, one thread, "
        f"{size / 1e6:.0f} MB read and written"
    )
    save("cpu/technology", {"problem": problem, "copy_ms": times["copy"]["median_ms"], "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--caches", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.first:
        use_caches(arguments.caches)
        report_first_call(arguments.first)
        return
    with tempfile.TemporaryDirectory() as caches:
        compare(Path(caches))


if __name__ == "__main__":
    main()
