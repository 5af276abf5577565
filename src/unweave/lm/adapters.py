"""The package of adapters, which is an extra."""

from __future__ import annotations

from typing import Any

from unweave.core.errors import UnweaveError


def require_peft(who: str, *, where: str = "", otherwise: str = "") -> Any:
    """The package peft. UnweaveError, saying ``who`` needs it and what to do ``otherwise``, where it is not there."""
    try:
        import peft
    except ImportError:
        remedy = "pip install 'unweave[finetune]'" + (f", or {otherwise}" if otherwise else "")
        raise UnweaveError(f"{who} needs the package peft", where=where, remedy=remedy) from None
    return peft
