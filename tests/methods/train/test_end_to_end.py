"""End-to-end training: its gradient by finite differences, parts of a batch, which tokens count, and that it helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.core.dist import Group
from unweave.core.errors import UnweaveError
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM, Tokens
from unweave.methods.train.end_to_end import end_to_end_step
from unweave.methods.train.kinds import SAESpec, TopKSpec
from unweave.methods.train.trainer import SAETrainer

SITE, EXCLUDED = "resid_post.0", 7


@pytest.fixture
def lm(tiny: Callable[..., Any]) -> LM:
    return LM(tiny("gpt_neox").double(), None)  # whose norms stay in float64


def _tokens(lm: LM, n: int = 6, width: int = 12, seed: int = 0) -> Tokens:
    """Rows of different lengths; each holds a token that is excluded."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        ids = torch.randint(8, 90, (width - i % 3,), generator=g)
        ids[i % 5] = EXCLUDED
        rows.append((ids.tolist(), [0] * len(ids)))
    return Tokens.pad(rows, 0)


def _policy(lm: LM, tokens: Tokens) -> TokenPolicy:
    with lm.taps(read=[SITE]) as seen:
        lm(tokens)
    norms = seen[SITE][tokens.mask].norm(dim=-1)
    return TokenPolicy((EXCLUDED,), float(norms.quantile(0.9)))


def _trainer(lm: LM, kind: str = "topk", **options: Any) -> SAETrainer:
    with lm.taps(read=[SITE]) as seen:
        lm(_tokens(lm, 30, seed=1))
    x = seen[SITE].reshape(-1, lm.d_model)
    values = {"kind": kind, "k": 4, "expansion": 2, "batch": 60, "tokens": 60_000, "warmup": 0.0, "decay": 0.0}
    return SAETrainer(SAESpec.from_dict(values | options), lm.d_model, init_x=x, dtype=torch.float64)


def _objective(lm: LM, trainer: SAETrainer, tokens: Tokens, policy: TokenPolicy, reconstruction: float) -> float:
    """KL + penalty from the definition, with the SAE in its inference form."""
    sae, s = trainer.to_sae(), trainer._output.scale
    with lm.taps(read=[SITE]) as seen:
        clean = lm(tokens)
    x = seen[SITE]
    kept = tokens.mask & (tokens.ids != EXCLUDED) & (x.norm(dim=-1) <= (policy.max_norm or 0.0))

    def swap(value: Tensor, _at: Any) -> Tensor:
        return torch.where(kept[..., None], sae(value), value)

    with lm.taps(edit={SITE: swap}):
        edited = lm(tokens)
    assert clean is not None and edited is not None
    p, q = clean.softmax(-1), edited.softmax(-1)
    n = kept.sum()
    loss = ((p * (p / q).log()).sum(-1) * kept).sum() / n
    if trainer.spec.kind == "relu":
        assert trainer.spec.sparsity is not None
        loss = loss + trainer.spec.sparsity * s * sae.encode(x[kept]).sum() / n
    loss = loss + reconstruction * (s * (sae(x[kept]) - x[kept])).square().sum() / n
    return float(loss)


@pytest.mark.parametrize("reconstruction", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_gradients_are_finite_differences_of_the_definition(lm: LM, kind: str, reconstruction: float) -> None:
    tokens = _tokens(lm)
    policy = _policy(lm, tokens)
    options = {"k": 32, "sparsity": 0.1} if kind == "relu" else {}
    t = _trainer(lm, kind, aux_weight=0.0, **options)
    g = torch.Generator().manual_seed(5)
    for name in ("b_enc", "b_dec"):
        getattr(t.weights, name).data.add_(0.03 * torch.randn(getattr(t.weights, name).shape, generator=g))
    before = {name: p.detach().clone() for name, p in t.weights.named().items()}
    value = _objective(lm, t, tokens, policy, reconstruction)
    row = end_to_end_step(lm, t, tokens, SITE, policy, reconstruction=reconstruction, part_tokens=30)
    assert row["loss"] == pytest.approx(value, rel=1e-6)
    gradients = {name: p.grad.clone() for name, p in t.weights.named().items() if p.grad is not None}
    for name, p in t.weights.named().items():
        direction = torch.randn(p.shape, generator=g).double()
        if name == "W_dec":  # whose rows keep their norm
            direction = direction - (direction * before[name]).sum(1, keepdim=True) * before[name]
        ends = []
        for sign in (1, -1):
            for other, saved in before.items():
                t.weights.named()[other].data.copy_(saved)
            p.data.add_(sign * 1e-6 * direction)
            ends.append(_objective(lm, t, tokens, policy, reconstruction))
        slope = float((gradients[name] * direction).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-9), name
        assert abs(slope) > 1e-5


def test_parts_of_a_batch_add_up(lm: LM) -> None:
    tokens, found = _tokens(lm), []
    for part_tokens in (10_000, 30, 12):
        t = _trainer(lm, aux_weight=0.0)
        row = end_to_end_step(lm, t, tokens, SITE, _policy(lm, tokens), part_tokens=part_tokens)
        assert t.steps == 1 and {float(s["step"]) for s in t.optimiser.state.values()} == {1.0}
        found.append((row, t.weights.W_enc.grad, t.tokens_seen, t.dead_for))
    for row, gradient, seen, clocks in found[1:]:
        assert row == pytest.approx(found[0][0], rel=1e-9)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-8, atol=1e-12)
        assert seen == found[0][2] and torch.equal(clocks, found[0][3])
    kept = _policy(lm, tokens)
    with lm.taps(read=[SITE]) as read:
        lm(tokens)
    assert found[0][2] == int(kept.keep(read[SITE], tokens.ids, tokens.mask).sum()) < tokens.n_tokens


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka", "relu", "p-anneal", "gated", "jumprelu"])
def test_training_brings_predictions_nearer(lm: LM, kind: str) -> None:
    tokens = _tokens(lm, 12)
    policy = TokenPolicy((EXCLUDED,))
    t = _trainer(lm, kind, lr=5e-3)
    rows = [end_to_end_step(lm, t, tokens, SITE, policy, part_tokens=60) for _ in range(30)]
    assert rows[-1]["kl"] < 0.6 * rows[0]["kl"]
    assert all(p.grad is None for p in lm.model.parameters())
    torch.testing.assert_close(t.weights.W_dec.norm(dim=1), torch.ones(t.d_sae).double())


def test_low_precision_models_train_fp32_weights(tiny: Callable[..., Any]) -> None:
    lm = LM(tiny("llama").bfloat16(), None)
    tokens = _tokens(lm)
    with lm.taps(read=[SITE]) as seen:
        lm(tokens)
    x = seen[SITE].reshape(-1, lm.d_model)
    t = SAETrainer(TopKSpec(k=4, expansion=2, batch=60), lm.d_model, init_x=x)
    assert end_to_end_step(lm, t, tokens, SITE)["kl"] > 0
    assert all(p.dtype == torch.float32 for p in t.weights.named().values())


def test_a_batch_in_which_nothing_counts_is_refused(lm: LM) -> None:
    tokens = Tokens.of(torch.full((2, 4), EXCLUDED))
    with pytest.raises(UnweaveError, match="no token"):
        end_to_end_step(lm, _trainer(lm), tokens, SITE, TokenPolicy((EXCLUDED,)))


def test_rows_that_are_not_finite_stop_training_or_are_dropped_and_counted(lm: LM) -> None:
    """Attention carries a NaN to the other tokens of its row: the others train as if it were not there."""
    tokens, (wanted, t, *others) = _tokens(lm), [_trainer(lm) for _ in range(4)]
    policy = _policy(lm, tokens)
    lengths = tokens.mask.sum(1)
    sound = Tokens(tokens.ids[1:], tokens.mask[1:], tokens.roles[1:])
    row = end_to_end_step(lm, wanted, sound, SITE, policy, part_tokens=10_000)

    def spoil(_module: Any, _args: Any, out: Any) -> Any:
        first = (out[0] if isinstance(out, tuple) else out).clone()
        first[: len(tokens) - 5, 4] = float("nan")  # of the first row, where there are six
        return (first, *out[1:]) if isinstance(out, tuple) else first

    handle = lm.layout.blocks[0].register_forward_hook(spoil)
    for other, policy_here in zip(others, (policy, TokenPolicy((EXCLUDED,))), strict=True):
        with pytest.raises(UnweaveError, match=r"NaN or infinite[\s\S]*resid_post\.0[\s\S]*nonfinite"):
            end_to_end_step(lm, other, tokens, SITE, policy_here)
    found = end_to_end_step(lm, t, tokens, SITE, policy, part_tokens=10_000, nonfinite="drop")
    handle.remove()
    assert found["nonfinite"] == int(lengths[0]) - 1  # all but the excluded one
    assert {**found, "nonfinite": 0} == pytest.approx(row)
    torch.testing.assert_close(t.weights.W_enc, wanted.weights.W_enc)


def test_norm_outliers_are_counted(lm: LM) -> None:
    tokens = _tokens(lm)
    policy = _policy(lm, tokens)
    with lm.taps(read=[SITE]) as seen:
        lm(tokens)
    ordinary = tokens.mask & (tokens.ids != EXCLUDED)
    wanted = int((ordinary & (seen[SITE].norm(dim=-1) > (policy.max_norm or 0.0))).sum())
    for part_tokens in (10_000, 30):
        row = end_to_end_step(lm, _trainer(lm), tokens, SITE, policy, part_tokens=part_tokens)
        assert row["outliers"] == wanted > 0 and row["nonfinite"] == 0


class Neighbour(Group):
    """As one of two processes sees it, of which the other has no rows."""

    def max(self, t: Tensor) -> Tensor:
        return torch.maximum(t, torch.zeros_like(t))


def test_a_process_without_rows_stops_all(lm: LM) -> None:
    none = _tokens(lm).rows(slice(0, 0))
    with pytest.raises(UnweaveError, match="has no rows"):
        end_to_end_step(lm, _trainer(lm), none, SITE)
    t = _trainer(lm)
    t.group = Neighbour(0, 2)
    with pytest.raises(UnweaveError, match=r"has no rows[\s\S]*2 processes"):
        end_to_end_step(lm, t, _tokens(lm), SITE)
