"""Versions of the packages that a run depends on."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

from parallel_clip import __version__

PACKAGES = ("torch", "torchvision", "megatron-core", "transformer-engine", "apex", "numpy")


def package_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """This package, Python, and `PACKAGES`."""
    own = {"parallel_clip": __version__, "python": sys.version.split()[0]}
    return own | {package: package_version(package) for package in PACKAGES}
