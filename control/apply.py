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
    chosen = chosen_of(names)
    root = checkout()
    argv = ["control.converge", str(root / INVENTORY), str(root / DEPLOY), *chosen]
    become(argv, doing="converging", names=chosen)


def chosen_of(names: Sequence[str]) -> list[str]:
    """The names, each once. Raises SettingsError for one that the hosts file does not have."""
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        settings_for(name)
    return chosen


def become(argv: Sequence[str], *, doing: str, names: Sequence[str]) -> NoReturn:
    """Become the module argv[0] with the rest of `argv`, having said what is done to which hosts.

    A new program: pyinfra's command line has to patch the standard library before anything uses it.
    """
    shown = ", ".join(names or fleet().hosts)
    print(f"quietport: {doing} {shown} of {fleet().file}", file=sys.stderr, flush=True)
    environment = {**os.environ, ENV_HOSTS: str(fleet().file.absolute())}
    # -P: nothing is imported from the directory it is called in.
    os.execve(sys.executable, [sys.executable, "-P", "-m", *argv], environment)  # noqa: S606


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
