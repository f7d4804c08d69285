"""The VM target's pure parts: names, XML, environment, answers of the guest agent, the box's recipe."""

from __future__ import annotations

import base64
import ipaddress
import json
import re
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab import box, libvirt, vm
from lab.network import IPV4_POOL, IPV6_POOL
from lab.process import LabError, boot_id, identify
from lab.state import Run, Subnet, Target

SUBNET = Subnet(bridge="qpv-0123abcd", ipv4="10.213.7.0/24", ipv6="fd71:7069:6574:7::/64")
VAGRANTFILE = vm.PROJECT / "Vagrantfile"


@pytest.fixture
def run_(tmp_path: Path) -> Run:
    """A run that has begun."""
    begun = Run("try", root=tmp_path)
    begun.create()
    (begun.keys / "operator").write_text("not a key\n")
    return begun


@pytest.fixture
def target(run_: Run) -> Target:
    return vm.describe(run_, "trixie", SUBNET, driver="qemu")


# Network


def test_network_reserves_each_host_its_address() -> None:
    hosts = {"v13": ("52:54:00:01:02:0d", "10.213.7.13"), "v12": ("52:54:00:01:02:0c", "10.213.7.12")}
    network = ET.fromstring(libvirt.network_xml(SUBNET, hosts))  # noqa: S314 - our own text
    found = {host.get("name"): (host.get("mac"), host.get("ip")) for host in network.iter("host")}
    assert found == hosts
    dynamic = network.find("ip/dhcp/range")
    assert dynamic is not None
    first, last = (ipaddress.ip_address(dynamic.attrib[key]) for key in ("start", "end"))
    assert not any(first <= ipaddress.ip_address(address) <= last for _, address in hosts.values())


def test_network_leaves_firewall_and_ipv6_to_the_lab() -> None:
    network = ET.fromstring(libvirt.network_xml(SUBNET, {}))  # noqa: S314 - our own text
    forward, bridge = network.find("forward"), network.find("bridge")
    assert forward is not None
    assert forward.attrib == {"mode": "open"}
    assert bridge is not None
    assert bridge.get("name") == SUBNET.bridge
    (ip,) = network.findall("ip")
    assert ip.attrib == {"address": "10.213.7.1", "netmask": "255.255.255.0"}


def test_mac_addresses_are_qemus_differ_by_run_and_stay() -> None:
    first, second = libvirt.mac("0123abcd", 13), libvirt.mac("deadbeef", 13)
    assert re.fullmatch(r"52:54:00(:[0-9a-f]{2}){3}", first)
    assert first.endswith(":0d")
    assert first != second
    assert first == libvirt.mac("0123abcd", 13)


def test_info_reads_what_virsh_prints() -> None:
    text = "Name:           qpv-0123abcd\nUUID:           7a:b\nActive:         yes\n\nnoise"
    assert libvirt.info(text) == {"Name": "qpv-0123abcd", "UUID": "7a:b", "Active": "yes"}


def test_interfaces_are_those_on_a_network() -> None:
    head = " Interface   Type      Source         Model    MAC\n--------------------------------------\n"
    row = " vnet3       network   qpv-0123abcd   virtio   52:54:00:56:20:0d\n"
    assert vm.interfaces(head + row) == ["vnet3"]
    assert vm.interfaces(head) == []
    # A VM that is off has no end here.
    assert vm.interfaces(row.replace("vnet3", "-")) == []


# Who uses libvirt


def test_users_of_libvirt_come_once_and_dead_runs_go(tmp_path: Path) -> None:
    live, dead, mine = (tmp_path / name for name in ("live", "dead", "mine"))
    live.mkdir()
    (live / "lab.json").touch()
    users = libvirt.with_user(libvirt.with_user([str(live), str(dead)], mine), mine)
    assert users == (str(live), str(dead), str(mine))
    assert libvirt.without_user(users, mine) == (str(live),)


def test_usage_survives_its_file() -> None:
    usage = libvirt.Usage(users=("/a", "/b"), daemon=identify(1))
    assert libvirt.Usage.from_json(json.loads(json.dumps(usage.to_json()))) == usage
    assert libvirt.Usage.from_json(libvirt.Usage().to_json()) == libvirt.Usage()


# KVM


def says(text: str, *, seconds: float = 0) -> list[str]:
    return [sys.executable, "-c", f"import time; print({text!r}, flush=True); time.sleep({seconds})"]


def test_a_kernel_that_reaches_its_panic_boots() -> None:
    assert libvirt.kernel_boots(says("[ 1.0] Kernel panic - not syncing: VFS"), wait=20)


@pytest.mark.parametrize("command", [says("Linux version 6"), ["/nonexistent/qemu"]])
def test_a_kernel_that_ends_otherwise_does_not(command: list[str]) -> None:
    assert not libvirt.kernel_boots(command, wait=20)


def test_a_kernel_that_hangs_is_given_up_and_ended() -> None:
    start = time.monotonic()
    assert not libvirt.kernel_boots(says("Booting", seconds=60), wait=1)
    assert time.monotonic() - start < 20


def test_driver_is_tried_once_a_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def boots(command: object) -> bool:
        tried.append(command)
        return True

    monkeypatch.delenv("QUIETPORT_VM_DRIVER", raising=False)
    monkeypatch.setattr(libvirt.os, "access", lambda *_: True)
    monkeypatch.setattr(libvirt, "kernel_boots", boots)
    first, second = (tmp_path / name / "vmlinuz" for name in ("box-1", "box-2"))
    assert [libvirt.driver(first) for _ in range(3)] == ["kvm"] * 3
    assert len(tried) == 1
    assert [libvirt.driver(kernel) for kernel in (second, first, second)] == ["kvm"] * 3
    assert len(tried) == 2
    (tmp_path / "box-1/kvm.json").write_text(json.dumps({"boot": f"not {boot_id()}", "driver": "qemu"}))
    assert libvirt.driver(first) == "kvm"
    assert len(tried) == 3


def test_driver_where_kvm_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIETPORT_VM_DRIVER", raising=False)
    monkeypatch.setattr(libvirt.os, "access", lambda *_: False)
    assert libvirt.driver(tmp_path / "vmlinuz") == "qemu"


def test_driver_named_by_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirt.os, "access", lambda *_: False)
    monkeypatch.setenv("QUIETPORT_VM_DRIVER", "kvm")
    assert libvirt.driver(tmp_path / "vmlinuz") == "kvm"
    monkeypatch.setenv("QUIETPORT_VM_DRIVER", "xen")
    with pytest.raises(LabError, match=r"'xen'.*kvm or qemu"):
        libvirt.driver(tmp_path / "vmlinuz")


# The target, and Vagrant's environment


def test_target_has_the_addresses_that_are_reserved(target: Target) -> None:
    assert target.name == "v13"
    assert (target.public_ip, target.public_ip6) == ("10.213.7.13", "fd71:7069:6574:7::13")
    assert (target.peer_ip, target.peer_ip6) == ("10.213.7.113", "fd71:7069:6574:7::113")
    assert libvirt.mac("tag", vm.number_of("trixie")).endswith(f":{13:02x}")


def test_two_runs_share_nothing(tmp_path: Path, run_: Run) -> None:
    other = Run("try", root=tmp_path / "elsewhere")
    other.create()
    (other.keys / "operator").write_text("not a key\n")
    first, second = (
        vm.vagrant_env(one, replace(SUBNET, bridge=f"qpv-{one.tag}"), driver="qemu", boxes={})
        for one in (run_, other)
    )
    differ = {key for key in first if first[key] != second[key]}
    assert {
        "QUIETPORT_VM_DIRECTORY",
        "QUIETPORT_VM_KEY",
        "QUIETPORT_VM_MAC_PREFIX",
        "QUIETPORT_VM_NETWORK",
        "QUIETPORT_VM_POOL",
        "QUIETPORT_VM_PREFIX",
        "VAGRANT_DOTFILE_PATH",
    } <= differ


def test_vagrant_keeps_off_the_users_own(run_: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIETPORT_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VAGRANT_HOME", str(tmp_path / "mine"))
    env = vm.vagrant_env(run_, SUBNET, driver="qemu", boxes={"trixie": "quietport-box-trixie-1"})
    assert env["VAGRANT_HOME"] == str(tmp_path / "cache/vagrant")
    assert Path(env["VAGRANT_DOTFILE_PATH"]).is_relative_to(run_.directory)
    assert env["VAGRANT_CHECKPOINT_DISABLE"] == "1"
    assert env["QUIETPORT_VM_BOX_TRIXIE"] == "quietport-box-trixie-1"


def test_vagrantfile_reads_what_the_lab_sets(run_: Run) -> None:
    boxes = dict.fromkeys(vm.NAMES, "box")
    sets = {key for key in vm.vagrant_env(run_, SUBNET, driver="qemu", boxes=boxes) if "_VM_" in key}
    text = VAGRANTFILE.read_text()
    reads = {f"QUIETPORT_VM_{name}" for name in re.findall(r'setting\("([A-Z_]+)"', text)}
    assert 'setting("BOX_#{distro.upcase}"' in text
    reads |= {f"QUIETPORT_VM_BOX_{distro.upper()}" for distro in vm.NAMES}
    # What only a person sets.
    assert reads - sets == {"QUIETPORT_VM_MEMORY", "QUIETPORT_VM_CPUS"}
    assert sets <= reads


def test_vagrantfile_and_lab_agree_on_numbers() -> None:
    pairs = dict(re.findall(r'"(\w+)" => (\d+)', VAGRANTFILE.read_text()))
    assert pairs == {distro: str(vm.number_of(distro)) for distro in vm.NAMES}


def test_furnishing_is_a_script_that_routes_the_labs_networks_alone(target: Target) -> None:
    script = vm.furnishing(target, SUBNET)
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
    found = re.findall(r"route replace (\S+) via (\S+)", script)
    assert set(found) == {("fd71:7069:6574::/48", "fd71:7069:6574:7::1")}
    routed = ipaddress.ip_network(found[0][0])
    assert all(ipaddress.ip_network(IPV6_POOL.format(n)).subnet_of(routed) for n in (1, 254))
    assert "default" not in script


# The guest agent


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_an_answer_of_the_agent_is_read() -> None:
    status = {"exited": True, "exitcode": 3, "out-data": b64(b"a\xff"), "err-data": b64(b"e")}
    done = vm.finished(["x"], status)
    assert (done.returncode, done.stdout, done.stderr) == (3, "a\ufffd", "e")
    assert vm.finished(["x"], {"exited": True, "signal": 9}).returncode == -9


class Agent:
    """Answers as virsh qemu-agent-command does, and remembers what was asked."""

    def __init__(self, *status: dict[str, Any]) -> None:
        self.status = list(status)
        self.asked: list[dict[str, Any]] = []

    def __call__(self, *words: str, timeout: float = 60) -> str:
        request = json.loads(words[-1])
        self.asked.append(request)
        if request["execute"] == "guest-exec":
            return json.dumps({"return": {"pid": 7}})
        answer = self.status[0] if len(self.status) == 1 else self.status.pop(0)
        return json.dumps({"return": answer})


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Agent]:
    def install(*status: dict[str, Any]) -> Agent:
        made = Agent(*status)
        monkeypatch.setattr(libvirt, "virsh", made)
        return made

    return install


def test_execute_waits_and_hands_input_over(target: Target, agent: Callable[..., Agent]) -> None:
    asked = agent({"exited": False}, {"exited": True, "exitcode": 0, "out-data": b64(b"hi\n")}).asked
    assert vm.execute(target, ["cat", "-"], input="h\u00e4").stdout == "hi\n"
    first = asked[0]["arguments"]
    assert (first["path"], first["arg"]) == ("cat", ["-"])
    assert base64.b64decode(first["input-data"]).decode() == "h\u00e4"
    assert [request["execute"] for request in asked[1:]] == ["guest-exec-status"] * 2


def test_execute_fails_when_the_command_does(target: Target, agent: Callable[..., Agent]) -> None:
    agent({"exited": True, "exitcode": 4, "err-data": b64(b"no such thing\n")})
    with pytest.raises(LabError, match="v13: false: exit code 4: no such thing"):
        vm.execute(target, ["false"])
    assert vm.execute(target, ["false"], check=False).returncode == 4


def test_execute_gives_up_in_time(target: Target, agent: Callable[..., Agent]) -> None:
    agent({"exited": False})
    fast = replace(target, detail={**target.detail, "driver": "kvm"})
    with pytest.raises(LabError, match=r"v13: sleep 9: still not done after 0\.1 s"):
        vm.execute(fast, ["sleep", "9"], timeout=0.1)
    slow = replace(target, detail={**target.detail, "driver": "qemu"})
    with pytest.raises(LabError, match=r"v13: sleep 9: still not done after 0\.5 s"):
        vm.execute(slow, ["sleep", "9"], timeout=0.1)


def test_execute_refuses_input_that_does_not_fit(target: Target, agent: Callable[..., Agent]) -> None:
    agent({"exited": True, "exitcode": 0})
    vm.execute(target, ["cat"], input="x" * vm.CHUNK)
    with pytest.raises(LabError, match="bytes of input"):
        vm.execute(target, ["cat"], input="x" * (vm.CHUNK + 1))


def test_a_request_of_the_largest_size_is_one_word_of_a_command_line() -> None:
    request = json.dumps({"execute": "guest-file-write", "arguments": {"buf-b64": b64(b"x" * vm.CHUNK)}})
    assert subprocess.run(["true", request], check=False).returncode == 0


def test_a_dead_agent_is_named_without_the_request(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def virsh(*words: str, timeout: float = 60) -> str:
        raise LabError(f"virsh {' '.join(words)}: exit code 1: error: Guest agent is not responding")

    monkeypatch.setattr(libvirt, "virsh", virsh)
    with pytest.raises(LabError, match="v13: the guest agent, asked for guest-exec: Guest") as seen:
        vm.execute(target, ["cat", "/a/long/story"])
    assert "story" not in str(seen.value)


# The box


def test_recipe_changes_with_all_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    first = box.recipe_key("trixie", "2026-01")
    assert first == box.recipe_key("trixie", "2026-01")
    keys = {first, box.recipe_key("bookworm", "2026-01"), box.recipe_key("trixie", "2026-02")}
    monkeypatch.setitem(box.FILES, "etc/fstab", "other\n")
    keys.add(box.recipe_key("trixie", "2026-01"))
    monkeypatch.setattr(box, "PACKAGES", (*box.PACKAGES, "htop"))
    keys.add(box.recipe_key("trixie", "2026-01"))
    assert len(keys) == 5


def test_box_holds_nobodys_key() -> None:
    texts = "\n".join([*box.FILES.values(), box.BOX_VAGRANTFILE])
    assert "authorized_keys" not in " ".join(box.FILES)
    assert not re.search(r"ssh-(rsa|ed25519) AAAA|PRIVATE KEY", texts)
    assert "ssh-keygen -A" in texts


def test_box_is_unknown_for_other_distributions(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"'sid'.*trixie"):
        box.build("sid", cache=tmp_path)


def test_box_has_what_vagrant_reads(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    for name in ("disk", "vmlinuz", "initrd.img"):
        (tmp_path / name).write_text(name)
    box._pack(tmp_path, image=image)
    with tarfile.open(tmp_path / "quietport.box") as packed:
        names = set(packed.getnames())
        metadata = packed.extractfile("metadata.json")
        assert metadata is not None
        assert json.load(metadata) == {"provider": "libvirt", "format": "qcow2", "virtual_size": box.DISK_GIB}
    assert names == {"box.img", "metadata.json", "Vagrantfile", "vmlinuz", "initrd.img"}


def test_bootstrap_names_no_mirror(tmp_path: Path) -> None:
    assert "://" not in " ".join(box.bootstrap_command("trixie", tmp_path))


def test_ipv4_pool_has_the_network_of_vms_by_hand() -> None:
    (by_hand,) = re.findall(r'setting\("SUBNET", "([^"]+)"\)', VAGRANTFILE.read_text())
    taken_by_runs = {IPV4_POOL.format(number) for number in range(1, 255)}
    assert by_hand not in taken_by_runs


def test_what_libvirt_leaves_in_a_table_goes_and_nothing_else() -> None:
    listing = """-P INPUT ACCEPT
-N LIBVIRT_INP
-N MINE
-A INPUT -j LIBVIRT_INP
-A INPUT -s 192.0.2.1/32 -m comment --comment "not -j LIBVIRT_INP" -j MINE
-A LIBVIRT_INP -i virbr0 -j ACCEPT
"""
    assert libvirt.chain_removal(listing) == [
        ["-D", "INPUT", "-j", "LIBVIRT_INP"],
        ["-F", "LIBVIRT_INP"],
        ["-X", "LIBVIRT_INP"],
    ]
