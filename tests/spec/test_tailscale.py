"""tailscale: joined for good, from a repository whose key is the pinned one."""

from __future__ import annotations

import pytest

from control.settings import HostSettings
from facts.apt import Keyring
from facts.files import FileState, FileText
from facts.system import System
from facts.tailnet import Tailnet
from facts.units import Units
from tests.spec.reading import Reading
from tests.spec.snapshot import SOURCES


def keyring_of(text: str) -> str:
    """The Signed-By path of a deb822 sources file."""
    return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("Signed-By:"))


def test_tailscaled_runs_and_comes_back_after_a_reboot(reading: Reading) -> None:
    unit = reading.fact(Units, ["tailscaled.service"])["tailscaled.service"]
    assert (unit["active"], unit["enabled"]) == ("active", "enabled")


def test_the_host_is_on_the_tailnet(reading: Reading) -> None:
    tailnet = reading.fact(Tailnet)
    assert tailnet["backend_state"] == "Running"
    assert tailnet["addresses"]
    # The control server gives addresses of both families; a host with IPv6 disabled can have one of them.
    ipv6 = reading.fact(System)["ipv6"]
    given = [address for address in tailnet["self_addresses"] if ipv6 or ":" not in address]
    assert sorted(tailnet["addresses"]) == sorted(given)


def test_the_host_is_on_the_tailnet_that_was_declared(reading: Reading, settings: HostSettings) -> None:
    assert reading.fact(Tailnet)["login_server"].rstrip("/") == settings.login_server.rstrip("/")


def test_the_name_is_its_own(reading: Reading, settings: HostSettings) -> None:
    tailnet = reading.fact(Tailnet)
    wanted = settings.hostname or reading.name
    assert tailnet["hostname"] == wanted
    # A stale node would have pushed this one to NAME-1.
    assert tailnet["dns_name"].split(".")[0] == wanted


def test_sshd_and_not_tailscale_answers_logins(reading: Reading) -> None:
    prefs = reading.fact(Tailnet)["prefs"]
    assert prefs["run_ssh"] is False
    assert prefs["shields_up"] is False


def test_preferences_are_the_declared_ones(reading: Reading, settings: HostSettings) -> None:
    prefs = reading.fact(Tailnet)["prefs"]
    assert (prefs["accept_dns"], prefs["accept_routes"]) == (settings.accept_dns, settings.accept_routes)


def test_the_node_does_not_expire(reading: Reading, settings: HostSettings) -> None:
    if settings.accept_key_expiry or settings.break_glass_cidrs:
        pytest.skip("accept_key_expiry or break_glass_cidrs is set for this host")
    assert not reading.fact(Tailnet)["key_expiry"]


def test_nothing_is_published_by_funnel(reading: Reading) -> None:
    """Funnel publishes to the Internet without a public listener on the host."""
    serve = reading.json("tailscale serve status --json")
    assert not serve.get("AllowFunnel")


def test_the_keyring_holds_the_pinned_key_alone(reading: Reading, settings: HostSettings) -> None:
    keyring = keyring_of(reading.fact(FileText, SOURCES))
    state = reading.fact(FileState, keyring)
    assert (state["user"], state["mode"]) == ("root", "0644")
    assert reading.fact(Keyring, keyring) == [settings.tailscale_key_fingerprint]


def test_the_repository_is_the_declared_one(reading: Reading, settings: HostSettings) -> None:
    text = reading.fact(FileText, SOURCES)
    wanted = settings.tailscale_repository or "https://pkgs.tailscale.com/stable/"
    assert f"URIs: {wanted}" in text


def test_the_key_is_gone_from_the_host(reading: Reading) -> None:
    """The key travels through a private file under /run that the join removes, also when it fails."""
    assert reading.lines("find /run /tmp /var/tmp -xdev -name %s", "*auth*key*") == []
