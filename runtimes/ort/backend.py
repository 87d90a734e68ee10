"""ONNX Runtime backend: CPU, and CUDA if the installed build has it.

Works with onnxruntime 1.23 and newer, and with onnxruntime-gpu. From 1.24 on the engine reports the
provider of each node; with an older one `Placement.providers` is empty and placement is checked by
the session's providers alone.

On CUDA, shape arithmetic may stay on the CPU, where the engine puts it on purpose, and is listed in
`Placement.exceptions`; any other node there is a PlacementError. (The engine's own
`session.disable_cpu_ep_fallback` would refuse the shape arithmetic too.)
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from mmedge.errors import BackendUnavailableError
from mmedge.runtimes.backends import (
    PORTABLE_TARGET,
    Backend,
    EngineFacts,
    Hardware,
    Obstacle,
    VariantFacts,
)
from mmedge.runtimes.onnx_file import check_external_data, read_onnx_file
from mmedge.runtimes.ort.engine import (
    CUDA_PROVIDER,
    cuda_device_count,
    engine_exceptions,
    load_engine,
    mapped,
    providers_for,
    read_placement,
    session_settings,
)
from mmedge.runtimes.ort.session import OrtSession
from mmedge.runtimes.processor import int8_saturates
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Precision

__all__ = ["BACKEND", "OrtBackend"]

_SUFFIX = "ExecutionProvider"
_ANYWHERE = "Azure"  # in every build, but for a remote service


class OrtBackend(Backend):
    """ONNX Runtime."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    distributions = ("onnxruntime", "onnxruntime-gpu")
    install = 'pip install "mmedge[cpu]"'

    def engine_version(self) -> str | None:
        """Return the version of the installed ONNX Runtime, without loading it; None if none is."""
        try:
            if find_spec("onnxruntime") is None:
                return None
        except ValueError:  # hidden from imports
            return None
        for name in self.distributions:
            with suppress(PackageNotFoundError):
                return f"{name} {version(name)}"
        return "of an unknown build"

    def layouts(self, device: str) -> tuple[str, ...]:
        """Return both layouts, the better one for the device first.

        The onnxruntime layout is made of operators that are fast, or exist, on the CPU alone; on
        another device it is the last resort, and placement is checked there.
        """
        return ("onnxruntime", "portable") if device == "cpu" else ("portable", "onnxruntime")

    def available_devices(self) -> tuple[str, ...]:
        """Return "cuda", "cuda:1", ... for every GPU that the build can use, then "cpu".

        Empty if onnxruntime is not installed. Neither raises nor prints.
        """
        try:
            engine = load_engine()
        except BackendUnavailableError:
            return ()
        on_gpus = CUDA_PROVIDER in engine.get_available_providers()
        count = cuda_device_count() if on_gpus else 0
        return (*("cuda" if n == 0 else f"cuda:{n}" for n in range(count)), "cpu")

    def unsupported(self, variant: VariantFacts, device: str) -> Obstacle | None:
        """Return why it runs a variant on no machine's device of that kind, None if it does."""
        if variant.precision is Precision.BF16 and device == "cpu":
            return Obstacle("no", "ONNX Runtime has no bfloat16 kernels for CPUs")
        return super().unsupported(variant, device)

    def devices_on(self, hardware: Hardware, engine: EngineFacts) -> tuple[str, ...]:  # noqa: ARG002
        """Return "cpu", and "cuda" where there is a GPU."""
        return ("cpu", "cuda") if hardware.gpu else ("cpu",)

    def explain(
        self, variant: VariantFacts, device: str, hardware: Hardware, engine: EngineFacts
    ) -> Obstacle | None:
        """Return what keeps a variant from running on a machine; see Backend.explain."""
        if device != "cpu" and "portable" not in variant.layouts:
            reason = "its graph uses ONNX Runtime CPU-only operators"
            return Obstacle("no", reason, convert_to=PORTABLE_TARGET)
        found = super().explain(variant, device, hardware, engine)
        if found is not None or device == "cpu" or "CUDA" in engine.offers:
            return found
        reason = "this ONNX Runtime has no CUDA"
        if hardware.jetson:
            advice = "the wheels for Arm are for CPUs, so take NVIDIA's onnxruntime-gpu for this "
            return Obstacle("needs", f"{reason}: {advice}JetPack")
        command = 'pip uninstall -y onnxruntime && pip install "mmedge[gpu]"'
        return Obstacle("needs", reason, command)

    def unusable(self, hardware: Hardware, engine: EngineFacts) -> Obstacle | None:
        """Return why ONNX Runtime does not start on a machine, None if it does."""
        found = super().unusable(hardware, engine)
        if found is not None and engine.version is None and hardware.gpu and not hardware.jetson:
            return replace(found, command='pip install "mmedge[gpu]"')
        return found

    def probe(self) -> Mapping[str, object]:
        """Load ONNX Runtime and describe it; it offers "CUDA", "CPU", ..."""
        engine = load_engine()
        offers = [name.removesuffix(_SUFFIX) for name in engine.get_available_providers()]
        return {
            "loaded": f"{_distribution(engine)} {engine.__version__}",
            "module": str(engine.__file__),
            "offers": [name for name in offers if name != _ANYWHERE],
        }

    def open_session(self, model: Path, options: SessionOptions) -> OrtSession:
        """Open an ONNX file in ONNX Runtime.

        Args:
            model: The ONNX file; its external data must lie beside or below it.
            options: How to run it. "auto" graph optimization takes everything, except for a graph
                that holds float16, which stays at "extended": ONNX Runtime 1.32 crashed on some of
                those at the full level.

        Raises:
            BackendUnavailableError: If onnxruntime or the device is missing.
            PlacementError: If nodes would run elsewhere than on the device requested.
            BackendError: If the file is missing, damaged, or refused by the engine.
            StorageError: If `options.profile_to` cannot be made.

        Warns:
            RuntimeWarning: If int8 sums may saturate on this processor, because the engine cannot
                sum this graph exactly.
        """
        engine = load_engine()
        providers = providers_for(engine, options.device)
        graph = read_onnx_file(model)
        check_external_data(model, graph)
        level = options.graph_optimization
        if level == "auto":
            level = "extended" if graph.has_fp16 else "all"
        saturates = int8_saturates()
        exact = saturates and not graph.paired
        # ONNX Runtime 1.32 fuses a blocked DequantizeLinear and a float16 product,
        # and at the extended level that gives other outputs. Up to 1.31 it makes int8 operators of
        # Q/DQ in fp8, and refuses its own graph. Where exact int8 sums are requested, it turns
        # signed Q/DQ into unsigned, and then refuses the graph or fails in a call.
        disable_qdq_fusion = graph.has_fp16 or graph.has_fp8 or (graph.signed_int8 and saturates)

        def opened(*, exact: bool) -> OrtSession:
            settings = session_settings(engine, options, level, exact=exact)
            if disable_qdq_fusion:
                settings.add_session_config_entry("session.disable_quant_qdq", "1")
            native = engine.InferenceSession(
                str(model), sess_options=settings, providers=providers, enable_fallback=0
            )
            placement = read_placement(engine, native, options.device, model)
            return OrtSession(native, model, placement, options.axes)

        try:
            try:
                return opened(exact=exact)
            except engine_exceptions() as error:
                # ONNX Runtime 1.32 rewrites weights for exact sums, and fails where two products
                # read one of them.
                if not exact or "replace the existing tensor" not in str(error):
                    raise
            warnings.warn(
                f"{model}: ONNX Runtime {engine.__version__} has no exact int8 sums for a graph in "
                "which two products share a weight, so they may saturate on this processor. Run "
                "`mmedge verify`, or convert with int8-dynamic-paired, whose sums are exact.",
                RuntimeWarning,
                stacklevel=3,
            )
            return opened(exact=False)
        except engine_exceptions() as error:
            raise mapped(error, f"{model}: ONNX Runtime {engine.__version__} rejects it") from error


def _distribution(engine: ModuleType) -> str:
    """Return the package name of the loaded build, such as "onnxruntime-gpu"."""
    try:
        info = importlib.import_module(f"{engine.__name__}.capi.build_and_package_info")
    except ImportError:  # built from source
        return engine.__name__
    return str(getattr(info, "package_name", engine.__name__))


BACKEND = OrtBackend()
