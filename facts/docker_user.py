"""Whether the rules that keep containers off the public side are in place."""

from __future__ import annotations

from pyinfra.api.facts import FactBase


class DockerUserChain(FactBase[bool]):
    """True when `quietport docker-user --check` finds the chain as wanted, for IPv4 and IPv6."""

    @staticmethod
    def default() -> bool:
        return False

    def command(self) -> str:
        return "/usr/local/sbin/quietport docker-user --check >/dev/null 2>&1 && echo yes || echo no"

    def process(self, output: list[str]) -> bool:
        return output[:1] == ["yes"]
