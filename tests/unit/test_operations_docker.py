"""How daemon.json is merged, and which packages a release has."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operations import docker

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = st.text(max_size=12) | st.sampled_from(["ip", "log-opts", "log-driver", "default-network-opts"])
configs = st.dictionaries(keys, values, max_size=5)


def wanted(config: dict[str, Any] | None, *, network_defaults: bool = True) -> dict[str, Any]:
    text = None if config is None else json.dumps(config)
    document = json.loads(docker.merged(text, network_defaults=network_defaults).text)
    assert isinstance(document, dict)
    return document


@given(configs)
def test_keys_that_are_not_ours_stay_and_a_second_merge_changes_nothing(config: dict[str, Any]) -> None:
    first = docker.merged(json.dumps(config), network_defaults=True)
    document = json.loads(first.text)
    ours = {"ip", "live-restore", "log-driver", "log-opts", "default-network-opts"}
    assert {key: value for key, value in document.items() if key not in ours} == {
        key: value for key, value in config.items() if key not in ours
    }
    assert document["ip"] == "127.0.0.1"
    assert document["live-restore"] is True
    second = docker.merged(first.text, network_defaults=True)
    assert (second.text, second.changed) == (first.text, False)


def test_a_log_driver_that_was_chosen_stays() -> None:
    assert wanted({"log-driver": "journald"})["log-driver"] == "journald"
    assert "log-opts" not in wanted({"log-driver": "journald"})


def test_rotation_that_was_chosen_stays() -> None:
    assert wanted({"log-opts": {"max-size": "1g"}})["log-opts"] == {"max-size": "1g", "max-file": "3"}


def test_network_defaults_only_where_the_engine_has_them() -> None:
    assert "default-network-opts" in wanted(None)
    assert "default-network-opts" not in wanted(None, network_defaults=False)
    other = {"default-network-opts": {"bridge": {"com.docker.network.driver.mtu": "1280"}, "macvlan": {}}}
    assert wanted(other)["default-network-opts"] == {
        "bridge": {"com.docker.network.driver.mtu": "1280", docker.BIND_OPTION: "127.0.0.1"},
        "macvlan": {},
    }


@pytest.mark.parametrize(
    ("source", "codename", "has"),
    [("debian", "trixie", True), ("debian", "bookworm", False), ("docker", "bookworm", True)],
)
def test_which_engines_have_network_defaults(source: str, codename: str, has: bool) -> None:
    assert docker.has_network_defaults(source=source, codename=codename) is has


@pytest.mark.parametrize("text", ["{", "[]", "3", '"text"', "null"])
def test_what_is_no_object_is_refused_and_not_overwritten(text: str) -> None:
    result = docker.merged(text, network_defaults=True)
    assert result.refusal is not None
    assert result.text == ""


@pytest.mark.parametrize(
    ("fact", "source", "refused"),
    [
        ({"source": None, "containers": 0}, "docker", False),
        ({"source": "debian", "containers": 3}, "debian", False),
        ({"source": "debian", "containers": 0}, "docker", False),
        ({"source": "debian", "containers": 3}, "docker", True),
    ],
)
def test_the_engine_stays_under_containers(fact: dict[str, Any], source: str, refused: bool) -> None:
    assert (docker.source_refusal(fact, source) is not None) is refused


def port(container: str, host_ip: str, number: int) -> dict[str, Any]:
    return {
        "container": container,
        "host_ip": host_ip,
        "host_port": number,
        "container_port": 80,
        "protocol": "tcp",
    }


def test_ports_that_were_published_on_every_address_are_named_once() -> None:
    assert docker.on_every_address([]) == []
    assert docker.on_every_address([port("web", "127.0.0.1", 80), port("db", "100.64.0.1", 81)]) == []
    ports = [port("web", "0.0.0.0", 8080), port("web", "::", 8080), port("shop_db_1", "0.0.0.0", 5432)]
    (sentence,) = docker.on_every_address([*ports, port("quiet", "::1", 1)])
    assert "shielded by the chain alone: 5432/tcp of shop_db_1, 8080/tcp of web." in sentence
    assert "quiet" not in sentence
