"""From stored tokens to mixed batches of activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.progress import ShownTask
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.norms import calibrate
from unweave.data.pack import Row
from unweave.data.policy import TokenPolicy
from unweave.data.stream import ActivationSource, MixingBuffer, RowBatches
from unweave.data.tokens import TokenStore
from unweave.lm.chat import Role
from unweave.lm.model import LM, Tokens

SITES = [Site("resid_post", 1), Site("attn_heads", 0), Site("mlp_add", 1)]
EXCLUDED = (3, 8)


@pytest.fixture
def lm(tiny) -> LM:  # type: ignore[no-untyped-def]
    return LM(tiny("llama"), None)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(60):
        ids = torch.randint(0, 97, (int(torch.randint(5, 40, (1,), generator=g)),), generator=g).tolist()
        rows.append(Row(ids, [int(Role.TEXT)] * len(ids), i))
    return TokenStore.write(tmp_path / "store", rows, 900, {})


def one_by_one(lm: LM, store: TokenStore, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: every row on its own, in order, without padding."""
    values, where = [], []
    for row in range(store.n_rows):
        ids = torch.from_numpy(store.row(row)[0].astype("int64"))
        with lm.taps(read=[site]) as seen:
            lm(Tokens.of(ids))
        kept = torch.tensor([int(i) not in EXCLUDED for i in ids])
        values.append(seen[site][0][kept])
        where.append((int(store.starts[row]) + torch.arange(len(ids)))[kept])
    return torch.cat(values), torch.cat(where)


def make(lm: LM, store: TokenStore, **settings) -> ActivationSource:  # type: ignore[no-untyped-def]
    return ActivationSource(
        lm, store, SITES, **{"chunk_tokens": 200, "batch_tokens": 128, "exclude_ids": EXCLUDED} | settings
    )


def test_trap_02_every_counted_token_once_and_no_padding(lm: LM, store: TokenStore) -> None:
    source = make(lm, store)
    assert source.n_chunks > 3
    chunks = [source.chunk(i) for i in range(source.n_chunks)]
    for site in SITES:
        values, where = one_by_one(lm, store, site)
        assert torch.equal(torch.cat([c.where for c in chunks]), where)
        torch.testing.assert_close(torch.cat([c.x[site] for c in chunks]), values, rtol=1e-4, atol=1e-5)
    assert not set(store.ids[torch.cat([c.where for c in chunks]).numpy()].tolist()) & set(EXCLUDED)


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_chunks_do_not_depend_on_the_batch_size(lm: LM, store: TokenStore, batch_tokens: int) -> None:
    one, other = make(lm, store).chunk(1), make(lm, store, batch_tokens=batch_tokens).chunk(1)
    assert torch.equal(one.where, other.where)
    torch.testing.assert_close(one.x[SITES[0]], other.x[SITES[0]], rtol=1e-4, atol=1e-5)


def test_cached_chunks_are_the_computed_ones_and_need_no_model(lm: LM, store: TokenStore, tmp_path: Path) -> None:
    source = make(lm, store, cache=tmp_path / "cache")
    first = source.chunk(2)
    lm.model.forward = None  # whoever calls it now fails
    again = source.chunk(2)
    assert torch.equal(first.where, again.where)
    assert all(torch.equal(first.x[s], again.x[s]) for s in SITES)
    with pytest.raises(TypeError):
        source.chunk(1)


def test_damaged_cache_is_named(lm: LM, store: TokenStore, tmp_path: Path) -> None:
    source = make(lm, store, cache=tmp_path / "cache")
    source.chunk(0)
    path = tmp_path / "cache" / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UnweaveError, match="00000"):
        source.chunk(0)


def test_the_forward_pass_ends_at_the_last_site(lm: LM, store: TokenStore) -> None:
    ran = []
    lm.layout.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    make(lm, store).chunk(0)
    assert not ran


def test_nan_activations_stop_with_the_document(lm: LM, store: TokenStore) -> None:
    def spoil(module, args, out):  # type: ignore[no-untyped-def]
        out = out.clone()
        out[0, 0] = float("nan")
        return out

    lm.layout.blocks[1].mlp.register_forward_hook(spoil)
    with pytest.raises(UnweaveError, match=r"NaN.*\n.*document"):
        make(lm, store).chunk(0)


def test_trap_07_norms_are_measured_and_outliers_left_out(lm: LM, store: TokenStore) -> None:
    source = make(lm, store)
    x = torch.cat([source.chunk(i).x[SITES[0]] for i in range(source.n_chunks)])
    ratio = 1.3
    norms = calibrate(source, ratio)[SITES[0]]
    limit = ratio * float(x.norm(dim=1).median())
    assert norms.max_norm == pytest.approx(limit)
    assert norms.outliers == int((x.norm(dim=1) > limit).sum()) > 0
    inside = x[x.norm(dim=1) <= limit]
    assert norms.gamma == pytest.approx(
        float(inside.mean(0).norm() / (inside - inside.mean(0)).square().sum(1).mean().sqrt()), rel=1e-2
    )
    assert calibrate(source, None)[SITES[0]].max_norm is None


def buffer(lm: LM, store: TokenStore, **settings) -> MixingBuffer:  # type: ignore[no-untyped-def]
    source = make(lm, store)
    policies = {site: TokenPolicy() for site in SITES}
    return MixingBuffer(source, **{"batch": 32, "capacity": 400, "seed": 5, "policies": policies} | settings)


def test_batches_are_tokens_of_the_source_with_sites_aligned(lm: LM, store: TokenStore) -> None:
    values = {site: one_by_one(lm, store, site)[0] for site in SITES}
    stream = buffer(lm, store)
    for _ in range(10):
        batch = stream.next()
        nearest = torch.cdist(batch[SITES[0]], values[SITES[0]]).argmin(1)
        for site in SITES:
            assert batch[site].shape[0] == 32
            torch.testing.assert_close(batch[site], values[site][nearest], rtol=1e-3, atol=1e-4)


def test_the_wait_before_the_first_batch_is_shown(lm: LM, store: TokenStore, shown_tasks: list[ShownTask]) -> None:
    stream = buffer(lm, store)
    calibrate(stream.source, None)
    for _ in range(30):  # refilled on the way, without a line of its own
        stream.next()
    assert [shown.name for shown in shown_tasks] == ["norms of activations", "fill the mixing buffer"]
    assert all(shown.end == "done" and shown.done >= 0.9 * shown.total > 0 for shown in shown_tasks)


def test_trap_11_a_batch_mixes_many_documents(lm: LM, store: TokenStore) -> None:
    values, where = one_by_one(lm, store, SITES[0])
    batch = buffer(lm, store).next()[SITES[0]]
    tokens = where[torch.cdist(batch, values).argmin(1)]
    documents = torch.bucketize(tokens, torch.from_numpy(store.starts[1:].astype("int64")), right=True)
    assert len(documents.unique()) >= 12
    neighbours = (documents[1:] == documents[:-1]).float().mean()
    assert neighbours < 0.3


def test_an_epoch_serves_about_everything_once(lm: LM, store: TokenStore) -> None:
    values, _ = one_by_one(lm, store, SITES[0])
    stream = buffer(lm, store, batch=16, capacity=10_000)  # the whole epoch fits
    served = torch.cat([stream.next()[SITES[0]] for _ in range(len(values) // 2 // 16)])
    found = torch.cdist(served, values).argmin(1)
    # rows that begin with the same token share its activation; drawing with replacement would repeat a fifth of them
    assert len(found.unique()) > 0.98 * len(served)


def test_trap_26_stream_state_continues_exactly(lm: LM, store: TokenStore) -> None:
    for taken in (0, 1, 7, 40):
        stream = buffer(lm, store)
        for _ in range(taken):
            stream.next()
        state = {name: value.clone() for name, value in stream.state_dict().items()}
        expected = [stream.next() for _ in range(40)]
        other = buffer(lm, store)
        other.load_state_dict(state)
        for batch in expected:
            got = other.next()
            assert all(torch.equal(got[s], batch[s]) for s in SITES)
        assert (other.epoch, other.position) == (stream.epoch, stream.position)


def test_seed_decides_the_order(lm: LM, store: TokenStore) -> None:
    one, same, other = buffer(lm, store), buffer(lm, store), buffer(lm, store, seed=6)
    a, b, c = one.next()[SITES[0]], same.next()[SITES[0]], other.next()[SITES[0]]
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_outliers_at_any_site_are_dropped_at_all_and_counted(lm: LM, store: TokenStore) -> None:
    values, _ = one_by_one(lm, store, SITES[0])
    limit = float(values.norm(dim=1).quantile(0.8))
    stream = buffer(
        lm, store, policies={site: TokenPolicy(max_norm=limit if site == SITES[0] else None) for site in SITES}
    )
    for _ in range(20):
        assert float(stream.next()[SITES[0]].norm(dim=1).max()) <= limit
    assert stream.outliers > 0


def test_peek_takes_nothing(lm: LM, store: TokenStore) -> None:
    stream, other = buffer(lm, store), buffer(lm, store)
    assert stream.peek(100)[SITES[0]].shape == (100, 32)
    assert torch.equal(stream.next()[SITES[0]], other.next()[SITES[0]])


def test_peek_gives_tokens_however_many_are_served(lm: LM, store: TokenStore) -> None:
    """After a resumption everything may be served; a sample is measured all the same."""
    stream = buffer(lm, store)
    stream.next()
    pool = stream._pool[SITES[0]][stream._order]
    for cursor, n in ((len(pool), 100), (len(pool) - 10, 100), (5, 100), (0, 10**6)):
        stream._cursor = cursor
        found = stream.peek(n)[SITES[0]]
        first = max(0, min(cursor, len(pool) - n))
        assert torch.equal(found, pool[first : first + n]) and len(found) == min(n, len(pool))


def test_too_little_text_or_buffer(lm: LM, store: TokenStore) -> None:
    with pytest.raises(UnweaveError, match="mixing buffer"):
        buffer(lm, store, batch=300)
    with pytest.raises(UnweaveError, match="fewer than one batch"):
        buffer(lm, store, batch=5000, capacity=20_000).next()
    with pytest.raises(UnweaveError, match="no site"):
        ActivationSource(lm, store, [])


def test_tokens_that_are_not_finite_are_dropped_and_counted(lm: LM, store: TokenStore, tmp_path: Path) -> None:
    clean = torch.cat([make(lm, store).chunk(i).where for i in range(make(lm, store).n_chunks)])

    def spoil(module, args, out):  # type: ignore[no-untyped-def]
        out = out.clone()
        out[:, 1, 0] = float("inf")
        return out

    lm.layout.blocks[1].mlp.register_forward_hook(spoil)
    source = make(lm, store, nonfinite="drop", cache=tmp_path)
    for _ in range(2):  # computed, then read
        chunks = [source.chunk(i) for i in range(source.n_chunks)]
        kept = torch.cat([chunk.where for chunk in chunks])
        spoiled = torch.tensor([int(start) + 1 for start in store.starts[:-1]])
        assert set(clean.tolist()) - set(kept.tolist()) == set(spoiled.tolist()) & set(clean.tolist())
        assert sum(chunk.nonfinite for chunk in chunks) == len(clean) - len(kept) > 0
        assert all(bool(torch.isfinite(x).all()) for chunk in chunks for x in chunk.x.values())


def test_row_batches_serve_every_row_once_an_epoch_and_continue_exactly(store: TokenStore) -> None:
    batches = RowBatches(store, 0, batch_tokens=40, seed=3)
    rows: list[int] = []
    saved, after = None, []
    while batches.epoch == 0:
        tokens, where = batches.next()
        assert tokens.n_tokens <= 40 or len(tokens) == 1
        rows += [int(first) for first in where[:, 0]]
        if saved is not None:
            after.append(where)
        elif len(rows) > 5:
            saved = batches.state_dict()
    assert len(rows) >= store.n_rows
    assert set(rows[: store.n_rows]) == {int(start) for start in store.starts[:-1]}
    again = RowBatches(store, 0, batch_tokens=40, seed=3)
    assert saved is not None
    again.load_state_dict(saved)
    for where in after:
        torch.testing.assert_close(again.next()[1], where)
    assert RowBatches(store, 0, batch_tokens=40, seed=4).next()[1].tolist() != after[0].tolist()


def test_row_batches_have_a_row_for_every_process(store: TokenStore) -> None:
    few, one = (RowBatches(store, 0, batch_tokens=8, seed=3, min_rows=n) for n in (3, 1))
    served = []
    for _ in range(10):
        tokens, where = few.next()
        assert len(tokens) == 3  # all are longer than 4 tokens
        served += [int(first) for first in where[:, 0]]
    assert served == [int(one.next()[1][0, 0]) for _ in range(30)]  # in the same order
    roomy = RowBatches(store, 0, batch_tokens=40, seed=3, min_rows=2)
    roomy.outliers, roomy.nonfinite = 4, 2
    again = RowBatches(store, 0, batch_tokens=40, seed=3, min_rows=2)
    again.load_state_dict(roomy.state_dict())
    assert (again.outliers, again.nonfinite) == (4, 2)
