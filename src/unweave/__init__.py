"""Unweave takes a language model apart into features, and puts it back together changed.

```python
from unweave import LM, SAE, Site

lm = LM.load("smollm2-135m-instruct")
with lm.taps(read=["resid_post.9"], stop="resid_post.9") as seen:
    lm(lm.tokenize(["The keys to the cabinet"]))
x = seen["resid_post.9"]                    # [batch, position, d_model]
```

The names below are loaded when they are first used, so that ``import unweave`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unweave.core.errors import UnweaveError, UnweaveWarning
    from unweave.core.site import Site
    from unweave.lm.model import LM
    from unweave.sae.module import SAE

__version__ = "0.1.0"

__all__ = ["LM", "SAE", "Site", "UnweaveError", "UnweaveWarning", "__version__"]

_HOMES = {
    "LM": "unweave.lm.model",
    "SAE": "unweave.sae.module",
    "Site": "unweave.core.site",
    "UnweaveError": "unweave.core.errors",
    "UnweaveWarning": "unweave.core.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unweave' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
