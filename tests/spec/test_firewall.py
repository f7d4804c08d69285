"""Firewall: everything in is denied, but the tailnet and the port WireGuard needs."""

from __future__ import annotations

import pytest

from control.settings import HostSettings
from facts.packetfilter import PacketFilter
from facts.system import System
from facts.ufw import Ufw
from facts.units import Units
from quietport.admission import openings
from quietport.ufw_rules import WANTED, rules_for
from tests.spec.reading import Reading

MARK = "quietport"


def test_it_is_active(reading: Reading) -> None:
    ufw = reading.fact(Ufw)
    assert (ufw["installed"], ufw["active"]) == (True, True)


def test_it_comes_back_after_a_reboot(reading: Reading) -> None:
    unit = reading.fact(Units, ["ufw.service"])["ufw.service"]
    assert unit["enabled"] == "enabled"


def test_a_restart_of_its_unit_opens_nothing(reading: Reading) -> None:
    """Read from systemd: stopping the unit runs nothing that would remove the rules first."""
    programs = reading.text("systemctl show ufw.service --property=ExecStart,ExecStop")
    assert "ufw-init start" in programs, "the positive control"
    assert "ExecStop={" not in programs


def test_incoming_is_denied_and_outgoing_allowed(reading: Reading) -> None:
    defaults = reading.fact(Ufw)["defaults"]
    assert (defaults["incoming"], defaults["outgoing"]) == ("deny", "allow")


def test_it_covers_ipv6(reading: Reading) -> None:
    assert reading.fact(Ufw)["ipv6"] is True


def test_rules_are_the_exact_ones(reading: Reading, settings: HostSettings) -> None:
    ours = [rule for rule in reading.fact(Ufw)["rules"] if MARK in rule]
    foreign = [rule for rule in reading.fact(Ufw)["rules"] if MARK not in rule]
    networks = rules_for(settings.break_glass_cidrs, ipv6=reading.fact(System)["ipv6"])[len(WANTED) :]
    assert len(ours) == 2 + len(networks)
    assert {rule.shown() for rule in networks} <= set(ours)
    assert [rule for rule in ours if rule.startswith("allow in on tailscale0")]
    assert [rule for rule in ours if rule.startswith("allow 41641/udp")]
    if settings.prune_foreign:
        assert foreign == []


def test_the_kernel_drops_what_no_rule_allows(reading: Reading) -> None:
    """What we believe is what runs: the policy of the kernel's chain, not ufw's word for it."""
    assert reading.lines("iptables -S INPUT")[0] == "-P INPUT DROP"
    assert reading.lines("ip6tables -S INPUT")[0] == "-P INPUT DROP"


def test_the_kernel_lets_nobody_else_at_ssh(reading: Reading, settings: HostSettings) -> None:
    """Where sshd listens on every address, this is all that keeps strangers away from it."""
    if not settings.break_glass_cidrs:
        pytest.skip("no break_glass_cidrs for this host")
    texts = reading.fact(PacketFilter)
    assert "4" in texts
    for text in texts.values():
        assert openings(text, port=22, networks=settings.break_glass_cidrs) == []
        # Positive control: what is let in is seen.
        assert openings(f"{text}\n-A INPUT -p tcp --dport 22 -j ACCEPT", port=22) != []


@pytest.mark.parametrize("program", ["iptables", "ip6tables"])
def test_the_kernel_lets_the_tailnet_in(reading: Reading, program: str) -> None:
    chain = "ufw-user-input" if program == "iptables" else "ufw6-user-input"
    rules = reading.lines("%s -S %s", program, chain)
    assert [rule for rule in rules if "-i tailscale0" in rule and rule.endswith("-j ACCEPT")]
    assert [rule for rule in rules if "--dport 41641" in rule and rule.endswith("-j ACCEPT")]
