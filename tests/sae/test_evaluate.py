"""sae/measure against a reference that runs each row alone, without padding, on the bare model in float64 sums."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unweave.core import progress
from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.result import to_plain
from unweave.core.site import Site
from unweave.data.batches import store_batches
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import JumpReLU, ReLU, TopK
from unweave.sae.measure import evaluate as core
from unweave.sae.measure import passes
from unweave.sae.measure.evaluate import CoreMetrics, drift, evaluate, evaluate_all
from unweave.sae.measure.metrics import density_histogram, recovered_share
from unweave.sae.module import SAE

D, LAYER, PAD = 32, 1, 2
SITE = Site("resid_post", LAYER)
SPECIAL = 5
Row = list[int]


def make_sae(kind: str = "relu", n_latents: int = 48, policy: TokenPolicy | None = None, seed: int = 3) -> SAE:
    """Random, with biases that are not zero (trap 21)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    activation = {"relu": ReLU(), "topk": TopK(6), "jumprelu": JumpReLU(normal(n_latents).abs())}[kind]
    return SAE(
        0.4 * normal(D, n_latents),
        0.3 * normal(n_latents) - 0.5,
        0.1 * normal(n_latents, D),
        0.3 * normal(D),
        activation,
        read=SITE,
        policy=policy,
    )


def constant_sae(value: Tensor, policy: TokenPolicy | None = None) -> SAE:
    """Reconstructs everything as ``value`` [d]."""
    d = len(value)
    return SAE(torch.zeros(d, 1), torch.zeros(1), torch.zeros(1, d), value, ReLU(), read=SITE, policy=policy)


def identity_sae(policy: TokenPolicy | None = None) -> SAE:
    """relu(x) - relu(-x) = x, exactly."""
    eye = torch.eye(D)
    w = torch.cat([eye, -eye], 1)
    return SAE(w, torch.zeros(2 * D), w.T.contiguous(), torch.zeros(D), ReLU(), read=SITE, policy=policy)


def sample(model: Any, n_rows: int = 10, seed: int = 0) -> list[Row]:
    """Rows of 3 to 14 tokens that the model itself finds likely, so that ablation hurts; some hold the special id."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 97, (n_rows, 1), generator=g)
    with torch.no_grad():
        for _ in range(13):
            logits = model(input_ids=ids).logits[:, -1]
            probabilities = (3 * logits).softmax(-1)
            probabilities[:, : SPECIAL + 1] = 0
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=g)], 1)
    lengths = torch.randint(3, 15, (n_rows,), generator=g).tolist()
    rows = [ids[i, :n].tolist() for i, n in enumerate(lengths)]
    for row in rows[::2]:
        row[0] = SPECIAL
    return rows


def batch_of(rows: list[Row], side: Any = "right") -> Tokens:
    return Tokens.pad([(row, [4] * len(row)) for row in rows], PAD, side)


# -- the reference ----------------------------------------------------------------------------------------------------


def block_of(model: Any, layer: int = LAYER) -> Any:
    for path in ("model.layers", "transformer.h", "gpt_neox.layers"):
        try:
            return model.get_submodule(path)[layer]
        except AttributeError:
            continue
    raise AssertionError("unknown family")


def run_row(model: Any, row: Row, change: Any = None) -> tuple[Tensor, Tensor]:
    """(activation after the block [P, D], log-probabilities [P, V]) of one row on its own; float64 softmax."""
    caught: list[Tensor] = []

    def hook(_module: Any, _args: Any, out: Any) -> Any:
        x = out if isinstance(out, Tensor) else out[0]
        caught.append(x[0].clone())
        if change is None:
            return None
        new = change(x[0])[None]
        return new if isinstance(out, Tensor) else (new, *out[1:])

    handle = block_of(model).register_forward_hook(hook)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0].double()
    handle.remove()
    return caught[0], logits.log_softmax(-1)


def reference(model: Any, sae: SAE, rows: list[Row]) -> dict[str, float]:
    """Every metric from the definitions, row by row, in numpy float64."""
    clean = [run_row(model, row) for row in rows]
    keeps = []
    for row, (x, _) in zip(rows, clean, strict=True):
        keep = np.array([token not in sae.policy.exclude_ids for token in row])
        if sae.policy.max_norm is not None:
            keep &= np.linalg.norm(x.double().numpy(), axis=-1) <= sae.policy.max_norm
        keeps.append(torch.from_numpy(keep))
    x32 = torch.cat([x[k] for (x, _), k in zip(clean, keeps, strict=True)])
    f = sae.encode(x32).double().numpy()
    hat = sae(x32).double().numpy()
    x = x32.double().numpy()
    mean = x.mean(0)
    out = {
        "tokens": len(x),
        "unexplained_variance": ((x - hat) ** 2).sum() / ((x - mean) ** 2).sum(),
        "mse": ((x - hat) ** 2).mean(),
        "cosine": np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, hat, strict=True)]),
        "norm_ratio": np.mean(np.linalg.norm(hat, axis=1) / np.linalg.norm(x, axis=1)),
        "l0": (f > 0).sum(1).mean(),
        "l1": np.abs(f).sum(1).mean(),
        "alive_fraction": (f > 0).any(0).mean(),
    }
    mean32 = torch.from_numpy(mean).float()
    values = {"sae": lambda x: sae(x), "mean": lambda x: mean32.expand_as(x), "zero": torch.zeros_like}
    ce = dict.fromkeys(("clean", *values), 0.0)
    kl = dict.fromkeys(values, 0.0)
    n = 0
    for row, (_, log_p), keep in zip(rows, clean, keeps, strict=True):
        n += len(row) - 1
        targets = torch.tensor(row[1:])[:, None]
        ce["clean"] -= float(log_p[:-1].gather(1, targets).sum())
        for name, value in values.items():
            _, log_q = run_row(model, row, lambda x, v=value, k=keep: torch.where(k[:, None], v(x), x))
            ce[name] -= float(log_q[:-1].gather(1, targets).sum())
            kl[name] += float((log_p.exp() * (log_p - log_q))[:-1].sum())
    out |= {f"ce_{name}": total / n for name, total in ce.items()}
    out |= {f"kl_{name}": total / n for name, total in kl.items()}
    for name in ("mean", "zero"):
        out[f"recovered_vs_{name}"] = (ce[name] - ce["sae"]) / (ce[name] - ce["clean"])
    return out | {"predictions": n}


def assert_same(a: CoreMetrics | dict[str, Any], b: CoreMetrics | dict[str, Any], rel: float = 1e-5) -> None:
    a, b = (to_plain(v.plain()) if isinstance(v, CoreMetrics) else v for v in (a, b))
    for name in a.keys() & b.keys():
        if isinstance(a[name], (int, float)) and name != "excluded":
            assert b[name] == pytest.approx(a[name], rel=rel, abs=1e-7), name
    assert a.keys() & b.keys() >= {"unexplained_variance", "kl_sae", "recovered_vs_mean"}


@pytest.fixture(scope="module")
def llama(tiny: Any) -> tuple[LM, list[Row]]:
    model = tiny("llama")
    return LM(model, None), sample(model)


def middle_norm(lm: LM, rows: list[Row], share: float = 0.9) -> float:
    """A limit between two norms, so that rounding cannot move a token across it."""
    norms = torch.cat([run_row(lm.model, row)[0].norm(dim=-1) for row in rows]).sort().values
    at = int(share * len(norms))
    return float(norms[at - 1 : at + 1].mean())


# -- agreement with the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("family_name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_every_metric_equals_the_reference(tiny: Any, family_name: str, kind: str) -> None:
    model = tiny(family_name)
    lm, rows = LM(model, None), sample(model)
    policy = TokenPolicy((SPECIAL,), middle_norm(lm, rows))
    sae = make_sae(kind, policy=policy)
    measured = evaluate(lm, sae, [batch_of(rows[:4]), batch_of(rows[4:])])
    assert_same(reference(model, sae, rows), measured)
    assert measured.excluded["special tokens"] == len(rows[::2])
    assert measured.excluded["norm outliers"] > 0
    assert (
        measured.tokens + sum(measured.excluded.values())
        == batch_of(rows[:4]).ids.numel() + batch_of(rows[4:]).ids.numel()
    )
    assert measured.explained_variance == 1 - measured.unexplained_variance


def test_counts_and_densities(llama: Any) -> None:
    lm, rows = llama
    sae = make_sae("topk", policy=TokenPolicy((SPECIAL,)))
    measured = evaluate(lm, sae, [batch_of(rows)])
    x = torch.cat([run_row(lm.model, row)[0][torch.tensor(row) != SPECIAL] for row in rows])
    counts = (sae.encode(x) > 0).sum(0)
    assert torch.equal(measured.firing_counts, counts)
    histogram = measured.density
    rates = np.log10(counts[counts > 0].numpy() / len(x))
    assert list(histogram.counts) == np.histogram(rates, histogram.edges)[0].tolist()
    assert histogram.never == int((counts == 0).sum())
    assert sum(histogram.counts) + histogram.never == sae.d_sae
    assert measured.alive_fraction == 1 - histogram.never / sae.d_sae


def test_density_of_the_extremes() -> None:
    histogram = density_histogram(torch.tensor([0, 1, 10**9, 10**9 // 2]), 10**9)
    assert histogram.never == 1
    assert histogram.counts[0] == 1  # rarer than the first edge
    assert histogram.counts[-1] == 1  # on every token
    assert sum(histogram.counts) == 3


def test_trap_06_all_tokens_reported_beside_counted_ones(llama: Any) -> None:
    lm, rows = llama
    narrow = make_sae("jumprelu", policy=TokenPolicy((SPECIAL,), middle_norm(lm, rows)))
    wide = make_sae("jumprelu")
    a, b = evaluate(lm, narrow, [batch_of(rows)]), evaluate(lm, wide, [batch_of(rows)])
    assert a.l0_all_tokens == pytest.approx(b.l0, rel=1e-9)
    assert a.unexplained_variance_all_tokens == pytest.approx(b.unexplained_variance, rel=1e-9)
    assert a.l0 != b.l0 and a.unexplained_variance != b.unexplained_variance


# -- fixed points -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family_name", ["llama", "gemma2", "gemma3_text", "qwen3", "gpt2", "gpt_neox"])
def test_trap_32_mean_predictor_scores_one_and_identity_zero(tiny: Any, family_name: str) -> None:
    model = tiny(family_name)
    lm, rows = LM(model, None), sample(model)
    policy = TokenPolicy((SPECIAL,), middle_norm(lm, rows))
    batches = [batch_of(rows[:3], "left"), batch_of(rows[3:], "left")]
    perfect = evaluate(lm, identity_sae(policy), batches)
    assert perfect.unexplained_variance == 0 and perfect.mse == 0
    assert perfect.kl_sae == 0 and perfect.ce_sae == perfect.ce_clean
    assert perfect.recovered_vs_mean == 1 and perfect.recovered_vs_zero == 1
    assert perfect.cosine == pytest.approx(1) and perfect.norm_ratio == pytest.approx(1)
    assert perfect.l0 == pytest.approx(D)

    # The measured mean itself is not reported, so it comes from the reference's activations.
    kept = []
    for row in rows:
        x, _ = run_row(model, row)
        kept.append(x[policy.keep(x, torch.tensor(row))])
    mean = torch.cat(kept).double().mean(0).float()
    flat = evaluate(lm, constant_sae(mean, policy), batches)
    assert flat.unexplained_variance == pytest.approx(1, abs=1e-9)
    assert flat.explained_variance == pytest.approx(0, abs=1e-9)
    assert flat.recovered_vs_mean == pytest.approx(0, abs=1e-5)
    assert flat.kl_sae == pytest.approx(flat.kl_mean, rel=1e-4)
    assert flat.alive_fraction == 0 and flat.density.never == 1
    zero = evaluate(lm, constant_sae(torch.zeros(D), policy), batches)
    assert zero.recovered_vs_zero == 0 and zero.ce_sae == zero.ce_zero
    assert zero.norm_ratio == 0 and zero.cosine == 0


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
@pytest.mark.parametrize("split", [[40], [1, 39], [13, 1, 26]])
def test_trap_32_variance_is_torch_var_on_high_mean_data(mean: float, split: list[int]) -> None:
    x = (mean + torch.randn(40, 6, generator=torch.Generator().manual_seed(0))).float()
    sums = core._Sums(0, torch.zeros(6, dtype=torch.float64), 0.0, torch.zeros(3, dtype=torch.int64))
    for part in x.split(split):
        sums.add(part, Codes.from_dense(torch.zeros(len(part), 3)), torch.zeros_like(part))
    assert sums.deviations == pytest.approx(float(x.double().var(0, correction=0).sum()) * 40, rel=1e-9)
    assert torch.allclose(sums.mean, x.double().mean(0), rtol=1e-12)


def test_mse_is_per_element_and_metrics_follow_a_change_of_scale(llama: Any) -> None:
    """Trap 33: scaling the activation and the SAE together changes MSE by the square and nothing else."""
    lm, rows = llama
    sae = make_sae("relu")
    scaled = SAE(sae.W_enc / 4, sae.b_enc, 4 * sae.W_dec, 4 * sae.b_dec, ReLU(), read=SITE)
    plain = evaluate(lm, sae, [batch_of(rows)])
    with lm.taps(edit={SITE: lambda x, at: 4 * x}):
        larger = evaluate(lm, scaled, [batch_of(rows)])
    assert larger.mse == pytest.approx(16 * plain.mse, rel=1e-6)
    for name in ("unexplained_variance", "cosine", "norm_ratio", "l0", "l1"):
        assert getattr(larger, name) == pytest.approx(getattr(plain, name), rel=1e-6), name


# -- what must not matter ---------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_trap_33_trap_01_split_order_and_padding_side_change_nothing(llama: Any, data: st.DataObject) -> None:
    lm, rows = llama
    sae = make_sae("jumprelu", policy=TokenPolicy((SPECIAL,), middle_norm(lm, rows)))
    expected = evaluate(lm, sae, [batch_of(rows)])
    order = data.draw(st.permutations(range(len(rows))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1), max_size=5)))
    batches = []
    for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        batches.append(batch_of([rows[i] for i in order[start:stop]], data.draw(st.sampled_from(["left", "right"]))))
    measured = evaluate(lm, sae, batches)
    assert_same(expected, measured)
    assert torch.equal(expected.firing_counts, measured.firing_counts)
    assert expected.tokens == measured.tokens and expected.predictions == measured.predictions


@pytest.mark.parametrize("family_name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_trap_01_padding_side_in_every_family(tiny: Any, family_name: str) -> None:
    model = tiny(family_name)
    lm, rows = LM(model, None), sample(model)
    sae = make_sae("topk", policy=TokenPolicy((SPECIAL,)))
    assert_same(evaluate(lm, sae, [batch_of(rows, "right")]), evaluate(lm, sae, [batch_of(rows, "left")]))


def test_memory_limit_splits_batches_and_changes_nothing(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, rows = llama
    sae = make_sae("relu")
    whole = evaluate(lm, sae, [batch_of(rows)])
    monkeypatch.setattr(core, "_LOGIT_BYTES", 1)
    monkeypatch.setattr(core, "_CHUNK_ELEMENTS", 97 * 3)
    assert len(list(core._split(batch_of(rows), lm.vocab_size))) == len(rows)
    assert_same(whole, evaluate(lm, sae, [batch_of(rows)]))


def test_trap_34_a_zero_activation_counts_and_padding_does_not(llama: Any) -> None:
    lm, rows = llama
    batch = batch_of(rows)
    sae = make_sae("relu")
    other_pads = replace(batch, ids=torch.where(batch.mask, batch.ids, torch.full_like(batch.ids, 77)))

    def silence(x: Tensor, _at: Any) -> Tensor:
        x = x.clone()
        x[:, 1] = 0.0
        return x

    with lm.taps(edit={SITE: silence}):
        a, b = evaluate(lm, sae, [batch]), evaluate(lm, sae, [other_pads])
    assert a == b
    assert a.tokens == sum(map(len, rows))
    x = torch.cat([run_row(lm.model, row)[0].index_fill(0, torch.tensor([1]), 0.0) for row in rows])
    assert a.mse == pytest.approx(float((x - sae(x)).double().square().mean()), rel=1e-6)


def test_trap_34_what_padding_holds_does_not_matter(llama: Any) -> None:
    """Not even NaN; at the last block, so that no later attention can carry it from the padding to the tokens."""
    lm, rows = llama
    batch = batch_of(rows)
    sae = make_sae("topk").at("resid_post.2")
    expected = evaluate(lm, sae, [batch])
    spoilt = {"resid_post.2": lambda x, at: torch.where(at.mask[..., None], x, torch.full_like(x, float("nan")))}
    with lm.taps(edit=spoilt):
        assert evaluate(lm, sae, [batch]) == expected


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scale=st.floats(0.1, 50), seed=st.integers(0, 1000))
def test_trap_07_excluded_tokens_do_not_enter_the_reconstruction(llama: Any, scale: float, seed: int) -> None:
    lm, rows = llama
    sae = make_sae("relu", policy=TokenPolicy((SPECIAL,)))
    expected = evaluate(lm, sae, [batch_of(rows)])

    def disturb(x: Tensor, at: Any) -> Tensor:
        noise = scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        return torch.where(((at.ids == SPECIAL) | ~at.mask)[..., None], x + noise, x)

    with lm.taps(edit={SITE: disturb}):
        measured = evaluate(lm, sae, [batch_of(rows)])
    for name in ("unexplained_variance", "mse", "cosine", "norm_ratio", "l0", "l1", "alive_fraction", "tokens"):
        assert getattr(measured, name) == getattr(expected, name), name
    assert torch.equal(measured.firing_counts, expected.firing_counts)


def test_splice_and_ablations_leave_excluded_tokens_alone(llama: Any) -> None:
    lm, rows = llama
    # Each row's second token is left out too: then no two rows are alike once they are ablated, and all are run.
    left_out = sorted({SPECIAL, *(row[1] for row in rows)})
    sae = make_sae("relu", policy=TokenPolicy(tuple(left_out)))
    seen: list[Tensor] = []
    batch = batch_of(rows)

    def look(x: Tensor, _at: Any) -> None:
        seen.append(x.clone())

    # A second set of taps, entered later, would see the edited value only if its hook ran last: read one site further.
    handle = block_of(lm.model, LAYER + 1).register_forward_pre_hook(lambda _m, args: look(args[0], None))
    evaluate(lm, sae, [batch])
    handle.remove()
    clean, *edited = seen  # the first pass stops before this block
    excluded = torch.isin(batch.ids, torch.tensor(left_out)) & batch.mask
    assert len(edited) == 3 and excluded.any()
    counted = batch.mask & ~excluded
    for x in edited:
        assert torch.equal(x[excluded], clean[excluded])
        assert not torch.isclose(x[counted], clean[counted]).all(-1).any()
    assert torch.equal(edited[2][counted], torch.zeros_like(edited[2][counted]))
    assert torch.allclose(edited[1][counted], clean[counted].mean(0).expand(int(counted.sum()), D), atol=1e-5)


# -- other kinds of SAE -----------------------------------------------------------------------------------------------


def test_transcoder_is_measured_where_it_writes(llama: Any) -> None:
    lm, rows = llama
    plain = make_sae("relu")
    g = torch.Generator().manual_seed(9)
    read, write = Site("mlp_in", LAYER), Site("mlp_add", LAYER)
    sae = SAE(
        plain.W_enc,
        plain.b_enc,
        plain.W_dec,
        plain.b_dec,
        ReLU(),
        W_skip=0.1 * torch.randn(D, D, generator=g),
        read=read,
        write=write,
    )
    batch = batch_of(rows)
    measured = evaluate(lm, sae, [batch])
    with lm.taps(read=[read, write]) as seen:
        logits = lm(batch)
    x, y = seen[read][batch.mask], seen[write][batch.mask].double()
    hat = sae(x).double()
    assert measured.site == "mlp_add.1"
    expected = float((y - hat).square().sum() / (y - y.mean(0)).square().sum())
    assert measured.unexplained_variance == pytest.approx(expected, rel=1e-6)
    mlp = block_of(lm.model).mlp
    handle = mlp.register_forward_hook(lambda _m, args, _out: sae(args[0]))
    spliced = lm(batch)
    handle.remove()
    assert logits is not None and spliced is not None
    pairs = batch.mask[:, :-1] & batch.mask[:, 1:]
    log_p, log_q = (z.double().log_softmax(-1)[:, :-1][pairs] for z in (logits, spliced))
    assert measured.kl_sae == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)


def test_trap_37_ablating_a_latent_changes_the_logits_by_its_row(llama: Any) -> None:
    lm, rows = llama
    sae = make_sae("relu")
    batch = batch_of(rows)
    with lm.taps(read=[SITE]) as seen:
        before = lm(batch)
    x = seen[SITE].clone()
    j = int((sae.encode(x[batch.mask]) > 0).sum(0).argmax())
    nxt = Site("resid_pre", LAYER + 1)
    with lm.taps(read=[nxt], edit=sae.ablate([j])) as seen:
        after = lm(batch)
    assert before is not None and after is not None
    wanted = x - sae.encode(x)[..., j, None] * sae.W_dec[j]
    assert torch.allclose(seen[nxt][batch.mask], wanted[batch.mask], atol=1e-5)
    assert (before - after)[batch.mask].abs().max() > 1e-3


# -- what is computed once ---------------------------------------------------------------------------------------------


def four_whole_passes(lm: LM, sae: SAE, batches: list[Tokens], mean: Tensor) -> dict[str, float]:
    """Losses and divergences from passes of the whole model from the tokens on, edited on the way; float64 softmax."""
    assert sae.read is not None and sae.write is not None
    sums, n = {f"{what}_{name}": 0.0 for what in ("ce", "kl") for name in ("clean", "sae", "mean", "zero")}, 0
    for batch in batches:
        with lm.taps(read=[sae.read]) as seen:
            lm(batch)
        keep = sae.policy.keep(seen[sae.read], batch.ids, batch.mask)[..., None]
        pairs = batch.mask[:, :-1] & batch.mask[:, 1:]
        n += int(pairs.sum())
        log_p = None
        for name, edit in {
            "clean": None,
            "sae": sae.reconstruct(),
            "mean": {sae.write: lambda x, at, k=keep: torch.where(k, mean.to(x.dtype), x)},
            "zero": {sae.write: lambda x, at, k=keep: torch.where(k, 0.0, x)},
        }.items():
            with lm.taps(edit=edit):
                logits = lm(batch)
            assert logits is not None
            log_q = logits.double().log_softmax(-1)[:, :-1][pairs]
            log_p = log_q if log_p is None else log_p
            sums[f"ce_{name}"] -= float(log_q.gather(1, batch.ids[:, 1:][pairs][:, None]).sum())
            sums[f"kl_{name}"] += float((log_p.exp() * (log_p - log_q)).sum())
    return {name: total / n for name, total in sums.items()}


def sae_of(lm: LM, read: str, write: str | None = None, policy: TokenPolicy | None = None) -> SAE:
    """A random SAE (or transcoder with a skip) of any two sites."""
    g = torch.Generator().manual_seed(7)
    d_in, d_out, n = lm.width(read), lm.width(write or read), 48

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    skip = None if write is None else 0.1 * normal(d_in, d_out)
    weights = 0.4 * normal(d_in, n), 0.3 * normal(n) - 0.5, 0.1 * normal(n, d_out), 0.3 * normal(d_out)
    sites = {"read": Site.parse(read), "write": Site.parse(write or read)}
    return SAE(*weights, ReLU(), W_skip=skip, policy=policy, **sites)


def precise(model: Any) -> LM:
    """In float64, where the family can: Gemma 2's attention is NaN at padding on the left there."""
    return LM(model if model.config.model_type == "gemma2" else model.double(), None)


def assert_equals_whole_passes(lm: LM, sae: SAE, rows: list[Row]) -> None:
    batches = [batch_of(rows[:4]), batch_of(rows[4:7], "left"), batch_of(rows[7:])]
    measured = vars(evaluate(lm, sae, batches))
    assert sae.read is not None and sae.write is not None
    values = []
    for batch in batches:
        with lm.taps(read=[sae.read, sae.write]) as seen:
            lm(batch)
        values.append(seen[sae.write][sae.policy.keep(seen[sae.read], batch.ids, batch.mask)])
    for name, expected in four_whole_passes(lm, sae, batches, torch.cat(values).double().mean(0)).items():
        if name != "kl_clean":
            rel = 1e-6 if lm.dtype == torch.float64 else 1e-5
            assert measured[name] == pytest.approx(expected, rel=rel, abs=rel / 1000), name


def test_numbers_equal_those_of_whole_passes_in_every_family(tiny: Any, family: str) -> None:
    model = tiny(family)
    rows, lm = sample(model), precise(model)
    for sites in (("resid_post.1",), ("mlp_add.1",), ("mlp_in.1", "mlp_add.1")):
        assert_equals_whole_passes(lm, sae_of(lm, *sites, policy=TokenPolicy((SPECIAL,))), rows)


@pytest.mark.parametrize("family_name", ["llama", "gemma2", "gpt_neox"])
def test_numbers_equal_those_of_whole_passes_at_every_site(tiny: Any, family_name: str) -> None:
    model = tiny(family_name)
    rows, lm = sample(model), precise(model)
    norm = {"llama": "model.norm", "gemma2": "model.norm", "gpt_neox": "gpt_neox.final_layer_norm"}[family_name]
    places = [(str(site),) for site in lm.sites() if site.layer in (None, 1)] + [(f"path.{norm}@in",)]
    transcoders = [("resid_post.0", "mlp_add.2"), ("attn_in.1", "attn_add.1"), ("embed", "final_norm")]
    for sites in (*places, *transcoders, (f"path.{norm}@in", "logits")):
        assert_equals_whole_passes(lm, sae_of(lm, *sites, policy=TokenPolicy((SPECIAL,))), rows)


def test_numbers_do_not_depend_on_tiles_or_on_where_logits_come_from(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, rows = llama
    sae = sae_of(lm, "mlp_add.1", policy=TokenPolicy((SPECIAL,)))
    expected = evaluate(lm, sae, [batch_of(rows)])
    monkeypatch.setitem(passes._TILES, "cpu", (3, 10))
    assert_same(expected, evaluate(lm, sae, [batch_of(rows)]), rel=1e-6)
    monkeypatch.setattr(passes, "knows", lambda _lm: False)
    monkeypatch.setattr(core, "_LOGIT_BYTES", 4 * 4 * 4 * lm.vocab_size * 14)  # four rows of four passes' logits
    with computed(lm) as counts:
        assert_same(expected, evaluate(lm, sae, [batch_of(rows)]), rel=1e-6)
    assert counts["logits"] == [4] * (4 * 2) + [2] * 4


@contextmanager
def computed(lm: LM) -> Iterator[dict[str, list[int]]]:
    """The rows of every pass through each block's MLP, by block, and through the unembedding."""
    counts: dict[str, list[int]] = {}

    def counting(name: str) -> Any:
        counts[name] = []
        return lambda _module, _args, out: counts[name].append(len(out))

    modules = {f"{i}": block.get_submodule(lm.layout.family.mlp) for i, block in enumerate(lm.layout.blocks)}
    modules["logits"] = lm.model.get_output_embeddings()
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(counting(name)).remove)
        yield counts


@pytest.mark.parametrize(
    ("sites", "calls", "calls_beyond"),
    [
        (("resid_post.1",), (1, 1, 4), (2, 2, 4)),
        (("resid_pre.1",), (1, 4, 4), (2, 4, 4)),
        (("mlp_add.1",), (1, 5, 4), (2, 5, 4)),
        (("embed",), (4, 4, 4), (4, 4, 4)),
        (("final_norm",), (1, 1, 1), (2, 2, 2)),
        (("mlp_in.0", "mlp_add.2"), (2, 2, 5), (2, 2, 5)),
        (("resid_post.0", "resid_post.1"), (1, 2, 4), (2, 2, 4)),
        (("path.model.layers.1",), (5, 5, 4), (5, 5, 4)),
    ],
)
def test_blocks_run_only_where_something_changes(
    llama: Any, monkeypatch: pytest.MonkeyPatch, sites: Any, calls: Any, calls_beyond: Any
) -> None:
    """Blocks below run once, or twice beyond the memory for their output; those above four times; no logits whole."""
    lm, rows = llama
    sae = sae_of(lm, *sites, policy=TokenPolicy((SPECIAL,)))
    evaluate(lm, sae, [batch_of(rows)])  # finds out once how logits are made
    for limit, expected in ((1 << 30, calls), (0, calls_beyond)):
        monkeypatch.setattr(core, "_HELD_BYTES", limit)
        with computed(lm) as counts:
            evaluate(lm, sae, [batch_of(rows)])
        assert tuple(len(counts[str(i)]) for i in range(3)) == expected
        assert len(counts["logits"]) == (4 if sites[0].startswith("path") else 0)


@pytest.mark.parametrize(("side", "in_block_2"), [("right", [3, 3, 1, 1, 3, 3]), ("left", [3, 3, 2, 2, 3, 3, 2, 2])])
def test_rows_that_ablation_makes_equal_are_run_once(llama: Any, side: str, in_block_2: list[int]) -> None:
    """Clean, with the SAE, with means, with zeros: of all tokens but the first, which is the same in every row.

    Rows of padding on the right are alike whatever their lengths; on the left those of the same length are.
    """
    lm, _ = llama
    long = [[SPECIAL, *row[1:]] for row in sample(lm.model, 20) if len(row) >= 8 and SPECIAL not in row[1:]]
    rows = [row[:n] for row, n in zip(long, (8, 6, 8, 8, 5, 7), strict=False)]
    assert len(rows) == 6
    batches = [batch_of(rows[:3], side), batch_of(rows[3:], side)]
    sae = make_sae("relu", policy=TokenPolicy((SPECIAL,)))
    mean = torch.cat([run_row(lm.model, row)[0][1:] for row in rows]).double().mean(0)
    passes.knows(lm)  # finds out once how logits are made
    with computed(lm) as counts:
        measured = vars(evaluate(lm, sae, batches))
    assert counts["2"] == in_block_2
    for name, expected in four_whole_passes(lm, sae, batches, mean).items():
        if name != "kl_clean":
            assert measured[name] == pytest.approx(expected, rel=1e-5), name


def test_what_is_held_is_limited_over_all_batches(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, rows = llama
    sae = make_sae("relu")
    batches = [batch_of(rows[:3]), batch_of(rows[3:6]), batch_of(rows[6:])]
    expected = evaluate(lm, sae, batches)
    monkeypatch.setattr(core, "_HELD_BYTES", batches[0].ids.numel() * D * 4)  # room for the first alone
    with computed(lm) as counts:
        assert_same(expected, evaluate(lm, sae, batches), rel=1e-6)
    assert len(counts["0"]) == 3 + 2


def test_other_peoples_taps_are_seen_by_every_pass(llama: Any) -> None:
    """Also below the site, where passes would otherwise not go, and at the logits."""
    lm, rows = llama
    sae = make_sae("relu", policy=TokenPolicy((SPECIAL,)))
    batch = batch_of(rows)
    edits = {"resid_post.0": lambda x, at: 1.5 * x, "logits": lambda x, at: 0.5 * x}
    with lm.taps(edit=edits):
        measured = vars(evaluate(lm, sae, [batch]))
        with lm.taps(read=[SITE]) as seen:
            lm(batch)
        x = seen[SITE][sae.policy.keep(seen[SITE], batch.ids, batch.mask)]
        expected = four_whole_passes(lm, sae, [batch], x.double().mean(0))
    for name in set(expected) - {"kl_clean"}:
        assert measured[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("site", ["resid_post.1", "attn_heads.1", "mlp_add.2"])
def test_several_saes_of_a_site_are_measured_as_each_alone(llama: Any, site: str) -> None:
    lm, rows = llama
    policy = TokenPolicy((SPECIAL,))
    saes = [make_sae(kind, n, policy, seed).at(site) for kind, n, seed in (("relu", 48, 3), ("topk", 20, 4))]
    batches = [batch_of(rows[:4]), batch_of(rows[4:], "left")]
    together = evaluate_all(lm, saes, batches)
    for sae, measured in zip(saes, together, strict=True):
        alone = evaluate(lm, sae, batches)
        assert measured == alone and torch.equal(measured.firing_counts, alone.firing_counts)
    assert together[0].ce_sae != together[1].ce_sae and together[0].ce_mean == together[1].ce_mean


def test_saes_that_count_other_tokens_are_not_measured_together(llama: Any) -> None:
    lm, rows = llama
    policies = [TokenPolicy((SPECIAL,), 9.0), TokenPolicy((7,), 8.0), TokenPolicy()]
    common = TokenPolicy.common(policies)
    assert common == TokenPolicy((SPECIAL, 7), 8.0)
    saes = [make_sae(policy=policy) for policy in policies[:2]]
    for others in ([saes[1]], [make_sae(policy=policies[0]).at("resid_post.2")]):
        with pytest.raises(UnweaveError, match="read and write the same sites"):
            evaluate_all(lm, [saes[0], *others], [batch_of(rows)])


def test_an_sae_that_reads_after_it_writes_is_refused(llama: Any) -> None:
    lm, rows = llama
    with pytest.raises(UnweaveError, match=r"reads at mlp_add\.1, which the model reaches after mlp_in\.1"):
        evaluate(lm, make_sae().at("mlp_add.1", "mlp_in.1"), [batch_of(rows)])


# -- bad input --------------------------------------------------------------------------------------------------------


def test_nan_in_an_activation_names_the_row(llama: Any) -> None:
    lm, rows = llama

    def spoil(x: Tensor, at: Any) -> Tensor:
        x = x.clone()
        x[(at.ids == rows[7][1]).any(-1) & (at.ids[:, 1] == rows[7][1]), 1] = float("nan")
        return x

    first = min(i for i, row in enumerate(rows) if row[1] == rows[7][1])
    with lm.taps(edit={SITE: spoil}), pytest.raises(UnweaveError, match=rf"(?s)resid_post\.1.*row {first} "):
        evaluate(lm, make_sae(), [batch_of(rows[:5]), batch_of(rows[5:])])


def test_nan_in_logits_names_the_row_and_the_variant(tiny: Any, llama: Any) -> None:
    model, rows = tiny("llama"), llama[1]
    lm = LM(model, None)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    head.weight[3] = float("nan")
    with pytest.raises(UnweaveError, match=r"(?s)logits \(clean\).*row 0 "):
        evaluate(lm, make_sae(), [batch_of(rows)])


def test_activations_that_do_not_vary_are_refused(tiny: Any, llama: Any) -> None:
    model, rows = tiny("llama"), llama[1]
    lm = LM(model, None)
    block_of(model).mlp.down_proj.weight.zero_()
    sae = SAE(torch.eye(D), torch.zeros(D), torch.eye(D), torch.zeros(D), ReLU(), read=Site("mlp_add", LAYER))
    with pytest.raises(UnweaveError, match="do not vary"):
        evaluate(lm, sae, [batch_of(rows)])


def test_recovered_is_undefined_where_ablation_does_no_harm(tiny: Any, llama: Any) -> None:
    """METHODS 10: a vanishing denominator must not give infinity."""
    model, rows = tiny("llama"), llama[1]
    lm = LM(model, None)
    block_of(model).mlp.down_proj.weight.mul_(1e-7)
    sae = SAE(torch.eye(D), torch.zeros(D), torch.eye(D), torch.zeros(D), ReLU(), read=Site("mlp_add", LAYER))
    measured = evaluate(lm, sae, [batch_of(rows)])
    assert measured.recovered_vs_mean is None and measured.recovered_vs_zero is None
    assert len(measured.notes) == 2 and "mean ablation does not raise" in measured.notes[0]
    json.dumps(to_plain(measured.plain()), allow_nan=False)


@pytest.mark.parametrize("family_name", ["gpt2", "llama"])
def test_recovered_is_undefined_where_the_model_only_guesses(tiny: Any, family_name: str) -> None:
    """A model of random weights on text that is not its own: the parts of a quotient of nothings look like a result."""
    model = tiny(family_name)
    lm, rows = LM(model, None), torch.randint(6, 97, (8, 12), generator=torch.Generator().manual_seed(1)).tolist()
    measured = evaluate(lm, make_sae("relu"), [batch_of(rows)])
    assert measured.ce_clean > math.log(lm.vocab_size) - 0.1
    assert measured.recovered_vs_mean is None and measured.recovered_vs_zero is None
    assert all("does not predict this text" in note for note in measured.notes) and len(measured.notes) == 2


def test_recovered_needs_damage() -> None:
    ce = {"clean": 3.0, "sae": 3.004, "mean": 3.008, "zero": 4.0}
    share, note = recovered_share(ce, "mean", 50_000)
    assert share is None and "3.0000 -> 3.0080" in note
    assert recovered_share(ce, "zero", 50_000) == (pytest.approx(0.996), "")
    share, note = recovered_share(ce, "zero", 20)  # ln 20 = 2.9957: no better than guessing
    assert share is None and "2.9957" in note


def test_nothing_to_count(llama: Any) -> None:
    lm, rows = llama
    with pytest.raises(UnweaveError, match="no tokens to evaluate"):
        evaluate(lm, make_sae(), [])
    with pytest.raises(UnweaveError, match="none of the tokens counts"):
        evaluate(lm, make_sae(policy=TokenPolicy(max_norm=1e-6)), [batch_of(rows)])
    with pytest.raises(UnweaveError, match="next token"):
        evaluate(lm, make_sae(), [batch_of([[7], [9], [11]])])


def test_wrong_sae_is_refused_before_any_work(llama: Any) -> None:
    lm, rows = llama
    nowhere = make_sae()
    nowhere.read = nowhere.write = None
    with pytest.raises(UnweaveError, match="which site"):
        evaluate(lm, nowhere, [batch_of(rows)])
    with pytest.raises(UnweaveError, match="dimensions"):
        evaluate(lm, make_sae().at("mlp_act.1"), [batch_of(rows)])
    with pytest.raises(UnweaveError, match="does not exist"):
        evaluate(lm, make_sae().at("resid_post.9"), [batch_of(rows)])


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_result_is_json_and_stamped(llama: Any) -> None:
    lm, rows = llama
    measured = evaluate(lm, make_sae(), iter([batch_of(rows)]))
    values = json.loads(json.dumps(to_plain(measured.plain()), allow_nan=False))
    assert values["metric_set"] == "unweave.core/2" and values["site"] == "resid_post.1"
    assert "firing_counts" not in values
    assert all(math.isfinite(v) for v in values.values() if isinstance(v, float))


def test_progress_reaches_its_total(llama: Any) -> None:
    lm, rows = llama
    done: dict[str, list[float]] = {}

    def display(name: str, total: float, unit: str, start: float) -> Any:
        assert unit == "tokens"
        done[name] = [total, start]
        return SimpleNamespace(
            advance=lambda k=1: done[name].__setitem__(1, done[name][1] + k), note=lambda _t: None, close=lambda: None
        )

    progress.set_display(display)
    try:
        evaluate(lm, make_sae(), [batch_of(rows[:3]), batch_of(rows[3:])])
    finally:
        progress.set_display(None)
    assert set(done) == {"mean activation", "evaluate"}
    assert all(total == reached > 0 for total, reached in done.values())


def test_trap_06_drift_warns_and_says_what_moved(llama: Any) -> None:
    lm, rows = llama
    measured = replace(evaluate(lm, make_sae(), [batch_of(rows)]), l0=30.0, unexplained_variance=0.20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for reference_values in (
            {},
            {"l0": 30.0, "unexplained_variance": 0.2},
            {"l0": 25.5, "unexplained_variance": 0.165},
            {"l0": 36.0},
            {"unexplained_variance": 0.219},
        ):
            assert drift(measured, reference_values) == ()
    with pytest.warns(UnweaveWarning, match="L0 is 30.0 here and was 24.0"):
        assert len(drift(measured, {"l0": 24.0, "unexplained_variance": 0.2})) == 1
    with pytest.warns(UnweaveWarning) as caught:
        assert len(drift(measured, {"l0": 1089.0, "unexplained_variance": 0.1})) == 2
    assert len(caught) == 2
    small = replace(measured, unexplained_variance=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drift(small, {"unexplained_variance": 0.005}) == ()  # four times as much, but of next to nothing


def test_store_batches_takes_each_row_once_and_pads_little(llama: Any) -> None:
    lm, rows = llama

    class Store:
        starts = np.cumsum([0, *map(len, rows)])

        def batch(self, indices: list[int], pad_id: int, side: Any = "right") -> tuple[Tokens, Tensor]:
            assert pad_id == lm.pad_id
            return batch_of([rows[i] for i in indices], side), torch.zeros(0)

    wanted = [0, 2, 3, 5, 8, 9]
    batches = store_batches(lm, Store(), wanted, batch_tokens=20)  # type: ignore[arg-type]
    found = [row[mask].tolist() for b in batches for row, mask in zip(b.ids, b.mask, strict=True)]
    assert sorted(found) == sorted(rows[i] for i in wanted)
    assert all(b.ids.numel() <= 20 or len(b) == 1 for b in batches)
    assert sum(b.ids.numel() for b in batches) < batch_of([rows[i] for i in wanted]).ids.numel()
