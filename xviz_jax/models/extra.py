"""Packages of the extra `models`, imported when they are needed."""

import importlib
from typing import Any


def require(package: str) -> Any:
    """Imports a package of the extra.

    Raises:
      ImportError: If it is not installed, saying how to install it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"published checkpoints need {package!r}, which is not installed: "
            "pip install 'xviz-jax[models]'"
        ) from error
