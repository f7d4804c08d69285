"""ssh: sshd answers on the tailnet and nowhere else, to keys and nothing else."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from control.reach import Route, route
from control.settings import HostSettings
from facts.sockets import ListeningSockets
from facts.sshd import SshdEffective, SshdFiles, SshdProcess
from facts.system import System
from facts.tailnet import Tailnet
from facts.units import Units
from quietport.sshd import ASKED_FROM, DROP_IN, PORT, SOCKETS, public_listeners, with_addresses
from quietport.unit_names import FOLLOWER
from tests.spec.reading import Reading
from tests.spec.test_timers import MOST_EXPOSED

LOGIN_TIMEOUT_S = 60


def login(to: Route, key: Path | None, *options: str) -> subprocess.CompletedProcess[str]:
    """Log in with OpenSSH's own client and run `true`; with `key`, nothing but that key is offered."""
    argv = ["ssh", "-F", "none", "-p", str(to.port), "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"]
    argv += ["-o", f"UserKnownHostsFile={to.known_hosts}", "-o", "GlobalKnownHostsFile=/dev/null"]
    argv += ["-o", "ConnectTimeout=20", *options]
    if key:
        argv += ["-i", str(key), "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none"]
    if to.proxy:
        argv += ["-o", f"ProxyCommand={to.proxy}"]
    argv += [f"{to.user}@{to.address}", "true"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=LOGIN_TIMEOUT_S, check=False)


@pytest.fixture(scope="session")
def tailnet_way(reading: Reading) -> Route:
    """How the host is reached now: a converged host is reached over the tailnet."""
    way = route(reading.name)
    assert way.way == "tailnet", f"{reading.name} is still reached by its public address"
    return way


def test_the_right_key_is_let_in(tailnet_way: Route) -> None:
    done = login(tailnet_way, tailnet_way.identity_file)
    assert done.returncode == 0, done.stderr


def test_a_wrong_key_is_refused(tailnet_way: Route, tmp_path: Path) -> None:
    key = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    done = login(tailnet_way, key)
    assert done.returncode == 255
    assert "Permission denied (publickey)" in done.stderr


def test_passwords_are_not_even_offered(tailnet_way: Route) -> None:
    done = login(tailnet_way, None, "-o", "PreferredAuthentications=password,keyboard-interactive")
    assert done.returncode == 255
    # The list in brackets is what the server still accepts.
    assert "Permission denied (publickey)" in done.stderr


def test_sshd_listens_on_every_tailnet_address_and_no_other(reading: Reading) -> None:
    if reading.settings.break_glass_cidrs:
        pytest.skip("break_glass_cidrs: sshd listens on every address, see the next one")
    listeners = [socket for socket in reading.fact(ListeningSockets) if socket["process"] == "sshd"]
    assert sorted({socket["address"] for socket in listeners}) == sorted(reading.fact(Tailnet)["addresses"])
    assert {socket["exposure"] for socket in listeners} == {"tailnet"}


def test_sshd_on_every_address_is_for_the_firewall_to_judge(reading: Reading, settings: HostSettings) -> None:
    """With break_glass_cidrs: allowed, because the firewall was read and admits those networks alone."""
    if not settings.break_glass_cidrs:
        pytest.skip("no break_glass_cidrs for this host")
    listeners = [socket for socket in reading.fact(ListeningSockets) if socket["process"] == "sshd"]
    wanted = [address for address, _ in public_listeners(ipv6=reading.fact(System)["ipv6"])]
    assert sorted(socket["address"] for socket in listeners) == sorted(wanted)
    assert {(socket["port"], socket["verdict"]) for socket in listeners} == {(PORT, "allowed")}


def test_only_keys_for_every_user_from_everywhere(reading: Reading, settings: HostSettings) -> None:
    for user in {settings.user, "root", *settings.agents}:
        for address in ASKED_FROM:
            effective = reading.fact(SshdEffective, user, address)
            assert effective["passwordauthentication"] == ["no"], (user, address)
            assert effective["kbdinteractiveauthentication"] == ["no"], (user, address)
            assert effective["authenticationmethods"] == ["publickey"], (user, address)


def test_our_file_is_read_first(reading: Reading) -> None:
    files = reading.fact(SshdFiles)
    assert DROP_IN in files
    assert min(path for path in files if "/sshd_config.d/" in path) == DROP_IN


def test_no_other_file_makes_it_listen(reading: Reading) -> None:
    """ListenAddress and Port accumulate: a line elsewhere stays active beside ours."""
    competing = [
        (path, line)
        for path, text in reading.fact(SshdFiles).items()
        for line in text.splitlines()
        if path != DROP_IN and line.strip().lower().startswith(("listenaddress", "port "))
    ]
    assert competing == []


def test_the_service_runs_with_its_configuration(reading: Reading) -> None:
    unit = reading.fact(Units, ["ssh.service"])["ssh.service"]
    assert (unit["active"], unit["enabled"], unit["need_reload"]) == ("active", "enabled", False)
    process = reading.fact(SshdProcess)
    assert (process["running"], process["stale"]) == (True, False)


def test_the_service_waits_for_the_tailnet(reading: Reading) -> None:
    """Without it sshd fails for good after a reboot: its address is not there yet."""
    unit = reading.text("systemctl cat -- ssh.service")
    assert "quietport sshd-wait" in unit
    assert "tailscaled.service" in reading.text("systemctl show --value -p After -- ssh.service").split()


def test_the_addresses_are_followed(reading: Reading) -> None:
    unit = reading.fact(Units, [FOLLOWER])[FOLLOWER]
    assert (unit["active"], unit["enabled"], unit["need_reload"]) == ("active", "enabled", False)
    verdict = reading.text("systemd-analyze security --no-pager %s", FOLLOWER)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", verdict)
    assert found, verdict[-200:]
    assert float(found.group(1)) <= MOST_EXPOSED


def test_the_follower_would_write_what_is_there(reading: Reading) -> None:
    if reading.settings.break_glass_cidrs:
        pytest.skip("break_glass_cidrs: the follower leaves the wildcards alone")
    text = reading.fact(SshdFiles)[DROP_IN]
    assert with_addresses(text, reading.fact(Tailnet)["addresses"]) == text


def test_sockets_cannot_start_it(reading: Reading) -> None:
    units = reading.fact(Units, list(SOCKETS))
    for name in SOCKETS:
        assert units[name]["load"] == "masked", name
        assert units[name]["active"] == "inactive", name


def test_no_socket_of_ssh_is_active(reading: Reading) -> None:
    """systemd-ssh-generator's vsock and unix sockets do not show up in `ss -lntup`."""
    active = reading.lines("systemctl list-units --type=socket --state=active --plain --no-legend --no-pager")
    assert [line.split()[0] for line in active if line.startswith(("ssh", "sshd"))] == []


def test_the_tailnet_is_exempt_from_penalties(reading: Reading, settings: HostSettings) -> None:
    effective = reading.fact(SshdEffective, settings.user, ASKED_FROM[0])
    if "persourcepenalties" not in effective:
        pytest.skip("this sshd has no PerSourcePenalties")
    assert "100.64.0.0/10" in " ".join(effective["persourcepenaltyexemptlist"])
