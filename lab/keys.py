"""Keys of a run: the operator's login key, and the host keys of its container targets."""

from __future__ import annotations

import shutil
from pathlib import Path

from lab.process import run
from lab.state import Run


def operator_key(run_: Run) -> Path:
    """The run's private login key (ed25519, no passphrase), made the first time; `.pub` is beside it."""
    key = run_.keys / "operator"
    if not key.is_file():
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"quietport-lab-{run_.id}", "-f", key])
    return key


def operator_public_key(run_: Run) -> str:
    """The line for authorized_keys."""
    return operator_key(run_).with_suffix(".pub").read_text().strip()


def host_keys(run_: Run, name: str) -> Path:
    """Make fresh host keys for a target. Returns the directory that has them, named as in /etc/ssh."""
    root = run_.keys / f"host-{name}"
    shutil.rmtree(root, ignore_errors=True)
    # ssh-keygen -A writes below PREFIX/etc/ssh, which must be there.
    directory = root / "etc/ssh"
    directory.mkdir(mode=0o700, parents=True)
    run(["ssh-keygen", "-A", "-f", root])
    return directory
