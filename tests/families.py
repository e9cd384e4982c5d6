"""Write the tables of docs/families.md: what the families' fields, the tests and the planner say.

python -m tests.families
"""

import sys
import tempfile
from pathlib import Path

# as for pytest
sys.path.insert(0, str(Path(__file__).parent))

from support.families_page import (
    REAL,
    line_of_plan,
    list_of_proofs,
    table_of_differences,
    table_of_proofs,
)

from benchmarks.record import ROOT
from benchmarks.report import with_section

PAGE = ROOT / "docs" / "families.md"
HEAD = "| model | class | parameters | memory | GPU |\n| --- | --- | --- | --- | --- |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        plans = [line_of_plan(model, Path(folder)) for model in REAL]
    text = PAGE.read_text()
    text = with_section(text, "differences", table_of_differences())
    text = with_section(text, "fits", "\n".join([HEAD, *plans]))
    text = with_section(text, "proofs", f"{table_of_proofs()}\n\n{list_of_proofs()}")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
