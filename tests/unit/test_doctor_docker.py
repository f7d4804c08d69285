"""The doctor's look at Docker: the engine, its containers, compose, and the chain."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietport import docker_user
from quietport.docker_user import MARK, PLACES, Fault, Port, is_late, problems, rules
from quietport.doctor import docker as checks
from quietport.doctor.docker import ask_engine, compose, docker, shielded, trouble
from quietport.doctor.model import Check, Finding
from quietport.doctor.place import Place
from quietport.doctor.run import Row, run, state_of
from quietport.errors import PROBLEM, HostProgramError
from tests.unit.doctor_place import DECLARED, World, commands, only, statuses

WITH_DOCKER = {**DECLARED, "docker_source": "debian"}
WEB = {
    "Id": "0123456789abcdef",
    "Names": ["/shop-web-1"],
    "State": "running",
    "Status": "Up 5 minutes (healthy)",
    "Labels": {checks.PROJECT: "shop", checks.COMPOSE_SERVICE: "web", checks.ONE_OFF: "False"},
}
ALONE = {**WEB, "Names": ["/alone"], "Labels": {}}
INFO = {"LiveRestoreEnabled": True, "ServerVersion": "26.1.5"}


def engine(
    *containers: Any, info: Any = INFO, policy: str = "always", code: int = 137
) -> Callable[[str], Any]:
    def ask(path: str) -> Any:
        if path == "/info":
            return info
        if path.startswith("/containers/json"):
            return list(containers)
        return {"HostConfig": {"RestartPolicy": {"Name": policy}}, "State": {"ExitCode": code}}

    return ask


def silent(path: str) -> Any:
    raise HostProgramError("Docker does not answer (TimeoutError).")


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.process("dockerd")
    return world


# --- the engine ---------------------------------------------------------------------------------------


def test_an_engine_that_is_well(world: World) -> None:
    found = docker(WITH_DOCKER, place=world.place, ask=engine(WEB, ALONE))
    assert only(found, "PASS").reason == "The engine answers; running containers: 2."


@pytest.mark.parametrize("declared", [{}, DECLARED, {**DECLARED, "docker_source": "none"}])
@pytest.mark.parametrize("check", [docker, compose, shielded])
def test_where_no_docker_is_declared_nothing_is_asked(
    tmp_path: Path, check: Callable[..., Any], declared: dict[str, Any]
) -> None:
    world = World(tmp_path)
    only(check(declared, place=world.place), "SKIP")
    assert world.asked == []


@pytest.mark.parametrize(
    ("unit", "typed"),
    [
        ({"LoadState": "not-found", "ActiveState": "inactive"}, "quietport apply vps1"),
        ({"LoadState": "masked", "ActiveState": "inactive"}, "systemctl unmask docker.service"),
        ({"UnitFileState": "disabled"}, "systemctl enable docker.service"),
        ({"ActiveState": "inactive"}, "systemctl start docker.service"),
        ({"ActiveState": "failed"}, "systemctl reset-failed docker.service"),
    ],
)
def test_an_engine_that_is_not_as_declared(world: World, unit: dict[str, str], typed: str) -> None:
    world.units[checks.SERVICE] = unit
    found = only(docker(WITH_DOCKER, place=world.place, ask=engine()), "FAIL")
    assert typed in commands(found)


def test_an_engine_that_does_not_run_is_not_asked(tmp_path: Path) -> None:
    """docker.socket would start it."""
    world = World(tmp_path)
    (tmp_path / "proc").mkdir()
    asked: list[str] = []
    only(docker(WITH_DOCKER, place=world.place, ask=asked.append), "FAIL")
    only(compose(WITH_DOCKER, place=world.place, ask=asked.append), "SKIP")
    assert asked == []


def test_an_engine_that_does_not_answer(world: World) -> None:
    found = only(docker(WITH_DOCKER, place=world.place, ask=silent), "FAIL")
    assert commands(found) == ["systemctl restart docker.service"]
    with pytest.raises(HostProgramError):
        compose(WITH_DOCKER, place=world.place, ask=silent)


def test_live_restore_that_is_off_is_for_the_converge(world: World) -> None:
    found = docker(WITH_DOCKER, place=world.place, ask=engine(info={"LiveRestoreEnabled": False}))
    assert commands(only(found, "WARN")) == ["quietport apply vps1"]


# --- containers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "policy", "code", "of_compose", "alone"),
    [
        ({}, "always", 0, "", ""),
        ({"Status": "Up 2 seconds (health: starting)"}, "always", 0, "", ""),
        ({"Status": "Up 2 hours (unhealthy)"}, "always", 0, "is unhealthy", "is unhealthy"),
        ({"State": "restarting"}, "always", 1, "is restarting", "is restarting"),
        ({"State": "paused"}, "no", 0, "is paused", "is paused"),
        ({"State": "dead"}, "no", 0, "is dead", "is dead"),
        ({"State": "created"}, "no", 0, "was never started", ""),
        ({"State": "exited"}, "no", 0, "", ""),
        ({"State": "exited"}, "", 0, "", ""),
        ({"State": "exited"}, "no", 1, "ended with exit code 1", ""),
        ({"State": "exited"}, "on-failure", 1, "ended with exit code 1", "ended with exit code 1"),
        ({"State": "exited"}, "unless-stopped", 143, "does not run (exit code 143)", ""),
        ({"State": "exited"}, "always", 0, "does not run (exit code 0)", "does not run (exit code 0)"),
        ({"State": ""}, "no", 0, "is in no state that is known", "is in no state that is known"),
    ],
)
def test_a_container_in_trouble(
    change: dict[str, str], policy: str, code: int, of_compose: str, alone: str
) -> None:
    for container, said in ((WEB, of_compose), (ALONE, alone)):
        found = trouble({**container, **change}, engine(policy=policy, code=code))
        assert found.startswith(said) and bool(found) == bool(said), container["Names"]


def test_services_are_for_compose_and_the_others_for_docker(world: World) -> None:
    sick = {"State": "restarting"}
    ask = engine({**WEB, **sick}, {**ALONE, **sick})
    of_compose = only(compose(WITH_DOCKER, place=world.place, ask=ask), "FAIL")
    assert of_compose.reason == "The service shop/web (shop-web-1) is restarting."
    assert commands(of_compose) == ["docker logs --tail 20 shop-web-1", "docker restart shop-web-1"]
    assert only(docker(WITH_DOCKER, place=world.place, ask=ask), "FAIL").reason.startswith(
        "The container alone "
    )


def test_compose_that_is_well_and_compose_that_is_not_there(world: World) -> None:
    one_off = {**WEB, "State": "exited", "Labels": {**WEB["Labels"], checks.ONE_OFF: "True"}}  # type: ignore[dict-item]
    found = compose(WITH_DOCKER, place=world.place, ask=engine(WEB, one_off))
    assert only(found, "PASS").reason == "Every service is well: shop."
    only(compose(WITH_DOCKER, place=world.place, ask=engine(ALONE)), "SKIP")


@pytest.mark.parametrize(
    ("state", "typed"),
    [
        ("exited", "docker start"),
        ("created", "docker start"),
        ("paused", "docker unpause"),
        ("dead", "docker restart"),
    ],
)
def test_the_next_step_fits_the_state(world: World, state: str, typed: str) -> None:
    found = compose(WITH_DOCKER, place=world.place, ask=engine({**WEB, "State": state}))
    assert commands(only(found, "FAIL"))[-1] == f"{typed} shop-web-1"


@given(st.text(), st.text())
def test_names_that_somebody_chose_are_not_typed_or_shown_as_they_are(name: str, label: str) -> None:
    container = {**WEB, "Names": [name], "Labels": {checks.PROJECT: label}, "State": "dead"}
    (found,) = checks._in_trouble([container], engine())
    assert found.reason.isprintable()
    typed = commands(found)[-1].split(" ")
    assert typed[:2] == ["docker", "restart"]
    assert typed[2:] in ([name.lstrip("/")], ["0123456789ab"])


@pytest.mark.parametrize("answer", [{}, None, [1], "x"])
def test_an_answer_that_is_not_understood_is_no_answer(world: World, answer: Any) -> None:
    def ask(path: str) -> Any:
        return INFO if path == "/info" else answer

    with pytest.raises(HostProgramError, match="not understood"):
        docker(WITH_DOCKER, place=world.place, ask=ask)


@pytest.mark.parametrize(
    ("sent", "value"),
    [
        (b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"a": 1}\n', {"a": 1}),
        (b"HTTP/1.1 500 Broken\r\nContent-Length: 2\r\n\r\n{}", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", None),
        (b"hello\r\n", None),
        (b"", None),
    ],
)
def test_the_engine_is_asked_over_its_socket(tmp_path: Path, sent: bytes, value: Any) -> None:
    path = str(tmp_path / "docker.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        got: list[bytes] = []

        def serve() -> None:
            with server.accept()[0] as connection:
                got.append(connection.recv(4096))
                connection.sendall(sent)

        thread = threading.Thread(target=serve)
        thread.start()
        if value is None:
            with pytest.raises(HostProgramError):
                ask_engine("/info", at=path)
        else:
            assert ask_engine("/info", at=path) == value
        thread.join()
    assert got[0].startswith(b"GET /info HTTP/1.1\r\n")
    with pytest.raises(HostProgramError, match="does not answer"):
        ask_engine("/info", at=str(tmp_path / "none"))


# --- cut short ----------------------------------------------------------------------------------------


def told(look: Callable[..., list[Finding]], place: Place, **more: Any) -> list[Row]:
    """The rows of a check that the doctor runs."""
    check = Check("one", lambda declared: look(declared, place=place, **more))
    return run([check], WITH_DOCKER)["one"]


def cut(rows: list[Row], reason: str) -> None:
    assert [(one.status, one.told) for one in rows] == [("FAIL", True), ("SKIP", False)], rows
    assert reason in rows[0].reason
    assert state_of(rows) == "fail"


def test_what_was_found_is_told_also_when_the_engine_falls_silent(world: World) -> None:
    world.units[checks.SERVICE] = {"UnitFileState": "disabled"}

    def ask(path: str) -> Any:
        return INFO if path == "/info" else silent(path)

    cut(told(docker, world.place, ask=ask), "it does not start at boot")


@pytest.mark.parametrize(("check", "first"), [(docker, ALONE), (compose, WEB)])
def test_a_container_in_trouble_is_told_also_when_the_next_one_cannot_be(
    world: World, check: Callable[..., list[Finding]], first: dict[str, Any]
) -> None:
    known = engine({**first, "State": "dead"}, {**first, "State": "exited"})

    def ask(path: str) -> Any:
        return silent(path) if path.endswith("/0123456789abcdef/json") else known(path)

    cut(told(check, world.place, ask=ask), "is dead")


def test_a_chain_that_is_not_there_at_boot_is_told_also_when_its_rules_cannot_be(world: World) -> None:
    world.units[checks.CHAIN_UNIT] = {"UnitFileState": "disabled"}

    def mute() -> list[Fault]:
        raise HostProgramError("iptables failed.")

    cut(told(shielded, world.place, faults=mute, ask=silent), "active and disabled")

    def refused() -> list[Fault]:
        raise HostProgramError("Docker makes no firewall rules.", code=PROBLEM)

    rows = told(shielded, world.place, faults=refused, ask=silent)
    assert [one.status for one in rows] == ["FAIL", "FAIL"]


# --- the chain ----------------------------------------------------------------------------------------


def test_the_chain_as_wanted_and_what_it_shields(world: World) -> None:
    ports = [
        {"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"},
        {"IP": "::", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"},
        {"IP": "127.0.0.1", "PrivatePort": 80, "PublicPort": 8081, "Type": "tcp"},
        {"PrivatePort": 82, "Type": "tcp"},
    ]
    ask = engine({**WEB, "Ports": ports}, ALONE)
    found = shielded(WITH_DOCKER, place=world.place, faults=list, ask=ask)
    assert only(found, "PASS").reason.endswith(" shielded by it: 8080/tcp.")
    found = shielded(WITH_DOCKER, place=world.place, faults=list, ask=engine({**WEB, "Ports": ports[2:]}))
    assert only(found, "PASS").reason == "The chain is in place."


def test_a_chain_that_is_not_as_wanted(world: World) -> None:
    wrong = [Fault("iptables filter: x"), Fault("iptables mangle: y", late=True)]
    found = shielded(WITH_DOCKER, place=world.place, faults=lambda: wrong, ask=silent)
    assert statuses(found) == ["FAIL", "WARN"]
    assert commands(found[0]) == [f"systemctl reload-or-restart {checks.CHAIN_UNIT}"]


@pytest.mark.parametrize(
    ("unit", "typed"),
    [
        ({"LoadState": "not-found"}, "quietport apply vps1"),
        ({"UnitFileState": "disabled"}, f"systemctl enable --now {checks.CHAIN_UNIT}"),
        ({"ActiveState": "failed"}, f"systemctl enable --now {checks.CHAIN_UNIT}"),
    ],
)
def test_a_chain_that_is_not_there_at_boot(world: World, unit: dict[str, str], typed: str) -> None:
    world.units[checks.CHAIN_UNIT] = unit
    found = shielded(WITH_DOCKER, place=world.place, faults=list, ask=engine())
    assert commands(only(found, "FAIL")) == [typed]


def test_an_engine_without_iptables_is_a_failure_and_silence_is_none(world: World) -> None:
    def refused(code: int) -> Callable[[], list[Fault]]:
        def ask() -> list[Fault]:
            raise HostProgramError("Docker makes no firewall rules.", code=code)

        return ask

    only(shielded(WITH_DOCKER, place=world.place, faults=refused(PROBLEM), ask=silent), "FAIL")
    with pytest.raises(HostProgramError):
        shielded(WITH_DOCKER, place=world.place, faults=refused(3), ask=silent)


INPUT, FORWARD = (
    next(place for place in PLACES if place.chain.endswith(word)) for word in ("INPUT", "FORWARD")
)
NEW = (Port("tcp", "8080"),)


def listing(place: docker_user.Place, held: list[str], jump: bool = True) -> str:
    return "\n".join([f"-P {place.origin} ACCEPT", *([place.jump] if jump else []), *held])


def test_published_ports_that_cannot_be_read_could_not_be_told(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "data/containers/1"
    folder.mkdir(parents=True)
    (folder / "hostconfig.json").write_text("{}")
    folder.chmod(0o777)
    monkeypatch.setattr(docker_user, "_daemon_json", lambda: json.dumps({"data-root": f"{tmp_path}/data"}))
    monkeypatch.setattr(docker_user, "_command_line", lambda: "")
    (one,) = told(shielded, world.place, ask=engine())
    assert (one.status, one.told) == ("SKIP", False)
    assert "can be written by others" in one.reason


def test_a_new_container_s_port_is_late_and_nothing_else_is() -> None:
    before = listing(INPUT, rules(INPUT, [Port("tcp", "9090")]))
    assert problems(INPUT, before, NEW) and is_late(INPUT, before)
    assert problems(INPUT, listing(INPUT, []), NEW) and not is_late(INPUT, listing(INPUT, []))
    assert not is_late(INPUT, listing(INPUT, rules(INPUT)[1:]))
    assert not is_late(INPUT, listing(INPUT, rules(INPUT), jump=False))
    assert not is_late(INPUT, listing(INPUT, rules(INPUT) * 2))
    assert not is_late(INPUT, listing(INPUT, [*rules(INPUT), f"-A {INPUT.chain} {MARK} -j ACCEPT"]))
    assert not is_late(FORWARD, listing(FORWARD, rules(FORWARD)))


def test_what_is_wrong_is_read_and_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = {place.table: "" for place in PLACES}
    for place in PLACES:
        good[place.table] += listing(place, rules(place)) + "\n"
    asked: list[list[str]] = []

    def output_of(argv: list[str], *, timeout: float) -> str:
        asked.append(argv)
        return good[argv[argv.index("-t") + 1]]

    config = tmp_path / "containers/1/hostconfig.json"
    config.parent.mkdir(parents=True)
    monkeypatch.setattr(docker_user, "_daemon_json", lambda: json.dumps({"data-root": str(tmp_path)}))
    monkeypatch.setattr(docker_user, "_command_line", lambda: "")
    monkeypatch.setattr(docker_user, "_programs", lambda: ("iptables",))
    monkeypatch.setattr(docker_user, "output_of", output_of)
    monkeypatch.setattr(docker_user, "run", lambda *_, **__: pytest.fail("something was changed"))
    assert docker_user.faults() == []
    config.write_text(json.dumps({"PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}}))
    (fault,) = docker_user.faults()
    assert fault.late and "QUIETPORT-INPUT" in fault.sentence
    good["filter"] = "-P FORWARD ACCEPT\n"
    assert sorted(fault.late for fault in docker_user.faults()) == [False, False, True]
    assert docker_user.main(["--check"]) == PROBLEM
    assert {argv[-1] for argv in asked} == {"-S"}
