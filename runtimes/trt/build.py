"""Engine build from an ONNX file.

The graph sets the precision: networks are strongly typed, quantization is Q/DQ, and no builder flag
sets one. The library reports a failure by its return value, and the reason to its logger only, so
every return value is checked and errors quote the logger.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedge.errors import EngineBuildError, StorageError
from mmedge.files import write_atomic
from mmedge.runtimes.cuda.runtime import Device
from mmedge.runtimes.engines.profiles import shape_profile
from mmedge.runtimes.engines.spec import (
    BuildSettings,
    BuiltEngine,
    EngineLayer,
    EngineRequest,
    ShapeProfile,
)
from mmedge.runtimes.onnx_file import OnnxFile, check_external_data, read_onnx_file
from mmedge.runtimes.session import BuildProgress
from mmedge.runtimes.trt.flavours import TITLES, BuildLog, LoadedFlavour, load_flavour, new_log
from mmedge.runtimes.trt.layers import check_precision, inspect_layers, parse_layers
from mmedge.runtimes.trt.network import (
    dtypes,
    float32_product,
    quantized_nodes,
    read_specs,
)
from mmedge.runtimes.trt.reasons import informative, parser_errors, reason_of
from mmedge.runtimes.trt.targets import check_dtypes, check_targets, resolve_targets
from mmedge.runtimes.trt.watching import BuildWatch, in_background, new_monitor
from mmedge.specs import TensorSpec

__all__ = ["build_engine"]

_MAX_SIZE = (1 << 31) - 1  # the binding truncates larger sizes


def build_engine(
    model: Path,
    request: EngineRequest,
    *,
    progress: BuildProgress | None = None,
    timing_cache: Path | None = None,
    device: int = 0,
) -> BuiltEngine:
    """Build an engine from an ONNX file.

    Builds in a separate thread, so that Ctrl-C ends the build at its next step. Writes nothing but
    the timing cache.

    Args:
        model: ONNX file in standard operators (a bundle's `portable` layout); external data is
            found beside it.
        request: What to build.
        progress: Called at each step, from the build thread. An exception in it ends the build and
            is raised here.
        timing_cache: File of kernel timings for later builds, used by flavours that time kernels. A
            failure to write it is a warning.
        device: The GPU to build for if the request names no compute capability.

    Returns:
        The plan, the specs of the network, and the layers of the engine.

    Raises:
        BackendUnavailableError: If the flavour is not installed or cannot be loaded.
        BackendError: If the model or its external data is missing or damaged.
        EngineBuildError: If an operator is unsupported (node and operator are named), the profiles
            do not fit the inputs, the flavour lacks a setting, the library fails, or all int8, fp8
            or int4 nodes are computed in float.
        KeyboardInterrupt: If it was interrupted.
    """
    loaded = load_flavour(request.backend)
    check_targets(loaded, request.compute_capabilities)
    file = read_onnx_file(model)
    check_external_data(model, file)
    watch = BuildWatch(progress)
    # The current GPU is a property of the thread.
    on_device = device != 0 and not request.compute_capabilities

    def work() -> BuiltEngine:
        logger, log = new_log(loaded.module)
        with log, Device(device).current() if on_device else nullcontext():
            try:
                return _Build(model, file, request, loaded, watch, timing_cache, logger, log).run()
            except EngineBuildError as error:
                raise EngineBuildError(f"{model}: {error}") from error

    return in_background(work, watch.cancel)


@dataclass(slots=True)
class _Build:
    """One build, which frees its library objects at the end."""

    model: Path
    file: OnnxFile
    request: EngineRequest
    loaded: LoadedFlavour
    watch: BuildWatch
    timing_cache: Path | None
    logger: Any
    log: BuildLog

    def run(self) -> BuiltEngine:
        began = time.perf_counter()
        module = self.loaded.module
        try:
            builder: Any = module.Builder(self.logger)
            network = builder.create_network(self.loaded.network_flags)
            config = builder.create_builder_config()
        except (TypeError, RuntimeError) as error:  # no GPU, but the flavour needs one
            raise self._failed("the builder cannot be created", str(error)) from error
        parser = self._parse(network)  # may own the weights until the engine is built
        inputs, outputs = read_specs(network, self.file)
        quantized = quantized_nodes(network)
        self._configure(config, network)
        self._add_profiles(builder, config, network, inputs)
        monitor = new_monitor(module, self.watch)
        config.progress_monitor = monitor
        self._read_timings(config)
        serialized = builder.build_serialized_network(network, config)
        if self.watch.raised is not None:
            raise self.watch.raised
        if self.watch.cancelled:
            raise EngineBuildError("the build was cancelled.")
        if serialized is None:
            raise self._failed("the build failed")
        self._write_timings(config)
        plan = bytes(serialized)
        del serialized, parser, network, builder
        layers = self._layers(plan)
        folded = check_precision(layers, quantized)
        return BuiltEngine(
            plan=plan,
            inputs=inputs,
            outputs=outputs,
            layers=layers,
            duration_s=time.perf_counter() - began,
            warnings=(*folded, *informative((*self.log.errors, *self.log.warnings))),
        )

    def _parse(self, network: Any) -> Any:  # noqa: ANN401
        parser = self.loaded.module.OnnxParser(network, self.logger)
        # By path, so that external data is found.
        if parser.parse_from_file(str(self.model)):
            return parser
        errors = parser_errors(parser)
        if not errors:
            raise self._failed("the parser failed")
        raise EngineBuildError(
            f"the parser of {self._name} rejects it: {errors}. Engines are built from the portable "
            "layout, in standard operators: convert with `mmedge convert --target tensorrt`, or "
            "run this graph with ONNX Runtime."
        )

    def _configure(self, config: Any, network: Any) -> None:  # noqa: ANN401
        module, settings = self.loaded.module, self.request.settings
        found = dtypes(network)
        targets = resolve_targets(self.loaded, self.request.compute_capabilities, found)
        check_dtypes(self.loaded, targets, found, float32_product(network))
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        for name in _flags(settings):
            flag = self.loaded.builder_flag(name)
            if flag is None:
                raise EngineBuildError(
                    f"{self._name} has no builder flag {name}. Update it, or leave the setting out."
                )
            config.set_flag(flag)
        tf32 = self.loaded.builder_flag("TF32")
        if tf32 is not None:  # on by default: 10 instead of 23 bits of mantissa
            config.clear_flag(tf32)
        if not self.loaded.capabilities:
            return
        wanted = targets or ("",)
        config.num_compute_capabilities = len(wanted)
        for index, target in enumerate(wanted):
            if not config.set_compute_capability(self.loaded.capability(target), index):
                raise self._failed(f"compute capability {target or 'CURRENT'} is refused")

    def _add_profiles(
        self,
        builder: Any,  # noqa: ANN401
        config: Any,  # noqa: ANN401
        network: Any,  # noqa: ANN401
        inputs: Sequence[TensorSpec],
    ) -> None:
        by_value = [
            tensor.name
            for tensor in (network.get_input(index) for index in range(network.num_inputs))
            if tensor.is_shape_tensor
        ]
        if by_value:
            raise EngineBuildError(
                f"the values of the inputs {by_value} are shapes of other tensors, which profiles "
                "do not bound. Make them constants of the graph."
            )
        dynamic = any(isinstance(axis, str) for spec in inputs for axis in spec.shape)
        profiles = self.request.profiles or (() if dynamic else (shape_profile(inputs, {}),))
        if not profiles:
            axes = sorted({axis for s in inputs for axis in s.shape if isinstance(axis, str)})
            raise EngineBuildError(
                f"the axes {axes} are dynamic, and the request has no profile: give min, opt and "
                "max of each."
            )
        for index, profile in enumerate(profiles):
            self._check_profile(profile, inputs)
            made = builder.create_optimization_profile()
            try:
                for name, shapes in profile.ranges.items():
                    made.set_shape(name, shapes.min, shapes.opt, shapes.max)
            except (RuntimeError, TypeError) as error:  # sizes beyond the library's integer type
                raise self._failed(f"profile {index} is refused", str(error)) from error
            if config.add_optimization_profile(made) < 0:
                raise self._failed(f"profile {index} is refused")

    def _check_profile(self, profile: ShapeProfile, inputs: Sequence[TensorSpec]) -> None:
        expected = {spec.name for spec in inputs}
        if profile.ranges.keys() != expected:
            raise EngineBuildError(
                f"a profile has the inputs {sorted(profile.ranges)}, expected {sorted(expected)}."
            )
        for spec in inputs:
            given = profile.ranges[spec.name]
            for shape in (given.min, given.opt, given.max):
                if not _fits(shape, spec):
                    raise EngineBuildError(
                        f"a profile has {shape} for '{spec.name}', which is {spec.shape}: only "
                        f"named axes can vary, up to {_MAX_SIZE}. Convert with a dynamic axis, or "
                        "use the graph's size."
                    )

    def _read_timings(self, config: Any) -> None:  # noqa: ANN401
        if self.timing_cache is None or not self.loaded.has_timing_cache:
            return
        timings = b""
        with suppress(OSError):  # missing or unreadable: timed again
            timings = self.timing_cache.read_bytes()
        for blob in (timings, b""):
            cache = config.create_timing_cache(blob)
            if cache is not None and config.set_timing_cache(cache, False):
                return
            self.log.warnings.append(
                f"the timing cache {self.timing_cache} is rejected: timed again"
            )

    def _write_timings(self, config: Any) -> None:  # noqa: ANN401
        if self.timing_cache is None or not self.loaded.has_timing_cache:
            return
        cache = config.get_timing_cache()
        if cache is None:
            return
        try:
            write_atomic(self.timing_cache, bytes(cache.serialize()), private=True)
        except StorageError as error:  # the engine is complete without it
            self.log.warnings.append(f"the timing cache cannot be saved: {error}")

    def _layers(self, plan: bytes) -> tuple[EngineLayer, ...]:
        layers = parse_layers(self.log.layers)
        # The inspector needs a loaded engine, for which TensorRT-RTX would compile every kernel.
        if layers or self.loaded.flavour != "tensorrt":
            return layers
        runtime = self.loaded.module.Runtime(self.logger)
        engine = runtime.deserialize_cuda_engine(plan)
        return () if engine is None else inspect_layers(self.loaded.module, engine)

    @property
    def _name(self) -> str:
        return f"{TITLES[self.loaded.flavour]} {self.loaded.version}"

    def _failed(self, what: str, raised: str = "") -> EngineBuildError:
        settings = self.request.settings
        reason = reason_of(
            self.log, raised, exchanges_weights=settings.stripped or settings.refittable
        )
        return EngineBuildError(f"{self._name}: {what}: {reason}")


def _fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    return len(shape) == len(spec.shape) and all(
        size == axis if isinstance(axis, int) else size <= _MAX_SIZE
        for size, axis in zip(shape, spec.shape, strict=True)
    )


def _flags(settings: BuildSettings) -> tuple[str, ...]:
    names = []
    if settings.weight_streaming:
        names.append("WEIGHT_STREAMING")
    if settings.stripped:
        names.append("STRIP_PLAN")
    if settings.refittable:
        names.append("REFIT")
    elif settings.stripped:
        names.append("REFIT_IDENTICAL")  # by the stripped weights
    return tuple(names)
