"""The hosts pyinfra is given: names, and what may be printed of their settings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import click

from control.errors import QuietportError, SettingsError
from control.settings import GROUPS, fleet, nearest


def hosts_or_exit() -> list[tuple[str, dict[str, Any]]]:
    """The same for pyinfra's command line: what is wrong with hosts.toml is one sentence and exit code 1.

    pyinfra would put the file and line of our own code before it. So is a --limit or --exclude that no host
    matches: pyinfra works on nothing then, or on what was to be left out, and ends with 0.
    """
    try:
        found = hosts()
        # pyinfra reads the inventory inside its click command, before it looks at these options itself.
        context = click.get_current_context(silent=True)
        check_choice(list(fleet().hosts), context.params if context else {})
        return found
    except QuietportError as error:
        sys.exit(f"quietport: {error}")


def check_choice(names: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raises SettingsError when a pattern of pyinfra's --limit or --exclude matches none of `names`.

    Also when the two leave no host at all.
    """
    chosen = {option: _matching(names, option, options.get(option) or ()) for option in ("limit", "exclude")}
    left = set(chosen["limit"] if options.get("limit") else names) - set(chosen["exclude"])
    if not left:
        raise SettingsError(f"{fleet().file}: --limit and --exclude leave no host.", hint="Correct them.")


def _matching(names: Sequence[str], option: str, patterns: Sequence[str]) -> list[str]:
    found = []
    for pattern in patterns:
        matching = [name for name in names if pattern in GROUPS or fnmatchcase(name, pattern)]
        if not matching:
            raise SettingsError(
                f"{fleet().file}: --{option} {pattern} matches no host.{nearest(pattern, list(names))}",
                hint=f"There {'are' if len(names) > 1 else 'is'} {', '.join(names)}.",
            )
        found += matching
    return found


def hosts() -> list[tuple[str, dict[str, Any]]]:
    """Every host as `@quietport/NAME` with plain data, under one key so that it is nobody's argument.

    Deploys take `control.settings.settings_for(host.name)`; the data is for eyes. Raises SettingsError.
    """
    return [
        (f"@quietport/{name}", {"quietport": settings.to_json()}) for name, settings in fleet().hosts.items()
    ]
