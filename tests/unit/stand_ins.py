"""Programs that stand in for a host's, for scripts that are run here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from operations.common import script


def install(place: Path, programs: Mapping[str, str]) -> None:
    """Make shell programs below `place`: name = text."""
    for name, text in programs.items():
        file = place / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)


def run(place: Path, text: str, *args: str, sent: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run a script as a host would, with these programs before all others and `sent` on standard input."""
    command = script(text, *args).get_raw_value()
    environ = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    return subprocess.run(["sh", "-c", command], input=sent, env=environ, capture_output=True, check=False)
