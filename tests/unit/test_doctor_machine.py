"""The doctor's look at disks, the clock and a reboot that is due."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietport.commands import Done
from quietport.doctor import machine
from quietport.doctor.machine import Room, clock, disk, max_error, percent, reboot
from quietport.doctor.model import CutShortError, Finding
from quietport.doctor.place import LATEST
from quietport.errors import HostProgramError
from tests.unit.doctor_place import DECLARED, NOW, World, commands, only, statuses

MIB = 1 << 20


def room(used: float, *, inodes: float = 10, reserved: int = 50, flag: int = 0) -> Any:
    """A file system of 1000 MiB of which programs can have 1000 - `reserved`, `used` % of that in use."""
    taken = round((1000 - reserved) * used / 100)
    inodes_used = round(1000 * inodes / 100)
    return SimpleNamespace(
        f_blocks=1000,
        f_bfree=1000 - taken,
        f_bavail=1000 - reserved - taken,
        f_frsize=MIB,
        f_files=1000,
        f_ffree=1000 - inodes_used,
        f_favail=1000 - inodes_used,
        f_flag=flag,
    )


def looked(world: World, status: Any) -> list[Finding]:
    def look(path: Path) -> Any:
        return status

    return disk(DECLARED, place=world.place, look=look)


# --- disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "status"), [(0, "PASS"), (84, "PASS"), (86, "WARN"), (94, "WARN"), (96, "FAIL"), (100, "FAIL")]
)
def test_how_full_a_disk_may_be(tmp_path: Path, used: int, status: str) -> None:
    found = only(looked(World(tmp_path), room(used)), status)
    assert f"{used} %" in found.reason


def test_what_is_kept_for_root_is_not_to_be_had(tmp_path: Path) -> None:
    """910 of 1000 blocks are 91 %, and 96 % where 50 blocks are root's, as df says."""
    only(looked(World(tmp_path), room(910 / 9.5, reserved=50)), "FAIL")
    only(looked(World(tmp_path), room(91, reserved=0)), "WARN")


@pytest.mark.parametrize(("inodes", "status"), [(84, "PASS"), (85, "WARN"), (95, "FAIL")])
def test_inodes_run_out_too(tmp_path: Path, inodes: int, status: str) -> None:
    only(looked(World(tmp_path), room(10, inodes=inodes)), status)


def test_a_file_system_without_inodes_of_its_own_does_not_run_out_of_them(tmp_path: Path) -> None:
    none = room(10)
    none.f_files = none.f_ffree = none.f_favail = 0
    only(looked(World(tmp_path), none), "PASS")


def test_the_timer_s_unit_has_everything_read_only_and_sees_as_much(tmp_path: Path) -> None:
    """ProtectSystem=strict (systemd.exec(5)): that a mount is read only says nothing of the disk."""
    only(looked(World(tmp_path), room(99, flag=os.ST_RDONLY)), "FAIL")


def test_one_file_system_is_told_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    for path in machine.PLACES:
        (tmp_path / path.lstrip("/")).mkdir(exist_ok=True, parents=True)
    only(looked(world, room(99)), "FAIL")


def test_where_docker_keeps_its_data_is_looked_at(tmp_path: Path) -> None:
    world = World(tmp_path)
    asked: list[Path] = []

    def look(path: Path) -> Any:
        asked.append(path)
        raise OSError

    for config, place in (
        ("", "var/lib/docker"),
        ('{"data-root": "/srv/docker"}', "srv/docker"),
        ("[", "var/lib/docker"),
    ):
        world.write("/etc/docker/daemon.json", config)
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        asked.clear()
        disk(DECLARED, place=world.place, look=look)
        assert asked[-1] == tmp_path / place


def big(world: World, path: str, size: int) -> None:
    """A file that takes `size` bytes of the disk."""
    file = world.write(path)
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, size)


def test_the_next_step_is_what_frees_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "JOURNAL_KEPT", MIB)
    world = World(tmp_path)
    small = room(99)
    small.f_frsize = 1 << 10
    assert commands(only(looked(world, small), "FAIL"))[0].startswith("du -xh")
    big(world, f"{machine.JOURNAL}/0/system.journal", 2 * MIB)
    assert commands(only(looked(world, small), "FAIL")) == ["journalctl --vacuum-size=1M"]
    big(world, f"{machine.ARCHIVES}/a.deb", MIB)
    assert commands(only(looked(world, small), "FAIL")) == ["apt-get clean"]
    large = room(99)
    assert commands(only(looked(world, large), "FAIL"))[0].startswith("du -xh"), "too little to matter"


@given(st.tuples(*[st.integers(0, 1 << 50)] * 6), st.integers(1, 1 << 20))
def test_numbers_of_any_file_system_are_a_percentage(numbers: tuple[int, ...], size: int) -> None:
    blocks, free, available, files, files_free, files_available = numbers
    status = SimpleNamespace(
        f_blocks=blocks,
        f_bfree=min(free, blocks),
        f_bavail=min(available, free, blocks),
        f_files=files,
        f_ffree=min(files_free, files),
        f_favail=min(files_available, files_free, files),
        f_frsize=size,
    )
    found = Room.of(status)  # type: ignore[arg-type]
    assert 0 <= percent(found.used, found.total) <= 100
    assert 0 <= percent(found.inodes_used, found.inodes) <= 100


def test_a_real_file_system_is_as_df_says() -> None:
    found = Room.of(os.statvfs("/"))
    done = subprocess.run(["df", "--output=pcent", "/"], capture_output=True, text=True, check=True)
    assert abs(percent(found.used, found.total) - int(done.stdout.split()[-1].rstrip("%"))) <= 1


# --- clock --------------------------------------------------------------------------------------------

IN_A_CONTAINER = "/run/systemd/container"
TIMEDATECTL = "timedatectl"


def at(seconds: float) -> str:
    return json.dumps({"schema": 1, "at": datetime.fromtimestamp(NOW + seconds, UTC).isoformat()})


def timed(world: World, error: int | None = 1000) -> list[Finding]:
    return clock(DECLARED, place=world.place, error=lambda: error)


def test_a_clock_that_somebody_sets(tmp_path: Path) -> None:
    only(timed(World(tmp_path)), "PASS")


@pytest.mark.parametrize(
    ("installed", "typed"),
    [
        ("", "apt-get install -y systemd-timesyncd"),
        ("/usr/lib/systemd/systemd-timesyncd", "systemctl enable systemd-timesyncd.service"),
        ("/usr/sbin/chronyd", "systemctl enable chrony.service"),
    ],
)
def test_a_clock_that_nobody_sets(tmp_path: Path, installed: str, typed: str) -> None:
    world = World(tmp_path)
    if installed:
        world.write(installed)
    assert commands(only(timed(world, 16_000_000), "WARN"))[0] == typed


@pytest.mark.parametrize(("said", "status"), [("yes\n", "PASS"), ("no\n", "WARN")])
def test_where_the_kernel_may_not_be_asked_systemd_is(tmp_path: Path, said: str, status: str) -> None:
    only(timed(World(tmp_path, answers={TIMEDATECTL: Done(0, said, "")}), None), status)


@pytest.mark.parametrize("done", [Done(1, "", "no bus"), Done(0, "", ""), Done(0, "maybe\n", "")])
def test_an_answer_of_systemd_that_is_none(tmp_path: Path, done: Done) -> None:
    with pytest.raises(HostProgramError):
        timed(World(tmp_path, answers={TIMEDATECTL: done}), None)


def test_the_kernel_is_asked_and_changes_nothing() -> None:
    found = max_error()
    assert found is None or found >= 0


@pytest.mark.parametrize(
    ("ahead", "status"), [(-60, "PASS"), (0, "PASS"), (299, "PASS"), (301, "FAIL"), (86400, "FAIL")]
)
def test_a_clock_that_is_before_what_it_wrote_down(tmp_path: Path, ahead: float, status: str) -> None:
    world = World(tmp_path)
    world.write(LATEST, at(ahead))
    found = only(timed(world), status)
    if status == "FAIL":
        assert commands(found) == ["systemctl start quietport-doctor.service"]
        assert commands(only(timed(world, 16_000_000), "FAIL"))[0].startswith("apt-get install")


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 1, "at": "soon"}', '{"schema": 1}', "[]"])
def test_a_last_result_that_says_no_time_is_none(tmp_path: Path, text: str) -> None:
    world = World(tmp_path)
    world.write(LATEST, text)
    only(timed(world), "PASS")


def test_a_container_has_no_clock_of_its_own(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write(IN_A_CONTAINER, "docker\n")
    only(timed(world, 16_000_000), "SKIP")
    world.write(LATEST, at(86400))
    assert commands(only(timed(world, 16_000_000), "FAIL")) == ["systemctl start quietport-doctor.service"]


def test_a_clock_that_jumped_is_told_also_when_nobody_says_who_sets_it(tmp_path: Path) -> None:
    world = World(tmp_path, answers={TIMEDATECTL: Done(1, "", "no bus")})
    world.write(LATEST, at(3600))
    with pytest.raises(CutShortError, match="no bus") as caught:
        timed(world, error=None)
    found = only(caught.value.found, "FAIL")
    assert "60 min from now" in found.reason
    assert len(commands(found)) > 1, "it may have to be set first"


# --- reboot -------------------------------------------------------------------------------------------


def due(world: World, *, days: float, packages: str = "") -> None:
    file = world.write(machine.REBOOT_DUE, "*** System restart required ***\n")
    os.utime(file, (NOW - days * 86400, NOW - days * 86400))
    if packages:
        world.write(f"{machine.REBOOT_DUE}.pkgs", packages)


@pytest.fixture
def booted(tmp_path: Path) -> Callable[[float], World]:
    def make(btime: float) -> World:
        world = World(tmp_path)
        world.write("/proc/stat", f"cpu 1 2\nbtime {int(btime)}\nprocesses 3\n")
        return world

    return make


def test_no_reboot_is_due(booted: Callable[[float], World]) -> None:
    only(reboot(DECLARED, place=booted(NOW).place), "PASS")


@pytest.mark.parametrize(("days", "status"), [(0, "WARN"), (13, "WARN"), (15, "FAIL")])
def test_a_reboot_is_due(tmp_path: Path, days: float, status: str) -> None:
    world = World(tmp_path)
    due(world, days=days, packages="linux-image-6.1\nlibc6\nlibc6\n")
    found = only(reboot(DECLARED, place=world.place), status)
    assert found.reason.endswith("for linux-image-6.1, libc6.")
    assert commands(found) == ["systemctl reboot"]


def test_many_packages_are_cut_and_names_are_harmless(tmp_path: Path) -> None:
    world = World(tmp_path)
    due(world, days=1, packages="\x1b[31mred " + " ".join(f"p{number}" for number in range(20)))
    reason = only(reboot(DECLARED, place=world.place), "WARN").reason
    assert reason.isprintable() and reason.endswith("p3 and others.")


def test_a_kernel_that_was_installed_since_the_boot(booted: Callable[[float], World]) -> None:
    """The inode's time is that of today: the boot is before it, or after it."""
    before = booted(1)
    before.write("/boot/vmlinuz-6.1.0-28-amd64")
    before.write("/boot/initrd.img-6.1.0-28-amd64")
    found = reboot(DECLARED, place=before.place)
    assert statuses(found) in (["WARN"], ["FAIL"])
    assert found[0].reason.endswith("for vmlinuz-6.1.0-28-amd64.")
    only(reboot(DECLARED, place=booted(1 << 40).place), "PASS")
    before.write(IN_A_CONTAINER)
    only(reboot(DECLARED, place=booted(1).place), "PASS")


def test_a_host_that_does_not_say_when_it_booted_is_not_fine(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(HostProgramError):
        reboot(DECLARED, place=world.place)
    world.write("/proc/stat", "cpu 1\n")
    with pytest.raises(HostProgramError):
        reboot(DECLARED, place=world.place)
