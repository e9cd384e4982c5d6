"""Records of a data file, each with the place it came from.

Where datasets.load_dataset infers a schema over all rows and reports a bad one by its Arrow type,
these readers hand on the values as the file has them, record by record, so that every later error
can name file and line. Every fault of the file is a ValueError that names both too. A fault of one
record goes to the caller, who may count it and go on; a fault that leaves the rest in doubt (an
open quote, a file that was cut off) ends the reading.

Files are read piece by piece; a text, which is one document, is a record for each piece.
"""

import difflib
import glob
from collections.abc import Callable, Iterator
from pathlib import Path

from data.reading.json_files import read_json, read_json_lines
from data.reading.record import Record, Refuse, raise_it
from data.reading.tables import read_csv, read_parquet
from data.reading.texts import read_text

_READERS: dict[str, Callable[[Path, Refuse], Iterator[Record]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".text": read_text,
    ".md": read_text,
}


def read_records(path: Path, refuse: Refuse = raise_it) -> Iterator[Record]:
    """Yield the records of a data file, in its order.

    By the end of its name: .jsonl, .json, .csv, .parquet, .txt, .text or .md; all but parquet may
    be compressed, as .jsonl.gz. A text file is records {"text": a part of it}. A .json file that
    holds JSON lines is read as such, one that holds an object as one record or, under "data" or
    "instances", a list of them.

    Args:
        refuse: is given the error of each record that cannot be read; if it returns, the record is
            left out.

    Raises:
        FileNotFoundError: no such file; the message lists the nearest names.
        ValueError: unknown extension, no records, content that is not what the extension says, or
            parquet without pyarrow.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the data file must exist: got {path}; {_nearest(path)}")
    reader = _READERS.get(data_suffix(path.name))
    if reader is None:
        raise ValueError(
            f"the data file must end in {', '.join(_READERS)}: got {path}; convert or rename it"
        )
    is_empty = True

    def refuse_and_note(error: ValueError) -> None:
        nonlocal is_empty
        is_empty = False
        refuse(error)

    for record in reader(path, refuse_and_note):
        is_empty = False
        yield record
    if is_empty:
        raise ValueError(
            f"{path} must hold at least one record: got none; check how it was written"
        )


def data_suffix(name: str) -> str:
    """The end of a file's name that says how it is read, "" where none does."""
    path = Path(name.lower())
    inner = Path(path.stem).suffix
    if path.suffix == ".gz":
        return inner if inner in _READERS and inner != ".parquet" else ""
    return path.suffix if path.suffix in _READERS else ""


def is_structured(name: str) -> bool:
    """Whether the file holds records with fields, rather than one text."""
    return data_suffix(name) != "" and _READERS[data_suffix(name)] is not read_text


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    # of a list of names, as LLaMA-Factory has one, whose files are in data/
    listed = sorted((path.parent / "data").glob(f"{glob.escape(path.name)}.*"))
    if found := [p for p in listed if data_suffix(p.name)]:
        return f"did you mean {found[0]}?"
    names = [p.name for p in path.parent.iterdir() if data_suffix(p.name)]
    nearest = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4) or sorted(names)[:3]
    return (
        f"did you mean {' or '.join(nearest)}?" if nearest else f"{path.parent} has no data files"
    )
