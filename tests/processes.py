"""Python in a process of its own, which has nothing that a test has loaded or made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def printed_by(script: str, *arguments: object) -> str:
    """What a script prints, without space around it; it finds the helpers of the tests.

    Raises:
        AssertionError: it failed; the message is what it complained of.
    """
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
