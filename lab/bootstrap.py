"""What must be there before anything else: the project's environment, and the lab's programs.

    python3 -m lab.bootstrap venv
    python3 -m lab.bootstrap lab [--target vm]

Runs on a bare Debian 12 or 13 with git, make and python3: standard library only. As root on Debian or
Ubuntu it installs what is missing; otherwise one sentence says what to install.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.process import LabError, run, say, step, succeeds

PROJECT = Path(__file__).resolve().parent.parent
VENV = PROJECT / ".venv"
MINIMUM_PYTHON = (3, 11)
# The sbin directories are not on an ordinary user's PATH, and the lab's programs live there.
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
# apt's own lists are refreshed at most this often, in seconds.
LISTS_MAX_AGE = 6 * 3600


@dataclass(frozen=True)
class Program:
    """A program the lab runs, and the package it comes in."""

    name: str
    package: str
    why: str


LAB_PROGRAMS = (
    Program("docker", "docker-cli|docker.io", "container targets"),
    Program("dockerd", "docker.io", "container targets, where no Docker daemon runs"),
    Program("iptables", "iptables", "the lab's networks"),
    Program("ip", "iproute2", "the lab's networks and the public side"),
    Program("mmdebstrap", "mmdebstrap", "images of blank hosts"),
    Program("busybox", "busybox-static", "the image that tests run inside a target"),
    Program("ssh", "openssh-client", "logging in to targets"),
    Program("ssh-keygen", "openssh-client", "the run's keys"),
    Program("openssl", "openssl", "the lab's certificate authority"),
    Program("gpg", "gnupg", "the lab's signed package repositories"),
    Program("apt-ftparchive", "apt-utils", "the lab's package repositories"),
    Program("dpkg-deb", "dpkg", "the lab's package repositories"),
    Program("xz", "xz-utils", "the lab's package repositories"),
    Program("update-ca-certificates", "ca-certificates", "downloads"),
)
VM_PROGRAMS = (
    Program("vagrant", "vagrant", "VM targets"),
    Program("libvirtd", "libvirt-daemon-system", "VM targets"),
    Program("virsh", "libvirt-clients", "VM targets"),
    Program("dnsmasq", "dnsmasq-base", "the VMs' network"),
    Program("qemu-system-x86_64", "qemu-system-x86", "VM targets"),
    Program("qemu-img", "qemu-utils", "the VM box"),
    Program("mke2fs", "e2fsprogs", "the VM box"),
    Program("rsync", "rsync", "Vagrant"),
)
TEST_PROGRAMS = (
    Program("sshd", "openssh-server", "tests against a real sshd"),
    Program("sudo", "sudo", "tests of logins that are not root"),
    Program("strace", "strace", "tests that watch every program's arguments"),
    Program("unshare", "util-linux", "tests in network namespaces"),
    Program("pgrep", "procps", "tests that look for what was left running"),
)
# Tests need the program alone: a machine must not answer the network because someone ran tests on it.
SSH_UNITS = ("ssh.service", "ssh.socket")
# Without a program of their own on PATH, so dpkg is asked.
VM_PACKAGES = ("vagrant-libvirt", "libvirt-daemon-driver-qemu")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two parts; exit code 0 when it is all there, 1 with a sentence when not."""
    parser = argparse.ArgumentParser(prog="python3 -m lab.bootstrap", description=__doc__.split("\n\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("venv", help="the project's Python environment, from the lock")
    lab = parts.add_parser("lab", help="the programs the lab runs")
    lab.add_argument("--target", choices=("container", "vm"), default="container")
    lab.add_argument("--tests", action="store_true", help="also what the tests run")
    arguments = parser.parse_args(argv)
    try:
        if sys.version_info < MINIMUM_PYTHON:
            raise LabError(
                f"Python {sys.version.split()[0]} is too old.", hint="Install Python 3.11 or newer."
            )
        if arguments.part == "venv":
            ensure_venv()
        else:
            ensure_programs(vm=arguments.target == "vm", tests=arguments.tests)
    except LabError as error:
        say(f"error: {error}")
        return 1
    return 0


# The project's environment


def stamp(project: Path, names: Sequence[str] = ("requirements.lock",)) -> str:
    """What a part of the environment was made from: those files, the place, and Python's version."""
    parts = [(project / name).read_bytes() for name in names]
    parts.append(f"{sys.version_info[:2]} {project}".encode())
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def ensure_venv() -> None:
    """Make `.venv` from requirements.lock, and the project installed in it, where they are not so already.

    Raises LabError. Two that run at once wait for each other.
    """
    with (PROJECT / "pyproject.toml").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _ensure_venv()


def _ensure_venv() -> None:
    packages, project = VENV / ".quietport-stamp", VENV / ".quietport-project-stamp"
    pip: list[str | os.PathLike[str]] = [VENV / "bin/python", "-m", "pip", "--disable-pip-version-check"]
    pip += ["--quiet", "install"]
    wanted = stamp(PROJECT)
    if _read(packages) != wanted or not succeeds([VENV / "bin/python", "-c", "import pyinfra"]):
        need_ensurepip()
        with step("Python environment .venv from requirements.lock"):
            shutil.rmtree(VENV, ignore_errors=True)
            run([sys.executable, "-m", "venv", VENV], timeout=300)
            run([*pip, "--require-hashes", "-r", PROJECT / "requirements.lock"], timeout=1800)
        packages.write_text(wanted)
    # Apart from the packages: a change here must not take the environment away from those who use it.
    wanted = stamp(PROJECT, ("requirements.lock", "pyproject.toml"))
    if _read(project) != wanted:
        with step("the project itself, in .venv"):
            run([*pip, "--no-deps", "--no-build-isolation", "-e", PROJECT], timeout=600)
        project.write_text(wanted)


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def need_ensurepip() -> None:
    """Debian ships venv without the pip it needs. Raises LabError when it cannot be installed here."""
    if succeeds([sys.executable, "-c", "import ensurepip, venv"]):
        return
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    if not can_install():
        raise LabError("Python's venv module is missing.", hint=f"Install it: sudo apt-get install {package}")
    install([package])


# The lab's programs


def find(name: str) -> str | None:
    """Where a program is, looking in the sbin directories as well."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), *SBIN)))


def missing_programs(*, vm: bool, tests: bool = False) -> list[Program]:
    """The programs the lab, and with `tests` its tests, would run here and does not find."""
    wanted = LAB_PROGRAMS + (VM_PROGRAMS if vm else ()) + (TEST_PROGRAMS if tests else ())
    missing = [program for program in wanted if find(program.name) is None]
    # A daemon of the machine's own that answers makes ours unnecessary.
    if not vm and any(program.name == "dockerd" for program in missing) and docker_answers():
        missing = [program for program in missing if program.name != "dockerd"]
    if vm:
        missing += [Program(name, name, "VM targets") for name in VM_PACKAGES if not package_installed(name)]
    return missing


def docker_answers() -> bool:
    """Whether the docker program reaches a daemon."""
    return find("docker") is not None and succeeds(["docker", "version"], timeout=15)


def package_installed(name: str) -> bool:
    """Whether dpkg has that package installed."""
    if find("dpkg-query") is None:
        return False
    done = run(["dpkg-query", "-W", "-f", "${db:Status-Status}", name], check=False)
    return done.stdout.strip() == "installed"


def ensure_programs(*, vm: bool, tests: bool = False) -> None:
    """Install what the lab lacks here. Raises LabError with the command when that is not ours to do."""
    missing = missing_programs(vm=vm, tests=tests)
    if not missing:
        return
    names = sorted({program.package.split("|")[-1] for program in missing})
    if not can_install():
        raise LabError(
            f"The lab needs {', '.join(program.name for program in missing)} here.",
            hint=f"Install them, as root: apt-get install --no-install-recommends {' '.join(names)}",
        )
    update_lists()
    if any(program.name == "sshd" for program in missing):
        mask_ssh()
    install(resolve(missing))
    if still := missing_programs(vm=vm, tests=tests):
        raise LabError(f"Installed, and yet not found: {', '.join(program.name for program in still)}.")


def mask_ssh(units: Path = Path("/etc/systemd/system")) -> None:
    """Keep the sshd that is about to be installed from being started, now and at boot."""
    for unit in SSH_UNITS:
        with contextlib.suppress(FileExistsError):
            units.mkdir(parents=True, exist_ok=True)
            (units / unit).symlink_to("/dev/null")


def resolve(missing: Sequence[Program]) -> list[str]:
    """Package names for this release: of `a|b` all that it has (trixie split docker-cli from docker.io)."""
    names: set[str] = set()
    for program in missing:
        alternatives = program.package.split("|")
        known = [name for name in alternatives if succeeds(["apt-cache", "show", "--quiet", name])]
        names.update(known or alternatives[-1:])
    return sorted(names)


def can_install() -> bool:
    """Root on Debian or Ubuntu."""
    return os.geteuid() == 0 and find("apt-get") is not None and distribution() in ("debian", "ubuntu")


def distribution(text: str | None = None) -> str:
    """ID of os-release(5), `debian` when the distribution says it is like one, or an empty word."""
    if text is None:
        path = Path("/etc/os-release")
        text = path.read_text() if path.is_file() else ""
    fields = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', text, re.MULTILINE))
    name = fields.get("ID", "")
    return "debian" if name != "ubuntu" and "debian" in fields.get("ID_LIKE", "").split() else name


def update_lists() -> None:
    """Refresh apt's lists when they are old, or when there are none."""
    lists = [path.stat().st_mtime for path in Path("/var/lib/apt/lists").glob("*Packages*")]
    if lists and time.time() - max(lists) < LISTS_MAX_AGE:
        return
    with step("apt-get update"):
        # lists/lock is not covered by DPkg::Lock::Timeout, so this query-like change is asked for again.
        apt(["update"])


def install(packages: Sequence[str]) -> None:
    """Install packages without their recommendations. Raises LabError when apt fails."""
    with step(f"apt-get install {' '.join(packages)}"):
        if run(["apt-cache", "policy", *packages], check=False).stdout.count("Candidate:") < len(packages):
            apt(["update"])
        apt(["install", "-y", "--no-install-recommends", *packages])


def apt(arguments: Sequence[str]) -> None:
    """apt-get, quiet, without questions, waiting ten minutes for a lock that another one holds."""
    argv = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=600", *arguments]
    end = time.monotonic() + 600
    while True:
        done = run(argv, check=False, timeout=3600, env={"DEBIAN_FRONTEND": "noninteractive"})
        if done.returncode == 0:
            return
        locked = "Could not get lock" in done.stderr or "Unable to lock" in done.stderr
        if not locked or time.monotonic() > end:
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
            raise LabError(f"apt-get {' '.join(arguments)}: {said}")
        time.sleep(3)


if __name__ == "__main__":
    raise SystemExit(main())
