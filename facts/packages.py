"""Versions of Debian packages."""

from __future__ import annotations

from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import one_host_at_most, quoted, sections, several, split


class Packages(FactBase[dict[str, str | None]]):
    """{name: installed version, or None}. Removed packages that left their configuration are None.

    Every name asked for is in the answer.
    """

    @override
    def command(self, names: str | list[str] | tuple[str, ...]) -> str:
        words = quoted(several(names))
        return sections(
            asked=f"printf '%s\\n' {words}",
            # It exits 1 when a name is unknown, and still prints the others.
            packages=f"dpkg-query -W -f '${{db:Status-Status}} ${{Package}} ${{Version}}\\n' -- {words}",
        )

    @override
    @staticmethod
    def default() -> dict[str, str | None]:
        return {}

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, str | None]:
        parts = split(output, "asked", "packages")
        found: dict[str, str | None] = dict.fromkeys(parts["asked"].text.split())
        for line in parts["packages"].text.splitlines():
            status, _, rest = line.partition(" ")
            name, _, version = rest.partition(" ")
            if status == "installed" and name in found:
                found[name] = version
        return found
