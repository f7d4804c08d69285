"""Where running labs leave their hosts files, so that a command typed by hand finds the only one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def lab_root(environ: dict[str, str] | None = None) -> Path:
    """Directory with one folder a lab run: QUIETPORT_LAB_ROOT, else the user's state directory."""
    environ = dict(os.environ) if environ is None else environ
    if root := environ.get("QUIETPORT_LAB_ROOT"):
        return Path(root)
    state = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(state) / "quietport-lab"


def running_lab_files(environ: dict[str, str] | None = None) -> list[Path]:
    """The hosts files of the labs that run, oldest first."""
    found = []
    for path in lab_root(environ).glob("*/hosts.toml"):
        with contextlib.suppress(FileNotFoundError):  # a lab that goes down at this moment
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]
