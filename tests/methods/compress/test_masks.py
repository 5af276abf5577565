"""Which weights go, and how SparseGPT mends the rest, against direct computations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.methods.compress.lowrank import low_rank, rank_for
from unweave.methods.compress.masks import Pattern, choose, sparsegpt, wanda_scores


def stable(scores: Tensor, n: int) -> Tensor:
    """The mask of each row's n smallest by a stable sort."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(1, scores.sort(dim=1, stable=True).indices[:, :n], True)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 0.99])
def test_a_share_of_every_row_goes_and_of_equal_scores_the_first(share: float, generator: torch.Generator) -> None:
    scores = torch.randint(0, 6, (40, 37), generator=generator).float()  # full of ties
    mask = choose(scores, share)
    assert (mask.sum(1) == int(37 * share)).all()
    assert torch.equal(mask, stable(scores, int(37 * share)))
    whole = choose(scores, share, "matrix")
    assert torch.equal(whole.flatten(), stable(scores.reshape(1, -1), int(scores.numel() * share))[0])


@pytest.mark.parametrize("written", ["2:4", "4:8", "1:4", "3:4"])
def test_a_pattern_leaves_exactly_m_less_n_of_every_group(written: str, generator: torch.Generator) -> None:
    pattern = Pattern.parse(written)
    scores = torch.rand(5, 24, generator=generator)
    groups = choose(scores, pattern).view(5, -1, pattern.m)
    assert (groups.sum(2) == pattern.n).all() and str(pattern) == written
    grouped = scores.view(5, -1, pattern.m)
    assert (grouped.masked_fill(~groups, -1).amax(2) <= grouped.masked_fill(groups, 2).amin(2)).all()


@pytest.mark.parametrize("wrong", ["4:4", "0:4", "2/4", "2:", "-1:4"])
def test_what_is_no_pattern_is_refused(wrong: str) -> None:
    with pytest.raises(UnweaveError, match="is not a pattern"):
        Pattern.parse(wrong)


def test_a_pattern_that_does_not_divide_the_row_is_refused() -> None:
    with pytest.raises(UnweaveError, match="does not divide rows of 6"):
        choose(torch.rand(2, 6), Pattern(2, 4))


def test_wanda_is_magnitude_under_equal_norms_and_idempotent(generator: torch.Generator) -> None:
    weights, norms = torch.randn(16, 30, generator=generator), torch.rand(30, generator=generator) + 0.1
    assert torch.equal(choose(wanda_scores(weights, torch.full((30,), 3.7)), 0.5), choose(weights.abs(), 0.5))
    mask = choose(wanda_scores(weights, norms), 0.5)
    assert not torch.equal(mask, choose(weights.abs(), 0.5))
    again = weights.masked_fill(mask, 0.0)
    assert torch.equal(choose(wanda_scores(again, norms), 0.5), mask)


def brute_force(
    weights: Tensor, gram: Tensor, share: float | Pattern, block: int, damp: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon column by column, with a fresh inverse of what is left for every column and row."""
    new, columns = weights.clone(), weights.shape[1]
    hessian = gram + damp * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    mask = torch.zeros_like(weights, dtype=torch.bool)
    first = [float(torch.linalg.inv(hessian[j:, j:])[0, 0]) for j in range(columns)]
    width = share.m if isinstance(share, Pattern) else block
    for j in range(columns):
        if j % width == 0:
            part = range(j, min(j + width, columns))
            scores = torch.stack([new[:, i] ** 2 / first[i] for i in part], 1)
            if isinstance(share, Pattern):
                mask[:, j : j + width] = stable(scores, share.n)
            else:
                mask[:, j : j + width] = stable(scores.reshape(1, -1), int(scores.numel() * share)).view_as(scores)
        inverse = torch.linalg.inv(hessian[j:, j:])
        for row in range(len(weights)):
            if mask[row, j]:
                new[row, j:] -= new[row, j] / inverse[0, 0] * inverse[0]
    return new.masked_fill(mask, 0.0), mask


@pytest.mark.parametrize(("share", "block", "damp"), [(0.5, 4, 0.0), (0.3, 128, 0.05), (Pattern(2, 4), 128, 0.0)])
def test_sparsegpt_is_the_surgeon_column_by_column(
    share: float | Pattern, block: int, damp: float, generator: torch.Generator
) -> None:
    weights = torch.randn(5, 12, dtype=torch.float64, generator=generator)
    x = torch.randn(40, 12, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(12, 12, dtype=torch.float64, generator=generator)  # inputs that go together
    expected, mask = brute_force(weights, x.T @ x, share, block, damp)
    new, chosen = sparsegpt(weights, x.T @ x, share, damp=damp, block=block)
    assert torch.equal(chosen, mask) and bool((new[mask] == 0).all())
    torch.testing.assert_close(new, expected, rtol=1e-8, atol=1e-10)


def test_where_the_first_columns_go_the_rest_is_the_least_squares_solution(generator: torch.Generator) -> None:
    weights = torch.randn(4, 10, dtype=torch.float64, generator=generator)
    weights[:, :5] *= 1e-6
    weights[:, :5] += 1e-6
    x = torch.randn(60, 10, dtype=torch.float64, generator=generator)
    x[:, 5:] += x[:, :5]
    new, mask = sparsegpt(weights, x.T @ x, 0.5, damp=0.0)
    assert mask[:, :5].all() and not mask[:, 5:].any()
    best = torch.linalg.lstsq(x[:, 5:], x @ weights.T).solution.T
    torch.testing.assert_close(new[:, 5:], best, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(weights[:, 5:], best, rtol=1e-9, atol=1e-12)


def test_sparsegpt_survives_inputs_that_are_always_zero(generator: torch.Generator) -> None:
    x = torch.randn(30, 8, generator=generator)
    x[:, 3] = 0.0
    new, _ = sparsegpt(torch.randn(4, 8, generator=generator), (x.T @ x).double(), 0.25)
    assert new.isfinite().all() and (new[:, 3] == 0).all()


def test_low_rank_is_the_nearest_matrix_in_weights_and_in_outputs(generator: torch.Generator) -> None:
    weights = torch.randn(9, 14, dtype=torch.float64, generator=generator)
    x = torch.randn(200, 14, dtype=torch.float64, generator=generator) * torch.linspace(0.1, 3, 14)
    plain, aware = low_rank(weights, 4), low_rank(weights, 4, x.T @ x)
    assert torch.linalg.matrix_rank(plain) == torch.linalg.matrix_rank(aware) == 4
    lost = torch.linalg.svdvals(weights)[4:].square().sum().sqrt()
    torch.testing.assert_close((weights - plain).norm(), lost)
    lost = torch.linalg.svdvals(weights @ x.T)[4:].square().sum().sqrt()  # no matrix of rank 4 does better
    torch.testing.assert_close(((weights - aware) @ x.T).norm(), lost)
    assert ((weights - plain) @ x.T).norm() > 1.01 * lost


def test_a_rank_holds_at_most_the_share_of_numbers() -> None:
    rank = rank_for(0.5, 576, 1536)
    assert rank * (576 + 1536) <= 0.5 * 576 * 1536 < (rank + 1) * (576 + 1536)
    assert rank_for(0.01, 4, 4) == 1
