"""The packet filter, as the kernel runs it."""

from __future__ import annotations

from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import Section, one_host_at_most, sections, split
from quietport.admission import LOCK_WAIT_S

READ4 = f"iptables -w {LOCK_WAIT_S} -S"
# Nothing, and no failure, on a host without IPv6.
READ6 = f"! grep -q . /proc/net/if_inet6 || ip6tables -w {LOCK_WAIT_S} -S"


def by_family(four: Section, six: Section) -> dict[int, str]:
    """What READ4 and READ6 printed, by family: "" where it cannot be read, no 6 on a host without IPv6."""
    found = {4: four.text if four.code == 0 else ""}
    if six.code != 0 or six.text:
        found[6] = six.text if six.code == 0 else ""
    return found


class PacketFilter(FactBase[dict[str, str]]):
    """The filter tables as iptables prints them: {"4": text of `iptables -S`, "6": of `ip6tables -S`}.

    A family that cannot be read has an empty text; a host without IPv6 has no "6".
    """

    @override
    def command(self) -> str:
        return sections(
            filter4=READ4,
            filter6=READ6,
        )

    @override
    @staticmethod
    def default() -> dict[str, str]:
        return {}

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, str]:
        parts = split(output, "filter4", "filter6")
        found = by_family(parts["filter4"], parts["filter6"])
        return {str(family): text for family, text in found.items()}
