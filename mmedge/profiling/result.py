"""Profile result: one versioned JSON document with units in the names."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mmedge.notebook import html_table
from mmedge.profiling.config import ProfileConfig

__all__ = [
    "PROFILE_VERSION",
    "BaselineFigures",
    "BundleFacts",
    "Cell",
    "ColdStart",
    "GateResult",
    "Latency",
    "Machine",
    "Memory",
    "Percentile",
    "PlacementFacts",
    "Profile",
    "Ratio",
    "Spread",
    "StageBreakdown",
    "VariantFigures",
]

PROFILE_VERSION = "1.0"

_FROZEN = ConfigDict(extra="forbid", frozen=True)


class Percentile(BaseModel):
    """A latency percentile and the 95 % order-statistic interval around it."""

    model_config = _FROZEN
    value_ms: float
    low_ms: float
    high_ms: float


class Latency(BaseModel):
    """A sample of latencies.

    Attributes:
        n: Runs behind every figure here.
        mean_ms: Mean wall-clock time of a run.
        min_ms: Shortest run.
        max_ms: Longest run.
        percentiles: "p50", "p90", "p95", "p99", as far as n supports them.
        cpu_ms: Mean CPU time of a run, all threads together.
        relative_iqr: (q75 - q25) / median, how much the runs scatter.
        curve_ms: 41 quantiles from 0 to 100 % at equal steps, for plots.
    """

    model_config = _FROZEN
    n: int = Field(ge=1)
    mean_ms: float
    min_ms: float
    max_ms: float
    percentiles: dict[str, Percentile]
    cpu_ms: float
    relative_iqr: float
    curve_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median of the sample, also with too few runs for a p50 and its interval."""
        return self.curve_ms[len(self.curve_ms) // 2]


class Ratio(BaseModel):
    """Median over interleaved pairs of ours / theirs, with its 95 % interval; below 1 is faster."""

    model_config = _FROZEN
    pairs: int
    median: float
    low: float
    high: float


class BaselineFigures(BaseModel):
    """The other side of an interleaved comparison.

    Attributes:
        name: What it was.
        latency: Its runs, measured between ours.
        ratio: Ours / theirs.
    """

    model_config = _FROZEN
    name: str
    latency: Latency
    ratio: Ratio


class PlacementFacts(BaseModel):
    """Actual placement, reported by the engine."""

    model_config = _FROZEN
    backend: str
    device: str
    engine: str
    providers: dict[str, int]
    exceptions: dict[str, str]

    @property
    def summary(self) -> str:
        """Placement of the nodes as text."""
        parts = [f"{count} nodes on {name}" for name, count in self.providers.items()]
        if self.exceptions:
            parts.append(f"{len(self.exceptions)} of them elsewhere by design")
        return ", ".join(parts) or f"{self.device}, reported by {self.engine}"


class Cell(BaseModel):
    """One combination of role, variant, batch, threads and sequence length.

    Attributes:
        role: "image_encoder", ...
        variant: Variant name.
        batch: Samples a run.
        threads: Threads inside one operator.
        sequence: Tokens, for text; None otherwise.
        latency: Of one run, i.e. of the whole batch.
        throughput_per_s: Samples a second, batch / mean latency.
        placement: What really ran.
        baseline: None where none was requested or none fits the role.
        noise: Why the figures are to be doubted; empty when they are not.
    """

    model_config = _FROZEN
    role: str
    variant: str
    batch: int
    threads: int
    sequence: int | None = None
    latency: Latency
    throughput_per_s: float
    placement: PlacementFacts
    baseline: BaselineFigures | None = None
    noise: tuple[str, ...] = ()


class Spread(BaseModel):
    """Median and extremes over a few runs, too few for percentiles."""

    model_config = _FROZEN
    median: float
    low: float
    high: float


class ColdStart(BaseModel):
    """Cold start: from process start to the first output, in fresh processes.

    Attributes:
        runs: Processes started.
        first_embedding_ms: From before the process was started to the first embedding.
        load_ms: Of that, opening the bundle and the session.
        import_ms: Of that, importing mmedge.
        first_run_ms: Of that, preprocessing and running the first input.
        cpu_ms: CPU time of the process until then, all threads together: what a busy machine
            changes less.
    """

    model_config = _FROZEN
    runs: int
    first_embedding_ms: Spread
    load_ms: Spread
    import_ms: Spread
    first_run_ms: Spread
    cpu_ms: Spread


class Memory(BaseModel):
    """Resident memory of a fresh process that runs this variant alone; medians over processes.

    Attributes:
        before_load_bytes: After the imports, before the session.
        peak_bytes: Highest ever (VmHWM), loading included.
        steady_bytes: After repeated runs (VmRSS).
        anonymous_bytes: Of steady, not backed by a file; None if not reported.
        source: Where the figures were read.
    """

    model_config = _FROZEN
    before_load_bytes: int
    peak_bytes: int
    steady_bytes: int
    anonymous_bytes: int | None
    source: str


class VariantFigures(BaseModel):
    """Figures of a variant that do not depend on the batch.

    Attributes:
        role: Role name.
        variant: Variant name.
        precision: Its number format.
        size_bytes: On disk.
        cosine_mean: Quality against fp32 from the manifest; 1 for fp32 itself, None if unknown.
        cosine_p1: First percentile of the same.
        cold_start: None when not measured.
        memory: None when not measured.
    """

    model_config = _FROZEN
    role: str
    variant: str
    precision: str
    size_bytes: int
    cosine_mean: float | None = None
    cosine_p1: float | None = None
    cold_start: ColdStart | None = None
    memory: Memory | None = None


class StageBreakdown(BaseModel):
    """Stages of one end-to-end call at batch 1.

    Attributes:
        role: Role name.
        variant: Variant name.
        threads: Threads inside one operator.
        input: What went in ("1280x720 JPEG", "12 tokens").
        stages_ms: Median of each stage measured alone, in order; the last, "other", is what the
            end-to-end call takes beyond their sum (copies, checks, Python), at least 0.
        sum_ms: Sum of the measured stages, without "other".
        end_to_end: The call that a user makes, measured between the stages.
        noise: Why the figures are to be doubted; empty when they are not.
    """

    model_config = _FROZEN
    role: str
    variant: str
    threads: int
    input: str
    stages_ms: dict[str, float]
    sum_ms: float
    end_to_end: Latency
    noise: tuple[str, ...] = ()


class Machine(BaseModel):
    """The machine of the measurement."""

    model_config = _FROZEN
    cpu_model: str
    processors_online: int
    processors_allowed: tuple[int, ...]
    governor: str | None
    frequency_mhz: float | None
    load_average_before: tuple[float, float, float] | None
    load_average_after: tuple[float, float, float] | None
    memory_total_bytes: int | None
    platform: str
    versions: dict[str, str]
    harness_overhead_ns: float


class BundleFacts(BaseModel):
    """The profiled bundle."""

    model_config = _FROZEN
    name: str
    path: str
    family: str
    source: str
    created: str


class GateResult(BaseModel):
    """One gate of --fail-if, applied to one figure."""

    model_config = _FROZEN
    expression: str
    metric: str
    got: float
    op: Literal["<", "<=", ">", ">=", "=="]
    limit: float
    failed: bool


class Profile(BaseModel):
    """Profile: measurements, machine and configuration."""

    model_config = _FROZEN
    profile_version: str = Field(default=PROFILE_VERSION, pattern=r"^\d+\.\d+$")
    created: str
    bundle: BundleFacts
    machine: Machine
    config: ProfileConfig
    cells: tuple[Cell, ...]
    variants: tuple[VariantFigures, ...]
    stages: tuple[StageBreakdown, ...]
    gates: tuple[GateResult, ...] = ()
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        failed = sum(gate.failed for gate in self.gates)
        return (
            f"<Profile {self.bundle.name}: {len(self.cells)} measurements of {len(self.variants)} "
            f"variants, {len(self.gates)} gates, {failed} failed, {len(self.warnings)} warnings>"
        )

    __str__ = __repr__

    def _repr_html_(self) -> str:
        heads = ("role", "variant", "batch", "threads", "tokens", "median ms", "per second")
        rows = (
            (
                cell.role,
                cell.variant,
                str(cell.batch),
                str(cell.threads),
                "" if cell.sequence is None else str(cell.sequence),
                f"{cell.latency.median_ms:.3g}",
                f"{cell.throughput_per_s:.3g}",
            )
            for cell in self.cells
        )
        return html_table(f"Profile of {self.bundle.name}", heads, rows)
