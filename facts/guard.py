"""The guard of a host (quietport/guard): whether a change waits there for its confirmation."""

from __future__ import annotations

import json
from typing import Any

from pyinfra.api.exceptions import FactProcessError
from pyinfra.api.facts import FactBase
from typing_extensions import override

from control.guard import argv
from facts.shell import one_host_at_most, quoted, sections, split
from quietport.errors import printable
from quietport.guard.state import ARMED

# Characters of a text of the host's that are shown.
SHOWN = 200


class Guard(FactBase[dict[str, Any]]):
    """{installed, armed}: whether the host has a program that answers, and what is armed there.

    One that does not answer fails the host while something is armed, of which nobody would know.
    armed is None or {token, by, since, left_s}: who armed it and when (UTC, by the host's clock), and how
    many seconds are left until the host undoes the change by itself.
    """

    @override
    def command(self) -> str:
        return sections(
            status=quoted(argv("status", "--json")),
            left=f"test -e {ARMED}",
        )

    @override
    @staticmethod
    def default() -> dict[str, Any]:
        return {"installed": False, "armed": None}

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, Any]:
        parts = split(output, "status", "left")
        if parts["status"].code != 0:
            if parts["left"].code == 0:
                raise FactProcessError(
                    f"a guard is armed there ({ARMED}) and does not answer: see `quietport guard status` "
                    "there, wait until it has undone its change, then run again"
                )
            # No such program, one from before there was a guard, or one to be mended by this run.
            return self.default()
        document = json.loads(parts["status"].text)
        if document["schema"] != 1:
            raise FactProcessError("the guard is of another version: use the quietport that it is of")
        armed = document["armed"]
        if armed is not None:
            armed = {
                "token": str(armed["token"]),
                "by": printable(str(armed["by"]), limit=SHOWN),
                "since": printable(str(armed["since"]), limit=SHOWN),
                "left_s": int(armed["left_s"]),
            }
        return {"installed": True, "armed": armed}
