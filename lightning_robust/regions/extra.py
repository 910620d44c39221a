"""Libraries that only the regions need."""

from __future__ import annotations

import importlib.util

from lightning_robust.errors import UserError


def require(module: str, purpose: str) -> None:
    """Say early, and without importing it, that a library is missing.

    Raises:
        UserError: naming the extra that brings it.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{purpose} needs {module}, which is not installed: pip install 'lightning-robust[regions]'")
