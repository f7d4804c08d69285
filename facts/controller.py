"""Who converges this host right now, by the lock in /run/quietport (control/lock.py)."""

from __future__ import annotations

import re
from typing import Any

from pyinfra.api.facts import FactBase
from typing_extensions import override

from control.lock import DIRECTORY
from facts.shell import one_host_at_most, sections, split


class Controller(FactBase[dict[str, Any]]):
    """{held, who, pid, since, quiet_s}: the controller that has the lock, or the last one that died with it.

    held is false for a dead one, and where nobody is named who is "". since is UTC by the host's clock,
    quiet_s how many seconds ago it was last heard of.
    """

    @override
    def command(self) -> str:
        # Shown free only by taking it, which under the mutex nobody else is tried by. Nothing is made here.
        held = "test -e lock.mutex && ! flock -w 10 -x lock.mutex flock -n -x lock true && [ -e lock.owner ]"
        return sections(
            owner=f"cd {DIRECTORY} && cat lock.owner",
            held=f"cd {DIRECTORY} && {held}",
            quiet=f"cd {DIRECTORY} && echo $(($(date +%s) - $(stat -c %Y lock.beat)))",
        )

    @override
    @staticmethod
    def default() -> dict[str, Any]:
        return {"held": False, "who": "", "pid": 0, "since": "", "quiet_s": 0}

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, Any]:
        parts = split(output, "owner", "held", "quiet")
        lines = parts["owner"].text.split("\n")
        if parts["owner"].code != 0 or len(lines) < 4 or not lines[2].isdigit():
            return self.default()
        quiet = parts["quiet"].text.strip()
        return {
            "held": parts["held"].code == 0,
            "who": re.sub(r"[^A-Za-z0-9@._-]", "_", lines[1]),
            "pid": int(lines[2]),
            "since": re.sub(r"[^0-9: -]", "_", lines[3]),
            "quiet_s": max(0, int(quiet)) if re.fullmatch(r"-?\d+", quiet) else 0,
        }
