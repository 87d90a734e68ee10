"""Builder of one role's variants, checked against PyTorch and fp32."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from mmedge.bundle.manifest import Layout
from mmedge.bundle.nodes import NodeEntry, NodeTable, save_nodes, with_output_errors
from mmedge.bundle.quality import Parity, Tolerance
from mmedge.converters.distillation.graph_weights import with_graph_weights
from mmedge.converters.distillation.train import Distillation, distill
from mmedge.converters.evaluation.base import Collected, Evaluation
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.graphs.export import (
    OPSET,
    export_role,
    graph_storage_errors,
)
from mmedge.converters.graphs.nan_trace import first_nan
from mmedge.converters.graphs.parity import Probe, measure_parity, require_parity
from mmedge.converters.graphs.probe import written_beside
from mmedge.converters.graphs.worker import Worker
from mmedge.converters.methods.configs import (
    BFloat16,
    Float16,
    QuantizationConfig,
    StaticInt8,
    WeightOnly,
)
from mmedge.converters.methods.recipes import Recipe
from mmedge.converters.numerics.int8_rounding import Range
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.bfloat16 import emulate_bfloat16
from mmedge.converters.passes.int8 import quantizable_inputs, quantizable_linears
from mmedge.converters.quantization.float16_check import require_agreement
from mmedge.converters.quantization.output_errors import SENSITIVITY_SAMPLES
from mmedge.converters.quantization.quantize import quantize
from mmedge.converters.quantization.sensitivity import (
    choose_excluded,
    measure_sensitivity,
    weight_bytes,
)
from mmedge.converters.quantization.size_target import lowered_bits
from mmedge.converters.statistics.calibrator import Calibrator
from mmedge.converters.statistics.collect import Feeds
from mmedge.errors import CalibrationError, ParityError, QuantizationError
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.specs import Array, Precision

__all__ = [
    "TOLERANCES",
    "BuiltVariant",
    "RoleInputs",
    "VariantBuilder",
    "keeping",
    "lay_out",
    "running_layout",
]

# How far another processor's rounding was allowed to carry the same graph. Integer kernels differ
# between instruction sets in how they saturate, so theirs is wide.
TOLERANCES: dict[Precision, Tolerance] = {
    Precision.FP32: Tolerance(cosine_min=0.9999, max_abs_error=1e-3),
    Precision.FP16: Tolerance(cosine_min=0.999, max_abs_error=1e-2),
    Precision.BF16: Tolerance(cosine_min=0.99, max_abs_error=5e-2),
    Precision.INT8: Tolerance(cosine_min=0.98, max_abs_error=0.1),
    Precision.FP8: Tolerance(cosine_min=0.98, max_abs_error=0.1),
    # Activations stay in float, or in groups of one row, so processors differ little.
    Precision.INT4: Tolerance(cosine_min=0.98, max_abs_error=0.1),
}


@dataclass(frozen=True)
class RoleInputs:
    """Inputs and reference outputs of a role.

    Attributes:
        probes: Inputs of several sizes with the source's outputs.
        golden: Inputs of the golden vectors.
        evaluation: Evaluation of the variants.
        reference: fp32 outputs of the roles that feed this one.
        started: Called with a variant's name when its evaluation begins; what it returns is called
            after each sample.
    """

    probes: Sequence[Probe]
    golden: Mapping[str, Array]
    evaluation: Evaluation
    reference: Mapping[str, Collected]
    started: Callable[[str], Callable[[], None]]


@dataclass(frozen=True)
class BuiltVariant:
    """A variant on disk and its measurements.

    Attributes:
        recipe: How it was made.
        models: ONNX file by layout.
        nodes: Node table, None for fp32.
        opset: Of the default domain.
        parity: Against the source, over every layout.
        golden: Its outputs for the golden inputs, as far as they are verified, by name.
        collected: Outputs collected for the evaluation.
        duration_s: Wall time to make and measure it.
        steps: Its outputs in several calls that hand a state to each other; empty without a state.
    """

    recipe: Recipe
    models: Mapping[Layout, Path]
    nodes: Path | None
    opset: int
    parity: Parity
    golden: Mapping[str, Array]
    collected: Collected
    duration_s: float
    steps: Mapping[str, Array] = field(default_factory=dict)


def lay_out(portable: Path) -> dict[Layout, Path]:
    """Write the layout for ONNX Runtime beside a portable graph, sharing its weights.

    Returns:
        Both files by layout; only the portable one where no pass changed anything.
    """
    out = portable.with_name(f"{portable.stem}.onnxruntime.onnx")
    with graph_storage_errors(out):
        to_onnxruntime_layout(portable, out)
    return {"portable": portable, "onnxruntime": out}


class VariantBuilder:
    """Builds the variants of one role and runs each on its check inputs.

    Attributes:
        spec: The role.
        inputs: What variants are run on.
        worker: Where they run.
    """

    def __init__(  # noqa: PLR0913, all that variants are made from
        self,
        role: str,
        folder: Path,
        fp32: Mapping[Layout, Path],
        spec: RoleSpec,
        inputs: RoleInputs,
        calibration: Feeds | None,
        *,
        explain: bool = False,
        seed: int = 0,
        report: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        """Set up the sources of the variants.

        Args:
            role: Its name.
            folder: Where files go; the fp32 graphs lie there.
            fp32: The role's fp32 graph by layout.
            spec: What the role was exported from, which recovery by distillation trains.
            inputs: What to run variants on.
            calibration: Starts a stream of feeds for the role, or None.
            explain: Measure the effect on the outputs of quantizing each layer alone, where there
                is calibration data to measure it on.
            seed: Random seed of distillation.
            report: Called with a stage that takes minutes, its steps done and its steps in all.
        """
        self._role = role
        self._folder = folder
        self._fp32 = fp32
        self.inputs = inputs
        self.worker = Worker()
        self._calibrator = None if calibration is None else Calibrator(calibration, fp32.values())
        self.spec = spec
        self._explain = explain and calibration is not None
        self._seed = seed
        self._report = report
        self._errors: dict[QuantizationConfig, dict[str, float]] = {}

    def close(self) -> None:
        """End the worker and remove intermediate files."""
        self.worker.close()
        if self._calibrator is not None:
            self._calibrator.close()

    def build(self, recipe: Recipe) -> BuiltVariant:
        """Build one variant and run it.

        Raises:
            ConversionError: If it cannot be made, fp32 disagrees with PyTorch, or fp16 with fp32.
            BackendError: If ONNX Runtime cannot run it.
        """
        started = time.monotonic()
        evaluation = self.inputs.evaluation
        label = f"{self._role}/{recipe.variant}"
        models: Mapping[Layout, Path] = self._fp32
        nodes: Path | None = None
        methods = dict(recipe.methods)
        if methods:
            if recipe.excluded:
                methods = self._with_excluded(methods, recipe.excluded)
            if recipe.distilled:
                models, entries = self._distil(recipe.variant, methods)
            else:
                models, entries = self._quantize(recipe.variant, methods, self._source)
                methods = _lowering(methods, entries)
            nodes = self._describe(recipe.variant, methods, entries)
        parities, verified = [], self.spec.verified
        for at, (layout, model) in enumerate(models.items()):
            with (
                _runnable(model, methods.get(layout)) as path,
                self.worker.open(path, label) as graph,
            ):
                parities.append(measure_parity(label, graph, self.spec, self.inputs.probes))
                if not methods:
                    require_parity(f"{label} ({layout})", parities[-1])
                if at == running_layout(models):
                    outputs = graph.run(self.inputs.golden)
                    golden = {name: outputs[name] for name in outputs if name in verified}
                    state = self.spec.state
                    steps = {} if state is None else graph.run_steps(state, self.inputs.golden)
                    advance = self.inputs.started(recipe.variant)
                    feeds = self._feeds(batched=not _ranges_of_batch(model))
                    collected = evaluation.collect(
                        self.spec, graph.run, feeds, advance, self.inputs.reference
                    )
                    if not methods:
                        self._require_finite(label, model, collected)
        return BuiltVariant(
            recipe=replace(recipe, methods=methods),
            models=models,
            nodes=nodes,
            opset=read_onnx_file(next(iter(models.values()))).opset or OPSET,
            parity=_worst(parities),
            golden=golden,
            steps=steps,
            collected=collected,
            duration_s=time.monotonic() - started,
        )

    def _feeds(self, *, batched: bool = False) -> Iterable[Mapping[str, Array]]:
        evaluation, reference = self.inputs.evaluation, self.inputs.reference
        return evaluation.feeds(self.spec, reference, batched=batched)

    def _require_finite(self, label: str, model: Path, collected: Collected) -> None:
        """Check fp32's outputs for the evaluation data, the reference of all variants."""
        for name, rows in collected.items():
            broken = np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
            if not broken.size:
                continue
            at = int(broken[0]) * self.inputs.evaluation.size(self.spec) // len(rows)
            activation = first_nan(model, next(islice(self._feeds(), at, None)))
            raise ParityError(
                f"{label}: output '{name}' is NaN or infinite in {broken.size} of {len(rows)} rows "
                f"of the evaluation data, first for sample {at + 1}"
                + (f", from activation '{activation}' on" if activation else "")
                + ". Check that sample and the source model."
            )

    def _distil(
        self, variant: str, methods: Mapping[Layout, QuantizationConfig]
    ) -> tuple[dict[Layout, Path], tuple[NodeEntry, ...]]:
        """Distil the quantized model from fp32, export it and write every layout."""
        layout, method = next(iter(methods.items()))
        module = self.spec.module
        if not isinstance(method, StaticInt8) or module is None or self._calibrator is None:
            raise QuantizationError(
                f"{self._role}/{variant}: distillation trains static int8 from the PyTorch module, "
                "on calibration data. Pass --calibration DIR, and int8-static-distilled."
            )
        spec, source = self.spec, self._source(layout)
        if method.equalization is not None:
            scaled = self._calibrator.equalized(source, method.equalization, method.activations)
            spec = replace(spec, module=with_graph_weights(module, source, scaled))
            source = scaled
        graph = ir.load(source)
        ranges = self._calibrator.ranges(
            source,
            quantizable_inputs(graph, method.keep),
            method.ranges,
            symmetric=method.activations == "int8",
        )
        by_layer = {
            linear.name: ranges[linear.x.name or ""]
            for linear in quantizable_linears(graph.graph, method.keep)
        }
        distilled = distill(
            spec,
            by_layer,
            self._calibrator,
            Distillation(seed=self._seed),
            keep=method.keep,
            activations=method.activations,
            teacher=module,
            advance=partial(self._report, f"Train {self._role} {variant}"),
        )
        if distilled.reason:
            raise QuantizationError(f"{self._role}/{variant}: {distilled.reason}.")
        student = self._folder / f".{variant}.float.onnx"
        try:
            export_role(self._role, distilled.spec, student)
            sources = lay_out(student)
            return self._quantize(
                variant,
                {layout: _unequalized(method) for layout, method in methods.items()},
                lambda layout: sources.get(layout, sources["portable"]),
                distilled.ranges,
            )
        finally:
            for path in self._folder.glob(f".{variant}.float.*"):
                path.unlink()

    def _quantize(
        self,
        variant: str,
        methods: Mapping[Layout, QuantizationConfig],
        source: Callable[[Layout], Path],
        ranges: Mapping[str, Range] | None = None,
    ) -> tuple[dict[Layout, Path], tuple[NodeEntry, ...]]:
        """Write every layout; shared weights are stored once."""
        models: dict[Layout, Path] = {}
        nodes: tuple[NodeEntry, ...] = ()
        for layout, method in methods.items():
            first = next(iter(models.values()), None)
            out = self._folder / f"{variant if first is None else f'{variant}.{layout}'}.onnx"
            models[layout] = out
            with graph_storage_errors(out):
                entries = quantize(
                    source(layout),
                    out,
                    method,
                    calibration=self._calibrator,
                    share=first,
                    ranges=ranges,
                    worker=self.worker,
                    advance=partial(self._report, f"Measure layers of {self._role} {variant}"),
                )
            if isinstance(method, Float16):
                require_agreement(source(layout), out, self._probe_feeds, worker=self.worker)
            nodes = nodes or entries
        return models, nodes

    def _source(self, layout: Layout) -> Path:
        """Return the fp32 graph of a layout, else the portable one."""
        return self._fp32.get(layout, self._fp32["portable"])

    def _probe_feeds(self) -> Iterable[Mapping[str, Array]]:
        return (probe.feed for probe in self.inputs.probes)

    def _with_excluded(
        self, methods: Mapping[Layout, QuantizationConfig], count: int
    ) -> dict[Layout, QuantizationConfig]:
        """Return the methods with the most sensitive layers excluded."""
        layout, method = next(iter(methods.items()))
        errors = self._sensitivity(layout, method)
        lists = choose_excluded(errors, weight_bytes(self._source(layout)), limit=count)
        if not lists:
            raise QuantizationError(
                f"{self._role}: no layer needs to be excluded; quantizing any of them moves "
                "the embedding. Leave keepN out."
            )
        return {layout: keeping(method, lists[-1]) for layout, method in methods.items()}

    def _sensitivity(self, layout: Layout, method: QuantizationConfig) -> dict[str, float]:
        """Return the sensitivity of each layer, measured once."""
        if method not in self._errors:
            if self._calibrator is None:
                raise CalibrationError(
                    f"{self._role}: the sensitivity of layers is measured on calibration data. "
                    "Pass --calibration DIR."
                )
            model = self._source(layout)
            equalization = getattr(method, "equalization", None)
            if equalization is not None:
                signed = isinstance(method, StaticInt8) and method.activations == "int8"
                activations: Literal["uint8", "int8"] = "int8" if signed else "uint8"
                model = self._calibrator.equalized(model, equalization, activations)
            self._errors[method] = measure_sensitivity(
                model,
                method,
                self._calibrator,
                worker=self.worker,
                advance=partial(self._report, f"Measure layers of {self._role}"),
            )
        return self._errors[method]

    def _describe(
        self,
        variant: str,
        methods: Mapping[Layout, QuantizationConfig],
        entries: tuple[NodeEntry, ...],
    ) -> Path:
        layout, method = next(iter(methods.items()))
        layerwise = not isinstance(method, Float16 | BFloat16)
        errors: Mapping[str, float] = {}
        if layerwise and self._explain:
            errors = self._sensitivity(layout, keeping(method, ()))
        elif layerwise:
            errors = self._errors.get(keeping(method, ()), {})
        entries = with_output_errors(entries, errors)
        measured = any(entry.output_error is not None for entry in entries)
        path = self._folder / f"{variant}.nodes.json"
        save_nodes(
            path,
            NodeTable(
                role=self._role,
                variant=variant,
                nodes=entries,
                samples=SENSITIVITY_SAMPLES if measured else 0,
            ),
        )
        return path


def keeping(method: QuantizationConfig, keep: tuple[str, ...]) -> QuantizationConfig:
    """Return a method that excludes the named layers.

    Raises:
        QuantizationError: If the method does not go layer by layer.
    """
    if isinstance(method, Float16 | BFloat16):
        raise QuantizationError(f"{type(method).__name__} does not go layer by layer.")
    return replace(method, keep=keep)


def _lowering(
    methods: Mapping[Layout, QuantizationConfig], entries: Sequence[NodeEntry]
) -> dict[Layout, QuantizationConfig]:
    """Return the methods with the layers lowered by a size target."""
    return {
        layout: replace(
            method,
            lowered=tuple(e.name for e in entries if e.precision == f"int{lowered_bits(method)}"),
        )
        if isinstance(method, WeightOnly)
        else method
        for layout, method in methods.items()
    }


def _unequalized(method: QuantizationConfig) -> QuantizationConfig:
    """Return the method for an already equalized graph."""
    return replace(method, equalization=None) if isinstance(method, StaticInt8) else method


def running_layout(models: Mapping[Layout, Path]) -> int:
    """Return the layout that ONNX Runtime runs here."""
    return list(models).index("onnxruntime") if "onnxruntime" in models else 0


@contextmanager
def _runnable(model: Path, method: QuantizationConfig | None) -> Iterator[Path]:
    """Yield a graph with ONNX Runtime kernels: bfloat16 is emulated."""
    if not isinstance(method, BFloat16):
        yield model
        return
    with written_beside(emulate_bfloat16(model), model.parent) as emulated:
        yield emulated


def _worst(parities: Sequence[Parity]) -> Parity:
    return Parity(
        max_abs_error=max(parity.max_abs_error for parity in parities),
        cosine_mean=min(parity.cosine_mean for parity in parities),
        cosine_min=min(parity.cosine_min for parity in parities),
        token_agreement=min(
            (p.token_agreement for p in parities if p.token_agreement is not None), default=None
        ),
        samples=parities[0].samples,
    )


def _ranges_of_batch(model: Path) -> bool:
    """Return whether a graph quantizes its activations by the range of the whole batch."""
    import onnx

    graph = onnx.load(model, load_external_data=False)
    nodes = (*graph.graph.node, *(node for each in graph.functions for node in each.node))
    return any(node.op_type.startswith("DynamicQuantize") for node in nodes)
