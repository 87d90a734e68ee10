"""The model of a search that is spread over nodes, against what queueing theory says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from retrieval_model import Cluster, Costs, PowerLaw, latencies, plan, queued

COSTS = Costs(
    fixed_s=1e-5,
    unit_s=1e-7,
    far_s=1e-7,
    work=PowerLaw.fitted(np.array([100.0, 200.0, 400.0]), *np.array([[1e4, 4e4, 1e4], [1, 1, 4]])),
    width=PowerLaw(0.0, (0.0,)),
    vector_bytes=2000.0,
    spread=0.0,
    build_s=1e-3,
)
CLUSTER = Cluster(
    cores=10, memory_gib=100, usable=0.5, row_bytes=500, request_ms=1, stall=0, network_ms=1e-9,
    network_p99_ms=2e-9,
)  # fmt: skip


def test_a_power_law_is_found_again() -> None:
    x, y = np.array([10.0, 100, 1000, 50]), np.array([3.0, 5, 2, 8])
    law = PowerLaw.fitted(7 * x**0.5 * y**-1.5, x, y)
    assert law.powers == pytest.approx((0.5, -1.5))
    assert law(400, 4) == pytest.approx(7 * 20 / 8)


def test_costs_and_plan_add_up() -> None:
    assert COSTS.compared(40_000) == pytest.approx(200)
    assert COSTS.segment_s(40_000) == pytest.approx(1e-5 + 200 * 2e-7)
    wanted = plan(COSTS, CLUSTER, 10**8, 40_000)
    assert wanted.segments == 2500
    assert wanted.memory_gib == pytest.approx(10**8 * 2500 / 2**30)
    assert wanted.nodes == 5  # 233 GiB, 50 a node
    assert wanted.core_ms == pytest.approx(2500 * 0.05)
    assert wanted.queries_per_s == pytest.approx(5 * 10 * 0.5 / 0.125)
    assert wanted.build_core_hours == pytest.approx(10**5 / 3600)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_the_queue_of_one_core_is_that_of_theory(load: float) -> None:
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(rng.exponential(1.0, 40_000))
    taken = queued(arrivals, lambda _: rng.exponential(load, (1, 1)), 1, 1)
    assert taken.mean() == pytest.approx(load / (1 - load), rel=0.1)  # M/M/1


def test_the_tasks_of_a_query_share_the_cores_of_a_node() -> None:
    tasks = np.array([[3.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    taken = queued(np.array([0.0, 100.0, 101.0]), lambda _: tasks, 2, 2)
    assert taken[0].tolist() == [4.0, 2.0]  # the fourth task starts when the third is done
    assert taken[1].tolist() == [4.0, 2.0]
    assert taken[2].tolist() == [7.0, 3.0]  # both cores have still to do


def test_an_idle_cluster_answers_in_the_time_of_its_slowest_node() -> None:
    idle = replace(CLUSTER, utilisation=1e-6)
    wanted = plan(COSTS, idle, 10**8, 40_000)
    taken = latencies(COSTS, idle, wanted, 40_000, 50)
    assert taken["plain"] == pytest.approx(1e-3 + 2500 / 5 / 10 * 5e-5)


def test_stalls_make_the_tail_of_many_nodes_and_a_second_copy_cuts_it() -> None:
    costs = replace(COSTS, spread=0.2)
    stalling = replace(CLUSTER, stall=0.005, stall_ms=1000, utilisation=0.1)
    tails = []
    for total in (2 * 10**7, 10**9):
        wanted = plan(costs, stalling, total, 4_000_000)
        taken = latencies(costs, stalling, wanted, 4_000_000, 1000)
        tails.append(np.percentile(taken["plain"], 95))
        assert np.all(taken["hedged"] <= taken["plain"])
    assert tails[1] > 0.1 > tails[0]  # of one node 0.5 % stall, of 47 nodes 21 % of the queries
    assert np.percentile(taken["hedged"], 95) < 0.1
