"""Secrets: private to root, whole, and never empty."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from control.secret import resolve
from control.settings import HostSettings
from facts.files import FileState
from tests.spec.reading import Reading


@pytest.fixture(scope="session")
def files(settings: HostSettings) -> dict[str, str]:
    """Path on the host = source on the operator's side."""
    if not settings.secrets:
        pytest.skip("hosts.toml names no secrets for this host")
    return settings.secrets


def test_files_are_for_root_alone(reading: Reading, files: dict[str, str]) -> None:
    for path in files:
        state = reading.fact(FileState, path)
        found = (state["kind"], state["user"], state["group"], state["mode"])
        assert found == ("file", "root", "root", "0600"), path


def test_directories_are_for_root_alone(reading: Reading, files: dict[str, str]) -> None:
    for directory in {str(PurePosixPath(path).parent) for path in files}:
        state = reading.fact(FileState, directory)
        assert (state["kind"], state["user"], state["mode"]) == ("directory", "root", "0700"), directory


def test_contents_are_the_sources(reading: Reading, files: dict[str, str]) -> None:
    for path, source in files.items():
        # Compared by digest: a failing test must not print a secret.
        state = reading.fact(FileState, path)
        assert state["size"] > 0, path
        assert state["sha256"] == resolve(source, what=path).sha256(), path


def test_nothing_else_is_left_beside_them(reading: Reading, files: dict[str, str]) -> None:
    """A temporary file that an interrupted write left would be a second copy of a secret."""
    for directory in {str(PurePosixPath(path).parent) for path in files}:
        assert set(reading.lines("find %s -type f", directory)) <= set(files)
