"""Whether Intel's extension of torch (IPEX) can be imported: told by versions, for importing it
beside another torch than its own ends in an AttributeError."""

from importlib import metadata

PACKAGE = "intel-extension-for-pytorch"
SUPPORTED = "2.8"  # its last release, and the torch that belongs to it


def ipex_fits() -> bool:
    """Whether IPEX and the torch it was built for are installed. Imports nothing."""
    return all(_minor(version_of(package)) == SUPPORTED for package in (PACKAGE, "torch"))


def version_of(package: str) -> str:
    """Of an installed package; empty when there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _minor(version: str) -> str:
    """2.8 of 2.8.10+xpu."""
    return ".".join(version.split(".")[:2])
