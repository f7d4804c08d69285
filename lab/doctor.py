"""What this machine lacks for the lab, and the command that mends it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from control.labs import lab_root
from lab import bootstrap, container
from lab.process import LabError
from lab.state import all_runs, cache_root

SCHEMA = 1
DISK_GIB = {"container": 8, "vm": 16}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    ok: bool
    what: str
    """What is there, or what is not."""
    mend: str = ""
    """The command that mends it; empty when there is nothing to mend."""


def examine(kind: str) -> list[Finding]:
    """Look at everything a target of that kind needs. Changes nothing."""
    return [*_python(), *_programs(kind), *_machine(kind), _disk(kind), *_runs()]


def report(findings: list[Finding], *, as_json: bool) -> str:
    """For a reader, or `{"schema": 1, "ok": bool, "findings": [{"ok", "what", "mend"}]}`."""
    if as_json:
        value = {
            "schema": SCHEMA,
            "ok": all(f.ok for f in findings),
            "findings": [asdict(f) for f in findings],
        }
        return json.dumps(value)
    lines = []
    for finding in findings:
        lines.append(f"{'ok     ' if finding.ok else 'missing'}  {finding.what}")
        if finding.mend:
            lines.append(f"         → {finding.mend}")
    return "\n".join(lines)


def _python() -> list[Finding]:
    version = sys.version.split()[0]
    fine = sys.version_info >= bootstrap.MINIMUM_PYTHON
    venv = (bootstrap.VENV / ".quietport-stamp").is_file()
    return [
        Finding(fine, f"Python {version}", "" if fine else "install Python 3.11 or newer"),
        Finding(venv, "the project's environment, .venv", "" if venv else "make venv"),
    ]


def _programs(kind: str) -> list[Finding]:
    missing = bootstrap.missing_programs(vm=kind == "vm")
    if not missing:
        return [Finding(True, f"the programs of a {kind} target")]
    packages = " ".join(sorted({program.package.split("|")[-1] for program in missing}))
    mend = f"apt-get install --no-install-recommends {packages}"
    return [Finding(False, f"{program.name}, for {program.why}", mend) for program in missing]


def _machine(kind: str) -> list[Finding]:
    findings = [Finding(False, what, mend) for what, mend in container.machine_lacks()]
    if kind == "container":
        answers = bootstrap.docker_answers()
        what = (
            "a Docker daemon that answers" if answers else "no Docker daemon answers: the lab starts its own"
        )
        findings.append(Finding(answers or bootstrap.find("dockerd") is not None, what))
    elif not os.access("/dev/kvm", os.R_OK | os.W_OK):
        findings.append(Finding(True, "no /dev/kvm: VMs are emulated, which is slower"))
    return findings


def _disk(kind: str) -> Finding:
    directory = cache_root()
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free / 2**30
    wanted = DISK_GIB[kind]
    mend = "" if free >= wanted else f"free some, or set QUIETPORT_LAB_CACHE to a place with {wanted} GiB"
    return Finding(free >= wanted, f"{free:.0f} GiB free for the lab's cache, {wanted} wanted", mend)


def _runs() -> list[Finding]:
    findings = []
    for run_ in all_runs():
        try:
            run_.read()
        except LabError as error:
            findings.append(Finding(False, str(error), f"rm -r {Path(lab_root()) / run_.id}"))
        else:
            if not run_.hosts_file.is_file() and not run_.busy:
                what = f"lab run {run_.id!r} began and did not come up"
                findings.append(Finding(False, what, f"python -m lab --run {run_.id} down"))
    return findings
