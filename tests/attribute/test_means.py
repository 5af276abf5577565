"""Mean effects against finite differences of ablating one latent, autograd through a splice, and other batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.attribution import F, close, make_sae
from unweave.attribute.means import Mean, mean_effects
from unweave.attribute.runner import Batch
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import JumpReLU, ReLU, TopK
from unweave.sae.module import SAE

SITES = ("resid_post.0", "resid_post.1")


class Differs:
    """logit 5 - logit 7 of each row's answer; also with the rows in another order."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self, out: Tensor, rows: Tensor) -> Tensor:
        return self.scale[rows] * (out[:, 5] - out[:, 7])


def double(tiny_lm: Callable[..., LM], family: str) -> LM:
    lm = tiny_lm(family)
    lm.model.double()
    return lm


def rows_of(n: int = 5) -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (4 + i,), generator=g).tolist() for i in range(n)]


def batches(rows: list[list[int]], size: int, side: str = "right") -> list[Batch]:
    scale = 1.0 + torch.arange(len(rows))
    parts = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    return [
        (Tokens.pad([(rows[i], [4] * len(rows[i])) for i in part], 2, side), None, Differs(scale[list(part)]))  # type: ignore[arg-type]
        for part in parts
    ]


def by_hand(lm: LM, sae: SAE, rows: list[list[int]], step: float = 0.03) -> tuple[Tensor, Tensor, Tensor]:
    """Each latent's slope by differences of the metric where its part alone is made larger or smaller (five points, for
    norms compute in float32), row by row without padding; and how strongly and how often it fires."""
    site = sae.write
    assert site is not None
    slopes, strong, often = (torch.zeros(len(rows), F, dtype=torch.float64) for _ in range(3))
    ends = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    weights = torch.tensor([1.0, -8.0, 8.0, -1.0], dtype=torch.float64) / (12 * step)
    for row, ids in enumerate(rows):
        tokens = Tokens.of(torch.tensor([ids]))
        with lm.taps(read=[sae.read or site]) as seen:
            lm(tokens)
        x = seen[sae.read or site]
        keep = sae.policy.keep(x, tokens.ids, tokens.mask)
        f = sae.encode(x) * keep.unsqueeze(-1)
        strong[row], often[row] = (v[0].double().sum(0) / max(int(keep.sum()), 1) for v in (f, f > 0))
        firing = (f[0] != 0).any(0).nonzero()[:, 0].tolist()
        if firing:
            parts = torch.cat([sae.subset([j]).writes(f[..., j : j + 1], x) for j in firing])  # [latents, P, D]
            moves = (step * ends[:, None, None, None] * parts).flatten(0, 1)
            with lm.taps(edit={site: lambda v, at, moves=moves: v + moves}):
                logits = lm(Tokens.of(torch.tensor([ids] * len(moves))))[:, -1]
            metric = (1.0 + row) * (logits[:, 5] - logits[:, 7])
            slopes[row, firing] = weights @ metric.view(4, len(firing))
    return slopes, strong, often


def test_every_family_has_the_slopes_of_ablating_each_latent_alone(tiny_lm: Callable[..., LM], family: str) -> None:
    lm = double(tiny_lm, family)
    saes = {Site.parse(site): make_sae(lm, site, seed) for seed, site in enumerate(SITES)}
    rows = rows_of(3)
    means = mean_effects(lm, saes, batches(rows, 3))
    assert sorted(means) == sorted(saes)
    for site, sae in saes.items():
        slopes, strong, often = by_hand(lm, sae, rows)
        close(means[site].effect.value, slopes.mean(0), 2e-4)
        close(means[site].activation.value, strong.mean(0))
        close(means[site].frequency.value, often.mean(0))
        margin = 1.96 * slopes.std(0) / 3**0.5
        close(means[site].effect.margin, margin, 4e-4)
        assert means[site].effect.n == 3 and bool((means[site].effect.value < 0).any())


@pytest.mark.parametrize("activation", [ReLU(), TopK(4), JumpReLU(torch.full((F,), 0.4, dtype=torch.float64))])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": TokenPolicy(exclude_ids=(5, 11, 12, 44, 60), max_norm=6.0)},
        {"input_norm": "layer_norm"},
    ],
)
def test_every_kind_of_sae(tiny_lm: Callable[..., LM], activation: Any, options: dict[str, Any]) -> None:
    lm, rows = double(tiny_lm, "llama"), rows_of(3)
    sae = make_sae(lm, SITES[1], activation=activation, **options)
    slopes, strong, _ = by_hand(lm, sae, rows)
    (means,) = mean_effects(lm, sae, batches(rows, 2)).values()
    close(means.effect.value, slopes.mean(0), 2e-4)
    close(means.activation.value, strong.mean(0))


def test_the_token_that_begins_a_text_counts_for_nothing(tiny_lm: Callable[..., LM]) -> None:
    """For an SAE from elsewhere, whose policy is not known, as for one whose policy excludes it."""
    lm, rows = double(tiny_lm, "llama"), [[0, *row] for row in rows_of(3)]
    assert lm.tokenizer is not None and lm.tokenizer.bos_token_id == 0
    ours, stated = (make_sae(lm, SITES[1], policy=TokenPolicy(ids)) for ids in ((), (0,)))
    (one,), (two,) = (mean_effects(lm, [sae], batches(rows, 2)).values() for sae in (ours, stated))
    close(one.effect.value, two.effect.value)
    close(one.activation.value, two.activation.value)
    close(one.frequency.value, two.frequency.value)


def test_a_transcoder_is_attributed_where_it_writes(tiny_lm: Callable[..., LM]) -> None:
    lm, rows = double(tiny_lm, "llama"), rows_of(3)
    sae = make_sae(lm, "mlp_add.1", read="mlp_in.1")
    slopes, _, _ = by_hand(lm, sae, rows)
    (means,) = mean_effects(lm, [sae], batches(rows, 3)).values()
    close(means.effect.value, slopes.mean(0), 2e-4)


def test_batches_and_padding_do_not_matter(tiny_lm: Callable[..., LM], shown_tasks: list[Any]) -> None:
    lm, rows = double(tiny_lm, "gpt2"), rows_of(5)
    saes = [make_sae(lm, site, seed) for seed, site in enumerate(SITES)]
    reference = mean_effects(lm, saes, batches(rows, 1), total=5)
    assert [(one.name, one.total) for one in shown_tasks] == [("attribute", 5)]
    for size, side, limit in ((5, "right", 1024), (2, "left", 1024), (5, "left", 16)):
        again = mean_effects(lm, saes, batches(rows, size, side), max_tokens=limit)
        for site, means in reference.items():
            for name in ("effect", "activation", "frequency"):
                close(getattr(again[site], name).value, getattr(means, name).value)
                close(getattr(again[site], name).deviation, getattr(means, name).deviation, 1e-7)


def test_one_pass_serves_all_sites(tiny_lm: Callable[..., LM]) -> None:
    lm, rows = double(tiny_lm, "llama"), rows_of(4)
    saes = [make_sae(lm, site, seed) for seed, site in enumerate(SITES)]
    mean_effects(lm, saes, batches(rows, 4))  # looks at the model too: whether the SAEs are of it, how it unembeds
    passes = []
    handle = lm.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        mean_effects(lm, saes, batches(rows, 2))
    finally:
        handle.remove()
    assert len(passes) == 2


def test_what_cannot_be_attributed(tiny_lm: Callable[..., LM]) -> None:
    lm, rows = double(tiny_lm, "llama"), rows_of(2)
    sae = make_sae(lm, SITES[0])
    ((tokens, _, _),) = batches(rows, 2)
    with pytest.raises(UnweaveError, match="the metric is constant"):
        mean_effects(lm, sae, [(tokens, None, lambda out, rows: out[:, 5] * 0.0)])
    with pytest.raises(UnweaveError, match="the metric is constant"):
        mean_effects(lm, sae, [])
    with pytest.raises(UnweaveError, match="NaN"):
        mean_effects(lm, sae, [(tokens, None, lambda out, rows: out[:, 5] / 0.0)])
    encoder = SAE(sae.W_enc, sae.b_enc, sae.W_dec[:, :0], sae.b_dec[:0], ReLU(), read=sae.read, encode_only="one layer")
    with pytest.raises(UnweaveError, match=r"encodes and has no decoder|file named no site"):
        mean_effects(lm, {Site.parse(SITES[0]): encoder}, batches(rows, 2))


def test_a_mean_of_one_example_has_no_interval() -> None:
    mean = Mean(2)
    mean.add(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    assert mean.value.tolist() == [1.0, -2.0] and mean.margin.tolist() == [0.0, 0.0]
