"""`make test`'s last part: the end-to-end tests, on every kind of target that this machine can have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from lab import bootstrap
from lab.process import LabError, say

TESTS = "tests/lab"


def main(environ: Mapping[str, str] | None = None) -> int:
    """Run them. Exit code of pytest; what is skipped, and why, is said before and after.

    With CI=true nothing is skipped: what cannot be installed is an error (LabError).
    """
    environ = os.environ if environ is None else environ
    strict = environ.get("CI") == "true"
    skipped: dict[str, str] = {}
    for kind in ("container", "vm"):
        try:
            if os.geteuid() != 0:
                raise LabError("The lab makes networks on this machine, which takes root.")
            bootstrap.ensure_programs(vm=kind == "vm", tests=True)
        except LabError as error:
            if strict:
                raise
            skipped[kind] = str(error)
    for line in report(skipped, environ):
        say(line)
    if len(skipped) == 2:
        return 0
    argv = [str(bootstrap.VENV / "bin/pytest"), TESTS, *select(skipped)]
    # The tests bring labs and hosts files of their own; nobody's hosts are named to them.
    env = {key: value for key, value in environ.items() if key != "QUIETPORT_HOSTS"}
    code = subprocess.run(argv, cwd=bootstrap.PROJECT, env=env, check=False).returncode
    for line in report(skipped, environ):
        say(line)
    if not strict and "container" not in skipped:
        leave_a_target()
    return code


def leave_a_target() -> None:
    """A blank host to try things on, as `make lab-up` makes it: the tests took theirs down."""
    up = [sys.executable, "-m", "lab", "up"]
    if subprocess.run(up, cwd=bootstrap.PROJECT, check=False).returncode == 0:
        say("A blank host is left for `pyinfra inventory deploys/vps.py`; `make lab-down` ends it.")


def select(skipped: Mapping[str, str]) -> list[str]:
    """pytest's arguments that leave out the kinds of targets that cannot be had."""
    return ["-m", " and ".join(f"not {kind}" for kind in skipped)] if skipped else []


def report(skipped: Mapping[str, str], environ: Mapping[str, str]) -> list[str]:
    """What is not tested here, and why."""
    lines = [f"SKIPPED: tests on a {kind} target: {why}" for kind, why in skipped.items()]
    if environ.get("QUIETPORT_TEST_ALL") != "1":
        lines.append(
            "SKIPPED: the plain VM with Debian 12, and every variant alone on Debian 12; `make test-all` "
            "adds them."
        )
    return lines
