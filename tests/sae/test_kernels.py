"""The sparse kernels against the dense computation that they stand for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from helpers.watch import largest_output
from unweave.core.dist import SOLO, Group
from unweave.methods.train.entries import Entries
from unweave.sae.sparse import kernels, products


def _sorted(values: Tensor) -> Tensor:
    return values.sort(dim=1).values


@pytest.mark.parametrize(
    ("n", "width", "k"),
    [
        (5, 1, 1),
        (7, 100, 1),
        (3, 97, 97),
        (4, 256, 255),
        (6, 4608, 32),
        (2, 4611, 31),
        (9, 1000, 3),
        (1, 12345, 7),
        (4, 64, 8),
    ],
)
def test_grouped_topk_finds_what_torch_finds(n: int, width: int, k: int) -> None:
    z = torch.randn(n, width, generator=torch.Generator().manual_seed(width + k))
    values, indices = kernels.topk_rows(z, k)
    assert torch.equal(_sorted(values), _sorted(z.topk(k, dim=1).values))
    assert torch.equal(z.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("levels", [1, 2, 3, 40])
def test_grouped_topk_with_ties_keeps_the_values(levels: int) -> None:
    z = torch.randint(0, levels, (8, 3001), generator=torch.Generator().manual_seed(levels)).float()
    values, indices = kernels.topk_rows(z, 19)
    assert torch.equal(_sorted(values), _sorted(z.topk(19, dim=1).values))
    assert torch.equal(z.gather(1, indices), values)
    assert all(len(set(row)) == 19 for row in indices.tolist())


@pytest.mark.parametrize("width", [40, 700, 3001])
@pytest.mark.parametrize("levels", [1, 2, 3, 40])
def test_among_equal_entries_the_first_win(levels: int, width: int) -> None:
    z = torch.randint(-1, levels, (16, width), generator=torch.Generator().manual_seed(levels)).float()
    z[3, 5], z[3, 7] = float("nan"), float("inf")
    for k in (1, 4, 19):
        values, indices = kernels.topk_rows(z, k)
        for row in range(16):
            order = sorted(range(width), key=lambda j: (not z[row, j].isnan(), -z[row, j].nan_to_num(9).item(), j))
            assert sorted(indices[row].tolist()) == sorted(order[:k])
        assert torch.equal(z.gather(1, indices).nan_to_num(9), values.nan_to_num(9))


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize(("k", "fewer"), [(4, 2), (40, 10), (200, 19)])
def test_training_chooses_by_the_same_rule_however_it_is_cut(k: int, fewer: int, chunk: int | None) -> None:
    g = torch.Generator().manual_seed(k)
    x, W = torch.randint(-1, 2, (23, 6), generator=g).float(), torch.randint(-1, 2, (301, 6), generator=g).float()
    values, choice = kernels.choose_topk(x, W, None, k, chunk=chunk)
    both = {k: Entries(values, choice), fewer: Entries(values, choice).largest(fewer)}
    for count, found in both.items():
        assert found.choice is not None
        for row, z in enumerate((x @ W.T).tolist()):
            order = sorted(range(301), key=lambda j: (-z[j], j))[:count]
            chosen = found.choice.indices.view(23, count)[row].tolist()
            assert sorted(chosen) == sorted(order)
            assert found.values.view(23, count)[row].tolist() == [z[j] for j in chosen]


def test_grouped_topk_with_all_winners_in_one_group_or_at_the_end() -> None:
    z = torch.zeros(2, 4611)
    z[0, ::256] = torch.arange(1.0, 20.0)  # strides that coincide with a group
    z[1, -16:] = torch.arange(1.0, 17.0)  # the entries that fill no group
    values, _ = kernels.topk_rows(z, 16)
    assert torch.equal(_sorted(values), _sorted(z.topk(16, dim=1).values))


def test_topk_of_more_than_there_are_takes_all() -> None:
    z = torch.randn(3, 10)
    assert torch.equal(_sorted(kernels.topk_rows(z, 99)[0]), _sorted(z))


def _problem(seed: int = 0, n: int = 23, d: int = 12, f: int = 301) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(n, d, generator=g),
        "W": torch.randn(f, d, generator=g) / d**0.5,
        "b": torch.randn(f, generator=g) / 5,
        "V": torch.randn(f, d, generator=g) / d**0.5,
        "goal": torch.randn(n, d, generator=g),
    }


def _leaves(problem: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype, copy=True).requires_grad_(name != "goal") for name, t in problem.items()}


def _assert_same_gradients(ours: dict[str, Tensor], oracle: dict[str, Tensor], sparse: Tensor, dense: Tensor) -> None:
    """Losses and their gradients to every leaf agree to 1e-5, those of float32 with those of float64."""
    dense.backward()
    sparse.backward()
    torch.testing.assert_close(sparse.double(), dense, rtol=1e-5, atol=1e-6)
    for name in ("x", "W", "b", "V"):
        got, wanted = ours[name].grad, oracle[name].grad
        assert got is not None and wanted is not None
        assert (got.double() - wanted).norm() <= 1e-5 * wanted.norm(), name


def _dense_loss(p: dict[str, Tensor], kept: Tensor) -> Tensor:
    f = torch.relu(p["x"] @ p["W"].T + p["b"]) * kept
    return (f @ p["V"] - p["goal"]).square().sum(1).mean()


def _sparse_loss(p: dict[str, Tensor], values: Tensor, choice: kernels.Choice) -> Tensor:
    f = torch.relu(kernels.attach(p["x"], p["W"], p["b"], values.to(p["x"].dtype), choice))
    return (kernels.decode(f, choice, p["V"]) - p["goal"]).square().sum(1).mean()


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_sparse_gradients_are_the_dense_ones(kind: str, chunk: int | None) -> None:
    problem = _problem()
    k = 6
    choose = kernels.choose_topk if kind == "topk" else kernels.choose_batch_topk
    values, choice = choose(problem["x"], problem["W"], problem["b"], k, chunk=chunk)
    z = problem["x"] @ problem["W"].T + problem["b"]
    limit = z.topk(k, dim=1).values[:, -1:] if kind == "topk" else z.flatten().topk(k * len(z)).values[-1]
    oracle, ours = _leaves(problem, torch.float64), _leaves(problem, torch.float32)
    dense, sparse = _dense_loss(oracle, (z >= limit).double()), _sparse_loss(ours, values, choice)
    _assert_same_gradients(ours, oracle, sparse, dense)


def test_plain_operations_agree_with_bags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices without weighted bags take gathers and sums; both ways agree."""
    problem = _problem(1)
    values, choice = kernels.choose_topk(problem["x"], problem["W"], problem["b"], 4)
    found = []
    for bags in (True, False):
        monkeypatch.setattr(products, "_has_bags", lambda table, bags=bags: bags)
        p = _leaves(problem, torch.float32)
        _sparse_loss(p, values, choice).backward()
        found.append([p[name].grad for name in ("x", "W", "b", "V")])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_check_in_double() -> None:
    problem = _problem(2, n=4, d=3, f=40)
    p = _leaves(problem, torch.float64)
    values, choice = kernels.choose_topk(p["x"].detach(), p["W"].detach(), p["b"].detach(), 3)
    names = ("x", "W", "b", "V")

    def loss(*tensors: Tensor) -> Tensor:
        q = dict(zip(names, tensors, strict=True))
        current = (q["x"] @ q["W"].T + q["b"]).detach()[choice.rows.long(), choice.indices.long()]
        return _sparse_loss({**q, "goal": p["goal"]}, current, choice)

    del values
    assert torch.autograd.gradcheck(loss, tuple(p[n] for n in names), fast_mode=False)


@pytest.mark.parametrize("guess", [None, 0.0, 0.3, 1e9])
@pytest.mark.parametrize("f", [301, 320])
def test_batch_topk_keeps_exactly_the_largest_positives(guess: float | None, f: int) -> None:
    p = _problem(3, f=f)
    k = 9
    values, choice = kernels.choose_batch_topk(p["x"], p["W"], p["b"], k, guess=guess, chunk=7)
    z = p["x"] @ p["W"].T + p["b"]
    wanted = z.flatten().topk(k * len(z)).values
    assert len(values) == k * len(z) and bool((values > 0).all())
    torch.testing.assert_close(values.sort(descending=True).values, wanted)
    torch.testing.assert_close(choice.dense(values), z * (z >= wanted[-1]))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_a_first_chunk_unlike_the_others_changes_nothing(scale: float) -> None:
    """With so low a guess the bound rises after the first chunk; where that was too much, the search starts anew."""
    p = _problem(12, n=40)
    p["x"][:8] *= scale
    passes = []
    for guess in (1e-6, None):
        looked = []
        with pytest.MonkeyPatch.context() as patch:
            original = kernels._places
            patch.setattr(kernels, "_places", lambda mask, o=original, seen=looked: (seen.append(0), o(mask))[1])
            values, choice = kernels.choose_batch_topk(p["x"], p["W"], p["b"], 5, guess=guess, chunk=8)
        passes.append(len(looked) // 5)
        z = p["x"] @ p["W"].T + p["b"]
        torch.testing.assert_close(choice.dense(values), z * (z >= z.flatten().topk(200).values[-1]))
    assert passes[0] == (2 if scale == 30.0 else 1)


def test_batch_topk_with_too_few_positives_takes_them_all() -> None:
    p = _problem(4)
    values, choice = kernels.choose_batch_topk(p["x"], p["W"], p["b"] - 2.0, 50)
    z = p["x"] @ p["W"].T + p["b"] - 2.0
    assert 0 < int((z > 0).sum()) < 50 * len(z)
    torch.testing.assert_close(choice.dense(values), torch.relu(z))


def test_rows_without_latents_and_latents_without_rows() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    choice = kernels.Choice(torch.tensor([4, 0, 4]), torch.tensor([0, 0, 2, 2, 3]), 6)
    table = torch.randn(6, 5)
    dense = choice.dense(values)
    assert dense.count_nonzero() == 3 and dense[1, 4] == 1 and dense[3, 4] == 3
    torch.testing.assert_close(kernels.weighted_rows(values, choice, table), dense @ table)
    other = torch.randn(4, 5)
    torch.testing.assert_close(kernels.transposed_rows(values, choice, other), dense.T @ other)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "above"])
def test_a_sparse_step_holds_one_chunk_of_dense_latents_at_most(kind: str) -> None:
    """No tensor of a forward and backward pass is larger than a chunk; the batch's latents are eight times as many."""
    g = torch.Generator().manual_seed(0)
    x, goal = (torch.randn(64, 8, generator=g) for _ in range(2))
    W, V = (torch.randn(512, 8, generator=g).requires_grad_() for _ in range(2))
    b = torch.zeros(512, requires_grad=True)

    def step() -> None:
        if kind == "above":
            found = kernels.choose_above(x, W, b, torch.full((512,), 5.0), limit=0.1, chunk=8)
        else:
            choose = kernels.choose_topk if kind == "topk" else kernels.choose_batch_topk
            found = choose(x, W, b, 16, chunk=8)
        assert found is not None
        f = torch.relu(kernels.attach(x, W, b, *found))
        (kernels.decode(f, found[1], V) - goal).square().sum().backward()
        assert W.grad is not None and V.grad is not None and b.grad is not None

    assert largest_output(step) <= 8 * 512
    assert largest_output(lambda: x @ W.T) == 64 * 512, "the watch sees what it should"


# -- entries above a bound ------------------------------------------------------------------------------------------


def _bounds(p: dict[str, Tensor]) -> Tensor:
    """Of each latent its own: one that every row passes, one that no row passes."""
    bound = torch.rand(len(p["W"]), generator=torch.Generator().manual_seed(9)) + 0.7
    bound[3], bound[5] = -100.0, 100.0
    return bound


@pytest.mark.parametrize("f", [301, 320])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("biased", [True, False])
def test_choose_above_finds_all_entries_above_their_bound(f: int, chunk: int | None, biased: bool) -> None:
    p = _problem(5, f=f)
    p["x"][4] = 0.0
    p["b"][torch.arange(f) != 3] -= 0.7  # a row of zeros has nothing but latent 3
    b, bound = (p["b"] if biased else None), _bounds(p)
    found = kernels.choose_above(p["x"], p["W"], b, bound, limit=1.0, chunk=chunk)
    assert found is not None
    values, choice = found
    z = p["x"] @ p["W"].T + (p["b"] if biased else 0.0)
    kept = z > bound
    assert choice.offsets.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    assert torch.equal(choice.indices.long(), kept.nonzero()[:, 1]), "by row, ascending within it"
    torch.testing.assert_close(values, z[kept])
    assert choice.indices.dtype == choice.offsets.dtype == torch.int32 and choice.n_latents == f


def test_choose_above_of_nothing_and_of_everything() -> None:
    p = _problem(6, f=64)
    nothing = kernels.choose_above(p["x"], p["W"], p["b"], torch.full((64,), 1e9), limit=0.0)
    assert nothing is not None
    assert len(nothing[0]) == 0 and nothing[1].offsets.tolist() == [0] * 24
    everything = kernels.choose_above(p["x"], p["W"], p["b"], torch.full((64,), -1e9), limit=1.0)
    assert everything is not None
    torch.testing.assert_close(everything[1].dense(everything[0]), p["x"] @ p["W"].T + p["b"])
    none = kernels.choose_above(p["x"][:0], p["W"], p["b"], torch.zeros(64), limit=0.1)
    assert none is not None and len(none[0]) == 0 and none[1].offsets.tolist() == [0]


def test_choose_above_gives_up_over_its_limit_and_early() -> None:
    p = _problem(7, f=64)
    bound = torch.zeros(64)
    z = p["x"] @ p["W"].T + p["b"]
    share = float((z > 0).double().mean())
    assert kernels.choose_above(p["x"], p["W"], p["b"], bound, limit=share + 1e-6) is not None
    assert kernels.choose_above(p["x"], p["W"], p["b"], bound, limit=share - 1e-6) is None
    dense_first = p["x"].clone()
    dense_first[7:] = float("nan")  # never looked at: the first chunk decides
    calls = []
    original = kernels._places

    def places(mask: Tensor) -> Tensor:
        calls.append(len(mask))
        return original(mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_places", places)
        assert kernels.choose_above(dense_first, p["W"], p["b"], bound, limit=0.1, chunk=7) is None
    assert calls == [7]


def _uneven(p: dict[str, Tensor]) -> None:
    """Row 2 has no latent, row 5 all of them; latent 3 is in every other row, latents 7 and 8 in no other row."""
    f = len(p["b"])
    p["W"] *= 0.4
    p["W"][:, 0], p["W"][:, 1] = -1.0, 1.0
    p["x"][:, 0], p["x"][:, 1] = 0.0, 0.0
    p["x"][2, 0], p["x"][5, 1] = 50.0, 50.0
    p["b"] = torch.where(torch.arange(f) == 3, 20.0, p["b"])
    p["b"][7:9] = -20.0


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("f", [301, 320])
def test_gradients_of_entries_above_a_bound_are_the_dense_ones(
    monkeypatch: pytest.MonkeyPatch, blocks: bool, f: int
) -> None:
    problem = _problem(10, f=f)
    _uneven(problem)
    bound = _bounds(problem).clamp(-1.0, 1.5)
    if blocks:
        monkeypatch.setattr(products, "CACHE_BYTES", 7 * 4 * 12)  # seven rows of 12 numbers
        monkeypatch.setattr(products, "BLOCK_ENTRIES", 0)
    found = kernels.choose_above(problem["x"], problem["W"], problem["b"], bound, limit=1.0, chunk=6)
    assert found is not None
    z = problem["x"] @ problem["W"].T + problem["b"]
    kept = z > bound
    assert (kept.sum(1)[[2, 5]].tolist(), int(kept[:, 3].sum())) == ([0, f], 22)
    assert kept[:, 7:9].sum(0).tolist() == [1, 1]
    oracle, ours = _leaves(problem, torch.float64), _leaves(problem, torch.float32)
    dense, sparse = _dense_loss(oracle, kept.double()), _sparse_loss(ours, *found)
    _assert_same_gradients(ours, oracle, sparse, dense)
    assert bool(found[1]._by_rows) is blocks and bool(found[1]._by_latents) is blocks


@pytest.mark.parametrize("size", [1, 4, 5, 23, 99])
def test_blocks_of_a_choice_make_it_up(size: int) -> None:
    p = _problem(11, f=50)
    found = kernels.choose_above(p["x"], p["W"], p["b"], torch.full((50,), 0.5), limit=1.0)
    assert found is not None
    values, choice = found
    dense = choice.dense(values)
    rows = choice.row_blocks(size)
    assert torch.equal(torch.cat([part.dense(values[entries]) for _, entries, part in rows]), dense)
    order, blocks = choice.latent_blocks(size)
    parts = [part.dense(values[order][entries]) for _, entries, part in blocks]
    assert torch.equal(torch.cat(parts, 1), dense)
    assert [latents for latents, _, _ in blocks] == [slice(a, min(a + size, 50)) for a in range(0, 50, size)]


# -- a batch divided between processes --------------------------------------------------------------------------------


class _Threads(Group):
    """A group whose members are threads of this process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: dict[int, Tensor]) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "meet", barrier)
        object.__setattr__(self, "board", board)

    def gather(self, t: Tensor) -> list[Tensor]:
        self.board[self.rank] = t.clone()
        self.meet.wait(10)
        found = [self.board[rank] for rank in range(self.size)]
        self.meet.wait(10)
        return found

    def sum(self, t: Tensor) -> Tensor:
        return t.copy_(torch.stack(self.gather(t)).sum(0))

    def max(self, t: Tensor) -> Tensor:
        return t.copy_(torch.stack(self.gather(t)).amax(0))


def _divided(x: Tensor, sizes: list[int], choose: Callable[[Tensor, Group], tuple[Tensor, kernels.Choice]]) -> Tensor:
    """The dense choice of the whole batch, put together from what each member chose of its part."""
    barrier, board = threading.Barrier(len(sizes)), {}
    with ThreadPoolExecutor(len(sizes)) as pool:
        groups = [_Threads(rank, len(sizes), barrier, board) for rank in range(len(sizes))]
        parts = list(pool.map(choose, x.split(sizes), groups))
    return torch.cat([choice.dense(values) for values, choice in parts])


@pytest.mark.parametrize("sizes", [[12, 11], [1, 3, 19], [0, 23]])
@pytest.mark.parametrize("guess", [None, 1e9])
def test_batch_topk_over_processes_is_that_of_the_whole_batch(sizes: list[int], guess: float | None) -> None:
    p = _problem(8)
    p["x"][15:] *= 3.0  # winners are far from equally many in each part

    def choose(x: Tensor, group: Group) -> tuple[Tensor, kernels.Choice]:
        return kernels.choose_batch_topk(x, p["W"], p["b"], 6, guess=guess, chunk=5, group=group)

    values, whole = choose(p["x"], SOLO)
    dense = _divided(p["x"], sizes, choose)
    assert len(values) == 6 * 23 == int((dense > 0).sum())
    torch.testing.assert_close(dense, whole.dense(values))


@pytest.mark.parametrize("sizes", [[23], [12, 11], [4, 4, 15]])
def test_ties_are_kept_up_to_the_exact_number_however_a_batch_is_divided(sizes: list[int]) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randint(0, 4, (23, 4), generator=g).float()
    W = torch.eye(4).repeat(8, 1)  # every value eight times in a row

    def choose(part: Tensor, group: Group) -> tuple[Tensor, kernels.Choice]:
        return kernels.choose_batch_topk(part, W, None, 3, guess=0.5, group=group)

    dense = _divided(x, sizes, choose)
    z = x @ W.T
    assert int((dense > 0).sum()) == 3 * 23
    lowest = z.flatten().topk(3 * 23).values[-1]
    above, equal = z > lowest, z == lowest
    first = equal & (equal.flatten().cumsum(0).view_as(equal) <= 3 * 23 - above.sum())
    assert 0 < int(first.sum()) < int(equal.sum()), "there are ties to cut"
    assert torch.equal(dense, z * (above | first))


def test_batch_topk_over_processes_with_too_few_positives() -> None:
    p = _problem(4)
    z = p["x"] @ p["W"].T + p["b"] - 2.0

    def choose(part: Tensor, group: Group) -> tuple[Tensor, kernels.Choice]:
        return kernels.choose_batch_topk(part, p["W"], p["b"] - 2.0, 50, group=group)

    torch.testing.assert_close(_divided(p["x"], [9, 14], choose), torch.relu(z))
