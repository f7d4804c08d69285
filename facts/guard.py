"""The guard of a host (quietport/guard): whether a change waits there for its confirmation."""

from __future__ import annotations

import json
from typing import Any

from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import one_host_at_most
from quietport.errors import printable

# Characters of a text of the host's that are shown.
SHOWN = 200


class Guard(FactBase[dict[str, Any]]):
    """{installed, armed}: whether the host has the program, and what is armed there.

    armed is None or {token, by, since, left_s}: who armed it and when (UTC, by the host's clock), and how
    many seconds are left until the host undoes the change by itself.
    """

    @override
    def command(self) -> str:
        return "/usr/local/sbin/quietport guard status --json 2>/dev/null || true"

    @override
    @staticmethod
    def default() -> dict[str, Any]:
        return {"installed": False, "armed": None}

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, Any]:
        try:
            document = json.loads("\n".join(output))
            if document["schema"] != 1:
                return self.default()
            armed = document["armed"]
        except (ValueError, KeyError, TypeError):
            # No such program, or one from before there was a guard.
            return self.default()
        if armed is not None:
            armed = {
                "token": str(armed["token"]),
                "by": printable(str(armed["by"]), limit=SHOWN),
                "since": printable(str(armed["since"]), limit=SHOWN),
                "left_s": int(armed["left_s"]),
            }
        return {"installed": True, "armed": armed}
