"""benchmarks/report.py: docs/measured.md holds what it makes of the committed results."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report as module
from benchmarks.report import (
    DOCUMENT,
    RESULTS,
    kernels_section,
    load,
    step_section,
    with_section,
    with_sections,
)
from benchmarks.tables import aligned, by_case, markdown, microseconds

KERNELS = ("<!-- kernels -->\n", "\n<!-- /kernels -->")
STEP = ("<!-- step -->\n", "\n<!-- /step -->")
EMPTY = f"# Title\n\n{''.join(STEP)}\n\n{''.join(KERNELS)}\n"
HEAD = {
    "device": "a GPU",
    "date": "2026-01-02",
    "torch": "2.11",
    "triton": "3.6",
    "commit": "0123456789abcdef",
    "bitsandbytes": "0.50.2",
    "copy_gbps": 3000.0,
    "matmul_tflops": 800.0,
}


def row(provider: str, us: float, m: int | None = None, mode: str = "forward") -> dict[str, Any]:
    return {
        "provider": provider,
        "mode": mode,
        "layer": "llama-3-8b.q_proj",
        "m": m,
        "n": 4096,
        "k": 4096,
        "dtype": "bfloat16",
        "timing": "graph",
        "ms_p20": us / 1e3,
        "ms_p50": us / 1e3,
        "ms_p80": us / 1e3,
        "gbps": 42e3 / us,
        "tflops": None,
        "percent_of_copy": 1400 / us,
        "peak_bytes": 0,
        "path": "fused" if provider == "ours" else None,
    }


def records() -> dict[str, dict[str, Any]]:
    """Make up the results of one device."""
    bandwidth = [row("limit", 14), row("ours", 15.04), row("bitsandbytes", 34), row("torch", 1234)]
    quantize = [row("limit", 14), row("ours", 15.04), row("ours-checked", 60)]
    matmul = [
        row(provider, factor * (3 + m / 100), m, mode)
        for mode in ("forward", "transposed")
        for m in (1, 4, 512, 8192)
        for provider, factor in (("limit", 1), ("ours", 2), ("ours-fused", 2), ("torch", 3))
        if m <= 512 or provider != "ours-fused"
    ]
    adamw = [
        row(provider, us, None, mode)
        | {"layer": "llama-3-8b.adapter-r16", "n": 41_943_040, "k": 448}
        for mode, provider, us in (
            ("32bit", "limit", 390),
            ("32bit", "ours", 450.4),
            ("32bit", "torch-fused", 1370),
            ("8bit-clip", "ours-host", 7000),
        )
    ]
    gate = [row("limit", 58), row("ours", 60), row("torch", 169), row("torch.compile", 66)]
    steps = [
        {"provider": provider, "policy": "keep", "shape": shape, "tokens_per_second": rate}
        | ({} if provider == "limit" else {"peak_gib": 12.34, "load_s": 2.5, "first_step_s": 8.1})
        for provider, rate in (("limit", 20_500.0), ("ours", 16_000.0))
        for shape in ("1x2048", "4x2048")
    ]
    families = [
        {"family": family, "launches": 2, "ms": ms, "limit_ms": limit}
        | {"percent_of_limit": 50.0 if limit else None, "percent_of_step": share}
        for family, ms, limit, share in (
            ("norms", 4.0, 2.0, 40.0),
            ("copies and other", 6.0, None, 60.0),
            ("host transfers", 3.0, None, None),
            ("all", 10.0, 2.0, 100.0),
        )
    ]
    loads = [
        {"provider": "ours", "mode": "load-nf4", "gbps": 8.0, "peak_bytes": 2**33}
        | dict.fromkeys(("ms_first", "ms_p20", "ms_p50", "ms_p80"), 2000.0)
    ]
    plain = {name: HEAD[name] for name in ("device", "date", "torch", "triton", "commit")}
    about = {"model": "llama-3-8b", "shape": "4x2048", "policy": "keep"}
    return {
        "adamw": HEAD | {"rows": adamw},
        "breakdown": HEAD | {"bitsandbytes": None} | about | {"rows": families},
        "load": plain | {"pinned_copy_gbps": 55.3, "rows": loads},
        "glu": HEAD | {"rows": gate},
        "train_step": plain | {"versions": {"unsloth": "2026.10"}, "rows": steps},
        "nf4_dequantize": HEAD | {"rows": bandwidth},
        "nf4_quantize": HEAD | {"bitsandbytes": None, "rows": quantize},
        "nf4_matmul": HEAD | {"rows": matmul},
    }


def test_the_page_holds_what_report_makes_of_the_results() -> None:
    page = DOCUMENT.read_text()
    assert page == with_sections(page, load(RESULTS)), "run python -m benchmarks report --write"


def test_every_chart_of_the_results_is_committed() -> None:
    for device, found in load(RESULTS).items():
        for name in module.charts_of(device, found):
            assert (RESULTS / name).is_file(), f"{name}: run python -m benchmarks report --write"


def test_results_are_found_by_device_and_benchmark(tmp_path: Path) -> None:
    for name, record in records().items():
        (tmp_path / f"{name}.h100.json").write_text(json.dumps(record))
    (tmp_path / "nf4_parity.h100.json").write_text("{}")
    assert load(tmp_path) == {"h100": records()}


def test_a_section_has_a_table_a_benchmark() -> None:
    section = kernels_section({"h100": records()})
    assert "| layer | N x K | dtype | of copy | limit | ours | bitsandbytes | torch |" in section
    line = "| q_proj | 4096 x 4096 | bfloat16 | 93 % | 14.0 | 15.0 | 34.0 | 1,234 |"
    assert line in section
    assert "| q_proj | 4096 x 4096 | bfloat16 | 93 % | 14.0 | 15.0 | 60.0 | - | - |" in section
    assert "| q_proj | forward | 1 | 3.0 | 6.0 | fused | 6.0 | - | - | - | 9.0 |" in section
    line = "| 32bit | no | 41,943,040 | 448 | 3 % | 390 | 450 | - | - | - | 1,370 | - | - | - |"
    assert line in section
    assert "| 8bit | yes | 41,943,040 | 448 | - | - | - | - | - | 7,000 |" in section
    # M = 4 is not shown, nor a product with few rows backwards
    assert "| forward | 4 |" not in section
    assert "| transposed | 1 |" not in section
    assert "| transposed | 8192 |" in section
    assert "bitsandbytes 0.50.2, commit 0123456; copy 3,000 GB/s, product 800 TFLOP/s." in section
    assert "](../benchmarks/results/nf4_matmul.h100.svg)" in section
    assert "](../benchmarks/results/nf4_bandwidth.h100.svg)" in section


def test_a_layers_operation_has_a_table() -> None:
    section = kernels_section({"h100": records()})
    assert "**Gate.** h = silu(gate) up" in section
    assert "| q_proj | forward | None | 23 % | 58.0 | 60.0 | 169 | 66.0 |" in section
    # without its result
    assert "**Rotate.**" not in section


def test_the_step_has_its_own_section() -> None:
    section = step_section({"h100": records()})
    assert section.startswith("## Loading and training\n\n**Training step.** Llama-3-8B")
    assert "|  | 1 x 2048 | 4 x 2048 | load s | first step s |" in section
    assert "| limit, keep | 20,500 | 20,500 | - | - |" in section
    assert "| Quatrain, keep | 16,000, 12.3 GiB | 16,000, 12.3 GiB | 2.5 | 8.1 |" in section
    assert "triton 3.6, unsloth 2026.10, commit 0123456." in section
    assert "| norms | 2 | 4.00 | 2.00 | 50 % | 40.0 % |" in section
    assert "commit 0123456; pinned copy 55 GB/s." in section
    timed = {"h100": {"glu": records()["glu"] | {"seconds": 61.3}}}
    assert "commit 0123456, 61 s; copy 3,000 GB/s" in kernels_section(timed)
    assert "| ours | load-nf4 | 2.00 | 2.00 | 2.00 | 2.00 | 8.0 | 8.00 |" in section
    assert section.endswith("](../benchmarks/results/breakdown.h100.svg)")
    assert "two projections" not in section


def test_products_in_fp8_have_their_own_tables() -> None:
    made = records()
    products = [row("limit", 250, 8192), row("ours", 300, 8192), row("torch-rowwise", 310, 8192)]
    found = {"h200": {"matmul_8bit": HEAD | {"rows": products}}}
    section = kernels_section(found)
    assert "**Multiply in FP8.** y = x W^T + h B^T" in section
    assert "| q_proj | forward | 8192 | 250 | 300 | - | - | 310 | - |" in section
    steps = {f"{name}_fp8": made[name] for name in ("train_step", "breakdown")}
    section = step_section({"h200": made | steps})
    assert section.count("| Quatrain, keep | 16,000, 12.3 GiB |") == 2
    assert "**Training step, base products in FP8.** The same with" in section
    assert section.index("**Training step.**") < section.index("**Training step, base products")
    assert section.index("**Breakdown.**") < section.index("**Breakdown, base products in FP8.**")


def test_a_section_without_results_says_so_or_is_empty() -> None:
    assert kernels_section({}).endswith("No results are committed yet.")
    assert step_section({}) == ""
    assert with_sections(EMPTY, {}).startswith(f"# Title\n\n{''.join(STEP)}\n\n")


def test_the_rest_of_the_page_stays() -> None:
    begin, end = KERNELS
    text = f"before\n{begin}old\nlines{end}\nafter\n"
    assert with_section(text, "kernels", "new") == f"before\n{begin}new{end}\nafter\n"
    with pytest.raises(ValueError, match="must have the markers <!-- step -->"):
        with_section(text, "step", "new")


def test_tables_are_laid_out() -> None:
    header, lines = ["a", "bb"], [["ccc", "1"], ["d", "234"]]
    assert aligned(header, lines) == "a    bb\nccc   1\nd   234"
    assert markdown(header, lines) == "| a | bb |\n| --- | ---: |\n| ccc | 1 |\n| d | 234 |"


def test_times_keep_three_digits() -> None:
    formatted = [microseconds(row("ours", us)) for us in (3.14159, 53.55, 100.2, 1234.5)]
    assert formatted == ["3.1", "53.5", "100", "1,234"]
    assert microseconds(None) == "-"


def test_rows_of_one_case_stand_side_by_side() -> None:
    cases = by_case([row("ours", 1, 4), row("torch", 2, 4), row("ours", 3, 8)])
    assert [(case.m, list(found)) for case, found in cases.items()] == [
        (4, ["ours", "torch"]),
        (8, ["ours"]),
    ]


@pytest.fixture
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, record in records().items():
        (tmp_path / f"{name}.h100.json").write_text(json.dumps(record))
    (tmp_path / "measured.md").write_text(EMPTY)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "DOCUMENT", tmp_path / "measured.md")


@pytest.mark.usefixtures("_folder")
def test_without_write_the_section_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report"])
    assert module.main() == 0
    devices = {"h100": records()}
    expected = f"{step_section(devices)}\n\n{kernels_section(devices)}\n"
    assert capsys.readouterr().out == expected
    assert (tmp_path / "measured.md").read_text() == EMPTY


@pytest.mark.usefixtures("_folder")
def test_without_matplotlib_writing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", "--write"])
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        module.main()
    assert "--write needs matplotlib" in capsys.readouterr().err


@pytest.mark.usefixtures("_folder")
def test_writing_twice_gives_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["report", "--write"])
    written = []
    for _ in range(2):
        assert module.main() == 0
        written.append({path.name: path.read_bytes() for path in sorted(tmp_path.iterdir())})
    assert written[0] == written[1]
    charts = [name for name in written[0] if name.endswith(".svg")]
    assert charts == ["breakdown.h100.svg", "nf4_bandwidth.h100.svg", "nf4_matmul.h100.svg"]
    for name in charts:
        assert b"<dc:date>" not in written[0][name]
    assert "| q_proj | forward | 1 |" in (tmp_path / "measured.md").read_text()
