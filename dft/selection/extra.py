"""Packages that only a selection needs, and that are installed with an extra of the project."""

from dft.errors import UserError


def missing_package(command: str, package: str) -> UserError:
    """The error of a command that needs a package which isn't installed."""
    return UserError(f"{command} needs the package {package}: pip install -e .[selection] -c constraints.txt")
