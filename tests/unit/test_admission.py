"""Whom the packet filter lets in: read from what iptables prints, and never more closed than it is."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietport import admission
from quietport.admission import admission_problem, closed_by_default, openings

OFFICE = "203.0.113.0/24"
# An active ufw with our two rules, tailscaled's chain first: the rules that matter, and some of their like.
BEFORE = """\
-P INPUT DROP
-P FORWARD DROP
-P OUTPUT ACCEPT
-N ts-input
-N ufw-before-input
-N ufw-after-input
-N ufw-not-local
-N ufw-reject-input
-N ufw-skip-to-policy-input
-N ufw-track-input
-N ufw-user-input
-N ufw-user-limit
-N ufw-user-limit-accept
-A INPUT -j ts-input
-A INPUT -j ufw-before-input
-A INPUT -j ufw-after-input
-A INPUT -j ufw-reject-input
-A INPUT -j ufw-track-input
-A ts-input -s 100.64.0.7/32 -i lo -j ACCEPT
-A ts-input -s 100.64.0.0/10 ! -i tailscale0 -j DROP
-A ts-input -i tailscale0 -j ACCEPT
-A ts-input -p udp -m udp --dport 41641 -j ACCEPT
-A ufw-after-input -p udp -m udp --dport 137 -j ufw-skip-to-policy-input
-A ufw-after-input -m addrtype --dst-type BROADCAST -j ufw-skip-to-policy-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-input -p udp -m udp --sport 67 --dport 68 -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -d 224.0.0.251/32 -p udp -m udp --dport 5353 -j ACCEPT
-A ufw-before-input -j ufw-user-input
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -j DROP
-A ufw-skip-to-policy-input -j DROP
-A ufw-user-input -i tailscale0 -m comment --comment "\\'quietport%3A%20the%20tailnet\\'" -j ACCEPT
-A ufw-user-input -p udp -m udp --dport 41641 -j ACCEPT
-A ufw-user-limit -m limit --limit 3/min -j LOG --log-prefix "[UFW LIMIT BLOCK] "
-A ufw-user-limit -j REJECT --reject-with icmp-port-unreachable
-A ufw-user-limit-accept -j ACCEPT
"""
FROM_OFFICE = f"-A ufw-user-input -s {OFFICE} -p tcp -m tcp --dport 22 -j ACCEPT\n"


def test_an_ufw_without_a_rule_for_ssh_admits_nobody() -> None:
    assert openings(BEFORE, port=22) == []
    assert closed_by_default(BEFORE)


def test_the_networks_are_no_opening_but_for_those_who_are_not_told_of_them() -> None:
    text = BEFORE + FROM_OFFICE
    assert openings(text, port=22, networks=[OFFICE]) == []
    assert openings(text, port=22, networks=["203.0.0.0/8", "2001:db8::/32"]) == []
    assert openings(text, port=22) == [FROM_OFFICE.strip()]
    assert openings(text, port=22, networks=["203.0.113.0/25"]) == [FROM_OFFICE.strip()]
    assert openings(text, port=23) == []


@pytest.mark.parametrize(
    ("rule", "opens"),
    [
        ("-p tcp -m tcp --dport 22 -j ACCEPT", True),
        ("-p tcp -m tcp --dport 20:30 -j ACCEPT", True),
        ("-p tcp -m tcp --dport :30 -j ACCEPT", True),
        ("-p tcp -m multiport --dports 80,443 -j ACCEPT", False),
        ("-p tcp -m multiport --dports 80,22 -j ACCEPT", True),
        ("-p tcp -m multiport --dports 80,20:30 -j ACCEPT", True),
        ("-p tcp -m tcp --dport 2222 -j ACCEPT", False),
        ("-p udp -m udp --dport 22 -j ACCEPT", False),
        ("-i eth0 -j ACCEPT", True),
        ("-i br-0123456789ab -j ACCEPT", False),
        ("! -i tailscale0 -p tcp -j ACCEPT", True),
        ("! -p tcp -j ACCEPT", False),
        ("! -p udp -j ACCEPT", True),
        ("-p tcp -m tcp ! --dport 22 -j ACCEPT", False),
        ("-p tcp -m tcp ! --dport 80 -j ACCEPT", True),
        ("! -s 192.0.2.0/24 -p tcp -j ACCEPT", True),
        ("-s 198.51.100.7/32 -j ACCEPT", True),
        ("-j ACCEPT", True),
        ("-m conntrack ! --ctstate ESTABLISHED -j ACCEPT", True),
        ("-m conntrack ! --ctstate NEW -j ACCEPT", False),
        ("-m set --match-set friends src -p tcp -m tcp --dport 22 -j ACCEPT", True),
        ("-p tcp -m tcp --dport 22 -j DROP", False),
        ("-p tcp -m tcp --dport 22 -j ufw-user-limit-accept", True),
        ("-p tcp -m tcp --dport 80 -j ufw-user-limit-accept", False),
        ("-p tcp -m tcp --dport 22 -g ufw-user-limit-accept", True),
    ],
)
@pytest.mark.parametrize("chain", ["INPUT", "ufw-user-input", "ts-input"])
def test_rules_of_others(chain: str, rule: str, *, opens: bool) -> None:
    text = f"{BEFORE}{FROM_OFFICE}-A {chain} {rule}\n"
    assert openings(text, port=22, networks=[OFFICE]) == ([f"-A {chain} {rule}"] if opens else [])


def test_a_chain_nobody_jumps_to_opens_nothing() -> None:
    lone = "-N lone\n-A lone -j ACCEPT\n"
    assert openings(BEFORE + lone, port=22) == []
    assert openings(BEFORE + lone + "-A INPUT -p tcp -j lone\n", port=22) == ["-A INPUT -p tcp -j lone"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT\n",
        "-P INPUT DROP\n",
        BEFORE.replace("-P INPUT DROP", "-P INPUT ACCEPT"),
        "iptables: Permission denied (you must be root)",
    ],
)
def test_a_firewall_that_is_not_ufws_is_not_closed(text: str) -> None:
    assert not closed_by_default(text)
    assert "IPv4" in admission_problem({4: text}, port=22, networks=[OFFICE])


def test_both_families_are_asked() -> None:
    six = (BEFORE + FROM_OFFICE).replace("ufw-", "ufw6-").replace(OFFICE, "2001:db8::/48")
    texts = {4: BEFORE + FROM_OFFICE, 6: six}
    networks = [OFFICE, "2001:db8::/48"]
    assert admission_problem(texts, port=22, networks=networks) == ""
    problem = admission_problem({**texts, 6: six + "-A INPUT -p tcp -j ACCEPT\n"}, port=22, networks=networks)
    assert "ip6tables -A INPUT -p tcp -j ACCEPT" in problem
    assert "IPv6" in admission_problem({**texts, 6: ""}, port=22, networks=networks)
    assert admission_problem(texts, port=22, networks=[])
    assert admission_problem({}, port=22, networks=networks)


def test_the_families_of_a_host(tmp_path: Path) -> None:
    file = tmp_path / "if_inet6"
    assert admission.families(file) == (4,)
    file.write_text("")
    assert admission.families(file) == (4,)
    file.write_text("00000000000000000000000000000001 01 80 10 80       lo\n")
    assert admission.families(file) == (4, 6)


networks_of_4 = st.builds(
    lambda number, length: str(ipaddress.ip_network((number, length), strict=False)),
    st.integers(0, 2**32 - 1),
    st.integers(1, 32),
)


@given(st.lists(networks_of_4, max_size=4), networks_of_4)
def test_a_source_is_no_opening_exactly_when_it_is_inside(allowed: list[str], source: str) -> None:
    rule = f"-A ufw-user-input -s {source} -p tcp -m tcp --dport 22 -j ACCEPT"
    inside = any(
        ipaddress.IPv4Network(source).subnet_of(ipaddress.IPv4Network(network)) for network in allowed
    )
    assert openings(f"{BEFORE}{rule}\n", port=22, networks=allowed) == ([] if inside else [rule])


@given(st.text(alphabet="-APN INPUTjACEtcpdro!s22\n/.:,0", max_size=200))
def test_whatever_iptables_prints_is_read(text: str) -> None:
    openings(text, port=22)
    closed_by_default(text)


# --- whether a stranger gets in -----------------------------------------------------------------------

SSH = "-p tcp -m tcp --dport 22"


@pytest.mark.parametrize(
    ("rules", "gets_in"),
    [
        ("", False),
        (f"-A ufw-user-input {SSH} -j ACCEPT", True),
        (FROM_OFFICE, False),
        (f"-A ufw-user-input {SSH} -j DROP\n-A ufw-user-input {SSH} -j ACCEPT", False),
        (f"-A ufw-user-input {SSH} -j ACCEPT\n-A ufw-user-input {SSH} -j DROP", True),
        (f"-A ufw-user-input -s 198.51.100.7/32 -j DROP\n-A ufw-user-input {SSH} -j ACCEPT", True),
        (f"-A ufw-user-input -j RETURN\n-A ufw-user-input {SSH} -j ACCEPT", False),
        (f"-A ufw-user-input {SSH} -j ufw-user-limit-accept", True),
        (f"-A ufw-user-input -p tcp -m multiport --dports 80,443 -j DROP\n-A INPUT {SSH} -j ACCEPT", True),
    ],
)
def test_the_first_rule_that_may_match_decides(rules: str, *, gets_in: bool) -> None:
    assert admission.lets_strangers_in(f"{BEFORE}{rules}\n", port=22) is gets_in


def test_a_filter_that_is_empty_or_cannot_be_read() -> None:
    assert admission.lets_strangers_in("-P INPUT ACCEPT\n", port=22)
    assert not admission.lets_strangers_in("-P INPUT DROP\n", port=22)
    assert not admission.lets_strangers_in("", port=22)


def test_chains_that_lead_to_each_other_end() -> None:
    text = "-P INPUT ACCEPT\n-N a\n-N b\n-A INPUT -j a\n-A a -j b\n-A b -j a\n"
    assert admission.lets_strangers_in(text, port=22)


@given(st.lists(st.sampled_from(BEFORE.splitlines()), max_size=12), st.booleans())
def test_who_gets_in_is_let_in_by_something(lines: list[str], opened: bool) -> None:
    text = "\n".join([*lines, *([f"-A INPUT {SSH} -j ACCEPT"] if opened else [])])
    if admission.lets_strangers_in(text, port=22):
        assert openings(text, port=22) != []
