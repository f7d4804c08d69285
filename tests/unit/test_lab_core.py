"""The lab's pure parts: state, subnets, rules, flags, the files it writes, and the scanner on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from control import scan
from lab import (
    bootstrap,
    cli,
    container,
    demo,
    e2e,
    evidence,
    hosts,
    images,
    network,
    process,
    testimage,
)
from lab.process import LabError, Process
from lab.state import Run, RunState, Subnet, Target, all_runs, cache_root, current_run_id
from lab.up import Wanted

SUBNET = Subnet(bridge="qpc-00c0ffee", ipv4="10.213.7.0/24", ipv6="fd71:7069:6574:7::/64")
TARGET = Target(
    name="c13",
    kind="container",
    distro="trixie",
    public_ip="10.213.7.13",
    public_ip6="fd71:7069:6574:7::13",
    bridge="qpc-00c0ffee",
    namespace="qpp-00c0ffee-c13",
    peer_ip="10.213.7.113",
    peer_ip6="fd71:7069:6574:7::113",
    state="running",
    detail={"container": "qp-00c0ffee-c13", "auth_key": "/k/a"},
)


@pytest.fixture
def a_run(tmp_path: Path) -> Run:
    run = Run("unit", root=tmp_path)
    run.create()
    return run


# Processes


def test_a_failing_program_says_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="exit code 3: no luck"):
        process.run(["sh", "-c", "echo no luck >&2; exit 3"])
    log = tmp_path / "log"
    with pytest.raises(LabError, match="no luck") as caught:
        process.run(["sh", "-c", "echo no luck; exit 3"], log=log)
    assert str(log) in caught.value.hint
    assert process.run(["sh", "-c", "exit 3"], check=False).returncode == 3


def test_a_missing_program_and_a_slow_one_are_sentences() -> None:
    with pytest.raises(LabError, match="not installed"):
        process.run(["quietport-no-such-program"])
    with pytest.raises(LabError, match="still not done after"):
        process.run(["sleep", "5"], timeout=0.1)


def test_a_daemon_is_stopped_by_identity_and_not_by_number(tmp_path: Path) -> None:
    daemon = process.spawn(["sleep", "60"], log=tmp_path / "log")
    impostor = replace(daemon, started=daemon.started + 1)
    assert process.alive(daemon)
    assert not process.alive(impostor)
    process.stop(impostor)
    assert process.alive(daemon), "a reused pid would have been killed"
    assert not process.alive(replace(daemon, boot_id="another boot"))
    process.stop(Process.from_json(json.loads(json.dumps(daemon.to_json()))))
    assert not process.alive(daemon)


def test_a_daemon_that_ignores_the_polite_signal_ends_too(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    daemon = process.spawn(
        ["sh", "-c", f"trap '' TERM; touch {ready}; while :; do sleep 0.1; done"], log=tmp_path / "log"
    )
    process.wait_until(ready.exists, timeout=10, what="the trap is set")
    os.kill(daemon.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert process.alive(daemon)
    process.stop(daemon, timeout=0.2)
    assert not process.alive(daemon)


def test_waiting_ends_with_what_did_not_happen() -> None:
    with pytest.raises(LabError, match="this did not happen: the moon turns green"):
        process.wait_until(lambda: False, timeout=0.05, interval=0.01, what="the moon turns green")
    assert process.wait_until(lambda: "yes", timeout=1, what="at once") == "yes"


# State


def test_state_survives_being_written(a_run: Run) -> None:
    a_run.update(lambda state: replace(state, networks={"container": SUBNET}))
    a_run.save_target(TARGET)
    assert a_run.read().networks == {"container": SUBNET}
    assert a_run.target("c13") == TARGET
    assert oct(a_run.file.stat().st_mode & 0o777) == "0o600"
    assert oct(a_run.directory.stat().st_mode & 0o777) == "0o700"
    a_run.forget_target("c13")
    with pytest.raises(LabError, match="no target 'c13'"):
        a_run.target("c13")


def test_another_schema_and_a_damaged_file_are_refused(a_run: Run) -> None:
    a_run.file.write_text('{"schema": 99}')
    with pytest.raises(LabError, match="schema 99"):
        a_run.read()
    a_run.file.write_text("{")
    with pytest.raises(LabError, match="cannot be read"):
        a_run.read()


@pytest.mark.parametrize("bad", ["", "../up", "a b", "-x", "A", "x" * 33])
def test_unusable_run_ids(bad: str, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="Run id"):
        Run(bad, root=tmp_path)


def test_runs_of_one_name_in_two_places_share_no_name(tmp_path: Path) -> None:
    one, two = Run("same", root=tmp_path / "a"), Run("same", root=tmp_path / "b")
    assert one.tag != two.tag
    assert Run("same", root=tmp_path / "a").tag == one.tag


def test_which_runs_there_are(a_run: Run) -> None:
    assert [run.id for run in all_runs(a_run.directory.parent)] == ["unit"]
    assert not a_run.busy
    with a_run.lock():
        assert a_run.busy
    a_run.remove()
    assert all_runs(a_run.directory.parent) == []


def test_names_from_the_environment(tmp_path: Path) -> None:
    assert current_run_id({}) == "default"
    assert current_run_id({"QUIETPORT_LAB_RUN": "mine"}) == "mine"
    assert cache_root({"QUIETPORT_LAB_CACHE": str(tmp_path)}) == tmp_path
    assert cache_root({"XDG_CACHE_HOME": "/c"}) == Path("/c/quietport-lab")


def test_names_of_interfaces_fit(a_run: Run) -> None:
    # IFNAMSIZ is 16 with its closing zero.
    for letters in network.PREFIXES.values():
        assert len(f"{letters}-{a_run.tag}") <= 15


# Networks


def test_addresses_of_a_subnet() -> None:
    assert SUBNET.host4(1) == "10.213.7.1"
    assert SUBNET.host6(113) == "fd71:7069:6574:7::113"


@pytest.mark.parametrize(
    ("other", "taken"),
    [
        ("10.213.7.0/24", True),
        ("10.213.7.9", True),
        ("10.0.0.0/8", True),
        ("fd71:7069:6574:7::/64", True),
        ("10.213.8.0/24", False),
        ("fd71:7069:6574:8::/64", False),
        ("0.0.0.0/1", False),
    ],
)
def test_what_overlaps(other: str, taken: bool) -> None:
    assert network.overlaps(SUBNET, [other]) is taken


def test_only_rules_with_the_mark_are_found() -> None:
    saved = """*nat
-A POSTROUTING -s 10.213.7.0/24 ! -d 10.213.0.0/16 -m comment --comment quietport-lab-00c0ffee -j MASQUERADE
-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE
COMMIT
*filter
-A INPUT -i qpc-1 -m comment --comment quietport-lab-00c0ffee1 -j ACCEPT
-A INPUT -i x -m comment --comment "quietport-lab-00c0ffee and more" -j ACCEPT
-A FORWARD -i qpc-00c0ffee -m comment --comment quietport-lab-00c0ffee -j ACCEPT
COMMIT
"""
    found = network.marked(saved, "quietport-lab-00c0ffee")
    assert [(table, words[:2]) for table, words in found] == [
        ("nat", ["-D", "POSTROUTING"]),
        ("filter", ["-D", "FORWARD"]),
    ]


def test_lab_services_are_reached_over_both_families_and_only_by_the_bridge() -> None:
    rules = network.rules_for(SUBNET)
    inputs = [rule for rule in rules if rule.chain == "INPUT"]
    assert {rule.program for rule in inputs} == {"iptables", "ip6tables"}
    assert all(rule.match[:2] == ("-i", SUBNET.bridge) for rule in inputs)


def test_nameservers_a_guest_cannot_use_are_left_out(tmp_path: Path) -> None:
    stub, real = tmp_path / "stub", tmp_path / "real"
    stub.write_text("nameserver 127.0.0.53\n")
    real.write_text("# x\nnameserver 192.0.2.53\nnameserver ::1\nnameserver 2001:db8::53\n")
    assert network.default_nameservers([stub]) == []
    assert network.default_nameservers([stub, real]) == ["192.0.2.53", "2001:db8::53"]


# Container targets


def test_targets_of_one_debian_have_addresses_of_their_own(a_run: Run) -> None:
    numbers = []
    for name in ("c13", "c13-a", "c13-b"):
        target = container.describe(a_run, "trixie", SUBNET, name)
        a_run.save_target(target)
        numbers.append(target.public_ip.rpartition(".")[2])
    assert numbers == ["13", "20", "21"]
    # Made anew, a target keeps its address.
    assert container.describe(a_run, "trixie", SUBNET, "c13-a").public_ip.endswith(".20")
    full = [replace(TARGET, name=f"x{n}", public_ip=SUBNET.host4(n)) for n in container.NUMBERS]
    for target in full:
        a_run.save_target(target)
    with pytest.raises(LabError, match="no address left"):
        container.describe(a_run, "trixie", SUBNET, "one-more")


def test_targets_made_at_the_same_time_get_addresses_of_their_own(a_run: Run) -> None:
    names = [f"c13-{number}" for number in range(16)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        made = list(pool.map(lambda name: container.reserve(a_run, "trixie", SUBNET, name), names))
    assert len({target.public_ip for target in made}) == len(names)
    assert a_run.read().targets.keys() == set(names)


def test_a_wanted_target_is_named_by_its_variants() -> None:
    assert Wanted.of("container", "bookworm").name == "c12"
    assert Wanted.of("container", "trixie", name="host").name == "host"
    with pytest.raises(LabError, match="No variant 'nonsense'"):
        Wanted.of("container", "trixie", variants=["nonsense"])


@pytest.mark.parametrize(("before", "during"), [("128", "8192"), ("8192", "8192"), ("100000", "100000")])
def test_settings_of_the_machine_are_raised_never_lowered_and_put_back(
    a_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, during: str
) -> None:
    monkeypatch.setattr(network, "MACHINE_DIR", tmp_path / "machine")
    monkeypatch.setattr(network, "_sysctl_path", lambda key: tmp_path / key)
    monkeypatch.setattr(network.os, "geteuid", lambda: 0)
    key = "fs.inotify.max_user_instances"
    (tmp_path / key).write_text(before)
    network.prepare_machine(a_run)
    network.prepare_machine(a_run)
    assert (tmp_path / key).read_text() == during
    network.restore_machine(a_run)
    assert (tmp_path / key).read_text() == before


def test_cgroup_modes(tmp_path: Path) -> None:
    assert container.cgroup_mode(tmp_path) == "legacy"
    (tmp_path / "unified").mkdir()
    (tmp_path / "unified/cgroup.procs").touch()
    assert container.cgroup_mode(tmp_path) == "hybrid"
    (tmp_path / "cgroup.controllers").touch()
    assert container.cgroup_mode(tmp_path) == "pure"


def test_cgroup_flags() -> None:
    assert container.cgroup_flags("pure", "trixie") == ["--cgroupns=private"]
    assert "--volume=/sys/fs/cgroup/unified:/sys/fs/cgroup:rw" in container.cgroup_flags("hybrid", "trixie")
    assert "--cgroupns=private" in container.cgroup_flags("legacy", "bookworm")
    with pytest.raises(LabError, match="needs cgroup v2"):
        container.cgroup_flags("legacy", "trixie")


def test_the_first_process_is_a_valid_script_that_ends_as_systemd() -> None:
    script = container.first_process("c13", ["192.0.2.53"])
    assert subprocess.run(["sh", "-n", "-c", script], check=False).returncode == 0
    assert script.splitlines()[-1] == "exec /sbin/init"
    assert "nameserver 192.0.2.53" in script


def test_a_recipe_has_a_name_of_its_own() -> None:
    one = images.Recipe("trixie")
    assert one.tag == images.Recipe("trixie").tag
    assert one.tag != images.Recipe("trixie", packages=("init",)).tag
    assert one.build_argv()[-2:] == ["trixie", "-"], "a mirror argument would override the default"


def test_a_blank_host_has_none_of_what_the_converge_brings() -> None:
    assert not {"ufw", "docker.io", "tailscale", "curl", "gnupg"} & set(images.PACKAGES)
    assert {"openssh-server", "python3", "sudo"} <= set(images.PACKAGES)


# Files a run writes


def _hosts_text(tmp_path: Path) -> str:
    services = hosts.Services(
        login_server="https://10.213.1.1:8443",
        tailnet_proxy='tail "scale" nc %h %p',
        tailscale_repository="http://10.213.1.1:8081/t",
        tailscale_key_fingerprint="A" * 40,
        docker_repository="http://10.213.1.1:8081/d",
        docker_key_fingerprint="B" * 40,
    )
    return hosts.hosts_toml(
        [TARGET],
        services=services,
        identity_file=tmp_path / "operator",
        auth_keys={"c13": Path("/k/a")},
        example_secret=tmp_path / "secret",
        more={"c13": {"accept_key_expiry": True, "user": "ops"}},
    )


def test_the_hosts_file_is_one_the_settings_accept(tmp_path: Path) -> None:
    from control.settings import parse_fleet

    host = parse_fleet(_hosts_text(tmp_path), file=tmp_path / "hosts.toml").hosts["c13"]
    assert host.address == TARGET.public_ip
    assert host.auth_key == "file:/k/a"
    assert host.tailnet_proxy == 'tail "scale" nc %h %p'
    assert list(host.secrets) == [hosts.EXAMPLE_SECRET]
    assert host.accept_key_expiry
    assert host.user == "ops"


def test_the_ssh_config_matches_names_and_both_addresses(a_run: Run, tmp_path: Path) -> None:
    text = hosts.ssh_config(a_run, [TARGET], tailnet_proxy="carry %h %p", tailnet={"c13": ["100.64.0.9"]})
    file = tmp_path / "ssh_config"
    file.write_text(text)

    def asked(host: str) -> dict[str, str]:
        out = process.output(["ssh", "-G", "-F", str(file), host])
        return dict(line.partition(" ")[::2] for line in out.splitlines())

    for host in ("c13", TARGET.public_ip, TARGET.public_ip6, "100.64.0.9"):
        assert asked(host)["user"] == "root"
        assert asked(host)["hostkeyalias"] == "c13", host
    assert asked("100.64.0.9")["proxycommand"] == "carry %h %p"
    assert asked("100.64.3.3")["proxycommand"] == "carry %h %p"
    assert "proxycommand" not in asked(TARGET.public_ip)
    assert "hostkeyalias" not in asked("example.com")


def test_hosts_that_are_not_the_labs_are_refused(a_run: Run, tmp_path: Path) -> None:
    a_run.save_target(TARGET)
    a_run.hosts_file.write_text(_hosts_text(tmp_path))
    assert hosts.guard(a_run.hosts_file).id == "unit"
    a_run.hosts_file.write_text('[hosts.c13]\naddress = "192.0.2.1"\n')
    with pytest.raises(LabError, match="c13 is not a target"):
        hosts.guard(a_run.hosts_file)
    a_run.hosts_file.write_text(f'[hosts.vps1]\naddress = "{TARGET.public_ip}"\n')
    with pytest.raises(LabError, match="vps1 is not a target"):
        hosts.guard(a_run.hosts_file)
    mine = tmp_path / "hosts.toml"
    mine.write_text(_hosts_text(tmp_path))
    with pytest.raises(LabError, match="not a lab's hosts file"):
        hosts.guard(mine)
    assert tomllib.loads(mine.read_text())


def test_status_before_anything_is_up(a_run: Run) -> None:
    found = cli.status(a_run)
    assert found == {
        "schema": 1,
        "run_id": "unit",
        "login_server": None,
        "ssh_config": str(a_run.ssh_config),
        "targets": [],
    }


# The scanner


def _listener(family: socket.AddressFamily, address: str) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.bind((address, 0))
    sock.listen()
    return sock


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_scanner_sees_open_and_closed_ports(family: socket.AddressFamily, address: str) -> None:
    with _listener(family, address) as sock:
        port = sock.getsockname()[1]
        seen = scan.scan(address, [port], timeout=1, concurrency=10, retries=0)
        assert seen.open == [port]
        assert scan.connect(address, port, timeout=1) == "open"
    seen = scan.scan(address, [port], timeout=1, concurrency=10, retries=0)
    assert (seen.open, seen.refused) == ([], 1)
    assert scan.connect(address, port, timeout=1) == "refused"


def test_a_port_that_does_not_answer_at_first_is_seen_within_the_default_patience() -> None:
    """The second packet is the system's own: a listener whose queue is full drops the first."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(0)
        place = sock.getsockname()
        with socket.create_connection(place):
            assert scan.connect(*place, timeout=0.3) == "silent"
            threading.Timer(0.5, sock.accept).start()
            seen = scan.scan(place[0], [place[1]], timeout=scan.TIMEOUT, concurrency=10, retries=0)
    assert seen.open == [place[1]]


def test_the_scanner_as_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    with _listener(socket.AF_INET, "127.0.0.1") as sock:
        port = sock.getsockname()[1]
        argv = [
            sys.executable,
            "-I",
            scan.__file__,
            "ports",
            "127.0.0.1",
            "--ports",
            f"{port - 20}-{port + 20}",
        ]
        answer = json.loads(process.output(argv))
    seen = answer["addresses"]["127.0.0.1"]
    assert port in seen["open"]
    assert len(seen["open"]) + seen["refused"] + seen["silent"] + seen["unreachable"] == 41


def test_ports_are_parsed() -> None:
    assert scan.parse_ports("22,80-82") == [22, 80, 81, 82]
    for bad in ("0", "65536", "9-8", "x", ""):
        with pytest.raises(ValueError, match=r"ports|invalid"):
            scan.parse_ports(bad)


def test_http_that_nobody_answers() -> None:
    assert scan.http_get("http://127.0.0.1:1/", timeout=1)["status"] == 0


# Bootstrap, evidence, demo, end to end


def test_the_stamp_changes_with_what_the_environment_is_made_from(tmp_path: Path) -> None:
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text(name)
    before = bootstrap.stamp(tmp_path)
    assert before == bootstrap.stamp(tmp_path)
    both = ("requirements.lock", "pyproject.toml")
    project = bootstrap.stamp(tmp_path, both)
    (tmp_path / "pyproject.toml").write_text("other")
    assert bootstrap.stamp(tmp_path) == before, "the packages do not depend on it"
    assert bootstrap.stamp(tmp_path, both) != project
    (tmp_path / "requirements.lock").write_text("other")
    assert bootstrap.stamp(tmp_path) != before


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("ID=debian\n", "debian"),
        ('NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n', "ubuntu"),
        ('ID=raspbian\nID_LIKE="debian"\n', "debian"),
        ("ID=fedora\n", "fedora"),
        ("", ""),
    ],
)
def test_distributions(text: str, word: str) -> None:
    assert bootstrap.distribution(text) == word


def test_bootstrap_imports_nothing_that_is_not_there_yet() -> None:
    code = "import sys; sys.path.insert(0, '.'); import lab.bootstrap; print('pyinfra' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_addresses_of_containers() -> None:
    networks = {
        "bridge": {"IPAddress": "172.17.0.2", "GlobalIPv6Address": ""},
        "x": {"IPAddress": "172.18.0.2"},
    }
    text = json.dumps([{"NetworkSettings": {"Networks": networks}}])
    assert evidence.addresses_in(text) == ["172.17.0.2", "172.18.0.2"]
    assert evidence.addresses_in("\n") == []


def test_changes_are_counted() -> None:
    def result(success: list[str], error: list[str]) -> str:
        one = {"name": "docker: engine", "success": success, "error": error}
        return json.dumps({"results": {"operations": [one]}})

    assert demo.count(result([], [])) == (1, [])
    assert demo.count(result(["c13"], [])) == (1, ["docker: engine"])
    with pytest.raises(LabError, match="Failed: docker: engine"):
        demo.count(result([], ["c13"]))
    with pytest.raises(LabError, match="cannot be read"):
        demo.count("")


def test_what_is_skipped_is_said() -> None:
    assert e2e.select({}) == []
    assert e2e.select({"vm": "no vagrant"}) == ["-m", "not vm"]
    said = e2e.report({"vm": "no vagrant"}, {})
    assert any("vm" in line and "no vagrant" in line for line in said)
    assert e2e.report({}, {"QUIETPORT_TEST_ALL": "1"}) == []


def test_a_program_that_needs_libraries_is_told_from_one_that_does_not() -> None:
    assert testimage.is_dynamic(Path(sys.executable).resolve().read_bytes())
    with pytest.raises(LabError, match="not a 64-bit ELF"):
        testimage.is_dynamic(b"#!/bin/sh\n")


def test_the_test_image_is_the_same_bytes_twice(tmp_path: Path) -> None:
    if bootstrap.find("busybox") is None:
        pytest.skip("busybox-static is not installed; the end-to-end tests install it")
    one, two = testimage.build(tmp_path / "1"), testimage.build(tmp_path / "2")
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as tar:
        assert {"bin/busybox", "bin/httpd", "www/index.html"} <= set(tar.getnames())


def test_state_of_an_empty_run_is_plain_json() -> None:
    state = RunState(run_id="x", tag="00c0ffee")
    assert RunState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_an_sshd_installed_for_tests_is_masked_first(tmp_path: Path) -> None:
    bootstrap.mask_ssh(tmp_path / "system")
    links = {link.name: str(link.readlink()) for link in (tmp_path / "system").iterdir()}
    assert links == {"ssh.service": "/dev/null", "ssh.socket": "/dev/null"}


def test_masking_leaves_what_an_administrator_put_there(tmp_path: Path) -> None:
    (tmp_path / "ssh.service").write_text("[Unit]\n")
    bootstrap.mask_ssh(tmp_path)
    assert (tmp_path / "ssh.service").read_text() == "[Unit]\n"
