"""systemd units: what is loaded, active, enabled or masked."""

from __future__ import annotations

from typing import Any

from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import one_host_at_most, quoted, sections, several, split
from quietport.times import properties, started_at

_PROPERTIES = (
    "Names",
    "LoadState",
    "ActiveState",
    "SubState",
    "UnitFileState",
    "NeedDaemonReload",
    "FragmentPath",
    "DropInPaths",
    "MainPID",
    "Result",
    "ExecMainStartTimestamp",
)


class Units(FactBase[dict[str, dict[str, Any]]]):
    """{name: {load, active, sub, enabled, need_reload, fragment, drop_ins, main_pid, result, started_at}}.

    `names` are full unit names; a template such as "ssh@.socket" has only load and enabled. load is loaded,
    masked, not-found, or "unknown" where systemd does not answer; enabled is the unit file's state: enabled,
    disabled, masked, static, ... or "" when there is no file. Every name asked for is in the answer.
    """

    @override
    def command(self, names: str | list[str] | tuple[str, ...]) -> str:
        wanted = several(names)
        # A template has no state of its own, and systemctl show refuses it together with all the others.
        plain = quoted(name for name in wanted if "@." not in name)
        templates = quoted(name for name in wanted if "@." in name)
        shown = " ".join(f"-p {name}" for name in _PROPERTIES)
        listed = "systemctl list-unit-files --full --no-legend --no-pager --"
        return sections(
            asked=f"printf '%s\\n' {quoted(wanted)}",
            units=f"systemctl show --timestamp=us+utc {shown} -- {plain}" if plain else "true",
            templates=f"{listed} {templates}" if templates else "true",
            running="test -d /run/systemd/system",
        )

    @override
    @staticmethod
    def default() -> dict[str, dict[str, Any]]:
        return {}

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, dict[str, Any]]:
        parts = split(output, "asked", "units", "templates", "running")
        asked = parts["asked"].text.split()
        absent = "not-found" if parts["running"].code == 0 else "unknown"
        found = {name: _unit({"LoadState": absent}) for name in asked}
        for block in parts["units"].text.split("\n\n"):
            shown = properties(block)
            for name in shown.get("Names", "").split():
                if name in found:
                    found[name] = _unit(shown)
        for line in parts["templates"].text.splitlines():
            words = line.split()
            if len(words) >= 2 and words[0] in found:
                load = "masked" if words[1].startswith("masked") else "loaded"
                found[words[0]] = _unit({"LoadState": load, "UnitFileState": words[1]})
        return found


class OwnTimers(FactBase[list[str]]):
    """Timers that quietport has made here, by the mark in their unit file: ["quietport-report", ...]."""

    @override
    def command(self) -> str:
        return sections(
            timers="cd /etc/systemd/system && for file in quietport-*.timer; do "
            '[ -f "$file" ] && head -n 1 "$file" | grep -q \'^# Written by quietport\' && '
            'printf "%s\\n" "${file%.timer}"; done; true'
        )

    @override
    @staticmethod
    def default() -> list[str]:
        return []

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> list[str]:
        return sorted(split(output, "timers")["timers"].text.split())


def _unit(shown: dict[str, str]) -> dict[str, Any]:
    return {
        "load": shown.get("LoadState", ""),
        "active": shown.get("ActiveState", "inactive"),
        "sub": shown.get("SubState", ""),
        "enabled": shown.get("UnitFileState", ""),
        "need_reload": shown.get("NeedDaemonReload") == "yes",
        "fragment": shown.get("FragmentPath", ""),
        "drop_ins": shown.get("DropInPaths", "").split(),
        "main_pid": int(shown.get("MainPID") or 0),
        "result": shown.get("Result", ""),
        "started_at": started_at(shown.get("ExecMainStartTimestamp", "")),
    }
