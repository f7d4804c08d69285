"""Secrets: their sources, the errors of those, and that nothing shows the bytes."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control import secret as secret_module
from control.errors import SecretError
from control.secret import MAX_SECRET_BYTES, Secret, check_source, resolve

CANARY = b"canary-4711"


def test_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPT_SECRET", "value\n")
    assert resolve("env:QPT_SECRET", what="the key").reveal() == b"value\n"
    assert resolve("env:QPT_SECRET", what="the key").stripped().reveal() == b"value"


def test_bytes_that_are_no_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(os.environb, b"QPT_SECRET", b"\xff\xfe")
    assert resolve("env:QPT_SECRET", what="x").reveal() == b"\xff\xfe"
    (tmp_path / "s").write_bytes(b"\x00\xff")
    assert resolve(f"file:{tmp_path}/s", what="x").reveal() == b"\x00\xff"
    assert resolve("command:printf '\\377'", what="x").reveal() == b"\xff"


def test_from_a_file_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s").write_text("v")
    assert resolve("file:~/s", what="x").reveal() == b"v"


def test_a_command_is_no_shell() -> None:
    assert resolve("command:echo $HOME ; id", what="x").reveal() == b"$HOME ; id\n"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("env:QPT_NOT_SET", "the environment has no QPT_NOT_SET"),
        ("file:/nonexistent/s", "cannot read /nonexistent/s: No such file"),
        ("file:/etc", "/etc is not a regular file"),
        ("file:/dev/zero", "/dev/zero is not a regular file"),
        ("file:~nobody-here-by-that-name/s", "no such user"),
        ("file:/dev/null", "is not a regular file"),
        ("command:false", "false failed with exit code 1"),
        ("command:true", "gave nothing"),
        ("command:no-such-program x", "cannot run no-such-program"),
        ("command:/etc", "cannot run /etc"),
        ("command:echo ' '", "gave nothing"),
        ("nonsense", "must say where the secret is"),
        ("file:\0", "NUL"),
        ("command:''", "name a program"),
    ],
)
def test_what_cannot_be_read_is_named(source: str, words: str) -> None:
    with pytest.raises(SecretError) as caught:
        resolve(source, what="vps1: auth_key")
    assert "vps1: auth_key" in caught.value.what
    assert words in str(caught.value)


def test_an_unreadable_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    done: list[str] = []

    def read() -> None:
        try:
            resolve(f"file:{tmp_path}/pipe", what="x")
        except SecretError as error:
            done.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert done
    assert "not a regular file" in done[0]


def test_an_empty_source_is_an_error_and_never_an_empty_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QPT_EMPTY", "")
    (tmp_path / "empty").write_text("\n")
    for source in ("env:QPT_EMPTY", f"file:{tmp_path}/empty"):
        with pytest.raises(SecretError, match="gave nothing"):
            resolve(source, what="x")


def test_more_than_a_secret_can_be(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"x" * MAX_SECRET_BYTES)
    assert len(resolve(f"file:{tmp_path}/s", what="x").reveal()) == MAX_SECRET_BYTES
    (tmp_path / "s").write_bytes(b"x" * (MAX_SECRET_BYTES + 1))
    with pytest.raises(SecretError, match="more than"):
        resolve(f"file:{tmp_path}/s", what="x")


def test_a_command_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_module, "COMMAND_TIMEOUT_S", 0.3)
    with pytest.raises(SecretError, match="took longer"):
        resolve("command:sleep 60", what="x")


def test_errors_do_not_repeat_what_a_command_printed() -> None:
    with pytest.raises(SecretError) as caught:
        resolve("command:sh -c 'cat /etc/hostname; echo $((40000+711)); exit 3'", what="x")
    assert "40711" not in str(caught.value)
    assert "exit code 3" in str(caught.value)


def test_no_rendering_shows_the_bytes(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(CANARY, source="env:X")
    logging.getLogger().warning("%s %r", secret, secret)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret:>40}", f"{secret!r}", repr([secret])]
    shown += [
        str.__mod__("%s", secret),
        caplog.text,
        json.dumps({"a": secret}, default=str),
        repr({"a": secret}),
    ]
    assert not [text for text in shown if CANARY.decode() in text]
    assert secret.reveal() == CANARY, "the positive control"


def test_it_cannot_be_written_anywhere_by_accident() -> None:
    secret = Secret(CANARY, source="env:X")
    for write in (pickle.dumps, copy.copy, copy.deepcopy, json.dumps):
        with pytest.raises(TypeError):
            write(secret)
    assert not hasattr(secret, "__dict__")
    with pytest.raises(TypeError):
        bytes(secret)  # type: ignore[call-overload]


def test_the_source_of_a_command_is_not_shown_either() -> None:
    assert repr(Secret(b"x", source="command:curl -H canary")) == "<Secret from command>"


def test_equality_and_digest() -> None:
    one, same, other = (
        Secret(b"a", source="env:A"),
        Secret(b"a", source="file:/x"),
        Secret(b"b", source="env:A"),
    )
    assert one == same
    assert one != other
    assert one != b"a"
    assert len({one, same, other}) == 2
    assert one.sha256() == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_source_is_accepted_or_refused_without_repeating_it(text: str) -> None:
    try:
        assert check_source(text) == text
    except ValueError as error:
        assert len(text) < 8 or text not in str(error)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["env:", "file:"]), st.text(min_size=1, max_size=30))
def test_any_name_or_path_is_a_secret_or_our_error(scheme: str, rest: str) -> None:
    try:
        assert resolve(scheme + rest, what="x").reveal()
    except SecretError as error:
        assert str(error).startswith("x: ")
