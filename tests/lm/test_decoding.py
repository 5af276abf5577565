"""Generation with edits that persist in keys and values or do not, against loops without a cache; and its draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae import steered
from unweave.sae.activations import ReLU
from unweave.sae.edits import Change
from unweave.sae.module import SAE
from unweave.sae.steered import generate_sweep

NEW = 6
ROWS = [[40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52], [60, 61, 62], [70]]  # longer than the windows of 8
ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},  # frequencies change beyond 16 positions: nothing is kept
    "linear": {"rope_type": "linear", "factor": 2.0},
}


def _lm(tiny: Callable[..., Any], family: str) -> LM:
    model = tiny("llama" if family in ROPES else family)
    if family in ROPES:
        config = model.config
        config.max_position_embeddings = 16 if family == "dynamic" else 64
        config.rope_parameters = {"rope_theta": 10_000.0, **ROPES[family]}
        weights = model.state_dict()
        model = type(model)(config).eval()
        model.load_state_dict(weights)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return LM(model, None)


def _saes(lm: LM) -> tuple[SAE, SAE]:
    g = torch.Generator().manual_seed(3)
    shapes = ((32, 40), (40,), (40, 32), (32,))
    sites = (Site("resid_post", 0), Site("mlp_add", 2))
    low, high = (SAE(*(torch.randn(*s, generator=g) * 0.4 for s in shapes), ReLU(), read=site) for site in sites)
    return low, high


def _whole_passes(lm: LM, row: list[int], edits: list[Any], persist: bool) -> list[int]:
    """Greedy continuation by whole passes of one row alone; every token is edited, or the last one."""

    def last_only(edit: Any) -> Callable[[Tensor, Any], Tensor]:
        def change(x: Tensor, at: Any) -> Tensor:
            last = (torch.arange(x.shape[1]) == x.shape[1] - 1).view(1, -1, 1)
            return torch.where(last, edit(x, at), x)

        return change

    given = edits if persist else {edit.site: last_only(edit) for edit in edits}
    ids = list(row)
    for _ in range(NEW):
        with lm.taps(edit=given):
            logits = lm(Tokens.of(torch.tensor([ids])))
        assert logits is not None
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(row) :]


FAMILIES = ["llama", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3", "olmo2", *ROPES]


@pytest.mark.parametrize("persist", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_persist_or_do_not(tiny: Callable[..., Any], family: str, persist: bool) -> None:
    lm = _lm(tiny, family)
    low, high = _saes(lm)
    edits = [low.clamp({3: 5.0}), high.add({4: 4.0})]
    batch = Tokens.pad([(row, [4] * len(row)) for row in ROWS], 2, "left")
    got = lm.generate_ids(batch, edits, max_new_tokens=NEW, persist=persist).tolist()
    assert got == [_whole_passes(lm, row, edits, persist) for row in ROWS]
    assert got != lm.generate_ids(batch, edits, max_new_tokens=NEW, persist=not persist).tolist()
    assert not lm.sessions and lm.current is None


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "dynamic"])
def test_without_edits_both_ways_are_the_same(tiny: Callable[..., Any], family: str) -> None:
    lm = _lm(tiny, family)
    batch = Tokens.pad([(row, [4] * len(row)) for row in ROWS], 2, "left")
    for temperature in (0.0, 1.0):
        kept, dropped = (
            lm.generate_ids(batch, max_new_tokens=NEW, temperature=temperature, persist=persist) for persist in (1, 0)
        )
        assert torch.equal(kept, dropped)


def test_a_row_draws_the_same_in_any_batch(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = _lm(tiny, "qwen3")
    low, _ = _saes(lm)
    batch = Tokens.pad([(row, [4] * len(row)) for row in ROWS], 2, "left")
    changes = [[Change(low, 3, 5.0)], [], [Change(low, 2, 1.0, "add")]]
    options: Any = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 7}
    together = generate_sweep(lm, batch, changes, **options).ids
    with monkeypatch.context() as patched:
        patched.setattr(steered, "_BATCH_TOKENS", 1)
        apart = generate_sweep(lm, batch, changes, **options).ids
    assert torch.equal(together, apart)
    assert not torch.equal(together, generate_sweep(lm, batch, changes, **options | {"seed": 8}).ids)
    same = lm.generate_ids(batch.rows(slice(0, 1)), max_new_tokens=NEW, temperature=1.0, seed=[5])
    twice = Tokens(*(column[[0, 0]] for column in (batch.ids, batch.mask, batch.roles)))
    rows = lm.generate_ids(twice, max_new_tokens=NEW, temperature=1.0, seed=[5, 6])
    assert rows[0].tolist() == same[0].tolist() != rows[1].tolist()
    with pytest.raises(UnweaveError, match="1 seeds are given for 2 rows"):
        lm.generate_ids(twice, max_new_tokens=NEW, temperature=1.0, seed=[5])


def test_draws_have_the_models_distribution(tiny: Callable[..., Any]) -> None:
    lm = _lm(tiny, "llama")
    n, temperature = 4000, 0.7
    logits = lm(Tokens.of(torch.tensor([[40, 41, 42]])))
    assert logits is not None
    p = torch.softmax(logits[0, -1].double() / temperature, -1)
    rows = Tokens.of(torch.tensor([[40, 41, 42]]).expand(n, -1))
    drawn = lm.generate_ids(rows, max_new_tokens=1, temperature=temperature).flatten()
    counts = torch.bincount(drawn, minlength=len(p)).double()
    assert bool(((counts - n * p).abs() <= 5 * (n * p).sqrt() + 3).all())  # five standard deviations
    assert int((counts > 0).sum()) > 5


def test_a_tiny_temperature_is_greedy(tiny: Callable[..., Any]) -> None:
    lm = _lm(tiny, "gemma2")
    batch = Tokens.pad([(row, [4] * len(row)) for row in ROWS], 2, "left")
    greedy = lm.generate_ids(batch, max_new_tokens=NEW)
    for temperature in (1e-40, 5e-324):
        assert torch.equal(greedy, lm.generate_ids(batch, max_new_tokens=NEW, temperature=temperature))


@pytest.mark.parametrize("persist", [True, False])
def test_what_leaves_the_range_of_numbers_is_refused(tiny: Callable[..., Any], persist: bool) -> None:
    lm = _lm(tiny, "llama")
    low, _ = _saes(lm)
    batch = Tokens.pad([(row, [4] * len(row)) for row in ROWS], 2, "left")
    by_row = torch.tensor([float("nan"), 3e38, 1.0])
    edits = low.add(dict.fromkeys(range(20), by_row), where="all")  # the sum is infinite
    lm.model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UnweaveError, match=r"new token 0 are not finite in rows \[0, 1, 2\]"):
        lm.generate_ids(batch, max_new_tokens=NEW)
    lm = _lm(tiny, "llama")
    for temperature in (0.0, 1.0):
        with pytest.raises(UnweaveError, match=r"new token 0 are not finite in rows \[1\]"):
            lm.generate_ids(batch, edits, max_new_tokens=NEW, temperature=temperature, persist=persist)
    assert not lm.sessions and lm.current is None


def test_a_stream_that_is_left_early_gives_the_model_back(tiny: Callable[..., Any]) -> None:
    from unweave.lm.decoding import decode

    lm = _lm(tiny, "llama")
    low, _ = _saes(lm)
    stream = decode(lm, Tokens.of(torch.tensor([ROWS[0]])), low.clamp({3: 5.0}), max_new_tokens=NEW)
    first = [int(next(stream)) for _ in range(2)]
    stream.close()  # type: ignore[attr-defined]
    assert not lm.sessions and lm.current is None
    assert first == _whole_passes(lm, ROWS[0], [low.clamp({3: 5.0})], True)[:2]
    with pytest.raises(UnweaveError, match="padding on the left"):
        lm.generate_ids(Tokens.pad([([40, 41], [4, 4]), ([42], [4])], 2, "right"))
