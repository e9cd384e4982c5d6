"""The files beside a merged model's weights, each copied byte for byte."""

from pathlib import Path

from checkpoint.files import INDEX_NAME, OTHER_COMPANIONS, SINGLE_NAME, TOKENIZER_COMPANIONS
from llama.config import CONFIG_NAME
from merging.job import MergeJob


def files_beside_the_weights(job: MergeJob) -> dict[Path, Path]:
    """Find the files that are copied, by their place in the folder: configs, index, tokenizer and
    chat templates."""
    model = job.model.folder
    sources = dict.fromkeys((CONFIG_NAME, INDEX_NAME, *OTHER_COMPANIONS), model)
    if (model / SINGLE_NAME).is_file():
        # the index is that of another checkpoint
        del sources[INDEX_NAME]
    sources |= dict.fromkeys(TOKENIZER_COMPANIONS, job.tokenizer_folder)
    return {
        path.relative_to(folder): path
        for pattern, folder in sources.items()
        for path in folder.glob(pattern)
    }
