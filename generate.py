"""Let a model answer, alone or with an adapter: read this file top to bottom.

    python generate.py --adapter OUT --prompt "..."                  one answer
    python generate.py --adapter OUT --chat                          a conversation
    python generate.py --adapter OUT --prompts FILE --output FILE    many answers, several at a time
    python generate.py --model M ...                                 without an adapter

The base of an adapter is found where the adapter says, and compared with the one that it was
trained on. Answers go to stdout or into a file, everything else to stderr. `answering/` has what
is checked before the model is loaded, the conversation and the file of answers.
"""

import os
import sys
from collections.abc import Sequence

from answering.flags import build_parser

if __name__ == "__main__":
    # --help and a mistyped flag are answered here: the imports below take seconds
    build_parser().parse_args()

from answering.chat import print_answer, talk
from answering.job import AnswerJob, check, say
from answering.output import new_answers
from checkpoint.loading import load_model
from foreign.terminal import first_line, guard_output, one_line
from generation.generator import Generator
from lora.adapter_file import load_adapter
from run.bars import progress_bar, reporting
from run.last_door import LastDoor
from run.privacy import as_private_as
from run.shortage import is_shortage
from run.signals import end_at_once


def main(arguments: Sequence[str]) -> None:
    job = check(arguments)
    generator = load(job)
    if job.output:
        answer_all(job, generator)
    elif job.prompts:
        print_answer(job, generator, job.prompts[0][1])
    else:
        talk(job, generator)


def load(job: AnswerJob) -> Generator:
    """Load the model, its adapter beside it, and allocate the cache of keys and values."""
    with reporting("loading", "tensors") as report:
        model = load_model(job.checkpoint, job.device, job.dtype, job.quantization, report)
    if job.adapter:
        folder, lora = job.adapter
        model.attach_lora(lora, seed=0)
        load_adapter(folder, model.adapter_tensors(), job.checkpoint.vocabulary_tensors)
    return Generator(model, job.sampling, job.capacity, job.num_sequences)


def answer_all(job: AnswerJob, generator: Generator) -> None:
    """Answer all prompts, and write each answer down as soon as it is complete."""
    assert job.output
    assert job.private_as
    ids = [ids for _, ids in job.prompts]
    num_cut = 0
    with as_private_as([job.private_as]), new_answers(job.output) as answers:
        try:
            with progress_bar("answering", "prompts", len(ids)) as bar:
                for index, new_ids in generator.complete(ids, job.max_new_tokens, job.stop_ids):
                    answers.add(index, job.prompts[index][0].given, job.words_of(new_ids))
                    num_cut += len(new_ids) == job.max_new_tokens
                    bar.update()
        except BaseException:
            say(f"{answers.num_answers:,} of {len(ids):,} answers are in {answers.unfinished}")
            raise
    cut = f"; {num_cut:,} were cut at {job.max_new_tokens:,} tokens" if num_cut else ""
    say(f"{len(ids):,} answers are in {job.output}{cut}")


if __name__ == "__main__":
    guard_output()
    try:
        with LastDoor():
            main(sys.argv[1:])
    except BrokenPipeError:
        # whoever read the answers wants no more; nothing is left to be flushed at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError) as error:
        # what the user gave, or what the disk refused: the message is enough
        sys.exit(f"error: {one_line(error)}")
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        sys.exit(
            f"error: the GPU's memory must suffice: {one_line(first_line(error))}; lower "
            "--max-length or --batch-size"
        )
    finally:
        end_at_once()
