"""Whether Intel's extension of torch (IPEX) can be imported: told by versions, for importing it
beside another torch than its own ends in an AttributeError."""

from importlib import metadata

PACKAGE = "intel-extension-for-pytorch"
SUPPORTED = "2.8"  # its last release, and the torch that belongs to it
GPU_BUILD = "+xpu"  # at the end of versions of the builds for GPUs, which serve processors too


def ipex_fits(device_type: str) -> bool:
    """Whether IPEX for such devices and the torch it was built for are installed.

    Imports nothing.
    """
    versions = (version_of(PACKAGE), version_of("torch"))
    is_built = device_type == "cpu" or all(version.endswith(GPU_BUILD) for version in versions)
    return is_built and all(_release(version) == SUPPORTED for version in versions)


def what_is_installed(device_type: str) -> str:
    """What `ipex_fits` looks for, and what it found."""
    build = "" if device_type == "cpu" else ", both built for GPUs (+xpu)"
    ipex, torch = (version_of(package) or "none" for package in (PACKAGE, "torch"))
    return (
        f"{PACKAGE} {SUPPORTED} and torch {SUPPORTED}{build}; installed are {PACKAGE} {ipex} and "
        f"torch {torch}"
    )


def version_of(package: str) -> str:
    """Of an installed package; empty when there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> str:
    """2.8 of 2.8.10+xpu."""
    return ".".join(version.split(".")[:2])
