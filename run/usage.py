"""The use of a trained adapter: the commands that talk to it, merge it and serve it."""

import shlex
from dataclasses import dataclass

# the largest ranks that vLLM can be told
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Usage:
    """An adapter and its base as commands name them; every command is quoted for the shell.

    Attributes:
        adapter: the adapter's folder.
        merged: a new folder for the merged model.
        base: the folder or hub id of the base model.
        revision: of the hub id, if there is one.
        rank: the largest of the updates.
        is_chat: whether prompts are messages, which a chat template writes.
        misreaders: the programs that would compute another update.
        has_gguf: whether the merged model has a form for llama.cpp.
    """

    adapter: str
    merged: str
    base: str
    revision: str | None
    rank: int
    is_chat: bool
    misreaders: tuple[str, ...]
    has_gguf: bool

    @property
    def prompt(self) -> str:
        return "Write a verse about the sea." if self.is_chat else "Once upon a time"

    @property
    def warning(self) -> str:
        """The programs that would misread the adapter; empty where all compute what was trained."""
        if not self.misreaders:
            return ""
        return (
            f"{', '.join(self.misreaders)} would misread this adapter: its projections have ranks "
            "or alphas of their own, which they do not read; merge it for them"
        )

    @property
    def talk(self) -> str:
        return shlex.join(["python", "generate.py", "--adapter", self.adapter, "--chat"])

    @property
    def answer(self) -> str:
        return shlex.join(
            ["python", "generate.py", "--adapter", self.adapter, "--prompt", self.prompt]
        )

    @property
    def merge(self) -> str:
        """With a file for llama.cpp and Ollama beside the merged model, where there can be one."""
        words = ["--adapter", self.adapter, "--output", self.merged]
        gguf = ["--gguf", "q8_0"] if self.has_gguf else []
        return shlex.join(["python", "merge.py", *words, *gguf])

    @property
    def serve(self) -> str:
        """With vLLM: the base and the adapter, or the merged model where vLLM would misread it."""
        if any("vLLM" in names for names in self.misreaders):
            return shlex.join(["vllm", "serve", self.merged])
        rank = next((rank for rank in _VLLM_RANKS if rank >= self.rank), self.rank)
        revision = ["--revision", self.revision] if self.revision else []
        # the run's tokenizer has the chat template that it was trained with
        words = ["--tokenizer", self.adapter, "--enable-lora", "--max-lora-rank", str(rank)]
        modules = ["--lora-modules", f"adapter={self.adapter}"]
        return shlex.join(["vllm", "serve", self.base, *revision, *words, *modules])

    def last_lines(self) -> list[str]:
        """What a run says at its end."""
        talk = self.talk if self.is_chat else self.answer
        warning = [self.warning] if self.warning else []
        return [*warning, "", f"talk    {talk}", f"merge   {self.merge}", f"serve   {self.serve}"]
