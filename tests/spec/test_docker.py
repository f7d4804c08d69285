"""Docker: no published port gets past the host, whatever publishes it."""

from __future__ import annotations

import json

import pytest

from control.settings import HostSettings
from facts.docker import Docker, PublishedPorts
from facts.files import FileText
from facts.units import Units
from tests.spec.reading import Reading
from tests.spec.snapshot import CHAINS, FAMILIES

UNIT = "quietport-docker-user.service"
LOOPBACK = ("127.0.0.1", "::1")


def parsed(rule: str) -> tuple[str, str]:
    """What a rule asks for, without our mark, and where it sends the packet."""
    asked, _, target = rule.replace(" -m comment --comment quietport", "").partition(" -j ")
    return asked.split(maxsplit=2)[2] if asked.count(" ") > 1 else "", target


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


def test_profiles_of_containers_can_be_loaded(reading: Reading) -> None:
    """With AppArmor in the kernel and no parser an engine starts no container, or one without a profile."""
    assert reading.text("PATH=$PATH:/usr/sbin:/sbin command -v apparmor_parser")


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


@pytest.mark.parametrize("program", FAMILIES)
@pytest.mark.parametrize(("table", "chain"), CHAINS)
def test_the_chain_lets_nothing_new_in(reading: Reading, program: str, table: str, chain: str) -> None:
    """Replies first, then the tailnet and Docker's own bridges by interface, the rest dropped."""
    rules = [rule for rule in reading.lines(f"{program} -t {table} -S {chain}") if rule.startswith("-A")]
    # What stands behind the DROP (Docker 26 leaves a RETURN there) is never asked.
    assert [parsed(rule) for rule in rules[:5]] == [
        ("-m conntrack --ctstate RELATED,ESTABLISHED", "RETURN"),
        ("-i tailscale0", "RETURN"),
        ("-i docker0", "RETURN"),
        ("-i br-+", "RETURN"),
        ("", "DROP"),
    ]


@pytest.mark.parametrize("program", FAMILIES)
@pytest.mark.parametrize(("table", "chain"), CHAINS)
def test_the_chain_is_asked_before_anything_accepts(
    reading: Reading, program: str, table: str, chain: str
) -> None:
    """Chains that only drop may come before it, and tailscaled's, which is about the tailnet alone."""
    forward = [rule for rule in reading.lines(f"{program} -t {table} -S FORWARD") if " -j " in rule]
    targets = [parsed(rule)[1] for rule in forward]
    assert chain in targets
    before = set(targets[: targets.index(chain)])
    assert before <= {"ts-forward", "DOCKER-ISOLATION-STAGE-1"}


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
