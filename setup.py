"""Package discovery: converters/ and runtimes/ install as mmedge.converters and mmedge.runtimes."""

from setuptools import find_packages, setup

_TREES = {"mmedge": "mmedge", "mmedge.converters": "converters", "mmedge.runtimes": "runtimes"}

packages = sorted(
    name
    for package, folder in _TREES.items()
    for name in [package, *(f"{package}.{sub}" for sub in find_packages(folder))]
)

setup(packages=packages, package_dir=dict(_TREES))
