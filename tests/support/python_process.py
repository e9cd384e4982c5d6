"""Runs Python as from the command line, forked from a process that has imported torch.

A script of `hosts`: its arguments are the files that take what is printed to both streams, the
environment, then those of `python`: `-c CODE`, `-m MODULE` or a program, and what that is given.
"""

import atexit
import json
import os
import runpy
import sys
import traceback

# the second is imported where a module is made on the meta device


def run(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def exit_code(asked: object) -> int:
    """What Python makes of the argument of sys.exit()."""
    if asked is None or isinstance(asked, int):
        return asked or 0
    print(asked, file=sys.stderr)
    return 1


def main() -> None:
    out, err, environment, *arguments = sys.argv[1:]
    for stream, path in enumerate((out, err), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(json.loads(environment))
    # in place of the folder of the host's script
    more = os.environ.get("PYTHONPATH", "")
    sys.path[:1] = [os.getcwd(), *filter(None, more.split(os.pathsep))]
    code = 0
    try:
        run(arguments)
    except SystemExit as error:
        code = exit_code(error.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
