"""The spec of the public side has no policy of its own: what may be public is for the one policy to say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from pyinfra.api.exceptions import FactProcessError

from control import outside
from control.settings import HostSettings, PublicListener
from quietport.errors import HostProgramError
from quietport.net import Interfaces
from quietport.ports import Declared, Evidence, judge_host
from quietport.processes import Program
from quietport.ss import Listener, Process
from tests.spec import test_ports as ports
from tests.spec import test_public_side as spec
from tests.spec.reading import Reading

INTERFACES = Interfaces(owners={"203.0.113.5": ("eth0",)}, kinds={"eth0": "public"})
PROGRAMS = {
    1: Program("init.scope", "/usr/lib/systemd/systemd"),
    10: Program("caddy.service", "/usr/bin/caddy"),
    11: Program("tailscaled.service", "/usr/sbin/tailscaled"),
    12: Program("docker.service", "/usr/sbin/docker-proxy"),
    13: Program("nginx.service", "/usr/sbin/nginx"),
}
ALLOWED = (
    # Started by its socket unit, which holds the socket as well.
    Listener("tcp", "*", 443, processes=(Process("systemd", 1), Process("caddy", 10))),
    # The kernel's own.
    Listener("tcp", "0.0.0.0", 2049),
    Listener("tcp", "203.0.113.5", 43210, processes=(Process("tailscaled", 11),)),
)
SHIELDED = Listener("tcp", "0.0.0.0", 8080, processes=(Process("docker-proxy", 12),))
OPEN = Listener("tcp", "0.0.0.0", 80, processes=(Process("nginx", 13),))
DECLARED = (
    Declared("tcp", 443, "the web site", "caddy.service"),
    Declared("tcp", 2049, "files for the office"),
)


@dataclass
class Host:
    """A reading of a host on which `listeners` listen. `unknown`: what its program and fact fail with."""

    listeners: tuple[Listener, ...] = ALLOWED
    published: tuple[int, ...] = ()
    name: str = "vps1"
    unknown: dict[str, Exception] = field(default_factory=dict)

    def reachable(self) -> list[dict[str, Any]]:
        if "program" in self.unknown:
            raise self.unknown["program"]
        units = {("tcp", "::", 443): "caddy.socket"}
        evidence = Evidence(
            self.listeners, INTERFACES, programs=PROGRAMS, declared=DECLARED, socket_units=units
        )
        return [one.to_json() for one in judge_host(evidence)]

    def fact(self, fact: Any) -> list[dict[str, Any]]:
        if "fact" in self.unknown:
            raise self.unknown["fact"]
        return [{"host_port": port} for port in self.published]


def reading_of(host: Host) -> Reading:
    return cast(Reading, host)


def test_what_the_policy_allows_passes() -> None:
    host = Host()
    found = [(one["unit"], one["verdict"]) for one in host.reachable()]
    assert found == [
        ("caddy.socket, caddy.service", "allowed"),
        ("", "allowed"),
        ("tailscaled.service", "allowed"),
    ]
    spec.test_nothing_listens_for_the_public(reading_of(host))


def test_an_exception_that_hosts_toml_does_not_have_is_none() -> None:
    """The host's own list may be another one: what it allows by that is not what was declared."""
    listed = tuple(
        PublicListener(port=one.port, unit=one.unit or None, reason=one.reason) for one in DECLARED
    )
    for listeners in ((), listed[:1]):
        settings = HostSettings(address="192.0.2.1", public_listeners=listeners)
        with pytest.raises((AssertionError, pytest.skip.Exception)) as raised:
            ports.test_an_exception_is_shown_with_its_reason(reading_of(Host()), settings)
        assert raised.type is AssertionError
    settings = HostSettings(address="192.0.2.1", public_listeners=listed)
    ports.test_an_exception_is_shown_with_its_reason(reading_of(Host()), settings)


def test_what_it_does_not_fails_and_is_named_with_the_way_to_mend_it() -> None:
    with pytest.raises(
        AssertionError, match=r"tcp 0\.0\.0\.0 port 80 \(nginx, nginx\.service\) is public: Bind"
    ):
        spec.test_nothing_listens_for_the_public(reading_of(Host((*ALLOWED, OPEN))))


def test_dockers_port_is_left_to_the_probe_where_a_container_publishes_it() -> None:
    listeners = (*ALLOWED, SHIELDED)
    spec.test_nothing_listens_for_the_public(reading_of(Host(listeners, published=(8080,))))
    with pytest.raises(AssertionError, match="port 8080"):
        spec.test_nothing_listens_for_the_public(reading_of(Host(listeners)))


@pytest.mark.parametrize("which", ["program", "fact"])
def test_containers_that_nobody_names_are_no_reason_to_skip(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "neighbour", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="no container"):
        spec.test_no_container_is_reachable(reading_of(Host()))
    error = {"program": HostProgramError("exit 3"), "fact": FactProcessError("does not say")}[which]
    with pytest.raises((type(error), pytest.skip.Exception)) as raised:
        spec.test_no_container_is_reachable(reading_of(Host(unknown={which: error})))
    assert raised.value is error
