"""sshd on every address: planned like any other change, and refused where the firewall lets others in too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
from pyinfra.api.command import FunctionCommand
from pyinfra.context import ctx_host, ctx_state
from pyinfra_testing.util import FakeState, create_host

from control.settings import HostSettings
from operations import gate, sshd
from quietport import sshd as pure
from tests.operations.test_secrets_to_ssh import converged

OFFICE = "203.0.113.0/24"
CLOSED = "-P INPUT DROP\n-N ufw-user-input\n-A INPUT -j ufw-user-input\n"
ADMITS = f"{CLOSED}-A ufw-user-input -s {OFFICE} -p tcp -m tcp --dport 22 -j ACCEPT\n"
EVERYBODY = f"{ADMITS}-A ufw-user-input -p tcp -m tcp --dport 22 -j ACCEPT\n"


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "settings_for", lambda name: HostSettings(address="192.0.2.1"))


def facts(*, ipv6: bool = True, public: bool = False, four: str = ADMITS) -> dict[str, Any]:
    """A converged host; with `public` one whose sshd is on every address already."""
    found = converged()
    found["system.System"] = {"ipv6": ipv6}
    found["packetfilter.PacketFilter"] = {"4": four, "6": CLOSED.replace("ufw-", "ufw6-")}
    if public:
        listeners = pure.public_listeners(ipv6=ipv6)
        found["sshd.SshdFiles"][pure.DROP_IN] = pure.render((), public=listeners)
        found["sockets.ListeningSockets"] = [
            {"protocol": "tcp", "address": address, "port": port, "pid": 77, "unit": pure.UNIT}
            for address, port in listeners
        ]
    return found


def commands(facts: dict[str, Any], networks: Sequence[str], *, executing: bool = False) -> list[Any]:
    state = FakeState()
    state.is_executing = executing
    state.check_for_changes = True
    with ctx_state.use(state), ctx_host.use(create_host(state, facts=facts)):
        made = sshd.tailnet_only._inner(login_user="admin", users=["root"], break_glass=list(networks))
        # What comes after the change asks a host that this one does not play.
        return list(islice(made, 3))


@pytest.mark.parametrize(
    ("ipv6", "listeners"), [(True, [["0.0.0.0", 22], ["::", 22]]), (False, [["0.0.0.0", 22]])]
)
@pytest.mark.parametrize("executing", [False, True])
def test_every_address_is_one_change(*, ipv6: bool, listeners: list[Any], executing: bool) -> None:
    first, _, second = commands(facts(ipv6=ipv6), [OFFICE], executing=executing)
    assert isinstance(first, FunctionCommand)
    assert first.function is gate._pass_gate
    assert "sshd-apply" in str(second)
    plan = json.loads(second.connector_arguments["_stdin"])
    assert plan["listeners"] == listeners
    assert plan["files"][pure.DROP_IN]["text"] == pure.render((), public=pure.public_listeners(ipv6=ipv6))


@pytest.mark.parametrize("ipv6", [True, False])
def test_it_is_made_once(*, ipv6: bool) -> None:
    assert commands(facts(ipv6=ipv6, public=True), [OFFICE]) == []


def test_without_the_setting_it_is_the_tailnet_again() -> None:
    plan = json.loads(commands(facts(public=True), [])[2].connector_arguments["_stdin"])
    assert plan["listeners"] == [[address, 22] for address in ("100.64.0.7", "fd7a:115c:a1e0::7")]


@pytest.mark.parametrize("four", [EVERYBODY, "-P INPUT ACCEPT\n", ""])
def test_a_firewall_that_admits_others_is_a_refusal_when_it_comes_to_it(four: str) -> None:
    # The plan is made before the firewall's step has changed anything.
    assert len(commands(facts(four=four), [OFFICE])) == 3
    (refusal,) = commands(facts(four=four), [OFFICE], executing=True)
    assert "sshd shall listen on every address, as break_glass_cidrs asks." in refusal.args[0]


def test_where_sshd_is_on_the_tailnet_alone_the_firewall_is_not_asked() -> None:
    assert commands(facts(four=EVERYBODY), [], executing=True) == []
