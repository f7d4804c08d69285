"""The host programs as one file that Python runs: same source, same bytes."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import quietport

_START = b"""\
import sys

from quietport.cli import main

sys.exit(main(sys.argv[1:]))
"""
# The oldest time a zip can hold.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def build(source: Path | None = None) -> bytes:
    """A zipapp of the package `quietport` (in `source`, by default the one that is imported here).

    Its bytes depend on the names and contents of the .py files alone: no times, modes, order of the
    directory or umask. Entries are stored, not compressed: zlib's output differs between builds of zlib,
    and two operators with one source would replace each other's file for ever.
    """
    package = source or Path(quietport.__file__).parent
    names = sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))
    if "cli.py" not in names:
        raise FileNotFoundError(f"{package} is not the package quietport")
    entries = {f"quietport/{name}": (package / name).read_bytes() for name in names}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {"__main__.py": _START, **entries}.items():
            archive.writestr(_entry(name), content)
    return buffer.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=_EPOCH)
    entry.create_system = 3  # Unix, also when built elsewhere
    entry.external_attr = 0o100644 << 16
    return entry
