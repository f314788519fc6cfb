"""Packages of the extra `audit`, imported when they are needed."""

import importlib
from typing import Any


def require(package: str, what: str, extra: str = "audit") -> Any:
    """Imports a package of an extra.

    Args:
      package: What is imported.
      what: What needs it, for the error.
      extra: The extra that brings it.

    Raises:
      ImportError: If it is not installed, saying how to install it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs {package!r}, which is not installed: "
            f"pip install 'xviz-jax[{extra}]'"
        ) from error
