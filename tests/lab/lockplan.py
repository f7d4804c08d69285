"""The lockout matrix as a plan: which fault comes at which moment of a converge, on which host. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOMENTS = ("before arm", "after arm", "step", "before confirm", "during confirm")
# In these a guard is armed, and the controller has not begun to confirm.
ARMED = ("after arm", "step", "before confirm")


@dataclass(frozen=True)
class Fault:
    """A kind of fault; `moments` are those it can come at."""

    name: str
    moments: tuple[str, ...]
    takes: float
    """Seconds of a round with it, about: what shares the rounds among the hosts."""
    turn: int = 1
    """Rounds of a host come in this order: what changes how its disk works is last."""
    each: bool = False
    """Whether a plan begins with one of it at every moment, not only one in all."""


FAULTS = (
    Fault("controller killed", MOMENTS, 45, each=True),
    Fault("controller frozen past the timeout", MOMENTS, 60, each=True),
    Fault("link cut for good", MOMENTS, 130, each=True),
    Fault("link cut for a while", MOMENTS, 55, each=True),
    Fault("tailscaled stopped", ARMED, 45),
    Fault("tailscale logged out", ARMED, 55),
    Fault("tailnet address changed", ARMED, 55),
    Fault("tailnet key expired", ARMED, 55),
    Fault("sshd_config broken by hand", ("before confirm",), 40),
    Fault("ufw deny for everything by hand", ARMED, 40),
    Fault("host restarted", ARMED, 60, turn=0),
    Fault("disk full at the snapshot", ("before arm",), 35, turn=2),
    Fault("disk full at the rollback", ARMED, 45, turn=2),
    Fault("two controllers, the first at work", ARMED, 40),
    Fault("two controllers, the first killed", ARMED, 50),
    Fault("rollback killed half-way", ARMED, 50),
)


@dataclass(frozen=True)
class Round:
    """A converge with a fault. `where`: which of the risky steps, from 0 to 1; `when`: how far into it."""

    number: int
    host: str
    fault: str
    moment: str
    where: float
    when: float

    @property
    def kind(self) -> Fault:
        """The fault itself."""
        return next(fault for fault in FAULTS if fault.name == self.fault)

    def step(self, steps: int) -> int:
        """Which of so many steps it is about, from 0."""
        return min(int(self.where * steps), steps - 1)

    def __str__(self) -> str:
        return f"{self.fault}, {self.moment}"


def plan(*, faults: int, seed: int, hosts: Sequence[str]) -> list[Round]:
    """The rounds of a campaign: every kind of fault first, then what the dice say; in the order of numbers.

    A longer campaign with the same seed begins with the faults of a shorter one, on other hosts perhaps.
    """
    dice = random.Random(f"{seed} lockout")  # noqa: S311
    every = [(fault, moment) for fault in FAULTS if fault.each for moment in fault.moments]
    every += [(fault, dice.choice(fault.moments)) for fault in FAULTS if not fault.each]
    dice.shuffle(every)
    while len(every) < faults:
        fault = dice.choice(FAULTS)
        every.append((fault, dice.choice(fault.moments)))
    thrown = [(fault, moment, dice.random(), dice.random()) for fault, moment in every[:faults]]
    busy = dict.fromkeys(hosts, 0.0)
    rounds: list[Round] = []
    numbered = list(enumerate(thrown, start=1))
    for number, (fault, moment, where, when) in sorted(numbered, key=lambda one: (-one[1][0].takes, one[0])):
        host = min(busy, key=lambda name: busy[name])
        busy[host] += fault.takes
        rounds.append(Round(number, host, fault.name, moment, round(where, 3), round(when, 3)))
    return sorted(rounds, key=lambda one: one.number)


def turns(rounds: Sequence[Round], host: str) -> list[Round]:
    """The rounds of a host, in the order in which they are run."""
    key: Callable[[Round], tuple[int, int]] = lambda one: (one.kind.turn, one.number)  # noqa: E731
    return sorted((one for one in rounds if one.host == host), key=key)


# What is said of a host after a round


@dataclass(frozen=True)
class Seen:
    """A host after a round: how it is otherwise than before and after, and how it answers."""

    not_old: tuple[str, ...]
    not_new: tuple[str, ...]
    public: bool
    """Whether sshd answers at its public address, over IPv4 and IPv6 both."""
    open_to_public: bool
    """Whether it answers there over either."""
    tailnet: bool
    login: bool
    """Whether the operator's own program logs in, by whichever way."""


def verdict(seen: Seen) -> str:
    """old, new, unreachable or mixture."""
    if not seen.login or not (seen.public or seen.tailnet):
        return "unreachable"
    if not seen.not_old and seen.public:
        return "old"
    if not seen.not_new and seen.tailnet and not seen.open_to_public:
        return "new"
    return "mixture"


UNDONE = "the change was undone by the host's guard"
STAYS = "the change was confirmed and stays"
UNKNOWN = "whether the change was undone is not known"
# Refused, or cut off, while the guard was being armed.
NOTHING = "nothing was changed"


def wrong_words(*, code: int, said: str, state: str, armed: bool) -> list[str]:
    """What a controller that lived to its end told wrongly, by its exit code and its closing line."""
    found = []
    lower = said.lower()
    if (code == 0) != (state == "new") and STAYS not in lower and UNKNOWN not in lower:
        found.append(f"exit code {code} of the controller, and the state is {state}")
    if code == 0 and state != "new":
        found.append(f"exit code 0, and the state is {state}")
    if UNDONE in lower and state != "old":
        found.append(f"it says that the change was undone, and the state is {state}")
    if NOTHING in lower and state != "old":
        found.append(f"it says that nothing was changed, and the state is {state}")
    if STAYS in lower and state != "new":
        found.append(f"it says that the change stays, and the state is {state}")
    if code != 0 and armed and not any(words in lower for words in (UNDONE, STAYS, UNKNOWN, NOTHING)):
        found.append("it does not say what became of the change")
    return found
