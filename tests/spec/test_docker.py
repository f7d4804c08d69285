"""Docker: no published port gets past the host, whatever publishes it."""

from __future__ import annotations

import json

import pytest

from control.settings import HostSettings
from facts.docker import Docker, PublishedPorts
from facts.files import FileText
from facts.units import Units
from tests.spec.reading import Reading

UNIT = "quietport-docker-user.service"
LOOPBACK = ("127.0.0.1", "::1")


def matched(rule: str) -> str:
    """What a rule of the chain asks for, without our mark."""
    asked = rule.split(" -j ")[0].removeprefix("-A DOCKER-USER")
    return asked.replace("-m comment --comment quietport", "").strip()


@pytest.fixture(scope="session", autouse=True)
def _wanted(settings: HostSettings) -> None:
    if settings.docker_source == "none":
        pytest.skip('docker_source = "none" for this host')


def test_the_engine_runs_and_comes_back_after_a_reboot(reading: Reading, settings: HostSettings) -> None:
    docker = reading.fact(Docker)
    assert (docker["installed"], docker["running"], docker["source"]) == (True, True, settings.docker_source)
    assert reading.fact(Units, ["docker.service"])["docker.service"]["enabled"] == "enabled"


def test_compose_is_there(reading: Reading) -> None:
    """Debian 12's own compose is version 1, a program of its own."""
    assert reading.text("docker compose version 2>/dev/null || docker-compose version")


def test_daemon_json_publishes_on_loopback_by_default(reading: Reading) -> None:
    config = json.loads(reading.fact(FileText, "/etc/docker/daemon.json"))
    assert config["ip"] == "127.0.0.1"
    assert config["live-restore"] is True
    assert config["log-driver"] in ("local", "json-file")
    assert config["log-opts"]["max-size"]
    assert config.get("iptables", True) is True


def test_the_daemon_runs_with_its_configuration(reading: Reading) -> None:
    """A daemon older than its daemon.json runs with the one before."""
    docker = reading.fact(Docker)
    assert docker["config_stale"] is False
    assert docker["live_restore"] is True


@pytest.mark.parametrize("program", ["iptables", "ip6tables"])
def test_the_chain_lets_nothing_new_in_from_outside(reading: Reading, program: str) -> None:
    """Replies first, then the tailnet and Docker's own bridges by interface, the rest dropped."""
    rules = [rule for rule in reading.lines("%s -S DOCKER-USER", program) if rule.startswith("-A")]
    found = [(matched(rule), rule.split(" -j ")[1]) for rule in rules]
    # What stands behind the DROP (Docker 26 leaves a RETURN there) is never asked.
    assert found[:5] == [
        ("-m conntrack --ctstate RELATED,ESTABLISHED", "RETURN"),
        ("-i tailscale0", "RETURN"),
        ("-i docker0", "RETURN"),
        ("-i br-+", "RETURN"),
        ("", "DROP"),
    ]


@pytest.mark.parametrize("program", ["iptables", "ip6tables"])
def test_the_chain_is_asked_before_dockers_own(reading: Reading, program: str) -> None:
    rules = [rule for rule in reading.lines("%s -S FORWARD", program) if "-j " in rule]
    jumps = [rule.split("-j ")[1].split()[0] for rule in rules]
    assert "DOCKER-USER" in jumps
    before = jumps[: jumps.index("DOCKER-USER")]
    assert [chain for chain in before if chain.startswith("DOCKER")] == []
    assert "ACCEPT" not in before


def test_the_chain_is_there_before_the_first_container(reading: Reading) -> None:
    unit = reading.fact(Units, [UNIT])[UNIT]
    assert (unit["active"], unit["enabled"]) == ("active", "enabled")
    ordering = reading.text("systemctl show -p Requires,After -- docker.service")
    assert ordering.count(UNIT) == 2


def test_the_program_agrees(reading: Reading) -> None:
    assert reading.text("quietport docker-user --check; echo $?").splitlines()[-1] == "0"


def test_nobody_is_in_the_docker_group_unasked(reading: Reading, settings: HostSettings) -> None:
    members = reading.text("getent group docker").split(":")[3]
    assert set(filter(None, members.split(","))) == set(settings.docker_users)


def test_ports_published_by_default_are_on_loopback(reading: Reading) -> None:
    """Ports that someone published on every address on purpose are shielded by the chain instead."""
    ports = reading.fact(PublishedPorts)
    if not ports:
        pytest.skip("no container publishes a port on this host")
    assert [port for port in ports if port["host_ip"] not in (*LOOPBACK, "0.0.0.0", "::", "")] == []
