"""Model of a search that is spread over nodes: memory, cost of a query, latency.

A collection is cut at random into segments of equal size, each with an index of its own, and the
segments lie evenly on nodes. Every query goes to all nodes at once; a node puts one task a segment
in its queue, which its cores work off in the order of arrival; the query is done when the slowest
node is. Nothing here is measured: what is stands in `Costs`, the assumptions in `Cluster`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmedge.specs import Array

__all__ = ["Cluster", "Costs", "Plan", "PowerLaw", "latencies", "plan", "queued"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Assumptions about nodes, rows, network and load.

    Attributes:
        cores: Of a node.
        memory_gib: Of a node.
        usable: Share of a node's memory that vectors and rows may take.
        row_bytes: Of an item beside its vector: id, fields, text.
        utilisation: Share of the cores' time that queries take.
        request_ms: What a query costs beside the segments: client, proxy, merge.
        network_ms: Median of a round trip between proxy and node.
        network_p99_ms: Its 99th percentile; it is log-normal.
        stall: Probability that a node holds a query up (garbage collection, a page fault).
        stall_ms: For how long, on average; it is exponential.
    """

    cores: int = 16
    memory_gib: float = 128.0
    usable: float = 0.75
    row_bytes: int = 600
    utilisation: float = 0.5
    request_ms: float = 3.0
    network_ms: float = 0.2
    network_p99_ms: float = 1.0
    stall: float = 0.001
    stall_ms: float = 20.0


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """exp(constant) * product of x ** power."""

    constant: float
    powers: tuple[float, ...]

    @classmethod
    def fitted(cls, values: Array, *xs: Array) -> PowerLaw:
        """Fit by least squares of the logarithms."""
        logs = np.log(np.stack([np.asarray(x, np.float64) for x in xs], axis=1))
        design = np.column_stack([np.ones(len(logs)), logs])
        found, *_ = np.linalg.lstsq(design, np.log(np.asarray(values, np.float64)), rcond=None)
        return cls(float(found[0]), tuple(float(each) for each in found[1:]))

    def __call__(self, *xs: float) -> float:
        """Return the value at a point."""
        terms = (power * math.log(x) for power, x in zip(self.powers, xs, strict=True))
        return math.exp(self.constant + sum(terms))


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """What one engine costs, as measured.

    Attributes:
        fixed_s: CPU seconds of a search in a segment, beside comparing vectors.
        unit_s: CPU seconds to compare the query with one vector.
        far_s: Seconds more for one vector of a segment much larger than the measured ones.
        work: Vectors compared, as a power law of the segment's vectors and the search width.
        width: Search width at the wanted recall, as a power law of the segment's vectors.
        vector_bytes: Memory of a vector and its share of the index.
        spread: Standard deviation of the logarithm of the vectors compared, over queries.
        build_s: CPU seconds to index one vector, at the largest measured size.
    """

    fixed_s: float
    unit_s: float
    far_s: float
    work: PowerLaw
    width: PowerLaw
    vector_bytes: float
    spread: float
    build_s: float

    def compared(self, vectors: int) -> float:
        """Return the vectors compared in a segment, at the wanted recall."""
        return self.work(vectors, max(1.0, self.width(vectors)))

    def segment_s(self, vectors: int) -> float:
        """Return the mean CPU seconds of a search in a segment."""
        return self.fixed_s + (self.unit_s + self.far_s) * self.compared(vectors)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a collection needs.

    Attributes:
        segments: Of the whole collection.
        nodes: That hold one copy of it in memory.
        memory_gib: Of one copy.
        core_ms: CPU time of a query, all segments together.
        queries_per_s: That one copy takes at the assumed utilisation.
        build_core_hours: CPU time to index everything once.
    """

    segments: int
    nodes: int
    memory_gib: float
    core_ms: float
    queries_per_s: float
    build_core_hours: float


def plan(costs: Costs, cluster: Cluster, vectors: int, segment: int) -> Plan:
    """Return what a collection needs.

    Args:
        costs: Of the engine.
        cluster: Assumptions.
        vectors: In the collection.
        segment: Vectors in a segment.
    """
    segments = math.ceil(vectors / segment)
    memory = vectors * (costs.vector_bytes + cluster.row_bytes) / 2**30
    nodes = math.ceil(memory / (cluster.memory_gib * cluster.usable))
    core_s = segments * costs.segment_s(segment)
    capacity = nodes * cluster.cores * cluster.utilisation
    hours = vectors * costs.build_s / 3600
    return Plan(segments, nodes, memory, core_s * 1e3, capacity / core_s, hours)


def queued(arrivals: Array, tasks: Callable[[int], Array], nodes: int, cores: int) -> Array:
    """Return the (T, nodes) seconds from each query's arrival until each node has done its tasks.

    Args:
        arrivals: (T,) seconds, ascending.
        tasks: Called with 0 to T - 1; returns (nodes, tasks) seconds of each task.
        nodes: That each query goes to.
        cores: Of a node; the first that is free takes the next task.
    """
    free = np.zeros((nodes, cores))
    every = np.arange(nodes)
    taken = np.empty((len(arrivals), nodes))
    for number, arrival in enumerate(arrivals):
        last = np.zeros(nodes)
        for seconds in tasks(number).T:
            core = free.argmin(axis=1)
            done = np.maximum(free[every, core], arrival) + seconds
            free[every, core] = done
            last = np.maximum(last, done)
        taken[number] = last - arrival
    return taken


def latencies(
    costs: Costs, cluster: Cluster, wanted: Plan, segment: int, queries: int, seed: int = 0
) -> dict[str, Array]:
    """Simulate queries that arrive at random; return their seconds, (queries,) each.

    `plain` waits for the slowest node. `hedged` asks a second copy as well where a node has not
    answered within its 95th percentile, and takes the first answer; the 5 % more load is left out.
    """
    rng = np.random.default_rng(seed)
    rate = wanted.queries_per_s
    arrivals = np.cumsum(rng.exponential(1 / rate, queries))
    each = math.ceil(wanted.segments / wanted.nodes)
    # A query that is hard in one segment is taken to be as hard in all others.
    hard = rng.lognormal(-(costs.spread**2) / 2, costs.spread, queries)
    compare_s = (costs.unit_s + costs.far_s) * costs.compared(segment)

    def tasks(number: int) -> Array:
        return np.full((wanted.nodes, each), costs.fixed_s + compare_s * hard[number])

    taken = queued(arrivals, tasks, wanted.nodes, cluster.cores)
    sigma = math.log(cluster.network_p99_ms / cluster.network_ms) / 2.326
    taken += cluster.network_ms / 1e3 * rng.lognormal(0, sigma, taken.shape)
    stalled = rng.random(taken.shape) < cluster.stall
    taken += stalled * rng.exponential(cluster.stall_ms / 1e3, taken.shape)
    limit = np.percentile(taken, 95)
    second = limit + rng.permuted(taken, axis=0)
    request = cluster.request_ms / 1e3
    return {
        "plain": request + taken.max(axis=1),
        "hedged": request + np.minimum(taken, second).max(axis=1),
    }
