"""latents/records.py and latents/contexts.py against plain loops over dense latents."""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.models import build_tiny
from unweave.core.codes import Codes
from unweave.core.contents import listing
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.site import Site
from unweave.core.writing import write_json
from unweave.data.batches import store_batches
from unweave.data.pack import Row
from unweave.data.policy import TokenPolicy
from unweave.data.stream import ActivationSource
from unweave.data.tokens import TokenStore
from unweave.latents import contexts as finder
from unweave.latents.collect import collect
from unweave.latents.contexts import KINDS, Contexts, RecordsSpec, find_contexts
from unweave.latents.records import Records, build, logit_effects
from unweave.lm.chat import Role, encode_text
from unweave.lm.model import LM
from unweave.sae.activations import ReLU, TopK
from unweave.sae.measure.evaluate import evaluate as evaluate_core
from unweave.sae.module import SAE

SPEC = RecordsSpec(top=3, bands=3, per_band=2, random=4, left=3, right=2, logits=4, seed=1)


@dataclass
class Store:
    """The parts of a token store that records read."""

    ids: np.ndarray
    roles: np.ndarray
    starts: np.ndarray
    documents: np.ndarray


@dataclass
class Case:
    store: Store
    where: np.ndarray
    f: Tensor

    @property
    def codes(self) -> Codes:
        return Codes.from_dense(self.f)

    def document(self, token: int) -> int:
        return int(self.store.documents[np.searchsorted(self.store.starts, token, side="right") - 1])


def case(seed: int, n_rows: int = 12, n_latents: int = 9, density: float = 0.3, levels: int | None = None) -> Case:
    """Random rows (several of the same document), of which about four tokens in five are counted, in mixed order.

    Latent 0 never fires and latent 1 always does. With ``levels`` values repeat, so that ties occur.
    """
    g = np.random.default_rng(seed)
    starts = np.cumsum([0, *g.integers(1, 15, n_rows)])
    n = int(starts[-1])
    store = Store(
        g.integers(3, 97, n).astype(np.uint32),
        g.choice([Role.SPECIAL, Role.USER, Role.ASSISTANT], n, p=[0.1, 0.4, 0.5]).astype(np.uint8),
        starts,
        g.integers(0, max(1, n_rows // 2), n_rows) * 10,
    )
    where = g.permutation(np.flatnonzero(g.random(n) < 0.8))
    if not len(where):
        where = np.arange(n)
    values = g.random((len(where), n_latents)).astype(np.float32) + 0.1
    if levels:
        values = (np.ceil(values * levels) / levels).astype(np.float32)
    f = values * (g.random(values.shape) < density)
    f[:, 0], f[:, 1] = 0, values[:, 1]
    return Case(store, where, torch.from_numpy(f))


def of_latent(found: Contexts, j: int, kind: str) -> list[int]:
    return np.flatnonzero((found.latent == j) & (found.kind == KINDS.index(kind))).tolist()


def rows_of(found: Contexts, case: Case, which: list[int]) -> list[int]:
    row = {int(token): i for i, token in enumerate(case.where)}
    return [row[int(found.token[c])] for c in which]


def same(a: Contexts, b: Contexts) -> None:
    for f in fields(Contexts):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert x.dtype == y.dtype and np.array_equal(x, y), f.name


# -- choosing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n_rows=st.integers(1, 20),
    density=st.sampled_from([0.02, 0.3, 0.9]),
    levels=st.sampled_from([None, 3]),
)
def test_contexts_equal_a_plain_loop(seed: int, n_rows: int, density: float, levels: int | None) -> None:
    data = case(seed, n_rows, density=density, levels=levels)
    found = find_contexts(data.codes, data.where, data.store, SPEC)  # type: ignore[arg-type]
    f = data.f.numpy()
    for j in range(f.shape[1]):
        firing = sorted(np.flatnonzero(f[:, j] > 0).tolist(), key=lambda i: -f[i, j])
        top: list[int] = []
        for i in firing:
            documents = [data.document(int(data.where[t])) for t in top]
            if len(top) < SPEC.top and data.document(int(data.where[i])) not in documents:
                top.append(i)
        assert rows_of(found, data, of_latent(found, j, "top")) == top
        rest = [i for i in firing if i not in top]
        quantile = of_latent(found, j, "quantile")
        chosen = rows_of(found, data, quantile)
        assert len(chosen) == len(set(chosen)) == min(len(rest), SPEC.bands * SPEC.per_band)
        for c, i in zip(quantile, chosen, strict=True):
            share = rest.index(i) / len(rest)
            band = int(found.band[c])
            assert band / SPEC.bands - 1 / len(rest) < share < (band + 1) / SPEC.bands
        assert [int(b) for b in found.band[quantile]] == sorted(found.band[quantile])
        assert len(of_latent(found, j, "random")) == SPEC.random
        assert all(found.band[c] == -1 for kind in ("top", "random") for c in of_latent(found, j, kind))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n_rows=st.integers(1, 20))
def test_windows_equal_a_plain_loop(seed: int, n_rows: int) -> None:
    data = case(seed, n_rows)
    found = find_contexts(data.codes, data.where, data.store, SPEC)  # type: ignore[arg-type]
    row_of = {int(token): i for i, token in enumerate(data.where)}
    for c in range(len(found)):
        token, j = int(found.token[c]), int(found.latent[c])
        row = int(np.searchsorted(data.store.starts, token, side="right")) - 1
        start, stop = int(data.store.starts[row]), int(data.store.starts[row + 1])
        window = list(range(max(start, token - SPEC.left), min(stop, token + SPEC.right + 1)))
        part = slice(int(found.offsets[c]), int(found.offsets[c + 1]))
        assert found.ids[part].tolist() == data.store.ids[window].tolist()
        assert found.counted[part].tolist() == [t in row_of for t in window]
        wanted = [float(data.f[row_of[t], j]) if t in row_of else 0.0 for t in window]
        assert found.values[part].tolist() == pytest.approx(wanted, abs=0)
        assert window[found.focus[c]] == token
        assert found.value[c] == data.f[row_of[token], j]
        assert found.role[c] == data.store.roles[token]
        assert found.document[c] == data.document(token)


@pytest.mark.parametrize("limits", [(1, 1), (40, 3), (10**9, 4)])
def test_blocks_of_latents_change_nothing(limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    data = case(5)
    whole = find_contexts(data.codes, data.where, data.store, SPEC)  # type: ignore[arg-type]
    monkeypatch.setattr(finder, "_BLOCK_FIRINGS", limits[0])
    monkeypatch.setattr(finder, "_BLOCK_LATENTS", limits[1])
    same(whole, find_contexts(data.codes, data.where, data.store, SPEC))  # type: ignore[arg-type]
    blocks = list(finder._blocks(data.codes.counts().numpy()))
    assert len(blocks) > 1
    assert [j for first, last in blocks for j in range(first, last)] == list(range(9))


def test_deterministic_by_seed_and_whatever_the_order_within_rows_of_codes() -> None:
    data = case(6)
    a = find_contexts(data.codes, data.where, data.store, SPEC)  # type: ignore[arg-type]
    same(a, find_contexts(data.codes, data.where, data.store, SPEC))  # type: ignore[arg-type]
    values, indices = data.f.topk(data.f.shape[1])  # as a TopK SAE stores them: by value, not by index
    sorted_codes = Codes.from_topk(values, indices, data.f.shape[1])
    assert not torch.equal(sorted_codes.indices, data.codes.indices)
    same(a, find_contexts(sorted_codes, data.where, data.store, SPEC))  # type: ignore[arg-type]
    other = find_contexts(data.codes, data.where, data.store, RecordsSpec(**{**SPEC.to_dict(), "seed": 2}))  # type: ignore[arg-type]
    top = a.kind == 0
    assert np.array_equal(a.token[top], other.token[other.kind == 0])
    assert not np.array_equal(a.token[~top], other.token[other.kind != 0])


def test_random_contexts_come_from_all_tokens() -> None:
    data = case(7, density=0.05)
    spec = RecordsSpec(top=0, bands=1, per_band=0, random=2000, left=0, right=0)
    found = find_contexts(data.codes, data.where, data.store, spec)  # type: ignore[arg-type]
    assert set(found.kind.tolist()) == {2}
    for j in (0, 1, 4):
        tokens = found.token[found.latent == j]
        assert set(tokens.tolist()) == set(data.where.tolist())  # 2,000 draws from some 70 tokens
        assert np.mean(found.value[found.latent == j] > 0) == pytest.approx(
            float((data.f[:, j] > 0).float().mean()), abs=0.1
        )


def test_codes_that_do_not_fit_are_refused() -> None:
    data = case(8)
    wrong: list[tuple[Any, str]] = [
        (data.where[:-1], "places of"),
        (data.where + 10_000, "other tokens"),
        (data.where - 10_000, "other tokens"),
        (np.full_like(data.where, data.where[0]), "twice"),
    ]
    for where, message in wrong:
        with pytest.raises(UnweaveError, match=message):
            find_contexts(data.codes, where, data.store, SPEC)  # type: ignore[arg-type]
    with pytest.raises(UnweaveError, match="no tokens"):
        find_contexts(Codes.from_dense(torch.zeros(0, 4)), np.zeros(0), data.store, SPEC)  # type: ignore[arg-type]
    for bad in ({"top": -1}, {"bands": 0}):
        with pytest.raises(UnweaveError):
            RecordsSpec.from_dict(bad)


# -- records ----------------------------------------------------------------------------------------------------------


def make_sae(
    n_latents: int, site: str = "resid_post.1", policy: TokenPolicy | None = None, k: int | None = None
) -> SAE:
    g = torch.Generator().manual_seed(4)
    return SAE(
        0.3 * torch.randn(32, n_latents, generator=g),
        0.3 * torch.randn(n_latents, generator=g),
        torch.randn(n_latents, 32, generator=g),
        torch.randn(32, generator=g),
        ReLU() if k is None else TopK(k),
        read=Site.parse(site),
        policy=policy,
    )


@pytest.fixture
def lm(tiny_lm: Any) -> LM:
    return tiny_lm("llama")


def made(lm: LM, seed: int = 9, **options: Any) -> tuple[Case, Records]:
    data = case(seed, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnweaveWarning)
        return data, build(lm, make_sae(9), data.codes, torch.from_numpy(data.where), data.store, SPEC)  # type: ignore[arg-type]


def test_numbers_of_a_record(lm: LM) -> None:
    data, records = made(lm)
    for j in range(9):
        column = data.f[:, j].double().numpy()
        record = records.latent(j)
        active = column[column > 0]
        assert record.count == len(active) and record.rate == len(active) / len(column)
        assert record.maximum == (active.max() if len(active) else 0)
        assert record.mean_active == pytest.approx(active.mean() if len(active) else 0, rel=1e-6)
        roles = [c.role for c in record.top]
        assert record.special_share == (roles.count(Role.SPECIAL) / len(roles) if roles else None)
        assert all(c.values[c.focus] == c.value for c in (*record.top, *record.quantile, *record.random))
        assert [c.band for c in record.quantile] == sorted(c.band for c in record.quantile if c.band is not None)
    assert records.latent(0).top == () and len(records.latent(0).random) == SPEC.random
    with pytest.raises(UnweaveError, match="0 to 8"):
        records.latent(9)
    with pytest.raises(UnweaveError, match="0 to 8"):
        records.latent(-1)


def test_negative_values_do_not_fire(lm: LM) -> None:
    """A TopK without ReLU stores negative values; they are neither firings nor maxima."""
    data = case(10)
    f = data.f.clone()
    f[:, 3] = -f[:, 3].abs() - 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnweaveWarning)
        records = build(lm, make_sae(9), Codes.from_dense(f), data.where, data.store, SPEC)  # type: ignore[arg-type]
    record = records.latent(3)
    assert (record.count, record.maximum, record.mean_active, record.top, record.quantile) == (0, 0, 0, (), ())


def test_texts_and_printing(lm: LM) -> None:
    data, records = made(lm)
    record = records.latent(4)
    shown = repr(record)
    assert "latent 4: fires on" in shown and "promotes:" in shown and "quantile:" in shown
    context = record.top[0]
    assert list(context.texts) == lm.token_strings(context.ids)
    assert f"[{context.texts[context.focus]}]" in str(context) or "\\n" in str(context)
    assert "8 of them fire" in repr(records)
    silent = build(LM(lm.model, None), make_sae(9), data.codes, data.where, data.store, RecordsSpec(top=1, random=0))  # type: ignore[arg-type]
    assert silent.latent(4).top[0].texts[0].startswith("<")


def test_trap_04_special_tokens_that_crowd_the_top_are_reported(lm: LM) -> None:
    data = case(11, n_rows=40)
    data.store.roles[:] = Role.USER
    data.store.roles[data.where[:5]] = Role.SPECIAL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calm = build(lm, make_sae(9), data.codes, data.where, data.store, SPEC)  # type: ignore[arg-type]
    assert calm.special_share < 0.25
    f = data.f.clone()
    f[:5, 2:] = 50
    with pytest.warns(UnweaveWarning, match="special or template tokens"):
        crowded = build(lm, make_sae(9), Codes.from_dense(f), data.where, data.store, SPEC)  # type: ignore[arg-type]
    assert crowded.special_share > 0.5
    assert crowded.latent(4).special_share == 1.0 or len({data.document(int(t)) for t in data.where[:5]}) < SPEC.top


@pytest.mark.parametrize("family_name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_logit_effects_equal_norm_and_unembedding(tiny: Any, family_name: str) -> None:
    model = tiny(family_name)
    sae = make_sae(20)
    written = logit_effects(LM(model, None), sae, 5)
    norm = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}.get(family_name, "model.norm")
    module = model.get_submodule(norm)
    rows = sae.W_dec.double()
    if family_name in ("gpt2", "gpt_neox"):
        rows = rows - rows.mean(1, keepdim=True)
        weight = module.weight.double()
    else:
        weight = module.weight.double() + (1 if family_name == "gemma2" else 0)
    rows = rows / rows.square().mean(1, keepdim=True).add(1e-5).sqrt() * weight
    logits = rows @ model.get_output_embeddings().weight.double().T
    for j in range(20):
        order = logits[j].argsort(descending=True)
        assert written.promoted[j].tolist() == order[:5].tolist()
        assert written.suppressed[j].tolist() == order.flip(0)[:5].tolist()
        assert written.promoted_scores[j] == pytest.approx(logits[j][order[:5]].numpy(), rel=1e-3)
        assert written.suppressed_scores[j] == pytest.approx(logits[j][order.flip(0)[:5]].numpy(), rel=1e-3)


def test_logit_effects_only_where_directions_lie_in_the_stream(tiny_lm: Any) -> None:
    data = case(12)
    spec = RecordsSpec(top=1, random=0, logits=3)
    for family, site, there in [
        ("llama", "resid_pre.1", True),
        ("llama", "attn_add.1", True),
        ("llama", "mlp_out.1", True),
        ("gemma2", "mlp_add.1", True),
        ("gemma2", "mlp_out.1", False),  # a post-norm comes between
        ("llama", "mlp_in.1", False),
        ("llama", "attn_heads.1", False),
    ]:
        records = build(tiny_lm(family), make_sae(9, site), data.codes, data.where, data.store, spec)  # type: ignore[arg-type]
        assert (records.written is not None) == there, (family, site)
        assert (records.latent(4).promoted != ()) == there


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), which=st.sets(st.integers(0, 8), min_size=1, max_size=9), levels=st.none() | st.just(2)
)
def test_records_of_some_latents_are_those_among_all(seed: int, which: set[int], levels: int | None) -> None:
    data, sae, lm_ = case(seed, levels=levels), make_sae(9), LM(build_tiny("llama"), None)
    chosen = sorted(which)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnweaveWarning)
        whole = build(lm_, sae, data.codes, data.where, data.store, SPEC)  # type: ignore[arg-type]
        codes = data.codes.of(torch.tensor(chosen))
        some = build(lm_, sae, codes, data.where, data.store, SPEC, latents=chosen)  # type: ignore[arg-type]
    torch.testing.assert_close(codes.dense(), data.f[:, chosen], rtol=0, atol=0)
    assert len(some) == len(chosen)
    for j in chosen:
        a, b = some.latent(j), whole.latent(j)
        assert [p[0] for p in a.promoted] == [p[0] for p in b.promoted]
        assert replace(a, promoted=(), suppressed=()) == replace(b, promoted=(), suppressed=())
    for j in set(range(10)) - which:
        with pytest.raises(UnweaveError, match=f"no record of latent {j}"):
            some.latent(j)


def test_records_of_some_latents_are_saved_and_wrong_choices_refused(lm: LM, tmp_path: Path) -> None:
    data, sae = case(3), make_sae(9)
    codes = data.codes.of(torch.tensor([2, 7]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnweaveWarning)
        records = build(lm, sae, codes, data.where, data.store, SPEC, latents=[2, 7])  # type: ignore[arg-type]
    loaded = Records.load(records.save(tmp_path))
    assert loaded.latents is not None and loaded.latents.tolist() == [2, 7]
    assert loaded.latent(7) == records.latent(7)
    for wrong in ([7, 2], [2, 9], [-1, 2], [2], [2, 2], []):
        with pytest.raises(UnweaveError, match="cannot be made"):
            build(lm, sae, codes, data.where, data.store, SPEC, latents=wrong)  # type: ignore[arg-type]


# -- storage ----------------------------------------------------------------------------------------------------------


def test_saved_records_load_equal(lm: LM, tmp_path: Path) -> None:
    _, records = made(lm)
    assert records.save(tmp_path / "records") == tmp_path / "records"
    assert sorted(p.name for p in (tmp_path / "records").iterdir()) == [
        "contexts.parquet",
        "latents.parquet",
        "records.json",
    ]
    loaded = Records.load(tmp_path / "records")
    same(records.contexts, loaded.contexts)
    assert loaded.spec == SPEC and loaded.n_tokens == records.n_tokens
    assert len(loaded) == 9
    for j in range(9):
        assert loaded.latent(j) == records.latent(j)


def test_saved_without_logits_or_contexts(lm: LM, tmp_path: Path) -> None:
    data = case(13)
    spec = RecordsSpec(top=0, per_band=0, random=0)
    records = build(lm, make_sae(9, "mlp_in.1"), data.codes, data.where, data.store, spec)  # type: ignore[arg-type]
    assert len(records.contexts) == 0 and records.special_share == 0
    loaded = Records.load(records.save(tmp_path))
    assert loaded.written is None and loaded.latent(4) == records.latent(4)
    same(records.contexts, loaded.contexts)


def test_parquet_reads_as_a_plain_table(lm: LM, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    _, records = made(lm)
    records.save(tmp_path)
    table = pq.read_table(tmp_path / "latents.parquet").to_pylist()
    assert [row["latent"] for row in table] == list(range(9))
    assert table[4]["count"] == records.latent(4).count and table[4]["rate"] == records.latent(4).rate
    contexts = pq.read_table(tmp_path / "contexts.parquet").to_pylist()
    first = next(row for row in contexts if row["latent"] == 4)
    assert first["kind"] == "top" and tuple(first["ids"]) == records.latent(4).top[0].ids


def test_damaged_or_missing_records_are_one_clear_error(lm: LM, tmp_path: Path) -> None:
    _, records = made(lm)
    with pytest.raises(UnweaveError, match="records"):
        Records.load(tmp_path / "nowhere")
    records.save(tmp_path)
    path = tmp_path / "contexts.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UnweaveError, match="records"):
        Records.load(tmp_path)
    records.save(tmp_path)
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "latents.parquet")
    about = json.loads(table.schema.metadata[b"unweave.records"]) | {"version": 99}
    pq.write_table(table.replace_schema_metadata({"unweave.records": json.dumps(about)}), tmp_path / "latents.parquet")
    with pytest.raises(UnweaveError, match=r"latents\.parquet"):
        Records.load(tmp_path)
    listed = listing(tmp_path, leave_out=("records.json",))
    write_json(tmp_path / "records.json", listed)
    with pytest.raises(UnweaveError, match="version 99"):
        Records.load(tmp_path)


def test_no_damaged_record_loads(lm: LM, tmp_path: Path) -> None:
    """Whole tables of fewer rows or columns too, which Parquet itself would take."""
    import pyarrow.parquet as pq

    _, records = made(lm)
    records.save(tmp_path)
    rng = np.random.default_rng(0)
    contents = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, whole in contents.items():
        for trial in range(60):
            damaged = bytearray(whole)
            if trial % 3 == 0:
                damaged = damaged[: rng.integers(len(whole))]
            elif trial % 3 == 1:
                damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            else:
                damaged += rng.bytes(5)
            path.write_bytes(damaged)
            try:
                loaded = Records.load(tmp_path)
            except UnweaveError as error:
                assert error.remedy
            else:  # white space in the listing
                assert path.name == "records.json" and loaded.latent(4) == records.latent(4)
        if path.suffix == ".parquet":
            path.write_bytes(whole)
            table = pq.read_table(path)
            for changed in (
                table.slice(0, 0),
                table.slice(0, len(table) - 1),
                table.drop_columns(table.column_names[:1]),
            ):
                pq.write_table(changed, path)
                with pytest.raises(UnweaveError, match=path.name):
                    Records.load(tmp_path)
        path.write_bytes(whole)
    assert Records.load(tmp_path).latent(4) == records.latent(4)


# -- from activations -------------------------------------------------------------------------------------------------


def test_collect_counts_what_the_policy_keeps(lm: LM) -> None:
    data = case(14, n_rows=30)
    n = int(data.store.starts[-1])
    x = 2 * torch.randn(n, 32, generator=torch.Generator().manual_seed(0))
    x[7] *= 100
    limit = float(x.norm(dim=-1).sort().values[-2]) + 1
    excluded = int(data.store.ids[11])
    sae = make_sae(16, policy=TokenPolicy((excluded,), limit), k=4)
    bounds = [0, n // 3, n // 2, n]
    chunks = [SimpleNamespace(x={sae.read: x[a:b]}, where=torch.arange(a, b)) for a, b in itertools.pairwise(bounds)]
    source = SimpleNamespace(n_chunks=3, chunk=lambda i: chunks[i])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnweaveWarning)
        records = collect(lm, sae, source, data.store, SPEC)  # type: ignore[arg-type]
        keep = (torch.from_numpy(data.store.ids.astype(np.int64)) != excluded) & (x.norm(dim=-1) <= limit)
        where = keep.nonzero().squeeze(1)
        direct = build(lm, sae, Codes.from_dense(sae.encode(x[keep])), where, data.store, SPEC)  # type: ignore[arg-type]
        part = collect(lm, sae, source, data.store, SPEC, max_tokens=1)  # type: ignore[arg-type]
    assert 7 not in where and 11 not in where
    assert records.n_tokens == len(where)
    for j in range(16):
        a, b = records.latent(j), direct.latent(j)
        assert a.count == b.count and [c.token for c in a.top] == [c.token for c in b.top]
        assert a.maximum == pytest.approx(b.maximum, rel=1e-5)
    assert part.n_tokens == int((where < bounds[1]).sum())


def test_collect_from_stored_text_equals_each_row_on_its_own(lm: LM, tmp_path: Path) -> None:
    """The whole path: a real token store and activation source, against rows run one by one."""
    texts = [f"The keys to cabinet {i} are{' here' * (i % 4)}." for i in range(9)]
    rows = [Row(*encode_text(lm.tokenizer, text), document=i) for i, text in enumerate(texts)]
    store = TokenStore.write(tmp_path / "tokens", rows, sum(len(row.ids) for row in rows), {})
    dot = int(rows[0].ids[-1])
    sae = make_sae(24, policy=TokenPolicy((dot,)), k=5)
    source = ActivationSource(lm, store, [Site("resid_post", 1)], chunk_tokens=70, batch_tokens=64)
    assert source.n_chunks > 1
    records = collect(lm, sae, source, store, SPEC)
    counts = torch.zeros(24)
    for row in rows:
        with lm.taps(read=["resid_post.1"]) as seen:
            lm(torch.tensor([row.ids]))
        counts += (sae.encode(seen["resid_post.1"][0, [t != dot for t in row.ids]]) > 0).sum(0)
    assert records.count.tolist() == counts.tolist()
    j = int(counts.argmax())
    for context in (*records.latent(j).top, *records.latent(j).random):
        assert "".join(context.texts) in texts[context.document]
        assert context.counted[context.focus] and context.counted == tuple(t != "." for t in context.texts)
    measured = evaluate_core(lm, sae, store_batches(lm, store, range(9), 64))
    assert measured.firing_counts.tolist() == counts.tolist()
    assert measured.tokens == records.n_tokens and measured.excluded["special tokens"] == 9


def test_collect_refuses_the_wrong_sae_and_empty_sources(lm: LM) -> None:
    data = case(15)
    empty = SimpleNamespace(n_chunks=0, chunk=lambda i: i)
    with pytest.raises(UnweaveError, match="no tokens"):
        collect(lm, make_sae(16), empty, data.store)  # type: ignore[arg-type]
    with pytest.raises(UnweaveError, match="dimensions"):
        collect(lm, make_sae(16, "mlp_act.1"), empty, data.store)  # type: ignore[arg-type]
    nowhere = make_sae(16)
    nowhere.read = None
    with pytest.raises(UnweaveError, match="which site"):
        collect(lm, nowhere, empty, data.store)  # type: ignore[arg-type]
