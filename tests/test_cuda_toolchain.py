"""Compiling kernels without a GPU: all sources for all architectures, the disk cache, what may be missing."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from gspn2.backends.cuda import depthwise, disk, plan, response, toolchain
from gspn2.backends.cuda.geometry import Kernel
from gspn2.backends.cuda.toolchain import Target, compile_kernel
from kept import kept_folder

needs_nvrtc = pytest.mark.skipif(toolchain.why_not() is not None, reason=str(toolchain.why_not()))

MAIN = (9, 0)
OTHERS = (((8, 0),), ((8, 6), (8, 9)), ((10, 0),), ((12, 0),))
"""Architectures that get every source; of two, which the sources do not tell apart, they take turns."""

TINY = Kernel("tiny.cu", "tiny", (("STORAGE", 1), ("VALUE", 7)))
SOURCE = """
#include "common.cuh"
KERNEL(32, 1) tiny(CONSTANT_PARAMS p) { p.y.data[threadIdx.x] = narrow(VALUE); }
"""


@cache
def representative(variant: str) -> list[tuple[Kernel, bool]]:
    return plan.variants()[variant].representative_kernels()


def oldest(variant: str, source: str) -> tuple[int, int]:
    """The first compute capability that a variant, or the part of it that has this source, runs on."""
    module = plan.variants()[variant]
    for part in getattr(module, "SPECIAL", ()):
        if any(kernel.source == source for kernel, _ in part.representative_kernels()):
            module = part
    return getattr(module, "CAPABILITY", plan.OLDEST)


def main_cases() -> Iterator[tuple[str, int]]:
    for variant in plan.variants():
        yield from ((variant, number) for number in range(len(representative(variant))))


def other_cases() -> Iterator[tuple[tuple[int, int], str, int]]:
    """One kernel of each source for the architectures but the main one."""
    for variant in plan.variants():
        sources = [kernel.source for kernel, _ in representative(variant)]
        for turn, source in enumerate(dict.fromkeys(sources)):
            for alike in OTHERS:
                capability = alike[turn % len(alike)]
                if capability >= oldest(variant, source):
                    yield capability, variant, sources.index(source)


@cache
def disassembler() -> Path | None:
    """nvdisasm of Triton, which PyTorch's CUDA build brings along, if it is there."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    program = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return program if program.exists() else None


def assert_no_odd_descriptors(code: bytes) -> None:
    """ptxas 13.0 can put an access's descriptor, two registers, at an odd number: an illegal instruction."""
    program = disassembler()
    if program is None:
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(program), "--print-code", "--no-dataflow", file.name]
        assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "EXIT" in assembly
    odd = re.findall(r".*desc\[UR\d*[13579]\].*", assembly)
    assert not odd, odd[:3]


@cache
def checks() -> str:
    """Changes with what is checked, and by which tools."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    program = disassembler()
    digest.update(str(program.stat().st_size if program else None).encode())
    return digest.hexdigest()


def assert_compiles(capability: tuple[int, int], variant: str, number: int) -> None:
    """A kernel that was found right, from the same sources and macros, by the same tools, still is."""
    kernel, hot = representative(variant)[number]
    made_for = Target("sm_{}{}".format(*capability))
    named = f"{toolchain.key(kernel, made_for)} {hot} {checks()}"
    verdict = kept_folder() / f"{hashlib.sha256(named.encode()).hexdigest()[:24]}.right"
    if verdict.exists():
        return
    compiled = compile_kernel(kernel, made_for)
    assert compiled.code[:4] == b"\x7fELF"
    assert "warning" not in compiled.log
    used = compiled.resources
    assert used is not None
    assert used.shared == 0, "all shared memory is dynamic"
    assert_no_odd_descriptors(compiled.code)
    if hot:
        assert (used.spill_stores, used.spill_loads) == (0, 0), f"{kernel} spills: {used}"
    verdict.touch()


def test_sources_tell_apart_only_what_is_compiled_for_each() -> None:
    paths = [*toolchain.SOURCES.glob("*.cu"), *toolchain.SOURCES.glob("*.cuh")]
    used = [u for path in paths for u in re.findall("__CUDA_ARCH__.*", path.read_text(encoding="utf-8"))]
    assert used
    assert all(re.match(r"__CUDA_ARCH__ >= 900\b(?!.*__CUDA_ARCH__)", use) for use in used), used


@needs_nvrtc
@pytest.mark.parametrize(("variant", "number"), list(main_cases()))
def test_kernels_compile_for_hopper_and_hot_ones_spill_nothing(variant: str, number: int) -> None:
    assert_compiles(MAIN, variant, number)


@needs_nvrtc
@pytest.mark.parametrize(("capability", "variant", "number"), list(other_cases()), ids=str)
def test_sources_compile_for_the_other_architectures(
    capability: tuple[int, int], variant: str, number: int
) -> None:
    assert_compiles(capability, variant, number)


def test_every_source_is_compiled_by_some_test() -> None:
    covered = {kernel.source for variant in plan.variants() for kernel, _ in representative(variant)}
    covered |= {kernel.source for kernel, _ in depthwise.representative_kernels()}
    covered |= {kernel.source for kernel in response.representative_kernels()}
    assert covered == {path.name for path in toolchain.SOURCES.glob("*.cu")}


@needs_nvrtc
@pytest.mark.parametrize("number", range(len(depthwise.representative_kernels())))
def test_depthwise_kernels_compile_and_spill_nothing(number: int) -> None:
    kernel, hot = depthwise.representative_kernels()[number]
    compiled = compile_kernel(kernel, Target("sm_{}{}".format(*MAIN)))
    used = compiled.resources
    assert used is not None
    assert "warning" not in compiled.log
    assert not hot or (used.spill_stores, used.spill_loads) == (0, 0), f"{kernel} spills: {used}"
    assert_no_odd_descriptors(compiled.code)


@needs_nvrtc
@pytest.mark.parametrize(
    "kernel", response.representative_kernels(), ids=lambda it: str(dict(it.defines)["CHANNELS"])
)
def test_kernels_of_responses_compile_and_spill_nothing(kernel: Kernel) -> None:
    compiled = compile_kernel(kernel, Target("sm_{}{}".format(*MAIN)))
    used = compiled.resources
    assert used is not None
    assert "warning" not in compiled.log
    assert (used.spill_stores, used.spill_loads) == (0, 0), f"{kernel} spills: {used}"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources that holds `TINY`, and an empty disk cache. Returns the source's path."""
    sources = tmp_path / "kernels"
    sources.mkdir()
    for header in toolchain.SOURCES.glob("*.cuh"):
        (sources / header.name).write_text(header.read_text(encoding="utf-8"), encoding="utf-8")
    (sources / TINY.source).write_text(SOURCE)
    monkeypatch.setattr(toolchain, "SOURCES", sources)
    monkeypatch.setenv("GSPN2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(disk, "_warned", set())
    toolchain._digest.cache_clear()
    yield sources / TINY.source
    toolchain._digest.cache_clear()


@needs_nvrtc
@pytest.mark.usefixtures("tiny")
def test_resources_are_those_of_the_kernel() -> None:
    compiled = compile_kernel(TINY, Target("sm_90"))
    assert compiled.resources is not None
    assert 0 < compiled.resources.registers < 64
    assert compiled.resources.stack == compiled.resources.spill_loads == 0
    assert toolchain.resources("no report") is None


def test_the_assemblers_report_is_read() -> None:
    log = (
        "ptxas info    : Function properties for f\n"
        "ptxas         .     16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 1056 bytes cmem[0]\n"
    )
    assert toolchain.resources(log) == toolchain.Resources(40, 16, 24, 32, 512)


@needs_nvrtc
def test_an_error_shows_the_source_the_macros_and_the_compilers_log(tiny: Path) -> None:
    tiny.write_text(SOURCE.replace("narrow(VALUE)", "narrow(VALEU)"))
    with pytest.raises(RuntimeError) as caught:
        toolchain.code(TINY, Target("sm_90"))
    message = str(caught.value)
    assert "cannot compile tiny.cu for sm_90 with -DSTORAGE=1 -DVALUE=7" in message
    assert 'tiny.cu(3): error: identifier "VALEU" is undefined' in message


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_architectures", lambda: ((8, 0), (9, 0), (10, 0), (12, 0)))
    assert toolchain.target((9, 0)) == Target("sm_90")
    assert toolchain.target((12, 1)) == Target("sm_120"), "code runs on newer devices of its generation"
    assert toolchain.target((13, 0)) == Target("compute_120", "ptx")
    with pytest.raises(RuntimeError, match=r"no architecture as old as 7\.5"):
        toolchain.target((7, 5))


# The disk cache


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """Kernels that were compiled, by a compiler that takes no time."""
    done: list[Kernel] = []

    def compiled(kernel: Kernel, made_for: Target) -> toolchain.Compiled:
        done.append(kernel)
        return toolchain.Compiled(f"code of {kernel} for {made_for}".encode(), None, "")

    monkeypatch.setattr(toolchain, "compile_kernel", compiled)
    monkeypatch.setattr(toolchain, "_nvrtc_version", lambda: "13.0")
    return done


def files() -> list[Path]:
    return sorted(disk.folder().iterdir()) if disk.folder().exists() else []


@pytest.mark.usefixtures("tiny")
def test_a_kernel_is_compiled_once(compilations: list[Kernel]) -> None:
    first = toolchain.code(TINY, Target("sm_90"))
    assert toolchain.code(TINY, Target("sm_90")) == first
    assert compilations == [TINY]
    assert [path.name for path in files()] == [toolchain.key(TINY, Target("sm_90"))]


def test_the_key_covers_all_that_the_code_depends_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_nvrtc_version", lambda: "13.0")
    keys = [toolchain.key(TINY, Target("sm_90"))]

    def changed() -> None:
        toolchain._digest.cache_clear()
        keys.append(toolchain.key(TINY, Target("sm_90")))
        assert len(set(keys)) == len(keys)

    keys.append(toolchain.key(TINY, Target("sm_80")))
    keys.append(toolchain.key(TINY, Target("compute_90", "ptx")))
    keys.append(toolchain.key(Kernel("tiny.cu", "tiny", (("STORAGE", 1), ("VALUE", 8))), Target("sm_90")))
    tiny.write_text(SOURCE + "// changed\n")
    changed()
    header = tiny.with_name("ptx.cuh")  # included by what the source includes
    header.write_text(header.read_text(encoding="utf-8") + "// changed\n", encoding="utf-8")
    changed()
    # Of headers only those that are included count.
    tiny.with_name("new.cuh").write_text("// one more\n")
    toolchain._digest.cache_clear()
    assert toolchain.key(TINY, Target("sm_90")) == keys[-1]
    # A source from elsewhere: the headers beside it, too.
    folder = tiny.parent.parent / "elsewhere"
    folder.mkdir()
    (folder / "own.cu").write_text(f'#include "own.cuh"\n{SOURCE}')
    (folder / "own.cuh").write_text("// its own\n")
    other = Kernel(str(folder / "own.cu"), "tiny", ())
    before = toolchain.key(other, Target("sm_90"))
    (folder / "own.cuh").write_text("// its own, changed\n")
    toolchain._digest.cache_clear()
    assert toolchain.key(other, Target("sm_90")) != before
    monkeypatch.setattr(toolchain, "_nvrtc_version", lambda: "13.1")
    changed()
    monkeypatch.setitem(toolchain.OPTIONS, "std", "c++20")
    changed()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "foreign"])
def test_a_damaged_file_is_compiled_anew(damage: str, compilations: list[Kernel]) -> None:
    whole = toolchain.code(TINY, Target("sm_90"))
    (path,) = files()
    content = path.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    path.write_bytes({"cut": content[:-5], "bit": flipped, "empty": b"", "foreign": b"x" * 300}[damage])
    assert toolchain.code(TINY, Target("sm_90")) == whole
    assert len(compilations) == 2
    assert path.read_bytes() == content
    assert files() == [path]


@pytest.mark.usefixtures("tiny")
def test_without_a_usable_folder_kernels_are_compiled_and_that_is_said_once(
    compilations: list[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("GSPN2_CACHE_DIR", str(in_the_way))
    with pytest.warns(UserWarning, match="cannot keep its compiled CUDA kernels on disk.*GSPN2_CACHE_DIR"):
        first = toolchain.code(TINY, Target("sm_90"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert toolchain.code(TINY, Target("sm_90")) == first
    assert len(compilations) == 2


@pytest.mark.usefixtures("tiny")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may write everywhere")
def test_a_folder_without_permission(compilations: list[Kernel]) -> None:
    disk.folder().mkdir(parents=True)
    disk.folder().chmod(0o500)
    with pytest.warns(UserWarning, match="cannot keep"):
        toolchain.code(TINY, Target("sm_90"))
    assert len(compilations) == 1


WRITER = """
import disk  # alone: three times importing PyTorch takes longer than the test
codes = [bytes([n]) * (100_000 + n) for n in range(4)]
for _ in range(5):
    for n, code in enumerate(codes):
        found = disk.load(f"key{n}")
        assert found in (None, code)
        disk.store(f"key{n}", code)
        assert disk.load(f"key{n}") == code
"""


@pytest.mark.usefixtures("tiny")
def test_processes_share_the_folder() -> None:
    """Nobody ever reads half a file, and no drafts are left."""
    environment = os.environ | {"PYTHONPATH": str(Path(disk.__file__).parent)}
    command = [sys.executable, "-W", "error", "-c", WRITER]
    writers = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert [path.name for path in files()] == [f"key{n}" for n in range(4)]


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GSPN2_CACHE_DIR", str(tmp_path))
    assert disk.folder() == tmp_path / "kernels"
    monkeypatch.setenv("GSPN2_CACHE_DIR", "")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert disk.folder() == tmp_path / "xdg" / "gspn2" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert disk.folder() == Path.home() / ".cache" / "gspn2" / "kernels"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert disk.folder() == tmp_path / "local" / "gspn2" / "kernels"


# What may be missing


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing is known yet of what is installed, and afterwards neither."""
    found = (toolchain.why_not, toolchain._cuda_include, toolchain._nvrtc_version)
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(toolchain, "find_spec", lambda name: looked.append(name))
    sentence = 'it needs cuda-core, which is not installed (pip install "gspn2[cuda]")'
    assert toolchain.why_not() == sentence
    times = len(looked)
    assert toolchain.why_not() == sentence
    assert len(looked) == times, "failure is remembered"
    with pytest.raises(RuntimeError, match=r"cannot compile tiny\.cu: it needs cuda-core"):
        compile_kernel(TINY, Target("sm_90"))


@needs_nvrtc
@pytest.mark.usefixtures("fresh")
def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    def missing() -> None:
        raise RuntimeError("Failure finding libnvrtc.so\nsecond line")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    reason = toolchain.why_not()
    assert reason is not None
    assert (
        "it needs NVRTC and cuda-bindings, and they do not load: Failure finding libnvrtc.so (pip" in reason
    )


@needs_nvrtc
@pytest.mark.usefixtures("fresh")
def test_without_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toolchain, "_include_candidates", lambda: iter([tmp_path]))
    reason = toolchain.why_not()
    assert reason is not None
    assert "it needs cuda_bf16.h" in reason
    assert "CUDA_HOME" in reason


def test_headers_of_a_toolkit_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tmp_path / "include" in list(toolchain._include_candidates())
