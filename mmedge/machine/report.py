"""Machine report: processor, memory, GPUs, Jetson, engines, cache, energy counters.

Everything is read through a Host. Engines are asked in processes of their own, so that one that
crashes on import costs an entry and not the report.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmedge.energy.counter import energy_counter, unavailable_reason
from mmedge.errors import MmedgeError
from mmedge.files.cache_folder import cache_folder
from mmedge.machine.gpus import Cuda, Gpu, read_cuda, read_gpus, undriven_gpus
from mmedge.machine.host import Host, PythonFacts
from mmedge.machine.jetson import Jetson, installed_deb, read_jetson
from mmedge.runtimes.backends import BACKENDS, EngineFacts, Hardware, backend
from mmedge.runtimes.processor import processor_name

__all__ = ["Machine", "Processor", "look_at_machine", "read_memory", "read_processor"]

# CPU features for low-precision products: name in /proc/cpuinfo -> common name.
_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "asimdhp": "fp16",
    "asimddp": "dot product",
    "i8mm": "int8 matrices",
    "bf16": "bf16",
    "sve": "SVE",
    "sve2": "SVE2",
}
# Arm cores report numbers only: include/asm/cputype.h of the Linux kernel.
_ARM_CORES = {
    "0xd03": "Cortex-A53",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
    "0xd83": "Neoverse-V3AE",
}


@dataclass(frozen=True, slots=True)
class Processor:
    """The processor.

    Attributes:
        name: Of the processor or its cores.
        architecture: As reported by `uname -m`.
        online: Processors of the machine.
        allowed: Processors that this process may use.
        features: What it computes small numbers with.
    """

    name: str
    architecture: str
    online: int
    allowed: int
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine, as reported by `mmedge doctor`.

    Attributes:
        system: Operating system and its kernel.
        container: Whether this process runs in one.
        processor: The processor.
        memory_bytes: Of the machine, or of the control group if that allows less; None if unknown.
        free_bytes: Of the memory, what could be had now; None if unknown.
        python: The Python that runs mmedge.
        mmedge: Version.
        jetson: What it is, if it is one.
        gpus: NVIDIA's GPUs that the driver shows.
        cuda: What drives them.
        engines: One for each of BACKENDS.
        cache: Where mmedge keeps engines and choices.
        cache_free_bytes: Free space there, None if unknown.
        energy: What counts energy, "" for nothing.
        energy_missing: Why nothing does, "" where something does.
        notes: What is odd, each with what to do.
    """

    system: str
    container: bool
    processor: Processor
    memory_bytes: int | None
    free_bytes: int | None
    python: PythonFacts
    mmedge: str
    jetson: Jetson | None
    gpus: tuple[Gpu, ...]
    cuda: Cuda
    engines: tuple[EngineFacts, ...]
    cache: Path
    cache_free_bytes: int | None
    energy: str
    energy_missing: str
    notes: tuple[str, ...] = field(default_factory=tuple)

    def engine(self, name: str) -> EngineFacts:
        """Return an engine by its backend's name."""
        return next(engine for engine in self.engines if engine.name == name)

    @property
    def hardware(self) -> Hardware:
        """Facts that decide which backends are available."""
        gpu, cuda, jetson = next(iter(self.gpus), None), self.cuda, self.jetson
        major = (cuda.serves or cuda.toolkit).partition(".")[0]
        if not major and jetson is not None and jetson.jetpack.startswith(("5.", "6.")):
            major = "12"
        return Hardware(
            architecture=self.processor.architecture,
            gpu="" if gpu is None else gpu.name,
            compute_capability="" if gpu is None else gpu.compute_capability,
            jetson=jetson is not None,
            cuda_major=12 if major.isdecimal() and int(major) < 13 else 13,
            cuda_bindings=bool(cuda.bindings),
            cuda_fault=cuda.fault,
        )


def look_at_machine(host: Host | None = None) -> Machine:
    """Return the facts of a machine, without those that cannot be read. Does not raise.

    Args:
        host: The machine; None is this one.
    """
    host = host or Host()
    jetson = read_jetson(host)
    probed = _asked_cuda(host, jetson)
    gpus = read_gpus(host, jetson, probed)
    cuda = read_cuda(host, jetson, probed)
    memory_bytes, free_bytes = read_memory(host)
    cache = cache_folder()
    counter, missing = _energy(host)
    engines = tuple(_engine(host, name) for name in BACKENDS)
    return Machine(
        system=_system(host),
        container=_is_container(host),
        processor=read_processor(host),
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        python=host.python,
        mmedge=host.package("mmedge") or "",
        jetson=jetson,
        gpus=gpus,
        cuda=cuda,
        engines=engines,
        cache=cache,
        cache_free_bytes=host.free_bytes(cache),
        energy=counter,
        energy_missing=missing,
        notes=tuple(_notes(host, gpus, cuda, engines)),
    )


def _asked_cuda(host: Host, jetson: Jetson | None) -> Mapping[str, object]:
    """Probe CUDA if its bindings are installed, and a driver or a Jetson is present."""
    driven = host.text("proc/driver/nvidia/version") or host.run(["nvidia-smi", "-L"])
    if host.package("cuda-bindings") is None or not (driven or jetson is not None):
        return {}
    return host.probe("cuda")


def _system(host: Host) -> str:
    release = re.search(r'^PRETTY_NAME="?([^"\n]+)', host.text("etc/os-release"), re.MULTILINE)
    kernel = host.text("proc/sys/kernel/osrelease")
    parts = [release[1] if release else "", f"Linux {kernel}" if kernel else ""]
    return ", ".join(part for part in parts if part) or "unknown"


def _is_container(host: Host) -> bool:
    return host.has(".dockerenv") or host.has("run/.containerenv")


def read_processor(host: Host) -> Processor:
    """Return the processor of a machine."""
    cpuinfo = host.text("proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    part = fields.get("CPU part", "").lower()
    if "model name" not in fields and fields.get("CPU implementer") == "0x41":
        named = _ARM_CORES.get(part, f"Arm core {part}")
    else:
        named = processor_name(host.root / "proc/cpuinfo")
    return Processor(
        name=named,
        architecture=host.architecture,
        online=len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE)) or len(host.processors),
        allowed=len(host.processors),
        features=tuple(spelled for flag, spelled in _FEATURES.items() if flag in flags),
    )


def read_memory(host: Host) -> tuple[int | None, int | None]:
    """Return total and free memory in bytes within the control group's limit; None if unknown."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", host.text("proc/meminfo"), re.MULTILINE))
    total = int(fields["MemTotal"]) * 1024 if "MemTotal" in fields else None
    free = int(fields["MemAvailable"]) * 1024 if "MemAvailable" in fields else None
    limit = host.text("sys/fs/cgroup/memory.max")
    if limit.isdecimal() and total is not None and int(limit) < total:
        used = host.text("sys/fs/cgroup/memory.current")
        left = int(limit) - (int(used) if used.isdecimal() else 0)
        return int(limit), left if free is None else min(free, left)
    return total, free


def _energy(host: Host) -> tuple[str, str]:
    try:
        counter = energy_counter(host.root / "sys")
        return (
            ("", unavailable_reason(host.root / "sys")) if counter is None else (counter.what, "")
        )
    except (MmedgeError, OSError, ValueError) as error:
        return "", str(error)


def _engine(host: Host, name: str) -> EngineFacts:
    version, known = host.engine_version(name), backend(name)
    if version is None:
        found = (installed_deb(host, package) for package in known.system_packages)
        elsewhere = next(filter(None, found), "").partition("-")[0]
        return EngineFacts(name, None, elsewhere=elsewhere)
    probed = host.probe(name)
    offers = probed.get("offers")
    return EngineFacts(
        name,
        str(probed.get("loaded") or version),
        module=str(probed.get("module") or ""),
        builds=tuple(each for each in known.distributions if host.package(each) is not None),
        offers=tuple(map(str, offers)) if isinstance(offers, list) else (),
        fault=str(probed.get("fault") or ""),
    )


def _notes(
    host: Host, gpus: tuple[Gpu, ...], cuda: Cuda, engines: tuple[EngineFacts, ...]
) -> Iterator[str]:
    if not gpus and undriven_gpus(host):
        container = _is_container(host)
        yield (
            "An NVIDIA GPU is on the PCI bus without a working driver. "
            + (
                "Start the container with --gpus all (the NVIDIA container toolkit on the host)."
                if container
                else "Install NVIDIA's driver, then check nvidia-smi."
            )
        )
    if not gpus and host.environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield "CUDA_VISIBLE_DEVICES hides every GPU from this process. Unset it."
    if gpus and cuda.fault:
        yield f"CUDA does not start from Python: {cuda.fault}"
    for engine in engines:
        if len(engine.builds) > 1:
            yield (
                f"{' and '.join(engine.builds)} are both installed, as the same module: "
                f"{engine.version} is loaded, from {engine.module or 'an unknown place'}. Remove "
                "both, and install mmedge[cpu] or mmedge[gpu]."
            )
        if engine.fault:
            yield f"{engine.name} is installed and does not start: {engine.fault}"
