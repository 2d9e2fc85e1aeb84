"""What README.md and the other pages show works: Python runs, commands parse, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

import gspn2
from gspn2.cli.main import COMMANDS, _parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path: path.read_text(encoding="utf-8") for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}

# `name = ...  # ... (2, 280, 384)`: a shape that the comment promises.
PROMISE = re.compile(r"^(\w+) = .*#.*\((\d+(?:, \d+)+)\)\s*$", re.MULTILINE)


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Command lines of gspn2, without comments and redirections; those that go on in the next line as one."""
    lines = text.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^\$ ", "", line.strip()) for line in lines]
    lines = [re.sub(r"^(torchrun .* -m|accelerate launch .*-m) ", "", line) for line in lines]
    return [re.split(" [#>]", line)[0].strip() for line in lines if line.startswith("gspn2 ")]


def examples() -> list[str]:
    """Those of the pages, and those that --help shows."""
    epilogs = [getattr(importlib.import_module(f"gspn2.cli.{name}"), "EPILOG", "") for name in COMMANDS]
    shown = [block for page in PAGES.values() for block in blocks("(?:console)?", page)]
    shown += ["\n".join(re.findall(r"^ {4}(.*)$", prose(page), re.MULTILINE)) for page in PAGES.values()]
    shown += ["\n".join(whole(page)) for page in PAGES.values()]
    shown += [text.partition("examples:\n")[2].partition("\n\n")[0] for text in epilogs]
    return sorted({line for text in shown for line in commands(text)})


def whole(page: str) -> list[str]:
    """Commands within a sentence that have all that they need: an option in capitals stands for a value."""
    named = [" ".join(text.split()) for text in re.findall(r"`(gspn2 [^`]*)`", prose(page))]
    return [
        line
        for line in named
        if len(line.split()) > 2 and not re.search(r"\.\.\.|--help|\b[A-Z]{2,}\b", line)
    ]


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """What links may name after #: headings as hosts of Markdown write them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "docs/models.md"])
def test_python_runs_and_gives_the_shapes_it_promises(name: str) -> None:
    torch.manual_seed(0)
    source = "".join(blocks("python", PAGES[ROOT / name]))
    names: dict[str, object] = {}
    exec(compile(source, name, "exec"), names)
    promised = PROMISE.findall(source)
    assert promised
    for variable, shape in promised:
        value = names[variable]
        assert isinstance(value, torch.Tensor)
        assert tuple(value.shape) == tuple(int(size) for size in shape.split(", ")), variable
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


@pytest.mark.parametrize("line", examples())
def test_commands_parse(line: str) -> None:
    _, command, *options = shlex.split(line)
    _parser(command).parse_args([command, *options])


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {page: set(re.findall(r"gspn2\[(\w+)\]", text)) for page, text in PAGES.items()}
    assert named[ROOT / "README.md"] == {"models", "train"}
    installed = {page: set(re.findall(r'"\.\[(\w+)\]"', text)) for page, text in PAGES.items()}
    assert installed[ROOT / "README.md"] == {"models", "train", "bench"}
    assert set.union(*installed.values()) <= set(project["optional-dependencies"])
    assert set.union(*named.values()) <= set(project["optional-dependencies"])


def test_the_package_is_of_the_version_that_it_tells() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == gspn2.__version__
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_every_file_of_the_package_is_installed() -> None:
    package = ROOT / "src" / "gspn2"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    data = {path for pattern in settings["package-data"]["gspn2"] for path in package.glob(pattern)}
    assert data
    made = {".py", ".pyc", ".nbi", ".nbc"}
    assert {path for path in package.rglob("*") if path.is_file() and path.suffix not in made} == data


def test_links_lead_somewhere() -> None:
    lost = []
    for page, text in PAGES.items():
        targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
        local = [target.partition("#") for target in targets if not target.startswith("https://")]
        assert local or page != ROOT / "README.md"
        for name, _, anchor in local:
            found = (page.parent / name).resolve() if name else page
            if not found.exists() or (anchor and anchor not in anchors(PAGES.get(found, ""))):
                lost.append(f"{page.name}: {name}#{anchor}")
    assert lost == []
