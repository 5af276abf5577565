"""When our own GPU kernels are used, and what they are given. The kernels themselves: ``make test-triton``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unweave.sae.sparse import kernels, products


class _StandIn:
    """What ``triton_kernels`` promises, in dense PyTorch, counting its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def weighted_rows(self, values: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
        self._note("weighted_rows", values, indices, offsets, table)
        return kernels.Choice(indices, offsets, len(table)).dense(values) @ table

    def dot_rows(self, g: Tensor, rows: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        self._note("dot_rows", g, rows, indices, table)
        return (g @ table.T)[rows.long(), indices.long()]

    def _note(self, name: str, *tensors: Tensor) -> None:
        self.calls.append(name)
        assert all(t.is_contiguous() for t in tensors)
        assert all(t.dtype == torch.int32 for t in tensors if not t.is_floating_point())


def _gradients(seed: int) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    x, W, b, V = (torch.randn(*s, generator=g).requires_grad_() for s in ((9, 6), (40, 6), (40,), (40, 6)))
    goal = torch.randn(6, 9, generator=g).T  # so that a gradient arrives transposed in memory
    found = kernels.choose_above(x, W, b, torch.full((40,), 2.0), limit=1.0)
    assert found is not None and len(found[0]) > 20
    f = torch.relu(kernels.attach(x, W, b, *found))
    (kernels.decode(f, found[1], V) * goal).sum().backward()
    return [x.grad, W.grad, b.grad, V.grad]


def test_a_step_uses_gpu_kernels_for_every_sparse_product(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = _gradients(0)
    stand_in = _StandIn()
    monkeypatch.setattr(products, "_triton", lambda table: stand_in)
    monkeypatch.setattr(products, "_bag", lambda *_: pytest.fail("not with kernels of our own"))
    ours = _gradients(0)
    for a, b in zip(ours, usual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # decode; to V; to the values; to x; to W; to b
    assert sorted(stand_in.calls) == ["dot_rows"] + 5 * ["weighted_rows"]


def test_gpu_kernels_are_for_floating_tables_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_imported", lambda: products)
    assert products._triton(torch.zeros(2, 2)) is None

    class OnGPU:
        is_cuda = True

        def is_floating_point(self) -> bool:
            return True

    assert products._triton(OnGPU()) is products  # type: ignore[arg-type]


def test_without_triton_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: None)
    assert products._imported.__wrapped__() is None
