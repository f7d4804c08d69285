"""Whether the rules that keep containers off the public side are in place."""

from __future__ import annotations

from pyinfra.api.facts import FactBase


class DockerUserChain(FactBase[dict[str, bool]]):
    """{as_wanted}: whether `quietport docker-user --check` finds the chain as wanted, for IPv4 and IPv6."""

    @staticmethod
    def default() -> dict[str, bool]:
        return {"as_wanted": False}

    def command(self) -> str:
        return "/usr/local/sbin/quietport docker-user --check >/dev/null 2>&1 && echo yes || echo no"

    def process(self, output: list[str]) -> dict[str, bool]:
        return {"as_wanted": output[:1] == ["yes"]}
