"""The CUDA operator on one GPU against its targets: bandwidth, GSPN-1, latency, calls from Python, memory.

    python benchmarks/gpu.py                        all sections, under four minutes on an H200
    python benchmarks/gpu.py propagate models       these
    python benchmarks/gpu.py gspn1 --cases '1024x1024 bf16' --variants planes,generic    for kernel developers
    python benchmarks/gpu.py --device cpu           a try of this script without a GPU, on a few pixels

Sections: line_scan, gspn1, propagate, few_planes, models, calls, memory. Each writes OUT/NAME.json after
every case (default: benchmarks/results/h200) and prints a table when it is done; progress goes to stderr.
Bytes are counted as every input read once and every output written once; shares are of the bandwidth of a
large copy, timed in turn with the case. A result that is wrong has no speed, and makes the exit code 1. A
case that hangs or kills the process is noted, and the rest runs in a new one. Where there is no git,
GSPN2_COMMIT says what was measured.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gpu_calls
import gpu_report
from common import RESULTS, machine
from gpu_cases import (
    FLOOR_US,
    GSPN1,
    SECTIONS,
    Case,
    Operands,
    Wrong,
    check,
    make_inputs,
    operator_calls,
    shrunk,
)
from gpu_timing import Work, bytes_per_ms, copy, in_turn, rounded
from gspn2.bench.results import compact
from planner import Planner

NAMES = [*SECTIONS, "calls", "memory"]
HANG_SECONDS = 90
MOST_RESTARTS = 4
DONE, WRONG, LOST = 0, 1, 4
Row = dict[str, Any]


class Journal:
    """A section's result file, written after every case: what ended a process is known to the next."""

    def __init__(self, section: str, args: argparse.Namespace) -> None:
        self.path = Path(args.out) / f"{section}.json"
        self.section, self.device = section, args.device
        self.rows: list[Row] = []
        self.facts: dict[str, Any] = {}
        if args.resume and self.path.exists():
            self.rows = json.loads(self.path.read_text())["cases"]
        for row in self.rows:
            if row.pop("began", False):
                row["error"] = "hung, or ended the process"

    def begin(self, name: str) -> bool:
        """Note that a case begins; False if it did so before, in another process."""
        if any(row["name"] == name for row in self.rows):
            return False
        self.rows.append({"name": name, "began": True})
        self.save()
        return True

    def end(self, rows: list[Row]) -> None:
        self.rows[-1:] = rounded(rows)
        self.save()

    def save(self, complete: bool = False) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(self.device), "complete": complete, **self.facts, "cases": self.rows}
        self.path.write_text(compact(content) + "\n")


class Bench:
    """What the cases of one process share: the copy, the inputs of the last family, the planner."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.rounds = args.rounds
        self.variants: list[str | None] = args.variants.split(",") if args.variants else [None]
        self.backend = "cuda" if self.device.type == "cuda" else None
        self.planner = Planner(self.device)
        self.copy = copy(self.device)
        self._family: tuple[Any, ...] | None = None
        self._inputs: list[Operands] = []
        torch.manual_seed(time.time_ns() % 2**32)

    def inputs(self, case: Case) -> list[Operands]:
        if self._family != case.family:
            self._inputs = []
            self._empty_cache()
            self._family, self._inputs = case.family, make_inputs(case, self.device)
        return self._inputs

    def _empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def alive(self) -> bool:
        """Does the device still answer this process?"""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def measure(self, case: Case) -> list[Row]:
        """Check, then time the case; a row for each variant."""
        inputs = self.inputs(case)
        rows: list[Row] = []
        works = {"copy": self.copy}
        for variant in self.variants:
            self.planner.use(variant)
            self.planner.forget()
            row: Row = case.describe()
            if variant is not None:
                row["forced"] = variant
            calls = operator_calls(case, inputs, self.backend)
            try:
                row["relative_error"] = check(case, inputs[0], calls)
            except (Wrong, RuntimeError) as error:
                if not self.alive():
                    raise
                row["error"] = str(error).splitlines()[0]
            else:
                row["plans"] = self.planner.chosen()
                for which in case.passes:
                    call = self.planner.bound(variant, calls[which])
                    works[f"{variant} {which}"] = Work(call, len(inputs))
            rows.append(row)
        times = in_turn(works, self.device, self.rounds) if len(works) > 1 else {}
        for variant, row in zip(self.variants, rows, strict=True):
            if "error" not in row:
                self._judge(case, variant, row, times)
        return rows

    def _judge(self, case: Case, variant: str | None, row: Row, times: dict[str, Any]) -> None:
        bandwidth = bytes_per_ms(times["copy"], self.device)
        row["copy_gb_per_s"] = bandwidth / 1e6
        for which in case.passes:
            it = times[f"{variant} {which}"]
            size, us = case.bytes(which), 1e3 * it["ms"]
            copied = 1e3 * size / bandwidth
            it |= {"us": us, "bytes": size, "gb_per_s": size / us / 1e3, "share": copied / us}
            it["fits_in_cache"] = size <= (gpu_report.cache_bytes(self.device) or 0)
            it |= {"copy_us": copied, "over_floor": us / max(FLOOR_US, copied)}
            it["us_per_line"] = us / sum(
                case.size[2 if direction in ("down", "up") else 3] for direction in case.directions
            )
            if case.gspn1 is not None:
                old = GSPN1["rows"][case.gspn1][
                    1 + 2 * (case.dtype == torch.bfloat16) + (which == "backward")
                ]
                it |= {"gspn1_ms": old, "factor": old / it["ms"]}
            target = case.targets.get(which)
            if target is not None:
                it["target"] = {"metric": target.metric, "value": target.value}
                it["met"] = target.met(it[target.metric])
            row[which] = it


def run_section(name: str, bench: Bench, args: argparse.Namespace) -> bool:
    """Run one section; False if a result in it was wrong."""
    journal = Journal(name, args)
    journal.facts = {"section": name, "rounds": args.rounds, "l2_bytes": gpu_report.cache_bytes(bench.device)}
    if name == "gspn1":
        journal.facts["gspn1_source"] = GSPN1["source"]
    for label, work in _works(name, bench, args):
        if not journal.begin(label):
            continue
        began = time.perf_counter()
        if bench.device.type == "cuda":
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            rows = work()
        except Exception as error:
            traceback.print_exc()
            if not bench.alive():
                os._exit(LOST)
            rows = [{"name": label, "error": repr(error).splitlines()[0]}]
        finally:
            faulthandler.cancel_dump_traceback_later()
        journal.end(rows)
        wrong = "; ".join(row["error"] for row in rows if "error" in row)
        print(f"{name}: {label} {time.perf_counter() - began:.1f} s {wrong}", file=sys.stderr, flush=True)
    journal.save(complete=True)
    print(gpu_report.text(name, journal.rows), flush=True)
    return not any("error" in row for row in journal.rows)


def _works(name: str, bench: Bench, args: argparse.Namespace) -> list[tuple[str, Callable[[], list[Row]]]]:
    """Labels and functions of a section's cases."""
    wanted = re.compile(args.cases or "")
    if name == "calls":
        works = gpu_calls.calls(bench.device, bench.backend)
    elif name == "memory":
        works = gpu_calls.memory(bench.device, bench.backend)
    else:
        cases = list(SECTIONS[name]())
        if args.quick:
            cases = _fewer(cases)
        if bench.device.type == "cpu":
            cases = [shrunk(case) for case in cases]
        works = [(case.name, lambda case=case: bench.measure(case)) for case in cases]
    return [(label, work) for label, work in works if wanted.search(label)]


def _fewer(cases: list[Case]) -> list[Case]:
    """One vertical and one horizontal direction, the first and the last size of each dtype."""
    few = [case for case in cases if case.directions[0] in ("down", "right")]
    sizes = [case.size for case in few]
    return [case for case in few if case.size in (sizes[0], sizes[-1])]


def compile_ahead(sections: list[str], args: argparse.Namespace) -> None:
    """All kernels at once, on all cores; what fails here is told again by the case that needs it."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_compile.py")), "--quiet", *sections]
    for option, value in (("--cases", args.cases), ("--variants", args.variants)):
        command += [option, value] if value else []
    subprocess.run(command, check=False)


def supervise(sections: list[str], args: argparse.Namespace) -> int:
    """Run the sections in a process that may be lost; whatever is not complete then runs in a new one."""
    left, code = sections, DONE
    compile_ahead(sections, args)
    options = [option for option in sys.argv[1:] if option not in NAMES]
    shown = re.sub(r" ?--out[ =]\S+", "", " ".join(sys.argv[1:])).strip()
    for attempt in range(MOST_RESTARTS * len(sections)):
        flags = ["--in-process", *(["--resume"] if attempt else [])]
        command = [sys.executable, __file__, *left, *options, *flags]
        done = subprocess.run(command, env={**os.environ, "GSPN2_BENCH_ARGUMENTS": shown}, check=False)
        if done.returncode in (DONE, WRONG):
            code |= done.returncode
        left = [name for name in left if not _complete(Path(args.out) / f"{name}.json")]
        if not left or not (Path(args.out) / f"{left[0]}.json").exists():
            break
        code = WRONG
    return code if not left else WRONG


def _complete(path: Path) -> bool:
    return path.exists() and json.loads(path.read_text())["complete"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sections", nargs="*", choices=[[], *NAMES], default=[], metavar="SECTION", help="default: all"
    )
    parser.add_argument("--cases", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--variants", metavar="A,B", help="force these variants of the planner, side by side")
    parser.add_argument("--out", default=str(RESULTS / "h200"), help="folder of the result files")
    parser.add_argument("--rounds", type=int, default=0, help="samples for each number (default: 15)")
    parser.add_argument("--quick", action="store_true", help="fewer cases, five samples")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--resume", action="store_true", help="keep the cases that result files hold")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = args.rounds or (5 if args.quick else 15)
    args.sections = args.sections or NAMES
    return args


def main() -> int:
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu tries the script without one")
    if not args.in_process and not args.resume:
        for name in args.sections:
            (Path(args.out) / f"{name}.json").unlink(missing_ok=True)
    if not args.in_process and args.device == "cuda":
        return supervise(args.sections, args)
    bench = Bench(args)
    right = [run_section(name, bench, args) for name in args.sections]
    return DONE if all(right) else WRONG


if __name__ == "__main__":
    sys.exit(main())
