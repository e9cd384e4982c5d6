"""A short form of tests/soak.py; the whole of it is `python -m tests.soak`."""

import subprocess
import sys

from conftest import ROOT


def test_doors_survive_kills_company_and_a_full_disk() -> None:
    command = [sys.executable, "-m", "tests.soak", "--every", "60"]
    # where anybody may have a name space, a disk can be mounted in it
    isolated = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*isolated, "true"], check=False, capture_output=True).returncode == 0:
        command = isolated + command
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failed, " in done.stdout
