"""`quietport apply`: the converge, with an exit code that says whether every chosen host converged."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import control
from control.errors import QuietportError
from control.settings import ENV_HOSTS, fleet, settings_for

INVENTORY = "inventory"
DEPLOY = "deploys/vps.py"


def run(names: Sequence[str]) -> NoReturn:
    """Become the converge of these hosts, all by default. What goes wrong later is told by control.converge.

    Raises SettingsError for a hosts file that cannot be used or an unknown name, QuietportError without the
    deploys of a checkout.
    """
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        settings_for(name)
    root = checkout()
    # A new program: pyinfra's command line has to patch the standard library before anything uses it.
    # -P: nothing is imported from the directory it is called in.
    argv = [
        sys.executable,
        "-P",
        "-m",
        "control.converge",
        str(root / INVENTORY),
        str(root / DEPLOY),
        *chosen,
    ]
    shown = ", ".join(chosen or fleet().hosts)
    print(f"quietport: converging {shown} of {fleet().file}", file=sys.stderr, flush=True)
    environment = {**os.environ, ENV_HOSTS: str(fleet().file.absolute())}
    os.execve(argv[0], argv, environment)  # noqa: S606


def checkout() -> Path:
    """The checkout this package is part of. Raises QuietportError when it was installed without one."""
    root = Path(control.__file__).resolve().parents[1]
    for part in (INVENTORY, DEPLOY, "templates"):
        if not (root / part).exists():
            raise QuietportError(
                f"{root / part} is not there: quietport was installed without its deploys.",
                hint="Use it from a checkout, where `make venv` installs it.",
            )
    return root
