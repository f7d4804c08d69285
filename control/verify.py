"""`quietport verify`: `pytest tests/spec` for hosts by name, from any directory."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from control import apply
from control.errors import QuietportError

SPECS = "tests/spec"


def run(names: Sequence[str], *, junit: str | None = None) -> NoReturn:
    """Become the specs of these hosts, all by default. `junit`: the file for a JUnit report besides.

    The exit code is pytest's: 0 all hold, 1 one does not, 2 interrupted, more for what could not begin.
    Raises SettingsError for a hosts file that cannot be used or an unknown name, QuietportError without the
    specs or pytest.
    """
    chosen = apply.chosen_of(names)
    root = apply.checkout()
    if not (root / SPECS).is_dir():
        raise QuietportError(f"{root / SPECS} is not there.", hint="Use quietport from a checkout.")
    if missing := [name for name in ("pytest", "testinfra") if find_spec(name) is None]:
        raise QuietportError(
            f"the specs need {' and '.join(missing)}, not installed here.",
            hint="`make venv` in the checkout installs it.",
        )
    apply.become(argv(root, chosen, junit=junit), doing="reading", names=chosen)


def argv(root: Path, names: Sequence[str], *, junit: str | None) -> list[str]:
    """Module and arguments: the specs of the checkout at `root`, as it is configured, and no cache."""
    words = ["pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(root)]
    words += ["-c", str(root / "pyproject.toml")]
    words += [f"--hosts={','.join(names)}"] if names else []
    words += [f"--junitxml={junit}"] if junit else []
    return [*words, str(root / SPECS)]
