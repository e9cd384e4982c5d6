"""Imports what scripts import, once, and runs each script in a fork of itself; see `hosts`.

What else each fork would do again, a script has under `if __name__ == "__host__"`.

A line of the standard input is a job: the script, its arguments, its working directory, and the
file that takes what it prints. A line of the standard output is the exit code of a job.
"""

import ast
import contextlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn


def is_for_host(line: ast.stmt) -> bool:
    """Whether a statement is an import, or meant for this process alone."""
    if isinstance(line, ast.If):
        return ast.unparse(line.test) == "__name__ == '__host__'"
    return isinstance(line, ast.Import | ast.ImportFrom)


def import_as(script: Path) -> None:
    """Run the imports of a script, so that its forks find the modules."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    tree.body = [line for line in tree.body if is_for_host(line)]
    # the script itself says what is missing
    with contextlib.suppress(ImportError):
        exec(compile(tree, str(script), "exec"), {"__name__": "__host__"})


def be(job: dict[str, Any]) -> NoReturn:
    """Run a script as Python does, and end with its exit code."""
    code = 1
    said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(job["folder"])
    sys.argv = [job["script"], *job["arguments"]]
    try:
        runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        import_as(Path(job["script"]))
        process = os.fork()
        if process == 0:
            be(job)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
