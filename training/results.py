"""The results of a finished run: adapter, tokenizer, model card, and a copy of them on the hub."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from export.gguf_architecture import has_architecture
from foreign.terminal import one_line
from hub.push import push_folder
from llama.model import parameter_shapes, projection_shapes
from llama.targets import update_sizes
from lora.adapter_file import rename_base
from lora.readers import misreaders
from run.atomic import new_files, new_folder, remove_folder, write_text
from run.log import RunLog
from run.model_card import CARD_FILE, model_card
from run.usage import Usage
from run.watching import Watching
from training.ending import cannot_save
from training.run import Run
from training.saving import write_adapter

# folder inside the output folder: the files on their way to the hub
HUB_FOLDER = "hub"


def save_results(run: Run, log: RunLog) -> list[str]:
    """Write the adapter and the tokenizer into the output folder, and return the files' names."""
    # frees the GPU's memory: the adapter must be saved also where none is left
    run.micro_step.release()
    if not (run.job.num_steps and run.ranks.is_first):
        return []
    output = run.job.output
    log.flush()
    try:
        with new_files(output) as folder:
            write_adapter(folder, run)
            names = _names_in(folder)
    except OSError as error:
        raise cannot_save(run.job, error) from None
    log.say(f"saved the adapter in {output}")
    # the tokenizer's files are copied from the model's folder, which may be gone by now
    with Watching("the tokenizer's copy", log.say), new_files(output) as folder:
        run.job.tokenizer.save(folder)
        names += _names_in(folder)
    return names


def _names_in(folder: Path) -> list[str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in paths]


def write_card(run: Run, log: RunLog, names: list[str]) -> None:
    """Write the model card of an adapter that was saved, and add it to the names of its files."""
    job = run.job
    if names:
        with Watching(CARD_FILE, log.say, is_last=True):
            is_on_hub = job.base_id is not None
            usage = usage_of(run)
            card = model_card(
                job.config, log.rows, names, job.base_name, usage, is_on_hub=is_on_hub
            )
            write_text(job.output / CARD_FILE, card)
            names.append(CARD_FILE)


def usage_of(run: Run) -> Usage:
    """Gather what the commands that use a run's adapter depend on."""
    job, output = run.job, str(run.job.output)
    shapes = (read(job.checkpoint.config) for read in (projection_shapes, parameter_shapes))
    sizes = update_sizes(job.lora, *shapes)
    hub_id = None if job.is_base_local else job.base_id
    return Usage(
        adapter=output,
        merged=f"{output}-merged",
        base=hub_id.repository if hub_id else job.config.model,
        revision=hub_id.revision if hub_id else None,
        rank=max(size.rank for size in sizes.values()),
        is_chat=job.tokenizer.has_chat_template,
        misreaders=tuple(misreaders(job.lora, sizes)),
        has_gguf=has_architecture(job.checkpoint),
    )


def say_usage(run: Run, log: RunLog, names: Sequence[str]) -> None:
    """Say how to go on with the adapter, if one was saved."""
    if names:
        for line in usage_of(run).last_lines():
            log.say(one_line(line))


def push(run: Run, log: RunLog, names: Sequence[str]) -> None:
    """Send the saved files and their card to --push-to-hub.

    Where the hub refuses them, they stay in a folder of their own.
    """
    job, repository = run.job, run.config.push_to_hub
    if repository and names:
        base = one_line(job.base_name)
        with Watching("--push-to-hub", log.say, is_last=True):
            folder = job.output / HUB_FOLDER
            shutil.rmtree(folder, ignore_errors=True)
            with new_folder(folder) as partial:
                for name in names:
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(job.output / name, partial / name)
                # the base's name alone: its place on this disk is private
                rename_base(partial, base)
            message = f"LoRA of {base} after {run.state.step:,} steps"
            url = push_folder(folder, repository, message)
            remove_folder(folder)
            log.say(f"pushed the adapter: {url}")
