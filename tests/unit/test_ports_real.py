"""What real ss programs printed is read whole, in each of its forms."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quietport.cli import main
from quietport.ports import classify, judge
from quietport.ss import Listener, parse_ss

ROOT = Path(__file__).parents[2]
OUTPUTS = Path(__file__).parent / "ss_outputs"
FILES = sorted(OUTPUTS.glob("*.txt"))
HARD = "hard_names_and_addresses.txt"

# port, protocol, address, zone, exposure by ranges, name of the processes, how many
MADE = [
    (1001, "tcp", "0.0.0.0", "", "public", "plain", 1),
    (1002, "tcp", "::", "", "public", "plain", 1),
    (1003, "tcp", "*", "", "public", "plain", 1),
    (1004, "tcp", "127.0.0.1", "", "loopback", "plain", 1),
    (1005, "tcp", "::1", "", "loopback", "plain", 1),
    (1006, "tcp", "::ffff:127.0.0.1", "", "loopback", "mapped", 1),
    (1007, "tcp", "::ffff:203.0.113.5", "", "public", "mapped", 1),
    (1008, "udp", "0.0.0.0", "tailscale0", "tailnet", "bound", 1),
    (1009, "udp", "127.0.0.53", "lo", "loopback", "bound", 1),
    (1010, "udp", "::", "eth0", "public", "bound", 1),
    (1011, "tcp", "fe80::5", "eth0", "public", "bound", 1),
    (1012, "tcp", "100.64.0.7", "", "tailnet", "tailnet", 1),
    (1013, "tcp", "fd7a:115c:a1e0::7", "", "tailnet", "tailnet", 1),
    (1014, "tcp", "203.0.113.5", "", "public", "workers", 3),
    (1015, "tcp", "0.0.0.0", "", "public", 'q"uote', 1),
    (1016, "tcp", "0.0.0.0", "", "public", "a space", 1),
    (1017, "tcp", "0.0.0.0", "", "public", "new\nline", 1),
    # It called itself `",pid=1,fd=3),(`; this ss ends a name at the first parenthesis.
    (1018, "tcp", "0.0.0.0", "", "public", '",pid=1,fd=3', 1),
    (1019, "tcp", "0.0.0.0", "", "public", "\ufffd\ufffd", 1),
    (1020, "udp", "0.0.0.0", "", "public", "(paren", 1),
    (1021, "udp", "0.0.0.0", "", "public", "\x1b[31mred", 1),
]


def read(name: str) -> list[Listener]:
    return parse_ss((OUTPUTS / name).read_bytes().decode(errors="replace"))


def test_every_socket_that_was_made_is_found() -> None:
    found = [
        (
            *(listener.port, listener.protocol, listener.address, listener.zone, classify(listener, None)),
            *({process.name for process in listener.processes}, len(listener.processes)),
        )
        for listener in read(HARD)
    ]
    assert sorted(found) == [(*row[:5], {row[5]}, row[6]) for row in MADE]


@pytest.mark.parametrize("name", ["no_header.txt", "terminal_of_60_columns.txt"])
def test_the_same_sockets_in_another_form(name: str) -> None:
    """A terminal makes two characters of each newline, also of one in a name."""
    text = (OUTPUTS / name).read_bytes().decode(errors="replace")
    found = parse_ss(text)
    assert ("\r\n" in text) == (name != "no_header.txt")
    assert parse_ss(text.replace("\r\n", "\n")) == read(HARD)
    assert [one.port for one in found] == [one.port for one in read(HARD)]


def test_without_netid_there_are_the_tcp_sockets() -> None:
    assert read("tcp_alone.txt") == [one for one in read(HARD) if one.protocol == "tcp"]


def test_who_is_not_root_sees_the_sockets_and_no_process() -> None:
    assert [(one.protocol, one.address, one.port, one.processes) for one in read("not_root.txt")] == [
        (one.protocol, one.address, one.port, ()) for one in read(HARD)
    ]
    public = [judge(one, None) for one in read("not_root.txt") if classify(one, None) == "public"]
    assert {entry.verdict for entry in public} == {"violation"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_host_has_something_to_say_and_no_socket_is_lost(file: Path) -> None:
    data = file.read_bytes()
    assert main(["ports", "--from-ss", str(file)]) == 1
    # A row has one word for its state; names of processes here do not contain these.
    assert len(read(file.name)) == data.count(b"LISTEN ") + data.count(b"UNCONN ")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_line_that_is_not_understood_is_not_passed_over(file: Path, tmp_path: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    other = tmp_path / "ss.txt"
    other.write_bytes(b"".join([*lines[:2], b"garbage\n", *lines[2:]]))
    assert main(["ports", "--from-ss", str(other)]) == 3


PAGE = ROOT / "docs/ports.md"
# What each command of the page ends with, by its words; what it asks of the machine itself may be either.
ENDS = {
    "python3 -m quietport ports --from-ss tests/unit/ss_outputs/debian_13_blank.txt": {1},
    "python3 -m quietport ports --from-ss - --json < tests/unit/ss_outputs/hard_names_and_addresses.txt": {1},
    "ss -lntup | python3 -m quietport ports --from-ss -": {0, 1},
    "head -n 1 tests/unit/ss_outputs/debian_13_blank.txt | python3 -m quietport ports --from-ss -": {0},
    "python3 -m quietport ports --from-ss /dev/null": {3},
}


def test_the_pages_commands_are_those_that_are_run() -> None:
    lines = PAGE.read_text().splitlines()
    assert {line for line in lines if "--from-ss" in line and not line.startswith("#")} == set(ENDS)


@pytest.mark.parametrize(("command", "codes"), ENDS.items(), ids=range(len(ENDS)))
def test_each_command_of_the_page_does_what_it_says(command: str, codes: set[int]) -> None:
    if command.startswith("ss ") and shutil.which("ss") is None:
        pytest.skip("no ss on this machine")
    python = f"{sys.executable} -m"
    done = subprocess.run(
        ["/bin/sh", "-c", command.replace("python3 -m", python)], capture_output=True, cwd=ROOT, check=False
    )
    assert done.returncode in codes
    assert (done.returncode == 3) == (b"quietport ports: " in done.stderr)
