"""Engine build from an ONNX file.

Precision stands in the graph: networks are strongly typed, quantization is Q/DQ, and no builder
flag asks for a precision. The library reports failure by a return value and says why to its logger
alone, so every return value is looked at and the reason is put into the error.
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
    computes_float32_products,
    dtypes,
    quantized_nodes,
    read_specs,
)
from mmedge.runtimes.trt.reasons import informative, parser_errors, reason_of
from mmedge.runtimes.trt.targets import check_named, check_needs, resolve
from mmedge.runtimes.trt.watching import BuildWatch, in_background, new_monitor
from mmedge.specs import TensorSpec

__all__ = ["build_engine"]

_LARGEST = (1 << 31) - 1  # the binding truncates larger sizes


def build_engine(
    model: Path,
    request: EngineRequest,
    *,
    progress: BuildProgress | None = None,
    timing_cache: Path | None = None,
    device: int = 0,
) -> BuiltEngine:
    """Build an engine from an ONNX file.

    It builds in a thread of its own: Ctrl-C ends the build at its next step and leaves nothing
    behind. Nothing is written but the timing cache.

    Args:
        model: ONNX file in standard operators (a bundle's `portable` layout); external data is
            found beside it.
        request: What to build.
        progress: Told of the phases of the build, from the thread that builds. What it raises ends
            the build and is raised here.
        timing_cache: Where kernel timings are kept between builds; read and written whole, and
            only by a flavour that times kernels. That it cannot be written is a warning.
        device: The GPU to build for where the request names no compute capability.

    Returns:
        The plan, the specs that the network had, and the layers of the engine.

    Raises:
        BackendUnavailableError: If the flavour is not installed or cannot be loaded.
        BackendError: If the model is missing or damaged, or its external data is.
        EngineBuildError: If an operator is not taken (node and operator are named), the profiles
            do not fit the inputs, the flavour cannot build what is asked for, the library fails,
            or what is asked for in int8, fp8 or int4 comes out in float.
        KeyboardInterrupt: If it was interrupted.
    """
    loaded = load_flavour(request.backend)
    check_named(loaded, request.compute_capabilities)
    file = read_onnx_file(model)
    check_external_data(model, file)
    watch = BuildWatch(progress)
    # The current GPU is a property of the thread.
    on_device = device != 0 and not request.compute_capabilities

    def work() -> BuiltEngine:
        logger, log = new_log(loaded.module)
        with log, Device(device).current() if on_device else nullcontext():
            return _Build(model, file, request, loaded, watch, timing_cache, logger, log).run()

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
            raise self._failed("the builder cannot be made", str(error)) from error
        parser = self._parse(network)  # may own the weights until the engine is built
        inputs, outputs = read_specs(network, self.file)
        asked = quantized_nodes(network)
        self._configure(config, network)
        self._add_profiles(builder, config, network, inputs)
        monitor = new_monitor(module, self.watch)
        config.progress_monitor = monitor
        self._read_timings(config)
        serialized = builder.build_serialized_network(network, config)
        if self.watch.raised is not None:
            raise self.watch.raised
        if self.watch.cancelled:
            raise EngineBuildError(f"{self.model}: the build was cancelled.")
        if serialized is None:
            raise self._failed("the build failed")
        self._write_timings(config)
        plan = bytes(serialized)
        del serialized, parser, network, builder
        layers = self._layers(plan)
        try:
            doubts = check_precision(layers, asked)
        except EngineBuildError as error:
            raise EngineBuildError(f"{self.model}: {error}") from error
        return BuiltEngine(
            plan=plan,
            inputs=inputs,
            outputs=outputs,
            layers=layers,
            duration_s=time.perf_counter() - began,
            warnings=(*doubts, *informative((*self.log.errors, *self.log.warnings))),
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
            f"{self.model}: the parser of {self._name} rejects it: {errors}. Engines are built "
            "from the portable layout, in standard operators: convert with `mmedge convert "
            "--target tensorrt`, or keep this graph to ONNX Runtime."
        )

    def _configure(self, config: Any, network: Any) -> None:  # noqa: ANN401
        module, settings = self.loaded.module, self.request.settings
        found = dtypes(network)
        targets = resolve(self.loaded, self.request.compute_capabilities, found)
        product = computes_float32_products(network)
        try:
            check_needs(self.loaded, targets, found, product and f"'{product}'")
        except EngineBuildError as error:
            raise EngineBuildError(f"{self.model}: {error}") from error
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        for name in _flags(settings):
            flag = self.loaded.builder_flag(name)
            if flag is None:
                raise EngineBuildError(
                    f"{self._name} cannot build this: it has no flag {name}. Update "
                    "it, or leave the setting out."
                )
            config.set_flag(flag)
        tf32 = self.loaded.builder_flag("TF32")
        if tf32 is not None:  # on by default: float32 products of 10 digits instead of 23
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
                f"{self.model}: the numbers in the inputs {by_value} are shapes of other tensors, "
                "which profiles here do not bound. Make them part of the graph."
            )
        dynamic = any(isinstance(axis, str) for spec in inputs for axis in spec.shape)
        profiles = self.request.profiles or (() if dynamic else (shape_profile(inputs, {}),))
        if not profiles:
            axes = sorted({axis for s in inputs for axis in s.shape if isinstance(axis, str)})
            raise EngineBuildError(
                f"{self.model}: the axes {axes} are dynamic, and the request has no profile: give "
                "min, opt and max of each."
            )
        for index, profile in enumerate(profiles):
            self._check_profile(profile, inputs)
            made = builder.create_optimization_profile()
            try:
                for name, shapes in profile.ranges.items():
                    made.set_shape(name, shapes.min, shapes.opt, shapes.max)
            except (RuntimeError, TypeError) as error:  # numbers beyond the library's integer type
                raise self._failed(f"profile {index} is refused", str(error)) from error
            if config.add_optimization_profile(made) < 0:
                raise self._failed(f"profile {index} is refused")

    def _check_profile(self, profile: ShapeProfile, inputs: Sequence[TensorSpec]) -> None:
        expected = {spec.name for spec in inputs}
        if profile.ranges.keys() != expected:
            raise EngineBuildError(
                f"{self.model}: a profile names the inputs {sorted(profile.ranges)}, expected "
                f"{sorted(expected)}."
            )
        for spec in inputs:
            given = profile.ranges[spec.name]
            for shape in (given.min, given.opt, given.max):
                if not _fits(shape, spec):
                    raise EngineBuildError(
                        f"{self.model}: a profile has {shape} for '{spec.name}', which is "
                        f"{spec.shape}: only named axes can vary, up to {_LARGEST}. Convert with a "
                        "dynamic axis, or take the size that the graph has."
                    )

    def _read_timings(self, config: Any) -> None:  # noqa: ANN401
        if self.timing_cache is None or not self.loaded.has_timing_cache:
            return
        kept = b""
        with suppress(OSError):  # missing or unreadable: timed again
            kept = self.timing_cache.read_bytes()
        for blob in (kept, b""):
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
        except StorageError as error:  # keep the engine despite this
            self.log.warnings.append(f"the timing cache cannot be saved: {error}")

    def _layers(self, plan: bytes) -> tuple[EngineLayer, ...]:
        layers = parse_layers(self.log.layers)
        # TensorRT-RTX would compile every kernel for this; TensorRT has a GPU and can inspect.
        if layers or self.loaded.flavour != "tensorrt":
            return layers
        runtime = self.loaded.module.Runtime(self.logger)
        engine = runtime.deserialize_cuda_engine(plan)
        return () if engine is None else inspect_layers(self.loaded.module, engine)

    @property
    def _name(self) -> str:
        return f"{TITLES[self.loaded.flavour]} {self.loaded.version}"

    def _failed(self, what: str, said: str = "") -> EngineBuildError:
        settings = self.request.settings
        reason = reason_of(
            self.log, said, exchanges_weights=settings.stripped or settings.refittable
        )
        return EngineBuildError(f"{self.model}: {self._name}: {what}: {reason}")


def _fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    return len(shape) == len(spec.shape) and all(
        size == axis if isinstance(axis, int) else size <= _LARGEST
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
