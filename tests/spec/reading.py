"""What a spec reads of a host: the project's own facts and a few commands, each asked once a test run.

testinfra pays a round trip for every assertion. Here one command answers many of them, most commands are run
at once at the beginning (snapshot.py), and answers are kept for the session: specs never change the host, so
they stay true.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyinfra.api import FactBase, StringCommand
from testinfra.host import Host

from control.settings import HostSettings, settings_for

UNIT = "systemctl show -p LoadState,ActiveState,Result,ExecMainStatus -- %s"


def line_of(fact: FactBase[Any], *args: Any) -> str:
    """The shell command that a fact is read with."""
    command = fact.command(*args) if callable(fact.command) else fact.command
    return command.get_raw_value() if isinstance(command, StringCommand) else str(command)


@dataclass
class Reading:
    """One host as the specs see it."""

    name: str
    host: Host
    _kept: dict[tuple[str, str], Any] = field(default_factory=dict)

    @property
    def settings(self) -> HostSettings:
        """What hosts.toml says about it."""
        return settings_for(self.name)

    def fact(self, fact: type[FactBase[Any]], *args: Any) -> Any:
        """The answer of one of the project's facts, by the same command and parser the converge uses."""
        key = (fact.name, repr(args))
        if key not in self._kept:
            self._kept[key] = self._ask(fact(), *args)
        return self._kept[key]

    def _ask(self, fact: FactBase[Any], *args: Any) -> Any:
        needed = fact.requires_command(*args)
        if needed and self.host.run("command -v %s", needed).rc != 0:
            return fact.default()
        return fact.process(self.host.run("sh -c %s", line_of(fact, *args)).stdout.splitlines())

    def text(self, command: str, *args: str) -> str:
        """Standard output of a command that must succeed; `args` fill its %s and are quoted."""
        key = (command, repr(args))
        if key not in self._kept:
            self._kept[key] = self.host.check_output(command, *args)
        return str(self._kept[key])

    def lines(self, command: str, *args: str) -> list[str]:
        """The same, as lines without surrounding blanks, empty ones left out."""
        return [line.strip() for line in self.text(command, *args).splitlines() if line.strip()]

    def json(self, command: str, *args: str) -> Any:
        """The same, as JSON."""
        return json.loads(self.text(command, *args))

    def reachable(self) -> list[dict[str, Any]]:
        """What can be reached on the host, as `quietport ports` there says; it fails when it cannot tell."""
        return list(self.json("quietport ports --json || test $? -eq 1")["listeners"])

    def unit(self, unit: str) -> Mapping[str, str]:
        """What systemd says about one unit. `is-enabled` is not asked: it fails for masked units."""
        shown = self.lines(UNIT, unit)
        return dict(line.partition("=")[::2] for line in shown)
