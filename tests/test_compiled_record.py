"""The record of compiled launches: what it has is not compiled, what changed is; lies are found."""

import importlib.util
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, pytest_configure
from support.compilation import Compilation
from support.compiled_record import DAYS, RECORD, WRITE, Launch, Record
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNEL = """
import triton
import triton.language as tl

FACTOR = tl.constexpr(3)


@triton.jit
def _scaled(x):
    return x * FACTOR


@triton.jit
def _kernel(x_ptr, number, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(x_ptr + offs, _scaled(tl.load(x_ptr + offs)) + number)
"""
SIGNATURE = {"x_ptr": "*fp32", "number": "i32", "SIZE": "constexpr"}
ALIGNED = {(0,): [["tt.divisibility", 16]]}


def compilation_of(
    folder: Path,
    text: str = KERNEL,
    signature: dict[str, str] = SIGNATURE,
    size: int = 128,
    attributes: dict[Any, Any] = ALIGNED,
    capability: int = 90,
    **options: int,
) -> Compilation:
    folder.mkdir(exist_ok=True)
    path = folder / "scaling.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("scaling", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = ASTSource(module._kernel, signature, {(2,): size}, attributes)
    options = {"enable_fp_fusion": True, **options}
    return Compilation(source, GPUTarget("cuda", capability, 32), options)


def test_a_key_is_of_the_code_and_not_of_its_place(tmp_path: Path) -> None:
    key = compilation_of(tmp_path / "a").key
    assert compilation_of(tmp_path / "a folder elsewhere").key == key
    moved = KERNEL.replace("FACTOR =", '"""What it does."""\n\n# a reason\nFACTOR =')
    moved = moved.replace(
        "\n\n@triton.jit\ndef _kernel", "\n\n# a line\n\n@triton.jit\ndef _kernel"
    )
    assert compilation_of(tmp_path / "b", moved).key == key


@pytest.mark.parametrize(
    ("line", "mutation"),
    [
        ("+ number", "- number"),
        ("x * FACTOR", "x / FACTOR"),
        ("constexpr(3)", "constexpr(4)"),
        ("@triton.jit\ndef _scaled", "@triton.jit(noinline=True)\ndef _scaled"),
    ],
    ids=["kernel", "helper", "constant", "decorator of a helper"],
)
def test_another_source_has_another_key(tmp_path: Path, line: str, mutation: str) -> None:
    assert KERNEL.count(line) == 1
    changed = compilation_of(tmp_path / "b", KERNEL.replace(line, mutation))
    assert changed.key != compilation_of(tmp_path / "a").key


@pytest.mark.parametrize(
    "changes",
    [
        {"signature": SIGNATURE | {"x_ptr": "*fp16"}},
        {"signature": SIGNATURE | {"number": "i64"}},
        {"size": 256},
        {"attributes": {}},
        {"capability": 100},
        {"num_warps": 8},
        {"maxnreg": 32},
        {"enable_fp_fusion": False},
    ],
    ids=str,
)
def test_another_launch_has_another_key(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert compilation_of(tmp_path, **changes).key != compilation_of(tmp_path).key


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("triton.__version__", "3.9.1"),
        ("triton.backends.nvidia.compiler.get_ptxas_version", lambda arch: "V14.0"),
        ("support.compilation.get_cache_invalidating_env_vars", lambda: {"DISABLE_LLVM_OPT": "1"}),
    ],
)
def test_another_compiler_has_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    key = compilation_of(tmp_path).key
    monkeypatch.setattr(name, value)
    assert compilation_of(tmp_path).key != key


def test_an_activation_given_as_a_constant_counts_by_its_source(tmp_path: Path) -> None:
    def key_with(text: str) -> str:
        compilation = compilation_of(tmp_path, text)
        source = compilation.source
        scaled = source.fn.__globals__["_scaled"]
        constants = source.constants | {(1,): scaled}
        signature = SIGNATURE | {"number": "constexpr"}
        return Compilation(
            ASTSource(source.fn, signature, constants, ALIGNED),
            compilation.target,
            compilation.options,
        ).key

    # not called by the kernel itself
    alone = KERNEL.replace("_scaled(tl.load(x_ptr + offs))", "tl.load(x_ptr + offs)")
    assert key_with(alone) == key_with(alone)
    assert key_with(alone.replace("x * FACTOR", "x / FACTOR")) != key_with(alone)
    assert (
        compilation_of(tmp_path, alone).key
        == compilation_of(tmp_path, alone.replace("x * FACTOR", "x / FACTOR")).key
    )


def no_compiler(question: str) -> Any:
    raise AssertionError(f"must not be compiled: asked {question}")


def launch_of(key: str, kernel: str = "_kernel", configuration: str = "") -> Launch:
    return Launch("scaling", kernel, 90, configuration, key)


def written(folder: Path, *launches: Launch, **answers: Any) -> None:
    """Write a record in which the compiler gave these answers."""
    record = Record(folder, is_written=True)
    for launch in launches:
        for question in answers:
            record.look_up(launch, no_compiler).ask(question, answers.__getitem__)
    record.write()


# the first of these days is the turn of the key 0
FIRST_DAY = date.fromordinal(DAYS * 36_500)
OTHER_DAY = FIRST_DAY + timedelta(days=1)


def test_what_is_in_the_record_is_not_compiled(tmp_path: Path) -> None:
    written(tmp_path, launch_of("00"), instructions=40)
    record = Record(tmp_path, today=OTHER_DAY)
    assert record.look_up(launch_of("00"), no_compiler).ask("instructions", no_compiler) == 40
    assert "1 looked up" in record.summary()


@pytest.mark.parametrize(
    ("launch", "question"),
    [
        (launch_of("02"), "instructions"),
        (launch_of("00", "_other_kernel"), "instructions"),
        (launch_of("00"), "find fma"),
    ],
    ids=["another key", "another kernel", "another question"],
)
def test_what_is_not_in_the_record_is_compiled(
    tmp_path: Path, launch: Launch, question: str
) -> None:
    written(tmp_path, launch_of("00"), instructions=40)
    record = Record(tmp_path, today=OTHER_DAY)
    assert record.look_up(launch, no_compiler).ask(question, {question: 41}.__getitem__) == 41
    assert "1 not found and compiled" in record.summary()
    # once
    assert record.look_up(launch, no_compiler).ask(question, no_compiler) == 41


def test_a_record_that_is_wrong_is_found_on_the_day_of_its_launch(tmp_path: Path) -> None:
    written(tmp_path, launch_of("00"), instructions=40, resources={"REG": 32})
    path = tmp_path / "scaling.json"
    compiler: Callable[[str], Any] = {"instructions": 40, "resources": {"REG": 32}}.__getitem__

    def look_up() -> str:
        record = Record(tmp_path, today=FIRST_DAY)
        record.look_up(launch_of("00"), compiler)
        return record.summary()

    assert "1 found there and compiled" in look_up()
    path.write_text(path.read_text().replace('"REG": 32', '"REG": 31'))
    for _ in range(2):
        with pytest.raises(AssertionError, match=f"{WRITE} tests/test_scaling.py"):
            look_up()
    # and is not read where it is written anew
    launch = Record(tmp_path, True, FIRST_DAY).look_up(launch_of("00"), no_compiler)
    assert launch.ask("resources", compiler) == {"REG": 32}


def test_every_launch_has_its_turn(tmp_path: Path) -> None:
    keys = [f"{number:02x}" for number in range(DAYS)]
    written(tmp_path, *map(launch_of, keys), instructions=40)
    turns = []
    for day in range(DAYS):
        record = Record(tmp_path, today=FIRST_DAY + timedelta(days=day))
        launches = [record.look_up(launch_of(key), lambda question: 40) for key in keys]
        turns += [launch.key for launch in launches if launch.is_compiled]
    assert sorted(turns) == keys


def test_a_record_has_a_line_for_each_launch_that_was_asked_for_and_no_other(
    tmp_path: Path,
) -> None:
    written(tmp_path, launch_of("00"), launch_of("01"), instructions=40)
    first, second = launch_of("02", configuration="a"), launch_of("01", configuration="b")
    written(tmp_path, second, launch_of("05", "_a_kernel"), first, instructions=40)
    lines = (tmp_path / "scaling.json").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines[1:-1]] == [
        '"_a_kernel sm_90 05"',
        '"_kernel sm_90 02"',
        '"_kernel sm_90 01"',
    ]


def test_processes_of_a_run_add_up(tmp_path: Path) -> None:
    written(tmp_path, launch_of("00"), instructions=40)
    record = Record(tmp_path, today=OTHER_DAY)
    for question, answer in (("instructions", 40), ("find fma", [])):
        process = Record(tmp_path, today=OTHER_DAY)
        process.look_up(launch_of("00"), no_compiler).ask(question, lambda question, a=answer: a)
        record.add(process.launches())
    (launch,) = record.launches()
    assert launch["answers"] == {"instructions": 40, "find fma": []}
    assert "0 looked up" in record.summary()
    assert "1 not found and compiled" in record.summary()


@pytest.mark.parametrize(
    ("keyword", "markexpr", "args"),
    [("sm90", "", []), ("", "not slow", []), ("", "", ["tests/test_kernels_rope.py::test_it"])],
)
def test_a_part_of_the_tests_writes_no_record(
    monkeypatch: pytest.MonkeyPatch, keyword: str, markexpr: str, args: list[str]
) -> None:
    monkeypatch.setattr(RECORD, "is_written", False)
    option = SimpleNamespace(keyword=keyword, markexpr=markexpr)
    config: Any = SimpleNamespace(getoption=lambda name: True, option=option, args=args)
    with pytest.raises(pytest.UsageError, match="must be given whole files"):
        pytest_configure(config)


def test_every_record_has_its_tests() -> None:
    for path in (ROOT / "tests" / "compiled").iterdir():
        assert (ROOT / "tests" / f"test_{path.stem}.py").exists(), path


def test_code_is_asked_as_the_tests_read_it(tmp_path: Path) -> None:
    compilation = compilation_of(tmp_path)
    used = compilation.answer("resources")
    assert used == {"WARPS": 4, "DYNAMIC": 0, "SHARED": 0, "STACK": 0, "LOCAL": 0} | {
        "REG": used["REG"]
    }
    assert 0 < used["REG"] < 32
    assert compilation.answer(r"find [ls][dt]\.global\S+") == [
        ["ld.global.b32", 1],
        ["st.global.b32", 1],
    ]
    assert 8 < compilation.answer("instructions") < 64
    # no path of a source, which is another on each machine
    assert not compilation.answer("find scaling.py")
    assert "scaling.py" in compilation.code.asm["ptx"]
