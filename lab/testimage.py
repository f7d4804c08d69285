"""A tiny container image made from busybox, for tests that run containers inside a target.

`build(path)` writes a tar for `docker import - quietport-test`; nothing is pulled from anywhere. Its
busybox has `httpd`, `wget`, `nc`, `sleep`: `docker run quietport-test httpd -f -p 80 -h /www`.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from lab.bootstrap import find
from lab.process import LabError

NAME = "quietport-test:1"
PAGE = "quietport test page\n"
# The same program, for a target that can reach Debian's packages: makes image $1 there when it is not.
IN_A_TARGET = """
docker image inspect "$1" >/dev/null 2>&1 || {
  command -v busybox >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get -q -y install busybox-static
  busybox=$(command -v busybox)
  tar -C / -c --transform 's,.*/busybox,bin/busybox,' "$busybox" 2>/dev/null | docker import - "$1"
}
"""
APPLETS = ("sh", "httpd", "wget", "nc", "sleep", "cat", "echo", "ip", "ls", "ping", "true")


def build(path: Path) -> Path:
    """Write the image's file system as a tar, the same bytes from the same busybox. Returns the path.

    Raises LabError when this machine has no static busybox.
    """
    busybox = find("busybox")
    if busybox is None:
        raise LabError("busybox: not installed.", hint="Install it: apt-get install busybox-static")
    program = Path(busybox).resolve().read_bytes()
    if is_dynamic(program):
        raise LabError(f"{busybox} is not static.", hint="Install it: apt-get install busybox-static")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for directory in ("bin", "etc", "proc", "sys", "dev", "tmp", "www"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if directory == "tmp" else 0o755
            tar.addfile(entry)
        _file(tar, "bin/busybox", program, 0o755)
        for applet in APPLETS:
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
        _file(tar, "etc/passwd", b"root:x:0:0:root:/:/bin/sh\n", 0o644)
        _file(tar, "www/index.html", PAGE.encode(), 0o644)
    return path


def is_dynamic(program: bytes) -> bool:
    """Whether an ELF program names an interpreter (a PT_INTERP header, elf(5)), and so needs libraries."""
    if program[:4] != b"\x7fELF" or program[4] != 2:
        raise LabError("busybox is not a 64-bit ELF program.")

    def number(start: int, size: int) -> int:
        return int.from_bytes(program[start : start + size], "little" if program[5] == 1 else "big")

    table, entry_size, count = number(32, 8), number(54, 2), number(56, 2)
    pt_interp = 3
    return any(number(table + index * entry_size, 4) == pt_interp for index in range(count))


def _file(tar: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))
