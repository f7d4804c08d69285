"""What a keyring of apt really holds."""

from __future__ import annotations

import base64
import binascii
import hashlib

from pyinfra.api.command import QuoteString, StringCommand
from pyinfra.api.facts import FactBase

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
