"""A rule as `ufw show added` prints it, without its leading "ufw " (ufw 0.36.2, parser.py get_command)."""

from __future__ import annotations

# Begins the comment of every rule of ours.
MARK = "quietport: "


def parse_added(text: str) -> list[str]:
    """The rules in what `ufw show added` printed."""
    return [line.removeprefix("ufw ").strip() for line in text.splitlines() if line.startswith("ufw ")]


def shown(text: str, why: str) -> str:
    """The rule `text` with our mark and the reason, as ufw shows it."""
    return f"{text} comment '{MARK}{why}'"


def bare(rule: str) -> str:
    """A shown rule without its comment: what `ufw delete` takes."""
    return rule.partition(" comment '")[0]


def is_ours(rule: str) -> bool:
    """Whether a shown rule carries our mark."""
    return f" comment '{MARK}" in rule


def traffic(rule: str) -> str:
    """What a rule is about, whatever it does with it: ufw keeps one rule for that, the last one given."""
    _, *words = bare(rule).split()
    return " ".join(word for word in words if word not in ("log", "log-all"))


def words_of(rule: str) -> list[str]:
    """A shown rule as arguments. Application profiles have blanks in their names and stand in quotes."""
    words: list[str] = []
    for at, part in enumerate(rule.split("'")):
        words += [part] if at % 2 else part.split()
    return words
