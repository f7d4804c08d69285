"""The directories a file is in, and whose they are."""

from __future__ import annotations

import stat
from pathlib import PurePosixPath
from typing import Any

from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import quoted, sections, split

# %f is the raw mode in hex; a path that is not there has a line of its own.
_ONE = (
    'for path in {paths}; do stat --printf "%f %U %G" -- "$path" || printf absent; '
    'dpkg-query -S -- "$path" > /dev/null && echo " packaged" || echo " own"; done; true'
)


class Parents(FactBase[dict[str, dict[str, Any]]]):
    """The directories that lead to `path`, those directly below / left out, outermost first.

    {directory: {kind: directory|link|other|absent, mode: "0755" or None, user, group, packaged: a Debian
    package ships it}}. Links are not followed.
    """

    @override
    def command(self, path: str) -> str:
        paths = ancestors(path)
        return sections(
            asked=f"printf '%s\\n' {quoted(paths)}",
            states=_ONE.format(paths=quoted(paths)),
        )

    @override
    @staticmethod
    def default() -> dict[str, dict[str, Any]]:
        return {}

    @override
    def process(self, output: list[str]) -> dict[str, dict[str, Any]]:
        parts = split(output, "asked", "states")
        names = parts["asked"].text.splitlines()
        return dict(zip(names, map(_state, parts["states"].text.splitlines()), strict=True))


def ancestors(path: str) -> list[str]:
    """/etc/a/b/file: /etc/a and /etc/a/b."""
    return [str(parent) for parent in reversed(PurePosixPath(path).parents) if len(parent.parts) > 2]


def _state(line: str) -> dict[str, Any]:
    *found, origin = line.split()
    packaged = origin == "packaged"
    if found == ["absent"]:
        return {"kind": "absent", "mode": None, "user": None, "group": None, "packaged": packaged}
    raw, user, group = found
    mode = int(raw, 16)
    kind = "directory" if stat.S_ISDIR(mode) else "link" if stat.S_ISLNK(mode) else "other"
    return {
        "kind": kind,
        "mode": f"{stat.S_IMODE(mode):04o}",
        "user": user,
        "group": group,
        "packaged": packaged,
    }
