"""The firewall's rules as ufw's own files have them: the same as `ufw show added`, without asking ufw."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietport.ufw_rules import (
    WANTED,
    assignments,
    bare,
    from_config,
    in_kernel,
    is_ours,
    kept_added,
    kept_rules,
    kernel_policies,
    rules_for,
)


def commented(text: str) -> str:
    return f"comment={text.encode().hex()}"


TAILNET = commented("quietport: the tailnet may come in")
WIREGUARD = commented("quietport: WireGuard, for direct paths")
OFFICE = commented("quietport: break-glass, ssh")
# As ufw 0.36.2 writes them (backend_iptables.py _write_rules).
USER_RULES = f"""\
*filter
:ufw-user-input - [0:0]
:ufw-user-output - [0:0]
### RULES ###

### tuple ### allow any any 0.0.0.0/0 any 0.0.0.0/0 in_tailscale0 {TAILNET}
-A ufw-user-input -i tailscale0 -j ACCEPT

### tuple ### allow udp 41641 0.0.0.0/0 any 0.0.0.0/0 in {WIREGUARD}
-A ufw-user-input -p udp --dport 41641 -j ACCEPT

### tuple ### allow tcp 22 0.0.0.0/0 any 203.0.113.0/24 in {OFFICE}
-A ufw-user-input -p tcp --dport 22 -s 203.0.113.0/24 -j ACCEPT

### tuple ### deny any any 0.0.0.0/0 any 203.0.113.9 in
-A ufw-user-input -s 203.0.113.9 -j DROP

### tuple ### limit tcp 22 0.0.0.0/0 any 0.0.0.0/0 OpenSSH - in
-A ufw-user-input -p tcp --dport 22 -m conntrack --ctstate NEW -m recent --set

### tuple ### route:allow_log tcp 80,443 10.0.0.1 any 0.0.0.0/0 in_eth0!out_eth1
-A ufw-user-forward -i eth0 -o eth1 -p tcp -m multiport --dports 80,443 -d 10.0.0.1 -j ACCEPT

### END RULES ###

### LOGGING ###
-A ufw-after-logging-input -j LOG --log-prefix "[UFW BLOCK] " -m limit --limit 3/min --limit-burst 10
### END LOGGING ###
COMMIT
"""
USER6_RULES = f"""\
### tuple ### allow any any ::/0 any ::/0 in_tailscale0 {TAILNET}
-A ufw6-user-input -i tailscale0 -j ACCEPT

### tuple ### allow udp 41641 ::/0 any ::/0 in {WIREGUARD}
-A ufw6-user-input -p udp --dport 41641 -j ACCEPT

### tuple ### allow tcp 22 ::/0 any 2001:db8:7::/48 in {OFFICE}
-A ufw6-user-input -p tcp --dport 22 -s 2001:db8:7::/48 -j ACCEPT

### END RULES ###
"""


def test_rules_are_those_that_ufw_shows() -> None:
    networks = ["203.0.113.0/24", "2001:db8:7::/48"]
    shown = kept_added([USER_RULES, USER6_RULES])
    assert shown == [
        *(rule.shown() for rule in rules_for(networks)[:3]),
        "deny from 203.0.113.9",
        "limit OpenSSH",
        "route allow in on eth0 out on eth1 log to 10.0.0.1 port 80,443 proto tcp",
        rules_for(networks)[3].shown(),
    ]


def test_a_rule_knows_what_it_is_in_the_kernel() -> None:
    kernel = dict(kept_rules(USER_RULES))
    assert kernel[WANTED[0].shown()] == ["-A ufw-user-input -i tailscale0 -j ACCEPT"]
    assert all(len(lines) == 1 for lines in kernel.values()), "what stands after the last rule is not its own"


@pytest.mark.parametrize(
    ("tuple_", "shown"),
    [
        ("allow tcp 22 0.0.0.0/0 any 0.0.0.0/0 out", "allow out 22/tcp"),
        ("reject_log-all any any 0.0.0.0/0 any 0.0.0.0/0 in", "reject log-all to any"),
        ("deny any any 0.0.0.0/0 any 0.0.0.0/0 out_eth0", "deny out on eth0"),
        ("allow tcp 5 10.0.0.1 53 10.0.0.2 in", "allow from 10.0.0.2 port 53 to 10.0.0.1 port 5 proto tcp"),
        ("allow tcp 5 ::/0 any ::/0 My%20App - in", "allow 'My App'"),
        ("allow tcp 5 ::/0 6 fe80::1 App B in_lo", "allow in on lo from fe80::1 app B to any app App"),
    ],
)
def test_other_rules(tuple_: str, shown: str) -> None:
    assert kept_added([f"### tuple ### {tuple_}\n"]) == [shown]


@pytest.mark.parametrize(
    "line", ["allow any", "allow any any ::/0 any ::/0 up_eth0", "a b c d e f in comment=xyz"]
)
def test_what_is_not_understood_is_no_rule(line: str) -> None:
    with pytest.raises(ValueError):
        kept_rules(f"### tuple ### {line}\n")


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for line in (text, f"### tuple ### {text}"):
        try:
            rules = kept_rules(line)
        except ValueError:
            continue
        assert all(isinstance(rule, str) for rule, _ in rules)


@given(st.text(st.characters(exclude_characters="'", exclude_categories=["Cs"]), min_size=1))
def test_a_comment_is_shown_as_it_was_given(comment: str) -> None:
    line = f"### tuple ### allow udp 41641 0.0.0.0/0 any 0.0.0.0/0 in {commented(comment)}"
    assert kept_added([line]) == [f"allow 41641/udp comment '{comment}'"]
    assert is_ours(kept_added([line])[0]) == comment.startswith("quietport: ")


@pytest.mark.parametrize(
    ("rule", "listed"),
    [
        ("-A ufw-user-input -i tailscale0 -j ACCEPT", "-A ufw-user-input -i tailscale0 -j ACCEPT"),
        (
            "-A ufw-user-input -p udp --dport 41641 -j ACCEPT",
            "-A ufw-user-input -p udp -m udp --dport 41641 -j ACCEPT",
        ),
        (
            "-A ufw-user-input -p tcp --dport 22 -s 203.0.113.7 -j ACCEPT",
            "-A ufw-user-input -s 203.0.113.7/32 -p tcp -m tcp --dport 22 "
            '-m comment --comment "it\'s" -j ACCEPT',
        ),
    ],
)
def test_a_rule_is_found_in_the_kernel(rule: str, listed: str) -> None:
    others = "-P INPUT DROP\n-A ufw-user-input -i eth0 -j ACCEPT\n"
    assert in_kernel(rule, f"{others}{listed}\n")
    assert not in_kernel(rule, others)
    assert not in_kernel(rule, listed.replace("ACCEPT", "DROP"))
    assert not in_kernel(rule, listed.replace("ufw-user-input", "ufw-user-output"))


def test_the_files_of_ufw() -> None:
    defaults = (
        'IPV6=yes\n# DEFAULT_INPUT_POLICY="ACCEPT"\nDEFAULT_INPUT_POLICY="DROP"\n'
        'DEFAULT_OUTPUT_POLICY="ACCEPT"\n'
    )
    assert from_config(defaults, "# ENABLED=no\nENABLED=yes\n") == {
        "enabled": True,
        "defaults": {"incoming": "deny", "outgoing": "allow", "routed": None},
        "ipv6": True,
    }
    assert from_config("", "")["enabled"] is False
    assert assignments("A=1\nA='2'\n") == {"A": "2"}
    assert kernel_policies("-P INPUT DROP\n-P FORWARD ACCEPT\n-N x\n") == {
        "INPUT": "DROP",
        "FORWARD": "ACCEPT",
    }
    assert bare(WANTED[1].shown()) == WANTED[1].text
