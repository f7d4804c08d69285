"""Canaries for each secret of a converge, and everywhere they could be seen.

On one blank host where an ordinary user's sudo asks for a password, each program's arguments, environment
and writes are traced on the host and on the operator's side: for plans, for converges that are killed, and
for the one that ends well. Spies leak on purpose beside it, so that a search that finds nothing means
something.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lab import container, targets
from lab.process import wait_until
from lab.state import write
from lab.variants.ssh import ADMIN, sudo_password
from tests.lab.interrupt import Converge, seeded
from tests.lab.own import own_lab
from tests.lab.record import record
from tests.lab.spies import FINE, Spy, turned
from tests.lab.story import (
    BIN,
    CONVERGE_TIMEOUT_S,
    DEPLOY,
    ROOT,
    SECRET_PATH,
    Done,
    Hosts,
    Lab,
    run,
)
from tests.lab.tracing import (
    Canary,
    Leak,
    around,
    carried,
    execs,
    inside,
    search_files,
    search_text,
    search_trace,
)

pytestmark = pytest.mark.container

NAME = "c13"
VARIABLE = "QUIETPORT_E2E_HIDDEN"
COMMANDS_PATH = "/etc/e2e-canary/key"
PYINFRA = str(BIN / "pyinfra")
JOIN = "tailscale | tailscale: on the tailnet"
SECRETS = "secrets | secrets: "
# A number that the second of these converges reaches on a blank host; see `seeded`.
LAST_OPERATION = 20
# What a command on the host works with, gone when it ends.
UNFINISHED = "ls -d /run/quietport-join.* /etc/*/*/.quietport.* /etc/*/.quietport.* 2>/dev/null; true"
NO_DISK = ("proc", "sys", "dev")
KEPT_SPY = "/var/tmp/e2e-spy"
TALKATIVE = ("-vvv", "--diff", "--debug-all")
PLANS = (
    ("--dry", *TALKATIVE),
    ("--dry", "--json"),
    ("--debug-operations", "--debug-facts"),
)


@dataclass
class Watched:
    """The host, what was hidden, and what all the searches saw."""

    lab: Lab
    folder: Path
    hosts: Hosts
    canaries: Sequence[Canary]
    hidden: str
    """The value of the environment variable a secret comes from."""
    here: Spy
    there: Spy
    kept: Canary
    logged: Canary
    operator: list[Path] = field(default_factory=list)
    target: list[Path] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)
    killed: list[str] = field(default_factory=list)
    left_by_kills: list[Leak] = field(default_factory=list)
    left: list[Leak] = field(default_factory=list)

    @property
    def all(self) -> list[Canary]:
        """The canaries, and those of the spies."""
        return [*self.canaries, *self.here.canaries, *self.there.canaries, self.kept, self.logged]

    def env(self) -> dict[str, str]:
        """pyinfra's environment: directories of its own for all it may leave behind."""
        own = {name: str(self.folder / name.lower()) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
        return {**own, VARIABLE: self.hidden}

    def through(self) -> list[str]:
        """What traces a pyinfra here, into a file of its own."""
        self.operator.append(self.folder / f"operator-{len(self.operator)}")
        return around(self.operator[-1])

    def pyinfra(self, *args: str) -> Done:
        """`pyinfra inventory deploys/vps.py ARGS`, traced."""
        argv = [*self.through(), PYINFRA, "inventory", DEPLOY, *args]
        done = run(argv, env=self.hosts.env(**self.env()), timeout=CONVERGE_TIMEOUT_S)
        self.said[" ".join(args)] = done.text
        return done

    def kill(self, reached: Callable[[Converge], object], *, after: float) -> None:
        """Converge, and kill it `after` seconds after `reached`, which waits for something of it."""
        with Converge.start(self.hosts, *TALKATIVE, through=self.through(), **self.env()) as converge:
            assert reached(converge), f"it ended before:\n{converge.text[-3000:]}"
            time.sleep(after)
            converge.kill()
        self.killed.append(converge.names[-1] if converge.names else "before the first operation")
        self.said[f"killed {len(self.killed)}"] = converge.text

    def search_operator(self) -> list[Leak]:
        """Everything a run may leave on the operator's side, but for the sources of the secrets."""
        directory = self.lab.run.directory
        places = [Path(self.env()[name]) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")]
        places += [path for path in directory.iterdir() if path != self.lab.run.keys]
        places += [ROOT / "pyinfra-debug.log", ROOT / "build"]
        return search_files([place for place in places if place.exists()], self.all)

    def search_target(self) -> list[Leak]:
        """The host's disk and its journal."""
        root = Path(f"/proc/{container.first_pid(self.lab.run, self.lab.target(NAME))}/root")
        places = [place for place in root.iterdir() if place.name not in NO_DISK and not place.is_symlink()]
        allowed = [root / path.lstrip("/") for path in (SECRET_PATH, COMMANDS_PATH)]
        found = search_files([*places, root / "dev/shm"], self.all, allowed=allowed)
        on_disk = [Leak(leak.canary, leak.how, leak.where.removeprefix(str(root))) for leak in found]
        journal = self.execute("journalctl -a -o export --no-pager")
        return on_disk + search_text("the journal", journal, self.all)

    def execute(self, command: str) -> str:
        """A shell command in the target, past its sshd and all that is traced."""
        return targets.execute(self.lab.run, self.lab.target(NAME), ["sh", "-c", command]).stdout


def set_up(lab: Lab, folder: Path) -> Watched:
    """A blank host, and a canary for each of its secrets."""
    lab.up(kind="container", distro="trixie", name=NAME, variants=("sudo-password",))
    target = lab.target(NAME)
    for name in ("home", "tmpdir", "xdg_cache_home"):
        (folder / name).mkdir()
    core = {word: secrets.token_hex(16) for word in ("variable", "command", "password")}
    # hskey-auth-ID-SECRET: the control server prints the id as it likes.
    key = Path(target.detail["auth_key"]).read_text().strip().split("-", 3)[-1]
    # With what shells, sudo and JSON might stumble over.
    password = f"""it's "{core["password"]}" $HOME \\n&é"""
    container.execute(lab.run, target, ["chpasswd"], input=f"{ADMIN}:{password}\n")
    write(sudo_password(lab.run, target), f"{password}\n")
    here = Spy.in_folder(str(folder / "spy"), who="operator's spy")
    there = Spy.in_folder("/var/tmp/e2e-spy", who="host's spy")
    (folder / "from-command").write_text(core["command"])
    program = folder / "source.sh"
    program.write_text(f"{here.text}\ncat {folder}/from-command\n")
    sources = {SECRET_PATH: f"env:{VARIABLE}", COMMANDS_PATH: f"command:sh {program}"}
    return Watched(
        lab=lab,
        folder=folder,
        hosts=Hosts.of(lab, "canaries", every={"docker_source": "none", "secrets": sources}),
        canaries=[
            Canary("auth key", key),
            Canary("secret of a variable", core["variable"]),
            Canary("secret of a command", core["command"]),
            Canary("sudo password", core["password"]),
        ],
        hidden=f"sk-{core['variable']}",
        here=here,
        there=there,
        kept=Canary("host's kept file", secrets.token_hex(16)),
        logged=Canary("host's log line", secrets.token_hex(16)),
    )


def tell(watched: Watched) -> None:
    """Plans, converges that are killed, and one that is not, all of it traced."""
    lab, dice = watched.lab, seeded("no secret bytes")
    # All but the first with the operator's side traced alone: they ask the host the same questions.
    for arguments in PLANS[1:]:
        watched.pyinfra(*arguments).ok()
    with inside(container.first_pid(lab.run, lab.target(NAME)), watched.folder / "target") as files:
        watched.target = files
        spy(watched)
        watched.pyinfra(*PLANS[0]).ok()
        number = dice.randint(1, LAST_OPERATION)
        watched.kill(lambda converge: converge.wait_for_heading(number), after=dice.random())
        watched.kill(lambda converge: converge.wait_for_name(JOIN), after=3 * dice.random())
        watched.kill(lambda converge: converge.wait_for_name(SECRETS), after=dice.random())
        # What the killed ones had begun on the host goes on without them, and ends.
        wait_until(lambda: not watched.execute(UNFINISHED), timeout=120, what="the killed converges' ends")
        watched.left_by_kills = watched.search_target() + watched.search_operator()
        watched.pyinfra("-y", *TALKATIVE).ok()
    watched.left = watched.search_target() + watched.search_operator()


def spy(watched: Watched) -> None:
    """Leak on purpose, by the way that every command of a converge takes."""
    more = f"say {turned(watched.kept.core)} > {KEPT_SPY}; say {turned(watched.logged.core)} | logger"
    watched.hosts.ssh(NAME, f"{watched.there.text}\n{more}").ok()


@pytest.fixture(scope="module")
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Everything that was done and seen."""
    with own_lab("canaries", request.session, asked_by="watched") as lab:
        watched = set_up(lab, tmp_path_factory.mktemp("canaries"))
        tell(watched)
        yield watched


@pytest.fixture(scope="module")
def on_host(watched: Watched) -> list[Leak]:
    """What the trace of the host gives away."""
    folders = [path.rpartition("/")[0] for path in (SECRET_PATH, COMMANDS_PATH)]
    return search_trace(watched.target, watched.all, folders=folders)


@pytest.fixture(scope="module")
def on_operators_side(watched: Watched) -> list[Leak]:
    """What the traces of the operator's side give away."""
    return [leak for file in watched.operator for leak in search_trace([file], watched.all, launched=PYINFRA)]


def about(watched: Watched, found: Sequence[Leak]) -> list[Leak]:
    """Those that are about the canaries, not about the spies."""
    names = {canary.name for canary in watched.canaries}
    return [leak for leak in found if leak.canary in names]


def test_the_search_sees_each_kind_of_leak(
    watched: Watched, on_host: list[Leak], on_operators_side: list[Leak]
) -> None:
    """Positive controls: what leaked on purpose, all of it for a moment only, was seen on both sides."""
    assert watched.there.unseen(on_host) == []
    assert watched.here.unseen(on_operators_side) == []
    fine = {watched.there.leaks[FINE].name, watched.here.leaks[FINE].name}
    assert not fine & {leak.canary for leak in (*on_host, *on_operators_side)}
    left = {(leak.canary, leak.where) for leak in watched.left}
    assert {(watched.kept.name, KEPT_SPY), (watched.logged.name, "the journal")} <= left
    # Each canary was there to be seen: it went to the host's programs through their pipes.
    assert carried(watched.target, watched.canaries) == {canary.name for canary in watched.canaries}
    assert execs(watched.target) > 1000
    assert min(execs([file]) for file in watched.operator) > 1


def test_the_secrets_are_where_they_belong(watched: Watched) -> None:
    """They did travel: else there would have been nothing to see."""
    password = watched.canaries[3]
    for path, canary in zip((SECRET_PATH, COMMANDS_PATH), watched.canaries[1:3], strict=True):
        state = watched.execute(f"stat -c '%a %U' {path} {path.rpartition('/')[0]}; cat {path}")
        assert state.split()[:4] == ["600", "root", "700", "root"]
        assert canary.is_in(state)
    assert watched.hosts.ssh(NAME, "tailscale ip -4").ok().out.startswith("100.")
    assert password.is_in(sudo_password(watched.lab.run, watched.lab.target(NAME)).read_text())
    assert watched.hosts.ssh(NAME, "echo $SUDO_USER").ok().out.strip() == ADMIN


def test_no_program_of_the_host_is_told_one(watched: Watched, on_host: list[Leak]) -> None:
    """In its arguments, its environment or the name of a file."""
    assert [leak for leak in about(watched, on_host) if leak.how in ("argv", "environment", "named")] == []


def test_no_program_of_the_operators_side_is_told_one(
    watched: Watched, on_operators_side: list[Leak]
) -> None:
    """pyinfra alone has the variable that the operator gave it."""
    found = about(watched, on_operators_side)
    assert [leak for leak in found if leak.how in ("argv", "environment", "named")] == []


def test_no_file_of_the_host_ever_holds_one_but_where_it_is_private(
    watched: Watched, on_host: list[Leak]
) -> None:
    assert [leak for leak in about(watched, on_host) if leak.how in ("written", "copied", "moved")] == []


def test_no_file_of_the_operators_side_ever_holds_one(
    watched: Watched, on_operators_side: list[Leak]
) -> None:
    found = about(watched, on_operators_side)
    assert [leak for leak in found if leak.how in ("written", "copied", "moved")] == []


def test_nothing_is_left_behind(watched: Watched) -> None:
    """On the host's disk, in its journal, on the operator's side."""
    assert about(watched, watched.left) == []
    # The search does read what the operator's side remembers: the pinned host key is found there.
    state = watched.lab.run.directory / "operator"
    pinned = max(re.findall(r"[A-Za-z0-9]{24,}", (state / f"{NAME}.json").read_text()), key=len)
    assert search_files([state], [Canary("pinned key", pinned)])


def test_no_output_shows_one(watched: Watched) -> None:
    """Plans, differences, JSON, pyinfra's debug output, and converges."""
    assert len(watched.said) == len(PLANS) + len(watched.killed) + 1
    found = [
        leak for where, text in watched.said.items() for leak in search_text(where, text, watched.canaries)
    ]
    assert found == []
    # They were about the secrets, and as talkative as can be.
    for arguments in PLANS:
        assert COMMANDS_PATH in watched.said[" ".join(arguments)]
    assert "paramiko" in watched.said[" ".join(PLANS[0])]


def test_a_killed_converge_leaves_none_behind(watched: Watched) -> None:
    assert about(watched, watched.left_by_kills) == []
    # Where each was when it was killed; that it had got to what is named here was checked then.
    assert len(watched.killed) == 3, watched.killed
    record(
        "fault",
        "the converge is killed (SIGKILL) as it joins the tailnet with a key, and as it writes a secret",
        sees="nothing more: the converge is gone",
        after="no secret is in any other file, log or process of the host or of the operator's side",
        hosts=[NAME],
    )
