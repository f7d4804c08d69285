"""The rows of the table in the docs: stable from run to run, safe from several writers."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lab import record
from tests.lab.record import Row, normal, sentence_of


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("c13: refused: the auth key has expired.", "HOST: refused: the auth key has expired."),
        ("c12-no-include and v13, not c13x or abc13", "HOST and HOST, not c13x or abc13"),
        ("\x1b[31mc13\x1b[0m: \x1b]0;title\x07no", "HOST: no"),
        ("10.213.7.13 port 22, [fd71:7069:6574:7::13]:22", "ADDRESS port 22, [ADDRESS]:22"),
        ("at 100.64.0.2. Next", "at ADDRESS. Next"),
        ("10.213.7.13:2222, https://10.213.2.1:8443/x", "ADDRESS:2222, https://ADDRESS:8443/x"),
        ("to 10.213.7.250: No route to host", "to ADDRESS: No route to host"),
        (f"the fingerprint {'8E0C' * 10}, not {'0' * 40}.", "the fingerprint ID, not ID."),
        ("fd7a:115c:a1e0::1: refused", "ADDRESS: refused"),
        ("ListenAddress 0.0.0.0, ::, 127.0.0.1 and ::1", "ListenAddress 0.0.0.0, ::, 127.0.0.1 and ::1"),
        ("10.0.0.300 and 10.0.0.0/33 are wrong", "10.0.0.300 and ADDRESS/33 are wrong"),
        ("192.0.2.7 is for documentation", "192.0.2.7 is for documentation"),
        ("held since 2025-11-21 09:57:53 UTC (12.3 s)", "held since TIME (N s)"),
        ("valid until 2025-11-21T09:57:53.123+00:00", "valid until TIME"),
        ("at 09:57:53 after 90 seconds", "at TIME after N seconds"),
        ("package 0a1b2c3d4e5f wrong, decade fine, face fine", "package ID wrong, decade fine, face fine"),
        ("SHA256:abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG of c13", "SHA256:ID of HOST"),
        ("by process 4711 (apt), pid 12", "by process N (apt), pid N"),
        ("in /tmp/pytest-of-root/pytest-3/x/key.", "in TEMP."),
        ("/root/.local/state/quietport-lab/e2e-bad-12ab/key.toml: x", "LAB/key.toml: x"),
        ("run e2e-outer-faults-00ff", "run RUN"),
        (f"{record.ROOT}/hosts.toml: no", "hosts.toml: no"),
        ("two\n   lines", "two lines"),
        ("std::string and 12:34", "std::string and 12:34"),
    ],
)
def test_what_differs_from_run_to_run_is_named(text: str, wanted: str) -> None:
    assert normal(text) == wanted
    assert normal(wanted) == wanted


def test_free_names_are_hosts_too() -> None:
    assert normal("web: refused; web-2, cobweb", hosts=["web", "web-2"]) == "HOST: refused; HOST, cobweb"
    assert normal("web.example and /etc/web", hosts=["web"]) == "web.example and /etc/web"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("--> Go\n    [c13] c13: refused: no key.\n[c13] Error: ran", "c13: refused: no key."),
        ("an error\n[c13] c13: failed: the disk is full.\n[c13] Error: x", "c13: failed: the disk is full."),
        ("an error\nquietport: hosts.toml: no.\n", "quietport: hosts.toml: no."),
        ("x\n\x1b[31m--> \x1b[1mpyinfra error\x1b[0m: c13: gone", "pyinfra error: c13: gone"),
        ("fine\n    [c13] Error: executed 1 commands", "Error: executed 1 commands"),
        ("all is well, terrors apart", ""),
    ],
)
def test_the_sentence_is_found_in_a_converges_output(text: str, wanted: str) -> None:
    assert sentence_of(text) == wanted


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(record.ENV, str(tmp_path / "rows"))
    return tmp_path / "rows"


def test_a_row_is_kept_once(place: Path) -> None:
    for name in ("c13", "c12"):
        record.record("fault", "cut for 20 s", sees=f"{name}: refused: 7 s", after=f"{name} as it was")
    assert record.recorded() == {Row("fault", "cut for 20 s", "HOST: refused: N s", "HOST as it was")}


def test_a_row_without_a_sentence_is_an_error(place: Path) -> None:
    with pytest.raises(ValueError, match="empty cell"):
        record.record("fault", "disk full", sees=sentence_of("fine"), after="as it was")
    with pytest.raises(ValueError, match="area 'faults'"):
        record.record("faults", "disk full", sees="x", after="y")
    assert record.recorded() == frozenset()


def test_writers_do_not_mix_their_lines(place: Path) -> None:
    def write(number: int) -> None:
        record.record("input", f"case {number}", sees="x" * 500, after="as it was")

    code = (
        "from tests.lab.record import record\n"
        "for n in range(50): record('fault', f'case {n}', sees='y' * 500, after='as it was')"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=record.ROOT)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(50)))
    assert other.wait(timeout=30) == 0
    assert len(record.recorded()) == 100
