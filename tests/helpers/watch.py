"""What operations of PyTorch are seen to do."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def largest_output(run: Callable[[], object]) -> int:
    """Elements of the largest tensor that any operation of ``run`` returns, those of the backward pass included."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor):
                    largest = max(largest, t.numel())
            return out

    with Watch():
        run()
    return largest
