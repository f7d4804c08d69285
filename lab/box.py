"""The Vagrant box of the lab's VM target, made from nothing but Debian packages.

It is what a provider hands over: root by key, sshd on every address, IPv4 by DHCP, python3, sudo, the guest
agent, and nothing else. No key of anybody is in it: the operator's
public key arrives as a systemd credential, and host keys are made at the first boot.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from lab import libvirt
from lab.cache import cached, digest
from lab.images import DISTROS
from lab.images import PACKAGES as BLANK_HOST
from lab.process import LabError, run, step
from lab.state import cache_root, locked, write

DISK_GIB = 10

# What a blank host has in any form, and what only a machine of its own needs. minbase leaves out what is not
# essential, `mount` and `udev` among it. The guest agent is in providers' images as well; the lab asks it
# when the host lets nobody in. libcap2-bin gives ping its capability instead of a set-uid bit.
PACKAGES = (
    *BLANK_HOST,
    "e2fsprogs",
    "ifupdown",
    "isc-dhcp-client",
    "libcap2-bin",
    "linux-image-cloud-amd64",
    "mount",
    "qemu-guest-agent",
    "udev",
)

COMMAND_LINE = "root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off"

INTERFACES = """\
auto lo
iface lo inet loopback

auto eth0
iface eth0 inet dhcp

source /etc/network/interfaces.d/*
"""

HOSTS = """\
127.0.0.1 localhost
::1 localhost ip6-localhost ip6-loopback
"""

# Every login would start a user manager and end it soon after, which an emulated machine does for seconds.
LOGIND = """\
[Login]
UserStopDelaySec=15min
"""

FSTAB = "/dev/vda / ext4 errors=remount-ro 0 1\n"

# Debian makes host keys when openssh-server is installed; a box that kept them would give all hosts the same.
HOST_KEYS_UNIT = """\
[Unit]
Description=Make the host keys of sshd at the first boot
Before=ssh.service ssh.socket
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A

[Install]
WantedBy=multi-user.target
"""
HOST_KEYS_NAME = "ssh-host-keys.service"

FILES = {
    "etc/network/interfaces": INTERFACES,
    "etc/hosts": HOSTS,
    "etc/fstab": FSTAB,
    "etc/systemd/logind.conf.d/lab.conf": LOGIND,
    "etc/hostname": "debian\n",
    # Empty, not absent: each host makes its own, and the boot is not taken for a first-boot dialogue.
    "etc/machine-id": "",
    f"etc/systemd/system/{HOST_KEYS_NAME}": HOST_KEYS_UNIT,
}

# QEMU 7.2 keeps what it translated by virtual address: with ASLR every process of a guest has libc and all
# else translated anew, which costs a quarter of all that an emulated machine does (measured).
EMULATED_COMMAND_LINE = f"{COMMAND_LINE} norandmaps"

BOX_VAGRANTFILE = f"""\
Vagrant.configure("2") do |config|
  config.vm.provider :libvirt do |lv|
    lv.kernel = File.expand_path("vmlinuz", __dir__)
    lv.initrd = File.expand_path("initrd.img", __dir__)
    kvm = ENV["QUIETPORT_VM_DRIVER"] == "kvm"
    lv.cmd_line = kvm ? "{COMMAND_LINE}" : "{EMULATED_COMMAND_LINE}"
  end
end
"""


@dataclass(frozen=True)
class Box:
    """A finished box in the lab's cache."""

    directory: Path

    @property
    def name(self) -> str:
        """What Vagrant knows it by; it carries the recipe's hash, so a changed recipe is another box."""
        return f"quietport-{self.directory.name}"

    @property
    def file(self) -> Path:
        """The file `vagrant box add` takes."""
        return self.directory / "quietport.box"

    @property
    def kernel(self) -> Path:
        """The kernel inside the box, for a boot without a boot loader."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The initial RAM disk that belongs to the kernel."""
        return self.directory / "initrd.img"


def recipe_key(distro: str, month: str) -> str:
    """A digest that changes with the recipe, and with the month so that boxes do not grow stale."""
    return digest(distro, month, json.dumps([DISK_GIB, PACKAGES, FILES, BOX_VAGRANTFILE]))


def build(distro: str, *, cache: Path | None = None) -> Box:
    """The box of `distro`, built if the cache has none (about half a minute).

    Raises LabError for a distribution without a recipe, when a program fails, or when this is not root.
    """
    if distro not in DISTROS:
        raise LabError(f"There is no box of {distro!r}.", hint=f"There are: {', '.join(DISTROS)}.")
    cache = cache or cache_root()
    key = recipe_key(distro, datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m"))
    box = Box(cached(cache, f"box-{distro}", key, lambda work: _build(distro, work)))
    _point_at(box, cache / f"box-{distro}.name")
    return box


def hand_key(cache: Path) -> Path:
    """The private key of VMs that are started by hand, without a lab run; made at the first call."""
    key = cache / "box-key"
    with locked(cache / ".box-key.lock"):
        if not key.is_file():
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "quietport-box", "-f", key])
    return key


def _build(distro: str, work: Path) -> None:
    if os.geteuid() != 0:
        raise LabError("Making the VM's box needs root.", hint="Run it with sudo, or use containers.")
    root, log = work / "root", work / "build.log"
    with step(f"box {distro}: packages"):
        run(bootstrap_command(distro, root), log=log, timeout=900)
    for path, text in FILES.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_text(text)
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    run(["systemctl", f"--root={root}", "enable", HOST_KEYS_NAME])
    _boot_files(root, work)
    with step(f"box {distro}: disk"):
        raw, image = work / "disk.raw", work / "box.img"
        # -d fills the file system while it is made: no loop device, no mount.
        size = f"{DISK_GIB}G"
        run(["mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", root, raw, size], log=log, timeout=300)
        zstd = ("-o", "compression_type=zstd")
        run(["qemu-img", "convert", "-c", *zstd, "-O", "qcow2", raw, image], log=log, timeout=300)
        _pack(work, image=image)
    raw.unlink()
    image.unlink()
    shutil.rmtree(root)


def bootstrap_command(distro: str, root: Path) -> list[str]:
    """The command that unpacks the packages below `root`. No mirror is named: the distribution has one."""
    return ["mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", distro, str(root)]


def _boot_files(root: Path, into: Path) -> None:
    for pattern, name in (("boot/vmlinuz-*", "vmlinuz"), ("boot/initrd.img-*", "initrd.img")):
        found = list(root.glob(pattern))
        if len(found) != 1:
            raise LabError(f"The box has {len(found)} files {pattern}, and one is wanted.")
        shutil.copy(found[0], into / name)


def _pack(done: Path, *, image: Path) -> None:
    (done / "metadata.json").write_text(
        json.dumps({"provider": "libvirt", "format": "qcow2", "virtual_size": DISK_GIB})
    )
    (done / "Vagrantfile").write_text(BOX_VAGRANTFILE)
    with tarfile.open(done / "quietport.box", "w") as box:
        box.add(image, "box.img")
        for name in ("metadata.json", "Vagrantfile", "vmlinuz", "initrd.img"):
            box.add(done / name, name)


def _point_at(box: Box, pointer: Path) -> None:
    """Tell the Vagrantfile which box is the newest one, for those who type `vagrant up` by hand."""
    if not pointer.is_file() or pointer.read_text().strip() != box.name:
        write(pointer, box.name + "\n")


def main(argv: list[str] | None = None) -> int:
    """`python -m lab.box [DISTRO ...]`: make what `vagrant up` by hand needs, and say where the boxes are."""
    for distro in (sys.argv[1:] if argv is None else argv) or ["trixie"]:
        try:
            hand_key(cache_root())
            box = build(distro)
            libvirt.driver(box.kernel)
            print(box.file)
        except LabError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
