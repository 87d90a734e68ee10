"""RAPL energy counters of Intel and AMD processors, through Linux powercap.

Source: Documentation/power/powercap/powercap.rst of the Linux kernel. Zones "intel-rapl:N" are
packages (AMD's too, in spite of the name) and "intel-rapl:N:M" parts of them. "intel-rapl-mmio:N"
is the same package once more through another register, and "psys" the whole platform, packages
included: neither is added. Since CVE-2020-8694 the counters are for root alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmedge.errors import ProfileError

__all__ = ["Domain", "Rapl", "domains_missing", "find_domains"]

_INTERVAL_S = 10.0  # the smallest counter, 65 kJ, would need 6.5 kW to wrap twice


@dataclass(frozen=True, slots=True)
class Domain:
    """One counter.

    Attributes:
        name: "package-0", "dram".
        path: Its folder in sysfs.
        range_uj: The largest value; after it the counter begins at 0 again.
    """

    name: str
    path: Path
    range_uj: int

    def read_uj(self) -> int:
        """Return the counter in microjoules.

        Raises:
            ProfileError: If it cannot be read.
        """
        try:
            return int((self.path / "energy_uj").read_text())
        except (OSError, ValueError) as error:
            raise ProfileError(
                f"Energy counter {self.path / 'energy_uj'}: cannot be read any more ({error})."
            ) from error


@dataclass(frozen=True, slots=True)
class Rapl:
    """The counters of all packages, and of their memory if separate."""

    domains: tuple[Domain, ...]

    @property
    def what(self) -> str:
        """Display name of what it measures."""
        return f"RAPL: {', '.join(domain.name for domain in self.domains)}"

    @property
    def interval_s(self) -> float:
        """Longest time between two readings, in seconds; a counter may wrap unseen after it."""
        return _INTERVAL_S

    def start(self) -> Callable[[], float]:
        """Start measuring; each call of the result returns the millijoules since the last."""
        last = [domain.read_uj() for domain in self.domains]

        def tick() -> float:
            total_uj = 0
            for index, domain in enumerate(self.domains):
                now = domain.read_uj()
                step = now - last[index]
                # range_uj is the largest value, so range_uj -> 0 is one step.
                total_uj += step if step >= 0 else step + domain.range_uj + 1
                last[index] = now
            return total_uj / 1000

        return tick


def find_domains(sys: Path) -> Rapl | None:
    """Return the counters, None if there are none or one is unreadable."""
    try:
        domains = tuple(
            Domain(name, zone, int((zone / "max_energy_range_uj").read_text()))
            for name, zone in _zones(sys)
        )
        for domain in domains:
            domain.read_uj()
    except (OSError, ValueError, ProfileError):
        return None
    return Rapl(domains) if domains else None


def domains_missing(sys: Path) -> str:
    """Return why find_domains returns None, and the fix, as sentences."""
    zones = [zone for _, zone in _zones(sys)]
    if not zones:
        return (
            f"RAPL: {sys / 'class/powercap'} shows no processor package; virtual machines, "
            "containers and Arm processors have none."
        )
    faults = [(zone / "energy_uj", fault) for zone in zones if (fault := _fault(zone)) is not None]
    if not faults:
        return f"RAPL: what {zones[0]} shows is no number."
    file, fault = faults[0]
    if not isinstance(fault, PermissionError):
        return f"RAPL: {file} cannot be read ({fault})."
    return (
        f"RAPL: {file} is readable by root only. Run as root, or allow it until reboot: sudo "
        f"chmod a+r {sys / 'class/powercap/intel-rapl*/energy_uj'} (readers learn "
        "something of what others compute)."
    )


def _fault(zone: Path) -> OSError | None:
    try:
        (zone / "energy_uj").read_text()
    except OSError as error:
        return error
    return None


def _zones(sys: Path) -> list[tuple[str, Path]]:
    """Return name and folder of every package, and of the memory beside it."""
    found = []
    for zone in sorted((sys / "class/powercap").glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
        except OSError:
            continue
        inner = zone.name.count(":") > 1
        if name.startswith("package") if not inner else name == "dram":
            found.append((name, zone))
    return found
