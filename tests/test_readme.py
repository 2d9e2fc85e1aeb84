"""What README.md shows works: its Python runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from gspn2.cli.main import COMMANDS, _parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# `name = ...  # ... (2, 280, 384)`: a shape that the comment promises.
PROMISE = re.compile(r"^(\w+) = .*#.*\((\d+(?:, \d+)+)\)\s*$", re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [line.removeprefix("$ ").split("#")[0].strip() for line in lines if line.startswith("$ ")]


def test_there_is_python_to_run() -> None:
    assert blocks("python")


@pytest.mark.parametrize("source", blocks("python"))
def test_python_runs_and_gives_the_shapes_it_promises(source: str) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), names)
    promised = PROMISE.findall(source)
    assert promised
    for name, shape in promised:
        value = names[name]
        assert isinstance(value, torch.Tensor)
        assert tuple(value.shape) == tuple(int(size) for size in shape.split(", ")), name
        assert value.isfinite().all()


def test_it_opens_with_the_three_commands() -> None:
    opening, _, rest = README.partition("```console\n")
    assert "##" not in opening
    first = [line.split("#")[0].strip() for line in rest.split("```")[0].splitlines()]
    assert first == ["$ make demo", "$ make test", "$ pip install ."]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(
        r"\bmake (\w+)", "\n".join([*blocks("console"), *re.findall(r"`(.*?)`", README)])
    ):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_command_has_its_line() -> None:
    assert sorted(re.findall(r"^\| `gspn2 (\w+)` \|", README, re.MULTILINE)) == sorted(COMMANDS)


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("gspn2 ")])
def test_commands_parse(line: str) -> None:
    _, command, *options = shlex.split(line)
    _parser(command).parse_args([command, *options])


def test_extras_exist() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set(re.findall(r"gspn2\[(\w+)\]", README))
    assert named == {"models", "train"}
    assert named <= set(project["optional-dependencies"])


def test_links_lead_somewhere() -> None:
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", README)]
    local = [target for target in targets if not target.startswith("https://")]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []
