"""The data of a run, to learn from and to evaluate on: tokenized, described and checked."""

from collections.abc import Sequence
from datetime import datetime
from functools import partial

from checkpoint.opening import Checkpoint
from checkpoint.untrained_rows import untrained_rows
from data import audit, mixture
from data.chat import template_marks
from data.dataset import Dataset, load_dataset
from data.formats.field_names import parse_fields
from data.prompt import encode_prompt
from data.sources import Found, Wanted, check_names, find_data
from data.tokenizer import Tokenizer
from foreign.terminal import one_line
from run.bars import progress_bar
from run.config import TrainConfig
from run.places import Place, read_places


def load_data(
    config: TrainConfig, tokenizer: Tokenizer, checkpoint: Checkpoint, started: str
) -> tuple[Dataset, Dataset | None]:
    """Tokenize the data to learn from and the data to evaluate on, and describe both in lines.

    Args:
        started: ISO time of the run's first start, which chat templates may print.

    Raises:
        ValueError: the data cannot be read, or would teach the wrong thing.
    """
    ignored_fields = _listed(config.ignore_fields)
    field_names = parse_fields(config.fields)
    find_untrained = partial(untrained_rows, checkpoint)
    places = read_places(config.data)
    found, eval_found = _find(config, places)

    def load(flag: str, found: Found) -> Dataset:
        files = found.files
        print(one_line(f"{flag}: {found.describe()}"))
        with progress_bar("tokenizing", "records") as bar:

            def report(num_records: int) -> None:
                bar.update(num_records - bar.n)

            dataset = load_dataset(
                files,
                tokenizer,
                data_format=config.data_format,
                max_length=config.max_length,
                train_on=config.train_on,
                vocab_size=checkpoint.config.vocab_size,
                now=datetime.fromisoformat(started),
                skip_bad_lines=config.skip_bad_lines,
                ignored_fields=ignored_fields,
                field_names=field_names,
                system_prompt=config.system_prompt,
                num_processes=config.dataset_num_proc,
                report=report,
            )
        print(audit.describe(dataset))
        for warning in template_marks.warnings(dataset.counts, tokenizer, find_untrained):
            print(one_line(warning))
        num_shown = config.inspect or int(flag == "--data")
        for index in range(min(num_shown, len(dataset.samples))):
            audit.say_sample(dataset, index, tokenizer, is_shortened=not config.inspect)
        audit.check(dataset, flag, allow_truncation=config.allow_truncation)
        return dataset

    train_data = mixture.mix(
        [load("--data", each) for each in found],
        [place.name for place in places],
        [place.weight for place in places],
    )
    for line in mixture.describe(train_data):
        print(one_line(line))
    if config.eval_fraction:
        train_data, eval_data = train_data.split(config.eval_fraction)
        print(
            f"--eval-fraction {config.eval_fraction:g}: {len(train_data.samples):,} samples to "
            f"learn from, {len(eval_data.samples):,} to evaluate on"
        )
        return train_data, eval_data
    if not eval_found:
        return train_data, None
    eval_data = load("--eval-data", eval_found)
    if shared := audit.num_shared(train_data, eval_data):
        print(
            f"{shared:,} of the {len(eval_data.samples):,} samples to evaluate on are among those "
            "to learn from"
        )
    return train_data, eval_data


def prompt_of(
    config: TrainConfig, tokenizer: Tokenizer, checkpoint: Checkpoint
) -> list[int] | None:
    """The tokens of --sample-prompt, None where it is not given."""
    if not config.sample_prompt:
        return None
    size = checkpoint.config.vocab_size
    return encode_prompt(config.sample_prompt, tokenizer, size, config.system_prompt)


def _find(config: TrainConfig, places: Sequence[Place]) -> tuple[list[Found], Found | None]:
    """Find the files of each data set of --data, and of --eval-data."""
    subsets, splits = _listed(config.subset), _listed(config.split)
    wanted = Wanted("--data", "train", subsets, splits)
    found, evaluation = [find_data(place.name, wanted) for place in places], list[Found]()
    eval_splits = _listed(config.eval_split)
    if config.eval_data:
        same = (f.part for p, f in zip(places, found, strict=True) if p.name == config.eval_data)
        wanted = Wanted("--eval-data", "eval", subsets, eval_splits, next(same, None))
        evaluation = [find_data(config.eval_data, wanted)]
    check_names("--subset", subsets, [*found, *evaluation])
    check_names("--split", splits, found)
    check_names("--eval-split", eval_splits, evaluation)
    return found, next(iter(evaluation), None)


def _listed(text: str) -> tuple[str, ...]:
    """The names of a flag that takes several."""
    names = (name.strip() for name in text.split(","))
    return tuple(name for name in names if name)
