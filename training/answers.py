"""The model's answers to --sample-prompt before, during and after its training."""

from data.answer_text import words_of
from foreign.terminal import one_line
from generation.generator import generate_greedy
from llama.served import as_served
from prepare.course import SAMPLE_TOKENS
from run.log import RunLog
from run.watching import Watching
from training.ending import is_of_device
from training.run import Run


def first_answer(run: Run, log: RunLog) -> None:
    """Answer before the first step, unless an earlier process of this run has answered."""
    is_first = run.ranks.is_first
    if run.job.prompt and run.ranks.largest(is_first and not log.answers()):
        answer(run, log)


def say_answer(run: Run, log: RunLog) -> None:
    """Answer after a step, and show the answer beside the figures."""
    text = answer(run, log)
    log.say(one_line(f"step {run.state.step}: {run.config.sample_prompt} -> {text}"))


def last_answer(run: Run, log: RunLog) -> None:
    """Answer after the last step, if the device still can."""
    with Watching("--sample-prompt", log.say, is_last=True):
        if run.job.prompt:
            answer(run, log)


def answer(run: Run, log: RunLog) -> str:
    """Continue --sample-prompt with the most probable tokens, and write the answer down.

    Returns:
        The answer, on the first rank; the other ranks generate nothing and return "".
    """
    text = ""
    with run.ranks.sharing_shortage():
        if run.ranks.is_first:
            with Watching("--sample-prompt", log.say, is_spared=is_of_device):
                job = run.job
                assert job.prompt is not None
                with as_served(run.model):
                    new_ids = generate_greedy(run.model, job.prompt, SAMPLE_TOKENS, job.stop_ids)
                text = job.tokenizer.decode(words_of(new_ids, job.opening)).strip()
                log.add_answer(run.state.step, text)
    return text


def compare_answers(run: Run, log: RunLog) -> None:
    """Show the untrained model's answer above the trained model's, where there are both.

    Further lines of an answer are indented, so that none of them reads as a message of the run.
    """
    answers = log.answers()
    if len(answers) < 2:
        return
    named = {"prompt": run.config.sample_prompt, "before": answers[0], "after": answers[-1]}
    lines = [f"{name:<8}" + text.replace("\n", f"\n{'':8}") for name, text in named.items()]
    log.say("\n".join(["", *lines]))
