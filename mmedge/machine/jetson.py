"""Jetson facts from its files: module, L4T release, JetPack, power mode.

Releases by JetPack: https://developer.nvidia.com/embedded/jetpack-archive. What no list knows is
named by the package `nvidia-jetpack`, or by its major version alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmedge.machine.host import Host

__all__ = ["Jetson", "installed_deb", "read_jetson"]

_RELEASES = {
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}
_MAJORS = {"32": "4", "35": "5", "36": "6", "38": "7", "39": "7"}

# By the name of the chip in the device tree: name of the GPU's module family, compute capability.
_CHIPS = {
    "tegra210": ("Nano", "5.3"),
    "tegra186": ("TX2", "6.2"),
    "tegra194": ("Xavier", "7.2"),
    "tegra234": ("Orin", "8.7"),
    "tegra264": ("Thor", "11.0"),
}


@dataclass(frozen=True, slots=True)
class Jetson:
    """A Jetson.

    Attributes:
        model: As its device tree names it.
        family: "Orin", "Thor", ...; "" for a chip unknown here.
        compute_capability: Of its GPU, "" for a chip unknown here.
        l4t: Release of Jetson Linux, such as "36.4.3"; "" if unknown.
        jetpack: Such as "6.2", or "6.x" for a release that is not known here; "" if unknown.
        power_mode: Such as "MAXN" or "30W"; "" if unknown.
    """

    model: str
    family: str
    compute_capability: str
    l4t: str
    jetpack: str
    power_mode: str


def read_jetson(host: Host) -> Jetson | None:
    """Return the facts of a Jetson, None on other machines."""
    compatible = host.text("proc/device-tree/compatible")
    release = host.text("etc/nv_tegra_release")
    chip = next((name for name in _CHIPS if name in compatible), "")
    if not chip and not release:
        return None
    family, capability = _CHIPS.get(chip, ("", ""))
    l4t = _l4t(release) or _deb_l4t(host)
    return Jetson(
        model=host.text("proc/device-tree/model") or f"Jetson {family}".strip(),
        family=family,
        compute_capability=capability,
        l4t=l4t,
        jetpack=_jetpack(host, l4t),
        power_mode=_power_mode(host),
    )


def installed_deb(host: Host, name: str) -> str:
    """Return the version of an installed Debian package, "" if it is not installed."""
    for paragraph in host.text("var/lib/dpkg/status").split("\n\n"):
        fields: dict[str, str] = dict(
            re.findall(r"^(Package|Status|Version): (.*)$", paragraph, re.MULTILINE)
        )
        if fields.get("Package") == name and fields.get("Status", "").endswith(" installed"):
            return fields.get("Version", "")
    return ""


def _l4t(release: str) -> str:
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    if match is None:
        return ""
    parts = [match[1], *match[2].split(".")]
    return ".".join([*parts, "0"][:3])  # "R36, REVISION: 4.3", but "R38, REVISION: 2"


def _deb_l4t(host: Host) -> str:
    """Return the release from its core package, for containers without nv_tegra_release."""
    return installed_deb(host, "nvidia-l4t-core").partition("-")[0]


def _jetpack(host: Host, l4t: str) -> str:
    if l4t in _RELEASES:
        return _RELEASES[l4t]
    if package := installed_deb(host, "nvidia-jetpack"):
        return re.split(r"[+-]", package)[0]
    major = _MAJORS.get(l4t.partition(".")[0])
    return f"{major}.x" if major else ""


def _power_mode(host: Host) -> str:
    output = host.run(["nvpmodel", "-q"]) or ""
    match = re.search(r"NV Power Mode:\s*(\S+)", output)
    if match is not None:
        return match[1].removeprefix("MODE_")
    match = re.search(r"pmode:0*(\d+)", host.text("var/lib/nvpmodel/status"))
    return f"number {match[1]}" if match is not None else ""
