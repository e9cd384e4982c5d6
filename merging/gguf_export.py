"""--gguf: a GGUF file and a Modelfile in the merged folder, planned before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint.opening import open_checkpoint
from checkpoint.shard_reader import Report
from data.tokenizer import Tokenizer
from export.chat_turns import find_turns
from export.gguf_file import GGUFPlan, check_installed, plan_gguf, write_gguf
from export.modelfile import MODELFILE, can_be_quoted, go_template, stops_of, write_modelfile
from merging.job import MergeJob


@dataclass(frozen=True)
class GGUFExport:
    """The plan of both files.

    Attributes:
        modelfile: the text of the Modelfile.
        remarks: lines about what llama.cpp and Ollama do otherwise.
    """

    plan: GGUFPlan
    file_name: str
    modelfile: str
    remarks: Sequence[str]

    @property
    def num_bytes(self) -> int:
        return self.plan.num_bytes + len(self.modelfile)


def plan_export(job: MergeJob) -> GGUFExport:
    """Plan the two files of the merged model.

    Raises:
        FileNotFoundError, ValueError: the gguf package is missing, or as `plan_gguf`.
    """
    check_installed()
    tokenizer = Tokenizer.from_folder(job.tokenizer_folder)
    plan = plan_gguf(job.model, tokenizer, job.tokenizer_folder, job.gguf)
    turns = find_turns(tokenizer.chat_template()) if tokenizer.has_chat_template else None
    adds_bos = plan.fields["tokenizer.ggml.add_bos_token"]
    template = go_template(turns, tokenizer.bos_token if adds_bos else None) if turns else None
    remarks = list(plan.remarks)
    if template is None:
        remarks.append(
            f"{MODELFILE} has no TEMPLATE, because the chat template is not made of fixed texts "
            "around messages: Ollama takes a template of its own that is like it, if it has one"
        )
    system = job.run.system_prompt
    if not can_be_quoted(system):
        remarks.append(
            f"{MODELFILE} has no SYSTEM, because the adapter's --system-prompt has characters that "
            "do not print or quotes at its end: give it with each conversation"
        )
        system = ""
    file_name = f"model-{plan.type}.gguf"
    stops = stops_of(turns, tokenizer, job.model.config.eos_token_ids)
    modelfile = write_modelfile(file_name, template, stops, system)
    return GGUFExport(plan, file_name, modelfile, remarks)


def write_export(export: GGUFExport, folder: Path, name: str, report: Report) -> None:
    """Write both files into the folder of the merged model.

    Args:
        name: of the model, in the GGUF file.
        report: called as `report(done, total)` after each tensor.

    Raises:
        OSError, ValueError: as `write_gguf`.
    """
    path = folder / export.file_name
    write_gguf(export.plan, open_checkpoint(folder), path, name, report)
    (folder / MODELFILE).write_text(export.modelfile, encoding="utf-8")
