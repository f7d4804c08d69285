"""What is particular to the variants of logins and network (lab/variants/ssh.py)."""

from __future__ import annotations

import paramiko

from lab.variants import ssh
from quietport import sshd
from tests.lab.story import run
from tests.lab.variants import Check, Guest

# A tailnet address, a public one, and one in the network that a Match block of the variants is about.
ASKED_FROM = ("100.64.0.9", "198.51.100.7", "203.0.113.9")
REFUSED = "Permission denied (publickey)"
CLIENT = (
    *(
        "ssh",
        "-F",
        "none",
        "-o",
        "BatchMode=yes",
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "ConnectTimeout=20",
    ),
    *("-o", "UserKnownHostsFile=/dev/null", "-o", "GlobalKnownHostsFile=/dev/null"),
)


def password_works(guest: Guest, user: str) -> bool:
    """Whether somebody on the public side gets in as `user` with the password that everyone knows."""
    _, port = min(place for place in guest.found.open if place[1] in (22, ssh.OTHER_PORT))
    # This machine is a neighbour of the host, and not on its tailnet.
    with paramiko.Transport((guest.target.public_ip, port)) as transport:
        transport.start_client(timeout=20)
        try:
            transport.auth_password(user, ssh.PASSWORD)
        except paramiko.SSHException:
            return False
        return transport.is_authenticated()


def refusal(guest: Guest, user: str, *options: str) -> str:
    """What ssh says when `user` logs in over the tailnet, with these options."""
    proxy = f"ProxyCommand={guest.over_tailnet()}"
    done = run([*CLIENT, "-o", proxy, *options, f"{user}@{guest.tailnet_addresses()[0]}", "true"])
    assert done.code == 255, f"{user} got in: {done.text}"
    return done.err


def refuses_passwords(guest: Guest, *users: str) -> None:
    """sshd says so for everyone who can log in, from everywhere, and `users` are offered nothing but keys."""
    for user, source, effective in policies(guest):
        assert sshd.in_without_key(effective) == [], (user, source)
    for user in users:
        assert REFUSED in refusal(guest, user, "-o", "PreferredAuthentications=password,keyboard-interactive")


def policies(guest: Guest) -> list[tuple[str, str, dict[str, list[str]]]]:
    """(user, source address, what `sshd -T -C` says) for every user with a login shell."""
    users = guest.inside("getent passwd | grep -vE '/(nologin|false|sync)$' | cut -d: -f1").split()
    assert "root" in users
    asked = [(user, source) for user in users for source in ASKED_FROM]
    # /run/sshd is there only while ssh.service is up.
    commands = [
        f"echo '##'; /usr/sbin/sshd -T -C 'user={user},host=h,addr={source}'" for user, source in asked
    ]
    answers = guest.inside("; ".join(["mkdir -p /run/sshd", *commands])).split("##\n")[1:]
    return [(*who, sshd.parse_effective(said)) for who, said in zip(asked, answers, strict=True)]


def lets_in(guest: Guest, user: str, source: str) -> bool:
    """Whether sshd's policy lets `user` in from there without a key."""
    return any(
        sshd.in_without_key(effective)
        for who, where, effective in policies(guest)
        if (who, where) == (user, source)
    )


def neutralised(guest: Guest, path: str, line: str) -> None:
    """Fails unless the line is in that file as a comment with our mark, and nowhere as itself."""
    lines = [text.strip() for text in guest.inside(f"cat {path}").splitlines()]
    assert f"{sshd.WAS}{line}" in [" ".join(text.split()) for text in lines], lines
    assert line not in lines


def listens(guest: Guest) -> set[str]:
    """Where sshd, or systemd in its place, really listens."""
    rows = guest.inside("ss -Hlntp").splitlines()
    return {row.split()[3] for row in rows if '"sshd"' in row or '"systemd"' in row}


def on_the_tailnet_alone(guest: Guest) -> None:
    """Fails unless that is port 22 of every tailnet address and nothing else."""
    wanted = {sshd.endpoint((address, 22)) for address in guest.tailnet_addresses()}
    assert wanted
    assert listens(guest) == wanted


# ssh-socket


def socket_before(guest: Guest) -> None:
    assert guest.inside("systemctl is-active ssh.socket; systemctl is-enabled ssh.socket").split() == [
        "active",
        "enabled",
    ]
    guest.inside("test -L /etc/systemd/system/ssh.service.requires/ssh.socket")
    addresses = guest.inside("cat /run/systemd/generator/ssh.socket.d/addresses.conf")
    assert f"ListenStream=0.0.0.0:{ssh.OTHER_PORT}" in addresses
    assert {port for _, port in guest.found.open} >= {22, ssh.OTHER_PORT}


def socket_after(guest: Guest) -> str:
    states = guest.inside("systemctl is-enabled ssh.socket || true; systemctl is-active ssh.socket || true")
    assert states.split() == ["masked", "inactive"]
    guest.inside("test ! -e /etc/systemd/system/ssh.service.requires/ssh.socket")
    guest.inside("test ! -L /etc/systemd/system/ssh.service.requires/ssh.socket")
    neutralised(guest, sshd.MAIN, f"Port {ssh.OTHER_PORT}")
    on_the_tailnet_alone(guest)
    return "ssh.socket is masked, and its link to ssh.service gone; ssh.service answers, on the tailnet alone"


# cloud-init-passwords


def cloud_init_before(guest: Guest) -> None:
    assert lets_in(guest, ssh.CLOUD_USER, ASKED_FROM[1])
    assert password_works(guest, ssh.CLOUD_USER)


def cloud_init_after(guest: Guest) -> str:
    # It loses, so it is left as cloud-init wrote it.
    assert (
        guest.inside(f"cat {ssh.CLOUD_INIT}; stat -c %a {ssh.CLOUD_INIT}")
        == "PasswordAuthentication yes\n600\n"
    )
    refuses_passwords(guest, ssh.CLOUD_USER)
    return "keys alone for everyone; cloud-init's file is as it was, and loses"


# foreign-listen


def foreign_before(guest: Guest) -> None:
    assert guest.found.open == {(guest.target.public_ip, ssh.OTHER_PORT)}


def foreign_after(guest: Guest) -> str:
    neutralised(guest, sshd.MAIN, f"Port {ssh.OTHER_PORT}")
    neutralised(guest, ssh.FOREIGN, "ListenAddress 0.0.0.0")
    assert "\nMaxAuthTries 4\n" in guest.inside(f"cat {ssh.FOREIGN}"), "what does not compete stays"
    on_the_tailnet_alone(guest)
    # Whoever asks for the way now is told the port of now.
    config = guest.tale.hosts.quietport("ssh-config", guest.name).ok().out.strip()
    assert run(["ssh", "-F", config, "-o", "BatchMode=yes", guest.name, "true"]).ok()
    return "both lines are comments with a mark; port 2222 is closed, port 22 answers the tailnet alone"


# match-passwords


def match_before(guest: Guest) -> None:
    assert lets_in(guest, ssh.LEGACY_USER, ASKED_FROM[1])
    assert lets_in(guest, "root", ASKED_FROM[2])
    assert password_works(guest, ssh.LEGACY_USER)


def match_after(guest: Guest) -> str:
    neutralised(guest, sshd.MAIN, "PasswordAuthentication yes")
    neutralised(guest, sshd.MAIN, "AuthenticationMethods any")
    kept = guest.inside(f"cat {sshd.MAIN}")
    assert "\n    AllowTcpForwarding no\n" in kept, "what lets nobody in stays"
    assert "\n    PubkeyAuthentication no\n" in kept
    # Without a password and without keys there is no way in for that user; nothing is offered at all.
    for user, source, effective in policies(guest):
        assert sshd.in_without_key(effective) == [], (user, source)
    said = refusal(guest, ssh.LEGACY_USER, "-o", "PreferredAuthentications=password,keyboard-interactive")
    assert "password" not in said.lower().replace("passwords", "")
    return "the lines that allowed passwords are comments with a mark, the rest of the blocks holds"


# no-include


def include_before(guest: Guest) -> None:
    assert "\nInclude" not in guest.inside(f"cat {sshd.MAIN}")
    assert lets_in(guest, "root", ASKED_FROM[1])


def include_after(guest: Guest) -> str:
    mark, line, *_ = guest.inside(f"cat {sshd.MAIN}").splitlines()
    assert mark.startswith(sshd.ADDED)
    assert line == f"Include {sshd.DROP_IN}"
    assert set(ssh.OLD_HOST_LINES) <= set(guest.inside(f"cat {sshd.MAIN}").splitlines()), (
        "these lose, and stay"
    )
    refuses_passwords(guest)
    on_the_tailnet_alone(guest)
    return "a marked Include line for our drop-in comes first, the file's own lines after it lose"


# no-ipv6


def ipv6_before(guest: Guest) -> None:
    assert guest.inside("cat /proc/net/if_inet6") == ""
    assert guest.found.open
    assert all(":" not in address for address, _ in guest.found.open)


def ipv6_after(guest: Guest) -> str:
    assert guest.inside("cat /proc/net/if_inet6") == "", "also after the restart"
    assert len(guest.tailnet_addresses()) == 1
    on_the_tailnet_alone(guest)
    return "sshd answers on the host's one tailnet address, of IPv4"


# sudo-password


def sudo_before(guest: Guest) -> None:
    asks = guest.inside(f"runuser -u {ssh.ADMIN} -- sudo -n true 2>&1 || true")
    assert "password is required" in asks
    # The operator's key opens this account and not root's.
    key = guest.tale.lab.run.keys / "operator"
    _, port = min(place for place in guest.found.open if place[1] in (22, ssh.OTHER_PORT))
    tries = {
        user: run([*CLIENT, "-i", str(key), "-p", str(port), f"{user}@{guest.target.public_ip}", "true"]).code
        for user in (ssh.ADMIN, "root")
    }
    assert tries == {ssh.ADMIN: 0, "root": 255}


def sudo_after(guest: Guest) -> str:
    # As root, by way of the ordinary user, with the password on sudo's standard input.
    assert guest.tale.hosts.ssh(guest.name, "id -un; logname || true").ok().out.split()[0] == "root"
    key = guest.tale.lab.run.keys / "operator"
    assert REFUSED in refusal(guest, "root", "-i", str(key))
    for user, source, effective in policies(guest):
        if user == "root":
            assert effective["permitrootlogin"] == ["no"], source
    password = ssh.sudo_password(guest.tale.lab.run, guest.target).read_text().strip()
    outputs = [guest.tale.chapters["dry"].done.text, guest.convergence.applied.done.text]
    assert [password in text for text in outputs] == [False, False]
    return "the ordinary user logs in over the tailnet and converges again; root still cannot log in"


CHECKS = {
    "ssh-socket": Check(
        socket_before, lambda guest: guest.said("ssh.socket listens in sshd's place"), socket_after
    ),
    "cloud-init-passwords": Check(
        cloud_init_before, lambda guest: guest.changed("ssh: answers"), cloud_init_after
    ),
    "foreign-listen": Check(
        foreign_before, lambda guest: guest.said("commented out", "ListenAddress 0.0.0.0"), foreign_after
    ),
    "match-passwords": Check(
        match_before, lambda guest: guest.said("commented out", "PasswordAuthentication yes"), match_after
    ),
    "no-include": Check(include_before, lambda guest: guest.said("does not read"), include_after),
    "no-ipv6": Check(ipv6_before, lambda guest: guest.changed("ssh: answers"), ipv6_after),
    "sudo-password": Check(
        sudo_before, lambda guest: guest.said("reached by its", f"as {ssh.ADMIN}"), sudo_after
    ),
}
