"""The correctness tests on one GPU, and NVIDIA's compute-sanitizer over every variant.

    python benchmarks/gpu_tests.py                          all parts: some ten minutes
    python benchmarks/gpu_tests.py tests memcheck           these
    python benchmarks/gpu_tests.py tests -- -k vectors -x   what follows goes to pytest

Parts: tests (`pytest -m gpu`), memcheck, racecheck, initcheck, synccheck; the last four run side by
side. Each has its own time limit (--limit tests=180) and its whole output in a log of its own. The
summary OUT/tests.json (default: benchmarks/results/h200) is written after every part; a part that
outlasts its limit is ended and counts as far as it got. The exit code is 1 if anything failed, was not
clean or did not end. Where there is no git, GSPN2_COMMIT says what was tested.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from threading import Lock
from typing import Any

from common import RESULTS, ROOT, machine

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LIMITS = {"tests": 500.0, **dict.fromkeys(TOOLS, 95.0)}
# A sanitizer begins no new case this long before its limit.
SPARE_SECONDS = 25
WORKERS = max(1, min(14, (os.cpu_count() or 1) - 2))  # mostly they compile; with more, memory runs out
LARGE_WORKERS = 2
"""For tests that are marked large: one of them may want 90 GiB of the device."""
Summary = dict[str, Any]


def run(command: list[str], log: Path, limit: float, extra: dict[str, str] | None = None) -> Summary:
    """A command with its output in a file: exit code, seconds, and whether its time was up."""
    environment = {**os.environ, **(extra or {})}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))
    )
    environment["PYTHONUNBUFFERED"] = "1"
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        timed_out = not ended(process, limit)
        if timed_out:
            # pytest still lists its failures when it is interrupted, once its workers have ended.
            process.send_signal(signal.SIGINT)
            ended(process, 30)
        end_group(process)
    shown = [Path(command[0]).name, *command[1:]]
    return {
        "command": " ".join(
            part.removeprefix(f"{ROOT}/").replace(sys.executable, "python") for part in shown
        ),
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - begin, 1),
        "timed_out": timed_out,
    }


def ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def end_group(process: subprocess.Popen[bytes]) -> None:
    """What the process has started ends with it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


# The tests

NOTHING_CHOSEN = 5
"""Exit code of pytest."""
OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) (?P<its>tests/\S.*?)"
    r"|(?P<name>tests/\S.*?) (?P<then>PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b.*)\s*$"
)


def tests(log: Path, limit: float, arguments: list[str]) -> Summary:
    """`pytest -m gpu`, counted line by line, so that an early end loses only what had not run.

    Large tests come last, by few workers: beside all the others the device's memory would not do.
    """
    marked = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    files = [str(path.relative_to(ROOT)) for path in marked]  # collecting the others would cost every worker
    # By ending the process: nothing else gets out of a wait for a kernel that hangs.
    patience = ["--timeout", "240", "--timeout-method", "thread"] if find_spec("pytest_timeout") else []
    begin, summaries, output = time.monotonic(), [], ""
    for marks, workers in (("gpu and not large", WORKERS), ("gpu and large", LARGE_WORKERS)):
        parallel = ["-n", str(workers), "--dist", "worksteal"] if find_spec("xdist") else []
        options = ["-m", marks, "-v", "--tb=short", "--durations=15", *parallel, *patience, *arguments]
        part = log.with_suffix(f".{len(summaries)}.log")
        left = max(1.0, limit - (time.monotonic() - begin))
        summaries.append(run([sys.executable, "-m", "pytest", *files, *options], part, left))
        output += part.read_text(errors="replace")
    log.write_text(output)
    # No test was chosen: with -k, there may be none of either kind.
    codes = [summary["exit_code"] for summary in summaries if summary["exit_code"] != NOTHING_CHOSEN]
    return {
        "command": "; ".join(summary["command"] for summary in summaries),
        "exit_code": next((code for code in codes if code != 0), 0),
        "seconds": round(sum(summary["seconds"] for summary in summaries), 1),
        "timed_out": any(summary["timed_out"] for summary in summaries),
    } | count_outcomes(output)


def count_outcomes(output: str) -> Summary:
    """From pytest's verbose output: numbers by outcome, names of what failed, and the slowest tests."""
    outcomes: dict[str, str] = {}
    for line in output.splitlines():
        match = OUTCOME.match(line)
        if match:
            name, outcome = (
                (match["its"], match["first"]) if match["first"] else (match["name"], match["then"])
            )
            outcomes[name] = outcome
    counts = Counter(outcomes.values())
    bad = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    reasons = re.findall(r"^SKIPPED \[(\d+)\] \S+ (.*)$", output, re.MULTILINE)
    slowest = re.findall(r"^([\d.]+)s (?:call|setup) +(tests/\S.*)$", output, re.MULTILINE)
    crashed = re.search(r"worker '?gw\d+'? crashed|Fatal Python error", output)
    return {
        "passed": counts["PASSED"],
        "failed": counts["FAILED"] + counts["ERROR"],
        "skipped": counts["SKIPPED"],
        "expected_failures": counts["XFAIL"] + counts["XPASS"],
        "failures": bad,
        "skip_reasons": [f"{count}: {reason}" for count, reason in reasons],
        "slowest": [f"{seconds} s {name.strip()}" for seconds, name in slowest[:10]],
        "crashed": crashed is not None,
    }


def tests_good(summary: Summary) -> bool:
    whole = summary["exit_code"] == 0 and not summary["timed_out"]
    return whole and summary["passed"] > 0 and summary["failed"] == 0


# The sanitizers


def sanitizer(tool: str) -> Callable[[Path, float, list[str]], Summary]:
    def part(log: Path, limit: float, _: list[str]) -> Summary:
        """compute-sanitizer over tests/cuda_sanitizer.py."""
        if which("compute-sanitizer") is None:
            return {"errors": None, "said": ["compute-sanitizer is not on the PATH"]}
        script = [str(ROOT / "tests" / "cuda_sanitizer.py"), "--seconds", f"{limit - SPARE_SECONDS:g}"]
        command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
        if tool == "memcheck":
            command += ["--report-api-errors", "no"]  # PyTorch asks older drivers for what they do not know
        if tool == "racecheck":
            script.append("--every-lane-arrives")
        command += [sys.executable, *script]
        summary = run(command, log, limit, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        return summary | read_sanitizer(log.read_text(errors="replace"))

    return part


def compile_ahead(log: Path) -> None:
    """What the sanitizers will run, compiled once and on all cores; what fails shows where it is run."""
    command = [sys.executable, str(ROOT / "tests" / "cuda_sanitizer.py"), "--compile"]
    for extra in ([], ["--every-lane-arrives"]):
        run([*command, *extra], log, 120)
        print(f"sanitizers: {log.read_text(errors='replace').strip()[-2000:]}", flush=True)


def read_sanitizer(output: str) -> Summary:
    """Number of errors (None when the tool did not get to its summary), messages, and the script's words."""
    found = re.search(r"^=+ ERROR SUMMARY: (\d+) error", output, re.MULTILINE)
    # racecheck counts hazards: "N hazards displayed (E errors, W warnings)".
    races = re.search(r"^=+ RACECHECK SUMMARY: (\d+) hazard", output, re.MULTILINE)
    numbers = [int(match[1]) for match in (found, races) if match]
    said = re.findall(
        r"^=+ ((?:Error|Warning|Invalid|Uninitialized|Barrier|Program|Race|Host).*)$", output, re.MULTILINE
    )
    summary: Summary = {"errors": sum(numbers) if numbers else None}
    summary["messages"] = [f"{count}: {text}" for text, count in Counter(said).most_common(10)]
    lines = [line for line in output.splitlines() if line.startswith('{"ran"')]
    if lines:
        return summary | json.loads(lines[-1])
    said = output.replace(f"{ROOT}/", "").splitlines()[-12:]
    return summary | {"wrong": None, "said": said}


def sanitizer_good(summary: Summary) -> bool:
    return summary["errors"] == 0 and summary.get("wrong") == [] and not summary["timed_out"]


PARTS: dict[str, Callable[[Path, float, list[str]], Summary]] = {
    "tests": tests,
    **{tool: sanitizer(tool) for tool in TOOLS},
}


def main() -> int:
    arguments, extra = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, extra = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"out of {', '.join(PARTS)}")
    parser.add_argument("--limit", action="append", default=[], metavar="PART=SECONDS")
    parser.add_argument("--out", type=Path, default=RESULTS / "h200", help="folder of tests.json")
    parser.add_argument("--logs", type=Path, default=None, help="folder of the logs")
    parser.add_argument("--device", default="cuda", help="cpu: a try of this script, with the CPU backend")
    args = parser.parse_args(arguments)
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    limits = LIMITS | {part: float(seconds) for part, seconds in (one.split("=") for one in args.limit)}
    logs = args.logs or Path(tempfile.mkdtemp(prefix="gspn2-tests-"))
    for folder in (logs, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    if args.device != "cuda":
        os.environ["GSPN2_TEST_DEVICE"] = args.device

    results: dict[str, Any] = {"machine": machine(args.device), "parts": {}}

    def part(name: str) -> bool:
        summary = PARTS[name](logs / f"{name}.log", limits[name], extra)
        summary["good"] = (tests_good if name == "tests" else sanitizer_good)(summary)
        with writing:
            results["parts"][name] = summary
            (args.out / "tests.json").write_text(json.dumps(results, indent=2) + "\n")
            print(f"{name}: {json.dumps(summary, indent=1)}", flush=True)
        return summary["good"]

    writing = Lock()
    good = "tests" not in args.parts or part("tests")
    tools = [name for name in args.parts if name in TOOLS]
    if tools and which("compute-sanitizer") is not None:
        compile_ahead(logs / "compile.log")
    with ThreadPoolExecutor(len(TOOLS)) as side_by_side:
        good = all([*side_by_side.map(part, tools), good])
    print(f"wrote {args.out / 'tests.json'}, logs in {logs}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
