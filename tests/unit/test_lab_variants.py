"""Hosts that are not blank: what the registry holds together, and what a variant's target needs."""

from __future__ import annotations

import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from control.settings import HostSettings
from lab import hosts, variants
from lab.process import LabError
from lab.state import Run, Target
from lab.up import Wanted
from lab.variants import machine, ssh

TARGET = Target(
    name="c13-x",
    kind="container",
    distro="trixie",
    public_ip="10.213.7.20",
    public_ip6="fd71:7069:6574:7::20",
    bridge="qpc-00c0ffee",
    namespace="qpp-00c0ffee-c13-x",
    peer_ip="10.213.7.120",
    peer_ip6="fd71:7069:6574:7::120",
)


@pytest.fixture
def a_run(tmp_path: Path) -> Run:
    run = Run("unit", root=tmp_path)
    run.create()
    return run


def with_variants(*names: str) -> Target:
    return replace(TARGET, detail={variants.DETAIL: ",".join(names)})


@pytest.mark.parametrize("name", variants.ALL)
def test_a_variant_is_told_apart_by_name_and_sentence(name: str) -> None:
    variant = variants.ALL[name]
    assert variant.name == name
    assert variant.what
    assert variant.kinds
    assert variant.distros
    assert variant.conflicts <= variants.ALL.keys() - {name}
    # With the usual name before it, it becomes a host name: 32 characters in the lab.
    for distro in variant.distros:
        for kind in variant.kinds:
            assert len(Wanted.of(kind, distro, variants=[name]).name) <= 32


def test_no_two_variants_have_one_name() -> None:
    every = [variant for module in variants._MODULES for variant in module]
    assert len(every) == len(variants.ALL)


def test_variants_that_undo_each_other_are_refused_in_either_order() -> None:
    with pytest.raises(LabError, match="cannot be had on one target"):
        Wanted.of("container", "trixie", variants=["no-include", "foreign-listen"])
    with pytest.raises(LabError, match="cannot be had on one target"):
        Wanted.of("container", "trixie", variants=["foreign-listen", "no-include"])
    Wanted.of("container", "trixie", variants=["no-include", "match-passwords"])


def test_the_sudo_password_is_a_private_file_and_travels_as_a_hash(a_run: Run) -> None:
    target = with_variants("sudo-password")
    keys = variants.keys_of(a_run, target)
    settings = HostSettings(address=target.public_ip, **keys)
    assert settings.user == ssh.ADMIN
    path = Path(str(settings.sudo_password).removeprefix("file:"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert variants.keys_of(a_run, target) == keys, "made once"
    script = ssh._sudo_script(a_run, target, None)  # type: ignore[arg-type]
    assert path.read_text().strip() not in script
    hashed = script.partition(f"'{ssh.ADMIN}:")[2].partition("'")[0]
    again = subprocess.run(
        ["openssl", "passwd", "-6", "-salt", hashed.split("$")[2], "-stdin"],
        input=path.read_text(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.strip() == hashed, "the password's, without the line's end"


def test_keys_of_all_variants_of_a_target_reach_its_files(a_run: Run) -> None:
    target = with_variants("foreign-listen", "sudo-password")
    keys = variants.keys_of(a_run, target)
    assert (keys["port"], keys["user"]) == (2222, ssh.ADMIN)
    text = hosts.hosts_toml(
        [target],
        services=hosts.Services(*["x"] * 6),
        identity_file=Path("/k"),
        auth_keys={},
        example_secret=Path("/s"),
        more={target.name: keys},
    )
    assert tomllib.loads(text)["hosts"]["c13-x"]["port"] == 2222
    config = hosts.ssh_config(
        a_run, [target, TARGET], tailnet_proxy="p", tailnet={}, users={target.name: ssh.ADMIN}
    )
    assert f"User {ssh.ADMIN}" in config.partition("\n\n")[0]
    assert config.rstrip().endswith("LogLevel ERROR")
    assert "User root" in config.rpartition("Host ")[2]


@pytest.mark.parametrize(
    ("config", "listens"),
    [
        ("Port 22\nPort 2222\n", ["0.0.0.0:22", "0.0.0.0:2222", "[::]:22", "[::]:2222"]),
        ("#Port 22\n", []),
        (
            "Port 22\nListenAddress 100.64.0.1:22\nListenAddress [fd7a::1]:22\n",
            ["100.64.0.1:22", "[fd7a::1]:22"],
        ),
    ],
)
def test_the_generator_of_the_socket_does_what_ubuntus_does(
    tmp_path: Path, config: str, listens: list[str]
) -> None:
    text = ssh._SSH_SOCKET.partition("sshd-socket-generator <<'END'\n")[2].partition("END\nchmod")[0]
    program = tmp_path / "generator"
    program.write_text(text.replace("/etc/ssh", str(tmp_path / "ssh")))
    (tmp_path / "ssh").mkdir()
    (tmp_path / "ssh/sshd_config").write_text(config)
    (tmp_path / "out").mkdir()
    subprocess.run(["sh", str(program), str(tmp_path / "out")], check=True)
    made = tmp_path / "out/ssh.socket.d/addresses.conf"
    lines = made.read_text().splitlines() if made.exists() else []
    assert [line.removeprefix("ListenStream=") for line in lines if line.startswith("ListenStream=")] == (
        ["", *listens] if listens else []
    )


def test_a_variant_may_take_a_key_away(a_run: Run) -> None:
    target = with_variants("tailnet-ssh")
    text = hosts.hosts_toml(
        [target],
        services=hosts.Services(*["x"] * 6),
        identity_file=Path("/k"),
        auth_keys={target.name: Path("/key")},
        example_secret=Path("/s"),
        more={target.name: variants.keys_of(a_run, target)},
    )
    assert tomllib.loads(text)["hosts"]["c13-x"] == {"address": target.public_ip}


def test_an_older_project_that_is_not_in_the_history_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIETPORT_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "OLDER", "0" * 40)
    with pytest.raises(LabError, match="has no commit 0000") as caught:
        machine._older_source()
    assert "git fetch" in caught.value.hint


def test_the_older_project_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIETPORT_LAB_CACHE", str(tmp_path))
    source = machine._older_source()
    assert (source / "deploys/vps.py").is_file()
    (source / "mark").touch()
    assert machine._older_source() == source
    assert (source / "mark").exists()


# These ask the run's services, or openssl.
ASKING = ("sudo-password", "tailnet-ssh")


@pytest.mark.parametrize("variant", [one for name, one in variants.ALL.items() if name not in ASKING])
def test_a_script_is_shell(a_run: Run, variant: variants.Variant) -> None:
    text = variant.script(a_run, TARGET, None)  # type: ignore[arg-type]
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
