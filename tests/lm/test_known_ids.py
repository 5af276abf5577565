"""Rows of an unembedding beyond the tokenizer's ids are no tokens: nothing shows or ranks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unweave.core.site import Site
from unweave.latents.logit_weights import logit_effects
from unweave.lm.model import LM
from unweave.lm.unembed import top_tokens
from unweave.sae.activations import TopK
from unweave.sae.module import SAE
from unweave.sae.output_score import NEUTRAL, output_scores
from unweave.sae.steered import lens_tokens

SITE = Site("resid_post", 1)
FAMILIES = ["llama", "gpt_neox", "gemma2", "gpt2"]


def _padded(tiny: Callable[..., Any], make_tokenizer: Callable[..., Any], family: str) -> tuple[LM, SAE]:
    """128 rows for 97 ids, the others so large that each direction raises and lowers some of them most."""
    model = tiny(family, vocab_size=128)
    with torch.no_grad():
        model.get_output_embeddings().weight[97:] *= 30
    generator = torch.Generator().manual_seed(4)
    W = torch.randn(12, 32, generator=generator)
    W = W / W.norm(dim=1, keepdim=True)
    sae = SAE(W.T.contiguous(), torch.zeros(12), W, torch.zeros(32), TopK(4), read=SITE)
    return LM(model, make_tokenizer()), sae


@pytest.mark.parametrize("family", FAMILIES)
def test_promoted_and_suppressed_tokens(tiny: Any, make_tokenizer: Any, family: str) -> None:
    lm, sae = _padded(tiny, make_tokenizer, family)
    assert lm.known_ids.tolist() == list(range(97)) and lm.vocab_size == 128
    written, logits = logit_effects(lm, sae, 6), lm.logit_lens(sae.W_dec)
    assert (logits.argmax(1) >= 97).all() and (logits.argmin(1) >= 97).all()  # they would come first
    for row in range(12):
        order = sorted(range(97), key=lambda i: -float(logits[row, i]))
        assert written.promoted[row].tolist() == order[:6]
        assert written.suppressed[row].tolist() == order[::-1][:6]
        torch.testing.assert_close(torch.from_numpy(written.promoted_scores[row]), logits[row, order[:6]].float())
    assert lens_tokens(lm, sae, [3, 5]).tolist() == [
        sorted(range(97), key=lambda i: -float(logits[row, i]))[:20] for row in (3, 5)
    ]
    assert logit_effects(lm, sae, 200).promoted.shape == (12, 97)


def test_output_scores_rank_tokens_under_the_whole_distribution(tiny: Any, make_tokenizer: Any) -> None:
    lm, sae = _padded(tiny, make_tokenizer, "llama")
    tokens = lm.tokenize(NEUTRAL)
    with lm.taps(read=[SITE]) as seen:
        lm(tokens)
    strongest = float(sae.encode(seen[SITE])[0, -1].max())
    for score in output_scores(lm, sae, [0, 4, 9]):
        shift = torch.zeros(1, tokens.ids.shape[1], 32)
        shift[:, -1] = 10 * strongest * sae.W_dec[score.latent]
        with lm.taps(edit={SITE: lambda x, _at, shift=shift: x + shift}):
            p = torch.softmax(lm(tokens, keep_logits=1)[0, -1], -1)  # type: ignore[index]
        theme = lens_tokens(lm, sae, [score.latent])[0]
        high = float(p[theme].max())
        rank = sum(float(p[i]) > high for i in range(97))
        assert score.rank == rank <= 97
        assert score.probability == pytest.approx(high, rel=1e-4)
        assert score.score == pytest.approx((1 - rank / 97) * high, rel=1e-4)
        assert all(score.tokens)  # ids that are none would have no text


def test_known_ids_of_other_tokenizers(tiny: Any, make_tokenizer: Any) -> None:
    assert LM(tiny("llama"), None).known_ids.tolist() == list(range(97))
    assert LM(tiny("llama", vocab_size=90), make_tokenizer()).known_ids.tolist() == list(range(90))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    lm = LM(tiny("llama", vocab_size=128), tokenizer)
    assert lm.known_ids.tolist() == list(range(98))
    logits = torch.arange(128.0)
    assert [found.tolist() for found in top_tokens(lm, logits, 2)] == [[97.0, 96.0], [97, 96]]
    assert top_tokens(lm, logits, 1, largest=False)[1].tolist() == [0]
