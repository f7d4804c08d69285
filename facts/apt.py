"""What a keyring of apt really holds, and where apt takes packages from."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pyinfra.api.command import QuoteString, StringCommand
from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import decoded, one_host_at_most, quoted, sections, split

PUBLIC_KEY_TAG = 6


def primary_fingerprints(keyring: bytes) -> list[str]:
    """Fingerprints of the primary public keys in a binary OpenPGP keyring, in order.

    RFC 4880, 4.2 (packet headers) and 12.2 (a version 4 fingerprint is the SHA-1 of 0x99, the packet's
    length in two octets, and its body). Raises ValueError when the bytes are no such keyring.
    """
    found = []
    position = 0
    while position < len(keyring):
        tag, start, end = _packet(keyring, position)
        body = keyring[start:end]
        if end > len(keyring) or not body:
            raise ValueError("a packet is cut short")
        if tag == PUBLIC_KEY_TAG:
            if body[0] != 4:
                raise ValueError(f"a key has version {body[0]}")
            framed = b"\x99" + len(body).to_bytes(2, "big") + body
            # SHA-1 is what the format says; the pinned value is one of these.
            found.append(hashlib.sha1(framed, usedforsecurity=False).hexdigest().upper())
        position = end
    return found


def _packet(data: bytes, position: int) -> tuple[int, int, int]:
    """Tag, start and end of the body of the packet at `position`."""
    try:
        head = data[position]
        if not head & 0x80:
            raise ValueError("not an OpenPGP packet")
        if head & 0x40:
            return (head & 0x3F, *_new_length(data, position + 1))
        size = {0: 1, 1: 2, 2: 4}.get(head & 0x03)
        if size is None:
            raise ValueError("a packet has no length")
        start = position + 1 + size
        return (head & 0x3C) >> 2, start, start + int.from_bytes(data[position + 1 : start], "big")
    except IndexError:
        raise ValueError("a packet is cut short") from None


def _new_length(data: bytes, position: int) -> tuple[int, int]:
    first = data[position]
    if first < 192:
        return position + 1, position + 1 + first
    if first < 224:
        length = ((first - 192) << 8) + data[position + 1] + 192
        return position + 2, position + 2 + length
    if first == 255:
        return position + 5, position + 5 + int.from_bytes(data[position + 1 : position + 5], "big")
    raise ValueError("a packet has a partial length")


class Keyring(FactBase[list[str]]):
    """Fingerprints of the primary keys in the keyring at `path`; empty when there is none, or it is none."""

    @staticmethod
    def default() -> list[str]:
        return []

    def command(self, path: str) -> StringCommand:
        # -f follows no FIFO or device into a hang; the size cap is what apt's keyrings never reach.
        quoted = QuoteString(path)
        read = StringCommand("head -c 1048576 --", quoted, "| base64 -w 0")
        return StringCommand("if [ -f", quoted, "]; then", read, "; fi; echo")

    def process(self, output: list[str]) -> list[str]:
        try:
            return primary_fingerprints(base64.b64decode("".join(output), validate=True))
        except (ValueError, binascii.Error):
            return []


# What fetches $1 with what a blank host has. A host that has neither is told nothing here.
_FETCH = (
    "if command -v curl >/dev/null; then "
    "curl --fail --silent --location --proto '=https,http' --max-time 15 --max-filesize 1048576 -- {url}; "
    # urlopen's timeout is that of each read.
    "else timeout 15 python3 -I -c 'import sys, urllib.request as r; "
    "sys.stdout.buffer.write(r.urlopen(sys.argv[1], timeout=15).read(1048576))' {url}; fi"
)


def dearmored(key: bytes) -> bytes:
    """The binary form of a key that may be in ASCII armor (RFC 4880, 6.2). Raises ValueError."""
    if b"-----BEGIN PGP" not in key:
        return key
    inside = key.partition(b"-----BEGIN PGP")[2].partition(b"-----END PGP")[0].splitlines()
    begin = next((number for number, line in enumerate(inside) if not line.strip()), None)
    if begin is None:
        raise ValueError("no blank line after the armor's headers")
    # The last line is the checksum: "=" and four characters.
    return base64.b64decode(b"".join(line.strip() for line in inside[begin:] if not line.startswith(b"=")))


class OfferedKey(FactBase[list[str]]):
    """Fingerprints of the primary keys that the host is offered at `url`, unless it has the file `keyring`.

    Empty when it has, or when it cannot tell: nothing there, no way to fetch it, no key.
    """

    @staticmethod
    def default() -> list[str]:
        return []

    def command(self, url: str, keyring: str) -> str:
        fetch = _FETCH.format(url=quoted([url]))
        return sections(key=f"[ -e {quoted([keyring])} ] || {{ {fetch}; }} | head -c 1048576 | base64 -w0")

    @one_host_at_most
    def process(self, output: list[str]) -> list[str]:
        try:
            text = split(output, "key")["key"].text
            return primary_fingerprints(dearmored(base64.b64decode(text, validate=True)))
        except (ValueError, binascii.Error):
            return []


# One line of sources.list(5): type, options in brackets, address, suite.
_ONE_LINE = re.compile(r"^\s*deb(?:-src)?\s+(?:\[[^\]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)")
_MAX_SOURCES_BYTES = 1 << 20


def sources_in(path: str, text: str) -> list[dict[str, Any]]:
    """The enabled sources in one file of apt's, in either form (sources.list(5)), in order.

    Each is {path, first, last (lines, from 1), uris, suites}. What is in neither form is left out.
    """
    found = _stanzas(text) if path.endswith(".sources") else _lines(text)
    return [{"path": path, **entry} for entry in found]


def _lines(text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if entry := _ONE_LINE.match(line):
            yield {"first": number, "last": number, "uris": [entry["uri"]], "suites": [entry["suite"]]}


def _stanzas(text: str) -> Iterator[dict[str, Any]]:
    lines = text.splitlines()
    blank = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    for before, after in pairwise([0, *blank, len(lines) + 1]):
        fields = _fields(lines[before : after - 1])
        enabled = fields.get("enabled", ["yes"])[0].lower()
        if fields.get("uris") and enabled not in ("no", "false", "0", "off"):
            place = {"first": before + 1, "last": after - 1}
            yield {**place, "uris": fields["uris"], "suites": fields.get("suites", [])}


def _fields(lines: list[str]) -> dict[str, list[str]]:
    """The words of each field of a stanza, comments and continuation lines understood."""
    fields: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        if line.startswith("#"):
            continue
        if not line.startswith((" ", "\t")):
            name, _, line = line.partition(":")
        fields.setdefault(name.strip().lower(), []).extend(line.split())
    return {name: words for name, words in fields.items() if words}


class Sources(FactBase[list[dict[str, Any]]]):
    """Where apt takes packages from: [{path, first, last, uris, suites}], enabled ones only.

    `first` and `last` are the lines of the file that make the source, from 1.
    """

    @override
    @staticmethod
    def default() -> list[dict[str, Any]]:
        return []

    @override
    def command(self) -> str:
        return sections(
            files="for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list "
            '/etc/apt/sources.list.d/*.sources; do [ -f "$file" ] && '
            'printf "%s %s\\n" "$(printf %s "$file" | base64 -w0)" '
            f'"$(head -c {_MAX_SOURCES_BYTES} "$file" | base64 -w0)"; done; true'
        )

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for line in split(output, "files")["files"].text.splitlines():
            name, _, content = line.partition(" ")
            path = decoded(name, what="the name of a file of apt's sources")
            found += sources_in(path, decoded(content, what=path))
        return found
