"""The Triton kernels through Triton's interpreter, which needs no GPU: ``make test-triton``.

pytest does not collect this file on its own: Triton is not among the developer's dependencies (a download of 290 MB),
and it must find ``TRITON_INTERPRET=1`` when it is first imported.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from unweave.sae.sparse import kernels, products

assert os.environ.get("TRITON_INTERPRET") == "1", "run `make test-triton`"

from unweave.sae.sparse import triton_kernels  # noqa: E402

EMPTY_ROWS = [0, 0, 5, 5, 40, 41, 41]


def _case(width: int, dtype: torch.dtype) -> tuple[Tensor, kernels.Choice, Tensor, Tensor]:
    """Six rows, three of them empty, one with more entries than a program looks at together; nine latents."""
    g = torch.Generator().manual_seed(width)
    indices = torch.randint(0, 9, (EMPTY_ROWS[-1],), generator=g)
    choice = kernels.Choice(indices, torch.tensor(EMPTY_ROWS), 9)
    values, table, rows = (torch.randn(*s, generator=g, dtype=dtype) for s in ((41,), (9, width), (6, width)))
    return values, choice, table, rows


@pytest.mark.parametrize("width", [1, 7, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_products_are_the_dense_ones(width: int, dtype: torch.dtype) -> None:
    values, choice, table, rows = _case(width, dtype)
    dense = choice.dense(values)
    said = triton_kernels.weighted_rows(values, choice.indices, choice.offsets, table)
    torch.testing.assert_close(said, dense @ table, rtol=1e-5, atol=1e-5)
    dots = triton_kernels.dot_rows(rows, choice.rows, choice.indices, table)
    torch.testing.assert_close(dots, (rows @ table.T)[choice.rows.long(), choice.indices.long()], rtol=1e-5, atol=1e-5)
    order, by_latent = choice.by_latent
    gathered = triton_kernels.weighted_rows(values[order], by_latent.indices, by_latent.offsets, rows)
    torch.testing.assert_close(gathered, dense.T @ rows, rtol=1e-5, atol=1e-5)


def test_half_precision_tables_are_summed_in_single() -> None:
    values, choice, table, _ = _case(40, torch.float32)
    low = table.bfloat16()
    said = triton_kernels.weighted_rows(values, choice.indices, choice.offsets, low)
    assert said.dtype == torch.bfloat16
    torch.testing.assert_close(said, (choice.dense(values) @ low.float()).bfloat16(), rtol=1e-2, atol=1e-2)


def test_nothing_chosen() -> None:
    choice = kernels.Choice(torch.zeros(0), torch.zeros(4), 5)
    said = triton_kernels.weighted_rows(torch.zeros(0), choice.indices, choice.offsets, torch.randn(5, 3))
    assert torch.equal(said, torch.zeros(3, 3))
    assert len(triton_kernels.dot_rows(torch.randn(3, 3), choice.rows, choice.indices, torch.randn(5, 3))) == 0


def test_a_step_on_them_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of attach and decode, with the kernels and without."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*s, generator=g) for s in ((11, 24), (70, 24), (70,), (70, 24))]
    found = kernels.choose_above(*leaves[:3], torch.full((70,), 3.0), limit=1.0)
    assert found is not None and 11 < len(found[0]) < 600
    goal, results = torch.randn(11, 24, generator=g), []
    for triton in (False, True):
        with monkeypatch.context() as patch:
            if triton:
                patch.setattr(products, "_triton", lambda table: triton_kernels)
            x, W, b, V = (t.clone().requires_grad_() for t in leaves)
            choice = kernels.Choice(found[1].indices, found[1].offsets, 70)
            f = torch.relu(kernels.attach(x, W, b, found[0], choice))
            loss = (kernels.decode(f, choice, V) - goal).square().sum()
            loss.backward()
            results.append([loss, x.grad, W.grad, b.grad, V.grad])
    for usual, ours in zip(*results, strict=True):
        assert ours is not None and usual is not None
        assert (ours - usual).norm() <= 1e-5 * usual.norm()
