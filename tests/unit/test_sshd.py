"""Which lines of sshd compete with ours, how they are neutralised and restored, and what we write."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietport import sshd

STOCK = "Include /etc/ssh/sshd_config.d/*.conf\n\nKbdInteractiveAuthentication no\nUsePAM yes\n"
OURS = sshd.render(["100.64.0.1", "fd7a:115c:a1e0::1"])
CLOUD = "/etc/ssh/sshd_config.d/50-cloud-init.conf"


def wanted(**files: str) -> dict[str, str]:
    """The wanted files, given the main file as `main` and others as their name under sshd_config.d."""
    paths = {name: sshd.MAIN if name == "main" else f"{sshd.FOLDER}/{name}.conf" for name in files}
    return sshd.wanted_files({paths[name]: text for name, text in files.items()}, OURS)


def test_a_stock_main_file_stays_as_it_is() -> None:
    assert wanted(main=STOCK) == {sshd.MAIN: STOCK, sshd.DROP_IN: OURS}


def test_a_later_file_that_loses_stays_as_it_is() -> None:
    assert wanted(main=STOCK, **{"50-cloud-init": "PasswordAuthentication yes\n"})[CLOUD] == (
        "PasswordAuthentication yes\n"
    )


@pytest.mark.parametrize(
    "line",
    [
        "ListenAddress 0.0.0.0",
        "listenaddress=0.0.0.0",
        "  ListenAddress\t[::]:22 # everywhere",
        "Port 2222",
        '"Port" 2222',
        "Port = 2222",
    ],
)
def test_lines_that_accumulate_are_neutralised_wherever_they_stand(line: str) -> None:
    result = wanted(main=f"{STOCK}{line}\n", **{"99-late": f"{line}\n"})
    assert result[sshd.MAIN] == f"{STOCK}# quietport: was: {line}\n"
    assert result[f"{sshd.FOLDER}/99-late.conf"] == f"# quietport: was: {line}\n"


@pytest.mark.parametrize(
    "line",
    [
        "PasswordAuthentication yes",
        "passwordauthentication no",
        "ChallengeResponseAuthentication yes",
        "KbdInteractiveAuthentication yes",
        "AuthenticationMethods any",
        "PermitRootLogin yes",
        "AddressFamily inet",
        "UsePAM no",
    ],
)
def test_where_the_first_wins_only_what_is_read_before_ours_is_neutralised(line: str) -> None:
    result = wanted(main=f"{line}\n{STOCK}{line}\n", **{"00-aaa": f"{line}\n", "01-after": f"{line}\n"})
    assert result[sshd.MAIN] == f"# quietport: was: {line}\n{STOCK}{line}\n"
    assert result[f"{sshd.FOLDER}/00-aaa.conf"] == f"# quietport: was: {line}\n"
    assert result[f"{sshd.FOLDER}/01-after.conf"] == f"{line}\n"


@pytest.mark.parametrize(
    ("line", "goes"),
    [
        ("PasswordAuthentication yes", True),
        ("PasswordAuthentication no", False),
        ("KbdInteractiveAuthentication yes", True),
        ("SkeyAuthentication yes", True),
        ("AuthenticationMethods password", True),
        ("AuthenticationMethods publickey,password publickey", True),
        ("AuthenticationMethods publickey publickey,publickey", False),
        ("PermitRootLogin yes", False),
        ("X11Forwarding no", False),
    ],
)
def test_in_match_blocks_what_allows_passwords_goes(line: str, *, goes: bool) -> None:
    text = f"{STOCK}Match User bob\n    {line}\n"
    mark = sshd.WAS if goes else ""
    assert wanted(main=text)[sshd.MAIN] == f"{STOCK}Match User bob\n{mark}    {line}\n"


def test_a_match_block_ends_with_its_file() -> None:
    result = wanted(main=STOCK, **{"00-a": "Match User bob\n", "00-b": "PermitRootLogin yes\n"})
    assert result[f"{sshd.FOLDER}/00-b.conf"] == "# quietport: was: PermitRootLogin yes\n"


def test_without_an_include_ours_is_read_first_and_the_folder_stays_unread() -> None:
    result = wanted(main="PasswordAuthentication yes\nPort 2222\n", **{"50-dead": "ListenAddress 0.0.0.0\n"})
    assert result[sshd.MAIN].split("\n")[1] == f"Include {sshd.DROP_IN}"
    assert "\nPasswordAuthentication yes\n# quietport: was: Port 2222\n" in result[sshd.MAIN]
    assert result[f"{sshd.FOLDER}/50-dead.conf"] == "ListenAddress 0.0.0.0\n"


@pytest.mark.parametrize(
    "include",
    [
        "Match User bob\nInclude /etc/ssh/sshd_config.d/*.conf\n",
        "Include /etc/ssh/sshd_config.d/50-*.conf\n",
        "# Include /etc/ssh/sshd_config.d/*.conf\n",
    ],
)
def test_an_include_that_does_not_read_ours_for_everyone_does_not_count(include: str) -> None:
    assert not sshd.reads_drop_in({sshd.MAIN: include})
    assert wanted(main=include)[sshd.MAIN].startswith(sshd.ADDED)


@pytest.mark.parametrize(
    "include", ["include sshd_config.d/*.conf", 'Include "/etc/ssh/sshd_config.d/*.conf" /x']
)
def test_an_include_in_another_spelling_counts(include: str) -> None:
    assert sshd.reads_drop_in({sshd.MAIN: include})


def test_it_is_stable() -> None:
    once = wanted(main="Port 2222\nMatch all\nPasswordAuthentication yes\n")
    assert sshd.wanted_files(once, OURS) == once


LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "Port 2222",
                " ListenAddress 0.0.0.0",
                "PasswordAuthentication yes\r",
                "Match User bob",
                "Include /etc/ssh/sshd_config.d/*.conf",
                "Include /etc/ssh/sshd_config.d/00-quietport.conf",
                "# a comment",
                "",
                "\t",
            ]
        ),
        st.text(alphabet=st.characters(exclude_characters="\n", exclude_categories=("Cs",)), max_size=30),
    )
).map("\n".join).filter(lambda text: "# quietport:" not in text)


@given(LINES, LINES)
def test_restoring_gives_back_every_byte(main: str, other: str) -> None:
    path = f"{sshd.FOLDER}/10-other.conf"
    result = sshd.wanted_files({sshd.MAIN: main, path: other}, OURS)
    assert sshd.restore(result[sshd.MAIN]) == main
    assert sshd.restore(result[path]) == other


@given(LINES, LINES)
def test_nothing_competes_in_what_is_wanted(main: str, other: str) -> None:
    result = sshd.wanted_files({sshd.MAIN: main, f"{sshd.FOLDER}/10-other.conf": other}, OURS)
    assert sshd.competing(result) == []
    assert sshd.reads_drop_in(result)


def test_what_is_commented_out_is_told_apart_from_what_was_before() -> None:
    before = {sshd.MAIN: f"Port 2222\n{sshd.WAS}Port 2222\n{STOCK}\tListenAddress ::\n", CLOUD: "Port 23\n"}
    once = sshd.wanted_files(before, OURS)
    lines = [(sshd.MAIN, "Port 2222"), (sshd.MAIN, "ListenAddress ::"), (CLOUD, "Port 23")]
    assert sshd.neutralised(before, once) == lines
    assert sshd.neutralised(once, sshd.wanted_files(once, OURS)) == []


def test_the_drop_in_never_listens_everywhere() -> None:
    assert "ListenAddress 127.0.0.1:22\n" in sshd.render([])
    with pytest.raises(ValueError, match="every address"):
        sshd.render(["0.0.0.0"])
    with pytest.raises(ValueError, match="every address"):
        sshd.render(["::"])


def test_the_drop_in_names_every_address_and_keys_only() -> None:
    text = sshd.render(["fd7a:115c:a1e0::1", "100.64.0.1"], penalties=True)
    assert [line for line in text.splitlines() if line.startswith("ListenAddress")] == [
        "ListenAddress 100.64.0.1:22",
        "ListenAddress [fd7a:115c:a1e0::1]:22",
    ]
    methods = "AuthenticationMethods publickey"
    for line in ("PasswordAuthentication no", "KbdInteractiveAuthentication no", methods):
        assert f"{line}\n" in text
    assert "PerSourcePenaltyExemptList 100.64.0.0/10,fd7a:115c:a1e0::/48\n" in text
    assert "PerSource" not in OURS


@pytest.mark.parametrize(
    ("foreign", "login", "expected"),
    [
        ("PermitRootLogin no", "admin", "no"),
        ("PermitRootLogin forced-commands-only", "admin", "forced-commands-only"),
        ("PermitRootLogin no", "root", "prohibit-password"),
        ("PermitRootLogin yes", "admin", "prohibit-password"),
        ("# quietport: was: PermitRootLogin no", "admin", "no"),
        ("Match User bob\nPermitRootLogin no", "admin", "prohibit-password"),
    ],
)
def test_root_is_never_let_in_more_than_before(foreign: str, login: str, expected: str) -> None:
    files = {sshd.MAIN: f"{foreign}\n{STOCK}", sshd.DROP_IN: "PermitRootLogin yes\n"}
    assert sshd.root_login(files, login_user=login) == expected


KEYS_ONLY = (
    "passwordauthentication no\nkbdinteractiveauthentication no\n"
    "authenticationmethods publickey\npubkeyauthentication yes\n"
)


def test_effective_keys_only() -> None:
    assert sshd.not_keys_only(sshd.parse_effective(KEYS_ONLY)) == []


@pytest.mark.parametrize(
    ("line", "worse"),
    [
        ("passwordauthentication no", "passwordauthentication yes"),
        ("kbdinteractiveauthentication no", "kbdinteractiveauthentication yes"),
        ("authenticationmethods publickey", "authenticationmethods any"),
        ("authenticationmethods publickey\n", ""),
        ("pubkeyauthentication yes", "pubkeyauthentication no"),
    ],
)
def test_effective_with_a_way_in_is_named(line: str, worse: str) -> None:
    found = sshd.not_keys_only(sshd.parse_effective(KEYS_ONLY.replace(line, worse)))
    assert [sentence.split()[0] for sentence in found] == [line.split()[0]]
    # Keys kept out let nobody in.
    way_in = [] if worse == "pubkeyauthentication no" else found
    assert sshd.in_without_key(sshd.parse_effective(KEYS_ONLY.replace(line, worse))) == way_in


def test_the_candidate_reads_its_own_folder() -> None:
    text = sshd.redirect_includes("Include sshd_config.d/*.conf /opt/x.conf\nPort 22\n", "/run/q")
    assert text == "Include /run/q/*.conf /opt/x.conf\nPort 22\n"


PROC_TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 01004064:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1 0
   1: 01004064:0016 02004064:9C40 01 00000000:00000000 00:00000000 00000000     0        0 4343 1 0
"""
PROC_TCP6 = """\
  sl  local_address                         remote_address                        st
   0: 5C117AFD0000E0A10000000001000000:0016 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 77 1
   1: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 78 1
"""


def test_sockets_of_the_kernel_only_those_that_listen() -> None:
    assert sshd.parse_proc_net(PROC_TCP) == {4242: ("100.64.0.1", 22)}
    assert sshd.parse_proc_net(PROC_TCP6) == {77: ("fd7a:115c:a1e0::1", 22), 78: ("::", 22)}


def effective_of_real_sshd(folder: Path, files: dict[str, str]) -> dict[str, list[str]]:
    """What a real sshd makes of the files, put into `folder`."""
    parts = folder / "sshd_config.d"
    parts.mkdir()
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    for path, text in files.items():
        place = folder / "sshd_config" if path == sshd.MAIN else parts / Path(path).name
        place.write_text(sshd.redirect_includes(text, str(parts)))
    argv = [sshd_program(), "-T", "-f", str(folder / "sshd_config"), "-o", f"HostKey={key}"]
    argv += ["-C", "user=bob,host=h,addr=198.51.100.7,laddr=100.64.0.1,lport=22"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sshd.parse_effective(done.stdout)


def sshd_program() -> str:
    return shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin") or ""


@pytest.mark.skipif(not sshd_program() or not Path("/run/sshd").is_dir(), reason="no sshd on this machine")
@pytest.mark.parametrize("main", ["", STOCK, f"Port 2222\nPasswordAuthentication yes\n{STOCK}"])
def test_a_real_sshd_agrees(tmp_path: Path, main: str) -> None:
    foreign = "ListenAddress 0.0.0.0\nAuthenticationMethods any\n"
    match = "Match User bob\n  PasswordAuthentication yes\n  AuthenticationMethods password\n"
    files = {sshd.MAIN: main + match, f"{sshd.FOLDER}/00-a.conf": foreign}
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    before = effective_of_real_sshd(tmp_path / "before", {**files, sshd.DROP_IN: OURS})
    assert sshd.not_keys_only(before) != []
    after = effective_of_real_sshd(tmp_path / "after", sshd.wanted_files(files, OURS))
    assert sshd.not_keys_only(after) == []
    assert sshd.effective_listeners(after) == {"100.64.0.1:22", "[fd7a:115c:a1e0::1]:22"}
