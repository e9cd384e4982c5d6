"""Measure the whole training step beside the peers': tokens per second, and the memory it takes.

    python -m benchmarks train_step --json benchmarks/results/train_step.h100.json
    python -m benchmarks train_step --recipe seed ...
    python -m benchmarks train_step --recipe 1b ...             and the others of the list
    python -m benchmarks train_step --base-compute fp8 ...      our base products in FP8

    all-linear   Llama-3-8B, rank 16 on all linear layers, paged AdamW in 32 bits
    seed         Llama-3-8B, rank 16 on q_proj and v_proj, dropout 0.05, paged AdamW in 8 bits
    1b, 3b       as all-linear, but the shapes of Llama-3.2-1B and Qwen2.5-3B
    70b          Llama-3-70B's shape with random codes, ours alone: no peer loads it without a file
    30b-a3b      Qwen3-30B-A3B's shape with random codes, rank 16 on attention, ours alone
    gemma-3-12b  these shapes with random codes, ours alone: also phi-4-mini, smollm3-3b, and
                 gpt-oss-20b with rank 16 on attention

NF4 with double quantization, bf16, all tokens with a label. Every provider is a process of its own
on the same GPU, one after the other, and all load the same checkpoint folder (--model; written with
random weights where there is none, or into a temporary folder); without --model and peers ours
draws random codes. `limit` rows are measured too: see
train_step_limit.py. A step is one micro-batch and the optimizer's step, with clipping; its time is
the median of three blocks of --steps each, after two steps to warm up. peak_gib and reserved_gib
are torch's allocator's, from each shape's first step on; first_step_s counts from the start of the
process.

A peer that is not installed, fails, does not fit or takes longer than --time-limit has a row that
says so. The file is written after every provider.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from benchmarks.load import SHAPES, write_checkpoint
from benchmarks.random_model import FAMILY_FIELDS
from benchmarks.record import ROOT, head, write
from benchmarks.step_timing import parse_shape
from benchmarks.tables import Row, aligned, train_step_lines
from checkpoint.files import INDEX_NAME, SINGLE_NAME
from run.flags import BASE_COMPUTES

HERE = Path(__file__).resolve().parent
# what the peers expect of a config.json beyond what a shape needs
PEER_FIELDS = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FIELDS = SHAPES["llama-3-8b"] | PEER_FIELDS
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
NUM_WORDS = 1000


class Provider(NamedTuple):
    """Who takes the step, and what happens to activations."""

    name: str
    policy: str


OURS = ("expand", "keep", "recompute", "offload", "auto")
PEERS = {
    "hf": (Provider("hf", "recompute"),),
    "unsloth": (Provider("unsloth", "keep"), Provider("unsloth", "offload")),
}


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on which shapes if the command line does not say."""

    shapes: tuple[str, ...]
    # of benchmarks/random_model.py
    shape_name: str = "llama-3-8b"
    has_checkpoint: bool = True
    ours: tuple[str, ...] = OURS
    target_modules: str = "all-linear"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    optim: str = "paged_adamw_32bit"
    # of ours: bf16, or fp8 for base products of E4M3 rows
    base_compute: str = "bf16"


RECIPES = {
    "all-linear": Recipe(("1x2048", "4x2048", "8x2048", "1x8192")),
    "seed": Recipe(
        ("4x512", "4x2048"),
        target_modules="q_proj,v_proj",
        dropout=0.05,
        optim="paged_adamw_8bit",
    ),
    "1b": Recipe(("1x2048", "4x2048", "8x2048"), shape_name="llama-3.2-1b"),
    "3b": Recipe(("1x2048", "4x2048", "8x2048"), shape_name="qwen2.5-3b"),
    "70b": Recipe(
        ("1x2048",),
        shape_name="llama-3-70b",
        has_checkpoint=False,
        ours=("offload", "recompute"),
    ),
    "30b-a3b": Recipe(
        ("4x2048",),
        shape_name="qwen3-30b-a3b",
        has_checkpoint=False,
        ours=("offload", "recompute", "auto"),
    ),
} | {
    name: Recipe(("4x2048",), shape_name=name, has_checkpoint=False, ours=("offload", "expand"))
    for name in FAMILY_FIELDS
}


@dataclass
class Outcome:
    """What a process printed, and why it ended if it did not end well."""

    rows: list[Row] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    is_ready: bool = False
    error: str | None = None
    is_timed_out: bool = False


def last_error(text: str) -> str:
    """Find the last line of a traceback, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0]]
    return (errors or lines or ["no message"])[-1][:300]


def read_output(text: str) -> Outcome:
    """Sort what a process printed: JSON objects a line, and whatever else its libraries say."""
    outcome = Outcome()
    for line in text.splitlines():
        if not line.startswith("{"):
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            # a line that the time limit cut off, or not ours
            continue
        if row.get("is_ready"):
            outcome.is_ready = True
        elif "versions" in row:
            outcome.versions |= row["versions"]
        elif "provider" in row:
            outcome.rows.append(row)
    return outcome


def run_process(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], time_limit: float
) -> Outcome:
    """Run a provider to its end, or to the end of its time, with all processes that it starts."""
    with tempfile.TemporaryDirectory() as logs:
        out, err = Path(logs) / "out", Path(logs) / "err"
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=dict(environment),
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                code = process.wait(time_limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        outcome = read_output(out.read_text(errors="replace"))
        if code is None:
            outcome.is_timed_out = True
            outcome.error = f"not done after {time_limit:.0f} s"
        elif code != 0:
            outcome.error = f"exit code {code}: {last_error(err.read_text(errors='replace'))}"
    return outcome


def without_checkout(path: str) -> str:
    """Take this checkout out of PYTHONPATH, and make the rest independent of where one is."""
    entries = [Path(entry).resolve() for entry in path.split(os.pathsep) if entry]
    return os.pathsep.join(str(entry) for entry in entries if entry != ROOT)


def command_of(
    provider: Provider, recipe: Recipe, model: str, shapes: Sequence[str], steps: int, folder: Path
) -> list[str]:
    """Write out the command of a provider's process; of a peer its script's copy in a folder."""
    if provider.name == "limit":
        module = ["-m", "benchmarks.train_step_limit", "--shape-name", recipe.shape_name]
        flags = ["--shapes", ",".join(shapes), "--base-compute", recipe.base_compute]
        return [sys.executable, *module, *flags]
    flags = {
        "--policy": provider.policy,
        "--model": model,
        "--shapes": ",".join(shapes),
        "--steps": steps,
        "--target-modules": recipe.target_modules,
        "--rank": recipe.rank,
        "--alpha": recipe.alpha,
        "--dropout": recipe.dropout,
        "--optim": recipe.optim,
        "--started": time.time(),
    }
    arguments = [str(part) for flag in flags.items() for part in flag]
    if provider.name == "ours":
        arguments += ["--base-compute", recipe.base_compute]
        return [sys.executable, "-m", "benchmarks.train_step_ours", *arguments]
    script = str(folder / "train_step_peer.py")
    return [sys.executable, script, "--provider", provider.name, *arguments]


def failure(provider: Provider, shape: str, error: str) -> Row:
    """Record that a provider has no figures for a shape."""
    return {"provider": provider.name, "policy": provider.policy, "shape": shape, "error": error}


@dataclass(frozen=True)
class Bench:
    """How providers are run."""

    recipe: Recipe
    model: str
    shapes: tuple[str, ...]
    steps: int
    time_limit: float

    def _run(self, provider: Provider, shapes: Sequence[str]) -> Outcome:
        if provider.name not in PEERS:
            command = command_of(provider, self.recipe, self.model, shapes, self.steps, ROOT)
            return run_process(command, ROOT, os.environ, self.time_limit)
        environment = os.environ | {
            "PYTHONPATH": without_checkout(os.environ.get("PYTHONPATH", "")),
            "HF_HUB_OFFLINE": "1",
            "UNSLOTH_DISABLE_STATISTICS": "1",
        }
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for name in ("train_step_peer.py", "step_timing.py"):
                shutil.copy(HERE / name, folder)
            command = command_of(provider, self.recipe, self.model, shapes, self.steps, folder)
            return run_process(command, folder, environment, self.time_limit)

    def measure(self, provider: Provider) -> Outcome:
        """Measure all shapes; one that ends the process gets another process for those after it."""
        found = Outcome()
        remaining = list(self.shapes)
        while remaining:
            outcome = self._run(provider, remaining)
            found.rows += outcome.rows
            found.versions |= outcome.versions
            done = {row["shape"] for row in outcome.rows}
            missing = [shape for shape in remaining if shape not in done]
            is_shape_to_blame = outcome.is_ready and not outcome.is_timed_out
            failed = missing[:1] if is_shape_to_blame else missing
            error = outcome.error or "no figures"
            found.rows += [failure(provider, shape, error) for shape in failed]
            remaining = missing[len(failed) :]
        return found


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of a few words, which Unsloth asks for and nobody uses."""
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(len(SPECIAL_TOKENS), NUM_WORDS))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(zip(("pad", "bos", "eos", "unk"), SPECIAL_TOKENS, strict=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": FIELDS["max_position_embeddings"],
        "padding_side": "right",
        **{f"{name}_token": token for name, token in named.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def prepare_checkpoint(folder: Path, fields: dict[str, Any]) -> Path:
    """Write a checkpoint of random weights into a folder that has none."""
    # the index is written last
    if not any((folder / name).is_file() for name in (INDEX_NAME, SINGLE_NAME)):
        start = time.monotonic()
        write_checkpoint(folder, fields)
        print(f"wrote {folder} in {time.monotonic() - start:.0f} s", flush=True)
    if not (folder / "tokenizer.json").is_file():
        write_tokenizer(folder)
    return folder


def providers_of(recipe: Recipe, ours: Sequence[str], peers: Sequence[str]) -> list[Provider]:
    """List who is measured, the limit first."""
    found = [Provider("limit", "keep"), *(Provider("ours", policy) for policy in ours)]
    if recipe.has_checkpoint:
        for peer in peers:
            name, _, policy = peer.partition(":")
            found += [provider for provider in PEERS[name] if policy in ("", provider.policy)]
    return found


def measure_all(
    bench: Bench, providers: Sequence[Provider], record: dict[str, Any], path: Path | None
) -> dict[str, Any]:
    """Measure one provider after the other, writing the file after each."""
    record |= {"versions": {}, "rows": []}
    for provider in providers:
        start = time.monotonic()
        outcome = bench.measure(provider)
        record["versions"] |= outcome.versions
        record["rows"] += outcome.rows
        seconds = time.monotonic() - start
        print(f"\n{provider.name} {provider.policy}, {seconds:.0f} s", flush=True)
        for row in outcome.rows:
            print("  " + describe(row), flush=True)
        if path:
            write(path, record)
    return record


def describe(row: Row) -> str:
    """Say in a line what a row found."""
    if "error" in row:
        return f"{row['shape']}: {row['error']}"
    memory = f", {row['peak_gib']} GiB" if row.get("peak_gib") is not None else ""
    return f"{row['shape']}: {row['tokens_per_second']:,.0f} tokens/s{memory}"


def some_of(text: str, known: Sequence[str], flag: str) -> list[str]:
    """Split a list at its commas.

    Raises:
        ValueError: it names something unknown.
    """
    names = [name for name in text.split(",") if name]
    for name in names:
        # auto:8GiB is a case of auto
        if name.partition(":")[0] not in known:
            raise ValueError(f"{flag} must name some of {', '.join(known)}: got {name!r}")
    return names


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description="Measure the training step.")
    result.add_argument("--recipe", choices=RECIPES, default="all-linear")
    result.add_argument("--shapes", default="", help="SAMPLESxTOKENS with commas, or the recipe's")
    result.add_argument("--base-compute", choices=BASE_COMPUTES, default="bf16", help="of ours")
    result.add_argument("--ours", help="policies with commas, of them auto:8GiB and the like")
    result.add_argument(
        "--peers", default="hf,unsloth", help="hf, unsloth, unsloth:keep, with commas"
    )
    result.add_argument("--model", type=Path, help="checkpoint folder, written if it is not there")
    result.add_argument(
        "--steps", type=int, default=3, help="of each of three blocks, after two to warm up"
    )
    result.add_argument("--time-limit", type=float, default=240, help="of a process, seconds")
    result.add_argument("--json", type=Path, help="result file to write")
    result.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    return result


def main() -> int:
    arguments = parser().parse_args()
    recipe = replace(RECIPES[arguments.recipe], base_compute=arguments.base_compute)
    shapes = tuple(arguments.shapes.split(",")) if arguments.shapes else recipe.shapes
    for shape in shapes:
        parse_shape(shape)
    ours = recipe.ours if arguments.ours is None else some_of(arguments.ours, OURS, "--ours")
    peers = some_of(arguments.peers, list(PEERS), "--peers")
    if not torch.cuda.is_available():
        raise RuntimeError("a benchmark needs a CUDA GPU: torch.cuda.is_available() is False")
    record = head("train_step", arguments.commit) | {
        "recipe": arguments.recipe,
        "base_compute": recipe.base_compute,
        "model": recipe.shape_name,
        "num_cores": os.cpu_count(),
        "steps": arguments.steps,
    }
    # a file that nobody else reads need not be written
    has_checkpoint = recipe.has_checkpoint and bool(peers or arguments.model)
    record |= {"checkpoint": has_checkpoint}
    with tempfile.TemporaryDirectory() as temporary:
        model = recipe.shape_name
        if has_checkpoint:
            folder = arguments.model or Path(temporary) / recipe.shape_name
            fields = SHAPES[recipe.shape_name] | PEER_FIELDS
            model = str(prepare_checkpoint(folder, fields).resolve())
        bench = Bench(recipe, model, shapes, arguments.steps, arguments.time_limit)
        measure_all(bench, providers_of(recipe, ours, peers), record, arguments.json)
    print(f"\n{record['device']}, torch {record['torch']}, triton {record['triton']}\n")
    print(aligned(*train_step_lines(record["rows"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
