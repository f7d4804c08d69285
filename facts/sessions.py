"""The ssh-agent sessions of the host's agents (quietport/sshagent), as their own program lists them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import one_host_at_most
from quietport.errors import printable

# Characters of a text of the host's that are shown.
SHOWN = 100

# Asked as the user: what lies below a home is then only what that user can read anyway. An agent cannot make
# its list endless, or keep us waiting.
_LISTS = """list=/usr/local/bin/codex-openclaw-ssh-agent
getent passwd 2>/dev/null | while IFS=: read -r user _ uid _ _ home _; do
  [ "$uid" -ge 1000 ] && [ "$uid" -ne 65534 ] || continue
  [ -d "$home/.local/state/codex-openclaw-ssh-agent" ] || continue
  printf 'user=%s\\n' "$user"
  timeout 60 runuser -u "$user" -- "$list" --list --json </dev/null 2>/dev/null | head -c 16777216
  echo
done
"""


class Sessions(FactBase[dict[str, dict[str, Any]]]):
    """By user: {readable, counts: {status: how many}, oldest: created_at of the oldest or None, unsafe: ids}.

    Users without any session directory are left out. `readable` is False when the program refuses to list, or
    is not there: the directory has another owner or mode than it must, or is a link.
    """

    @override
    def command(self) -> str:
        return _LISTS

    @override
    @staticmethod
    def default() -> dict[str, dict[str, Any]]:
        return {}

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, dict[str, Any]]:
        texts: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in output:
            if line.startswith("user="):
                lines = texts.setdefault(line.removeprefix("user="), [])
            else:
                lines.append(line)
        return {user: _summary("\n".join(text)) for user, text in texts.items()}


def _summary(text: str) -> dict[str, Any]:
    """What one user's list says. Everything in it was written by that user: nothing is taken on trust."""
    try:
        document = json.loads(text)
        sessions = [one for one in document["sessions"] if isinstance(one, dict)]
        readable = document["schema"] == 1
    except (ValueError, KeyError, TypeError):
        sessions, readable = [], False
    created = [one["created_at"] for one in sessions if isinstance(one.get("created_at"), str)]
    return {
        "readable": readable,
        "counts": dict(
            sorted(Counter(printable(str(one.get("status")), limit=SHOWN) for one in sessions).items())
        ),
        "oldest": printable(min(created), limit=SHOWN) if created else None,
        "unsafe": sorted(
            printable(str(one.get("id")), limit=SHOWN) for one in sessions if one.get("status") == "unsafe"
        ),
    }
