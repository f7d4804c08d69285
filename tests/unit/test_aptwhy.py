"""One sentence from what apt and curl said: verbatim output of apt 2.6 and 3.0, dpkg and curl 7.88."""

from __future__ import annotations

import pytest

from operations import aptwhy

REPO = "http://10.0.0.1:8081/tailscale/stable/debian"
INRELEASE = f"{REPO}/dists/trixie/InRelease"
DEB = f"{REPO}/pool/trixie/tailscale_1.102.5_amd64.deb"
IGNORED = "E: Some index files failed to download. They have been ignored, or old ones used instead."
HASHES = """   Hashes of expected file:
    - SHA256:2aa9440f263f66a0fac5a366e1386d989a1239776d73e2d116f16185e5614dc0
   Hashes of received file:
    - SHA256:69ed34f22395aa1dfb90462030d94611fea2a86409d493ae4af572cb042304e4"""
NO_RELEASE = f"""Ign:1 {REPO} trixie InRelease
Err:2 {REPO} trixie Release
  404  Not Found [IP: 10.0.0.1 8081]
Reading package lists...
E: The repository '{REPO} trixie Release' does not have a Release file."""


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            NO_RELEASE,
            f"the repository {REPO} has no Release file for trixie (404 Not Found). Look whether 10.0.0.1 is "
            "up and the address right, then run again.",
        ),
        (
            f"E: Failed to fetch {INRELEASE}  500  Internal Server Error [IP: 10.0.0.1 8081]\n{IGNORED}",
            f"the repository {REPO} cannot be read: 10.0.0.1 answers 500 Internal Server Error for "
            "InRelease. Look whether 10.0.0.1 is up and the address right, then run again.",
        ),
        (
            f"E: Failed to fetch {INRELEASE}  Connection failed [IP: 10.0.0.1 8081]\n{IGNORED}",
            f"the repository {REPO} cannot be read: 10.0.0.1 gives no answer. "
            "Look whether 10.0.0.1 is up and the address right, then run again.",
        ),
        (
            f"E: Failed to fetch {INRELEASE}  Could not connect to 10.0.0.1:8081 (10.0.0.1). "
            f"- connect (111: Connection refused)\n{IGNORED}",
            f"the repository {REPO} cannot be read: Could not connect to 10.0.0.1:8081 (10.0.0.1). "
            "- connect (111: Connection refused). "
            "Look whether 10.0.0.1 is up and the address right, then run again.",
        ),
        (
            f"E: Failed to fetch {DEB}  Hash Sum mismatch\n{HASHES}\nE: Some files failed to download",
            f"tailscale_1.102.5_amd64.deb of the repository {REPO} has another hash than its signed index "
            "says: it is not used. The repository is just being changed, or someone changes what it sends. "
            "Look into it, or wait some minutes, then run again.",
        ),
        (
            f"E: Release file for {INRELEASE} is expired (invalid since 24h 0min 0s). Updates for this "
            "repository will not be applied.",
            f"the repository {REPO} is out of date: its Release file expired 24h 0min 0s ago, and nothing "
            "from it is trusted. Have it brought up to date, or mend the host's clock (`date` there), then "
            "run again.",
        ),
        (
            f"E: Failed to fetch {INRELEASE}  Clearsigned file isn't valid, got 'NOSPLIT' (does the network "
            f"require authentication?)\nE: The repository '{REPO} trixie InRelease' is not signed.",
            f"the repository {REPO} is not signed by its pinned key: nothing from it is used. "
            "Look whether its address is right, then run again.",
        ),
        (
            "curl: (22) The requested URL returned error: 404\n"
            f"cannot fetch the signing key from {REPO}/k.gpg; what curl said is above.",
            f"the signing key {REPO}/k.gpg cannot be fetched: 10.0.0.1 answers 404 for k.gpg. "
            "Look whether 10.0.0.1 is up and the address right, then run again.",
        ),
        (
            "curl: (28) Operation too slow. Less than 1 bytes/sec transferred the last 15 seconds\n"
            f"cannot fetch the signing key from {REPO}/k.gpg; what curl said is above.",
            f"the signing key {REPO}/k.gpg cannot be fetched: 10.0.0.1 gives no answer. "
            "Look whether 10.0.0.1 is up and the address right, then run again.",
        ),
    ],
    ids=["404", "500", "hang", "refused", "hash", "expired", "unsigned", "key-404", "key-hang"],
)
def test_each_reason_has_its_sentence(said: str, sentence: str) -> None:
    assert aptwhy.why(f"Reading package lists...\n{said}\n") == sentence


@pytest.mark.parametrize(
    ("said", "part"),
    [
        (f"E: Failed to fetch {INRELEASE}  Could not resolve '10.0.0.1'", "cannot be resolved"),
        (f"W: GPG error: {REPO} trixie InRelease: The following signatures were invalid: BADSIG", "BADSIG"),
        (f"E: Release file for {INRELEASE} is not valid yet (invalid for another 3h).", "clock is wrong"),
        ("E: Unable to locate package tailscale", "no package tailscale"),
        ("E: Package 'tailscale' has no installation candidate", "no package tailscale"),
        ("dpkg: error processing package ufw (--configure):", "dpkg failed (processing package ufw"),
        ("E: You don't have enough free space in /var/cache/apt/archives/.", "disk is full"),
        ("E: Write error - write (28: No space left on device)", "disk is full"),
    ],
)
def test_the_other_reasons_are_named(said: str, part: str) -> None:
    sentence = aptwhy.why(said)
    assert sentence is not None
    assert part in sentence
    assert sentence.endswith("then run again.")


def test_a_mirror_that_was_only_warned_about_is_the_reason_for_a_package_that_is_not_there() -> None:
    warned = f"W: Failed to fetch {INRELEASE}  Connection failed [IP: 10.0.0.1 8081]"
    said = f"{warned}\nE: Unable to locate package ufw"
    sentence = aptwhy.why(said)
    assert sentence is not None
    assert "gives no answer" in sentence


def test_what_is_not_known_is_left_to_speak_for_itself() -> None:
    assert aptwhy.why("something quite different") is None
