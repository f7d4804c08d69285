"""End-to-end stories on real targets. Each kind of target tells its own, in the background.

`fleet` is both Debians in containers, converged in one run; `vm` is the VM; `variants` and `vm_mixed` are
hosts that are not blank (variants.py); `faults` is a host where things go wrong. The tests wait for the
chapter they are about. A story whose tests failed keeps its targets and their logs, the others are taken
down.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lab.up import Wanted
from tests.lab import record, table, variants
from tests.lab.ailments import Patient
from tests.lab.checks import CHECKS
from tests.lab.drifts import drifted
from tests.lab.guarded import Guarded
from tests.lab.lockout import campaign_of_ci
from tests.lab.own import FAILED, Waits, own_lab
from tests.lab.story import PROGRESS, TOLD, Lab, in_ci, in_test_all
from tests.lab.tale import Tale, tell
from tests.lab.ways import Ways

BLANK = {
    "fleet": (Wanted.of("container", "trixie"), Wanted.of("container", "bookworm")),
    "vm": (Wanted.of("vm", "trixie"),),
}
if in_test_all():
    BLANK["vm_bookworm"] = (Wanted.of("vm", "bookworm"),)
STORIES = {**BLANK, **variants.STORIES}
# Mostly waits, in this order (own.py).
WAITING = ("test_follow.py", "test_guard_host.py", "test_ways.py", "test_doctor.py", "test_lockout.py")
# The end of a failure, which is where the reason is; the summary has all of it.
AT_ONCE_LINES = 40
MARKERS = {
    "container": "needs Docker and root: a target in a container",
    "vm": "needs libvirt, QEMU and root: a target in a virtual machine",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, what in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {what}")
    # Rows of this run alone, also those that its other processes record.
    os.environ.setdefault(record.ENV, str(record.directory() / time.strftime(f"%Y%m%dT%H%M%S-{os.getpid()}")))
    # Others want the machine too: an emulated second processor costs a sixth more work in all.
    os.environ.setdefault("QUIETPORT_VM_CPUS", "1")
    # Python runs hundreds of times here: without its caches every run compiles all modules again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    said = SaidAtOnce(config)
    config.pluginmanager.register(said)
    PROGRESS.append(said.line)


class SaidAtOnce:
    """Says at once how far stories are and why a test failed: a run that is cut off has no summary."""

    def __init__(self, config: pytest.Config) -> None:
        capture = config.pluginmanager.get_plugin("capturemanager")
        # Threads speak in the middle of tests, whose output pytest keeps.
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            self._out = os.dup(1)

    def line(self, text: str) -> None:
        """Print a line of its own, whatever is captured now."""
        with contextlib.suppress(OSError):
            os.write(self._out, f"\n{text}".encode(errors="replace"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.line(f"--- {report.nodeid} ({report.when})")
            for line in report.longreprtext.splitlines()[-AT_ONCE_LINES:]:
                self.line(line)
            self.line("")


def _kind(story: str) -> str:
    return STORIES[story][0].kind


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of the story is a test of each target it is told on.

    A module's TOLD_BY names the stories that are enough where the kind of target makes no difference. What
    asks for a `guest` is a test of each host that is not blank.
    """
    if "guest" in metafunc.fixturenames:
        hosts = [
            pytest.param(story, want.name, marks=getattr(pytest.mark, want.kind), id=want.name)
            for story, wanted in variants.STORIES.items()
            for want in wanted
        ]
        metafunc.parametrize(("story", "guest_name"), hosts, scope="session")
    elif "story" in metafunc.fixturenames:
        names = getattr(metafunc.module, "TOLD_BY", BLANK)
        told = [pytest.param(name, marks=getattr(pytest.mark, _kind(name))) for name in names]
        metafunc.parametrize("story", told, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What has no story first: it keeps this thread busy while the stories are told in the background."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    story = _told_of(item)
    if story is None:
        if (module := Path(item.path).name) in WAITING:
            return 2 + WAITING.index(module)
        # Both have one blank host; by name, what leaves it untouched comes first.
        return 0 if module in ("test_bad_input.py", "test_faults.py") else 1
    return 10 if story == "fleet" else 11 if _kind(story) == "container" else 12


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests module by module, and those of a story as soon as it is told to its end.

    The machine's time is what a run is short of: in a fixed order this thread would wait for one story
    while the tests of another, or what has no story, could run.
    """
    if session.testsfailed or session.config.option.collectonly:
        return None
    groups: dict[tuple[str | None, str], list[pytest.Item]] = {}
    for item in session.items:
        groups.setdefault((_told_of(item), item.nodeid.partition("::")[0]), []).append(item)
    now = _next(groups)
    while now is not None:
        following = _next(groups)
        session.config.hook.pytest_runtest_protocol(item=now, nextitem=following)
        _leave_if_over(session, _told_of(now), groups, following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        now = following
    return True


def _next(groups: dict[tuple[str | None, str], list[pytest.Item]]) -> pytest.Item | None:
    """Take the next test: of the module that was begun, of a story that ended, of none, or the first."""
    if not groups:
        return None
    ended = [key for key in reversed(groups) if key[0] in TELLING and TELLING[key[0]].chapters.ended]
    free = [key for key in groups if key[0] is None]
    if all(Path(module).name in WAITING for _, module in free):
        ROOM.set()
    key = BEGUN[-1] if BEGUN and BEGUN[-1] in groups else next(iter([*ended, *free, *groups]))
    BEGUN.append(key)
    item = groups[key].pop(0)
    if not groups[key]:
        del groups[key]
    return item


def _leave_if_over(
    session: pytest.Session,
    story: str | None,
    groups: Mapping[tuple[str | None, str], object],
    following: pytest.Item | None,
) -> None:
    """Let a story's targets go when its last test is over."""
    left = {name for name, _ in groups} | {_told_of(following) if following else None}
    stories = session.stash.get(STORIES_TOLD, None)
    if story is not None and story not in left and stories is not None:
        stories.leave(story)


# Set when no test is left that is about no story, but for those that mostly wait.
ROOM = threading.Event()
# The stories that are being told, and which module of which story was begun, in this order.
TELLING: dict[str, Tale] = {}
BEGUN: list[tuple[str | None, str]] = []


@dataclass
class Stories:
    """What is being told, and which stories had a failing test."""

    told: dict[str, Tale]
    failed: set[str]
    down: dict[str, threading.Thread] = field(default_factory=dict)
    """Those whose tests are over and well, on their way down: an idle VM takes a fifth of a processor."""

    def leave(self, name: str) -> None:
        """Every test of a story is over: its targets go, unless a test failed."""
        if name in self.told and name not in self.failed and name not in self.down:
            self.down[name] = threading.Thread(target=self.told[name].lab.down)
            self.down[name].start()


STORIES_TOLD: pytest.StashKey[Stories] = pytest.StashKey()


def _told_of(item: pytest.Item) -> str | None:
    """The story a test is about."""
    parameters = getattr(item, "callspec", None)
    return parameters.params.get("story") if parameters else None


def _missing(kind: str) -> str:
    """What this machine lacks for a target of that kind, as a sentence, or nothing."""
    if os.geteuid() != 0:
        return "the lab needs root on this machine; run `make test` as root"
    programs = {"container": ("ip", "docker"), "vm": ("ip", "vagrant", "virsh")}[kind]
    lacking = [program for program in programs if shutil.which(program) is None]
    return f"{', '.join(lacking)} not installed; `python -m lab doctor` says how to get it" if lacking else ""


@pytest.fixture(scope="session")
def stories(request: pytest.FixtureRequest) -> Iterator[Stories]:
    """Start every story that a selected test is about; all run at the same time."""
    wanted = [name for name in STORIES if any(_told_of(item) == name for item in request.session.items)]
    told: dict[str, Tale] = {}
    for name in wanted:
        if in_ci() or not _missing(_kind(name)):
            told[name] = _tell(name, told, request.session.items)
    TELLING.update(told)
    stories = Stories(told, set())
    request.session.stash[STORIES_TOLD] = stories
    yield stories
    for name, tale in told.items():
        if name in stories.failed:
            tale.lab.collect()
        elif name in stories.down:
            stories.down[name].join()
        else:
            tale.lab.down()


@pytest.fixture(scope="session")
def background(stories: Stories, request: pytest.FixtureRequest) -> Iterator[Waits]:
    """What is told beside other tests. The lockout matrix takes longest, and begins with the stories."""
    waits = Waits(request.session)
    try:
        if in_ci() or not _missing("container"):
            waits.begin("lockout", campaign_of_ci)
        yield waits
    finally:
        waits.close()


@pytest.fixture(scope="session", autouse=True)
def _stories_begin(background: Waits) -> None:
    """Before the first test, whatever it is about."""


def _tell(name: str, told: Mapping[str, Tale], items: Sequence[pytest.Item]) -> Tale:
    """Begin a story. One of hosts that are not blank waits for its turn (see above)."""
    if name in BLANK:
        drifts = any(Path(item.path).name == "test_drift.py" and _told_of(item) == name for item in items)
        # A VM's belong to its turn: two that are emulated would take all that this machine has.
        return tell(name, STORIES[name], then=_tell_drifts if drifts and _kind(name) == "vm" else None)
    before = [tale.chapters for other, tale in told.items() if _kind(other) == _kind(name)]

    def turn() -> None:
        for chapters in before:
            chapters.wait()
        if _kind(name) == "container":
            ROOM.wait()

    return variants.tell(name, STORIES[name], checks=CHECKS, turn=turn)


def _tell_drifts(tale: Tale) -> None:
    drifted(tale).story.wait()


@pytest.fixture
def guest(tale: Tale, guest_name: str) -> variants.Guest:
    """The host that is not blank a test is about."""
    assert isinstance(tale, variants.Variants)
    return tale.guest(guest_name)


@pytest.fixture
def tale(story: str, stories: Stories, request: pytest.FixtureRequest) -> Iterator[Tale]:
    """The story a test is about."""
    if story not in stories.told:
        pytest.skip(f"story {story}: {_missing(_kind(story))}")
    before = request.session.testsfailed
    yield stories.told[story]
    if request.session.testsfailed > before or request.node.stash.get(FAILED, False):
        stories.failed.add(story)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note on the test that it failed, for the fixtures that then keep their targets."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture(scope="session")
def needs_containers() -> None:
    """Skip, with the reason, where this machine can have no container targets; never in CI."""
    if not in_ci() and (lacking := _missing("container")):
        pytest.skip(lacking)


@pytest.fixture(scope="session")
def blank(
    stories: Stories, request: pytest.FixtureRequest, needs_containers: None
) -> Iterator[tuple[Lab, str]]:
    """A lab of its own with one blank host, for what must go wrong on it, one test after the other."""
    with own_lab("faults", request.session, asked_by="blank") as lab:
        yield lab, lab.up(kind="container", distro="trixie")


@pytest.fixture(scope="session")
def waits(background: Waits, needs_containers: None) -> Waits:
    """What mostly waits, in the background: the rest of it begins here, whichever is asked for first."""
    background.begin("guarded", Guarded.begun)
    background.begin("ways", Ways.begun)
    background.begin("patient", Patient.begun)
    return background


@pytest.fixture(scope="session")
def guarded(waits: Waits) -> Guarded:
    """Hosts whose addresses change, and hosts under a guard; their stories are being told."""
    told: Guarded = waits.told("guarded")
    return told


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A directory for keys nobody knows."""
    return tmp_path


DIFFERENCES: pytest.StashKey[list[str]] = pytest.StashKey()
SECONDS: dict[str, float] = defaultdict(float)
SKIPPED: list[str] = []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Compare what the tests recorded with the page in the docs; the summary names each difference.

    It fails nothing: what a user sees when two things go wrong at once depends on which comes first. The page
    is made from a run of everything that CI runs. A part of that is compared with its part of the page, and a
    larger run may know more.
    """
    larger = in_test_all()
    run = record.recorded()
    whole = _is_everything(session.config) and exitstatus == pytest.ExitCode.OK and not (larger or SKIPPED)
    if whole and run:
        (record.directory() / table.WHOLE).touch()
    found = table.differences(table.page_rows(), run, whole=whole, more=larger)
    session.config.stash[DIFFERENCES] = found


def _is_everything(config: pytest.Config) -> bool:
    """Whether the run was asked for all end-to-end tests."""
    options = ("keyword", "markexpr", "lf", "deselect", "ignore", "collectonly")
    selected = any(getattr(config.option, name, None) for name in options)
    return not selected and [Path(arg).resolve() for arg in config.args] == [Path(__file__).parent]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up what each module costs, and note what was skipped."""
    SECONDS[report.nodeid.partition("::")[0]] += report.duration
    if report.skipped:
        SKIPPED.append(report.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Where the time went, and what the docs say otherwise."""
    if SECONDS:
        terminalreporter.section("seconds")
    for module, seconds in SECONDS.items():
        terminalreporter.line(f"{seconds:7.0f} s  {module}")
    for told in TOLD:
        times = ", ".join(f"{name} {seconds:.0f}" for name, seconds in told.seconds.items())
        terminalreporter.line(f"{sum(told.seconds.values()):7.0f} s  story {told.name}: {times}")
    if found := config.stash.get(DIFFERENCES, []):
        terminalreporter.section(f"{table.PAGE.relative_to(record.ROOT)} says otherwise", red=True)
        for line in found:
            terminalreporter.line(line)
        terminalreporter.line(f"When the run is right: `{table.COMMAND}`, and commit the page.")
