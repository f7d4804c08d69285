"""The page of the benchmark says what was measured, and nothing else."""

from __future__ import annotations

import json

from bench import fleet
from bench.fleet import Measured


def measured() -> list[Measured]:
    found = []
    for step, wall in (("dry", 10.0), ("apply", 100.0), ("again", 8.0)):
        found.append(Measured("fleet", step, 3, wall, wall / 2, 150, 0 if step == "again" else 90))
        found += [Measured("loop", step, 1, wall / factor, 1.0, 90, 0) for factor in (2, 4, 5)]
    return found


def test_the_page_has_the_median_of_one_the_run_of_all_and_the_sum_of_the_loop() -> None:
    document = fleet.document_of(measured(), hosts=3, load=0.25)
    page = fleet.page_of(json.loads(json.dumps(document)))
    assert "| dry run | 2.5 s | 10.0 s | 4.0 | 9.5 s | 1.0 s | 5.0 s | 150 MiB |" in page
    assert "| converge of blank hosts | 25.0 s | 100.0 s | 4.0 | 95.0 s | 1.0 s | 50.0 s | 150 MiB |" in page
    assert f"{document['cores']} cores" in page
    assert document["date"] in page
    assert document["schema"] == 1


def test_changes_are_counted_by_host() -> None:
    plan = [{"hosts_with_change": ["a", "b"]}, {"hosts_with_change": []}, {"hosts_with_change": ["a"]}]
    assert fleet.changes_in({"plan": plan, "results": None}) == 3
    assert fleet.changes_in({"plan": plan, "results": {"operations": [{"success": ["b"]}]}}) == 1
