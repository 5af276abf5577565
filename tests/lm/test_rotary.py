"""A row's numbers never depend on its neighbours, nor on earlier calls, whatever the kind of rotary embedding."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers as hf

from unweave.lm.model import LM, Tokens
from unweave.lm.rotary import changing

LIMIT = 24
_FACTORS = {"short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.5, 3.0, 7.0, 20.0]}
_SIZE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def _longrope() -> Any:
    config = hf.Phi3Config(
        **_SIZE,
        max_position_embeddings=128,
        original_max_position_embeddings=LIMIT,
        rope_scaling={"type": "longrope", **_FACTORS},
    )
    return hf.Phi3ForCausalLM(config)


def _dynamic() -> Any:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZE, max_position_embeddings=LIMIT, rope_scaling=scaling))


def _yarn() -> Any:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LIMIT}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZE, max_position_embeddings=4 * LIMIT, rope_scaling=scaling))


MAKERS = {"longrope": _longrope, "dynamic": _dynamic, "yarn": _yarn}


@functools.cache
def _made(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MAKERS[kind]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
    return model


def _fresh(kind: str) -> Any:
    """A model that nobody has called yet, the same weights every time."""
    return copy.deepcopy(_made(kind))


def _rows(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 97, (n,), generator=generator).tolist() for n in lengths]


def _padded(rows: list[list[int]], side: Any) -> Tokens:
    return Tokens.pad([(row, [1] * len(row)) for row in rows], 2, side)


def _alone(kind: str, row: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Block 1's output and the logits of one row, from transformers, in a model that has seen nothing else."""
    with torch.no_grad():
        out = _fresh(kind)(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False)
    return out.hidden_states[1][0], out.logits[0]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_in_a_batch_are_as_alone(kind: str, side: str) -> None:
    rows = _rows((10, 40, LIMIT, LIMIT + 1, 3, 55))
    lm = LM(_fresh(kind), None)
    batch = _padded(rows, side)
    with lm.taps(read=["resid_post.0"]) as seen:
        logits = lm(batch)
    for row, mask, read, mine in zip(rows, batch.mask, seen["resid_post.0"], logits, strict=True):
        hidden, wanted = _alone(kind, row)
        torch.testing.assert_close(read[mask], hidden, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(mine[mask], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_these_kinds_do_depend_on_the_longest_row_in_transformers(kind: str) -> None:
    """What is guarded against: without us, a row of 10 beside one of 40 has other activations."""
    rows = _rows((10, 40))
    batch = _padded(rows, "right")
    with torch.no_grad():
        beside = _fresh(kind)(input_ids=batch.ids, attention_mask=batch.mask.long()).logits[0, :10]
    wanted = _alone(kind, rows[0])[1]
    assert float((beside - wanted).norm() / wanted.norm()) > 0.02


@pytest.mark.parametrize("kind", MAKERS)
def test_a_call_does_not_depend_on_earlier_ones(kind: str) -> None:
    model = _fresh(kind)
    short, long, longer = (Tokens.of(torch.tensor(row)) for row in _rows((LIMIT, 40, 60)))
    with torch.no_grad():
        model(input_ids=longer.ids, use_cache=False)  # before it became an LM
    lm = LM(model, None)
    for tokens in (long, short, longer, long, short):
        wanted = _alone(kind, tokens.ids[0].tolist())[1]
        torch.testing.assert_close(lm(tokens)[0], wanted, atol=1e-5, rtol=1e-5)
    lm(longer)
    with torch.no_grad():  # and nothing of ours is left in the model
        theirs = model(input_ids=short.ids, use_cache=False).logits
    torch.testing.assert_close(theirs[0], _alone(kind, short.ids[0].tolist())[1], atol=1e-6, rtol=1e-6)


def _greedy(kind: str, row: list[int], new: int) -> list[int]:
    """Greedy continuation by whole passes of one row, each in a model that has seen nothing else."""
    for _ in range(new):
        row = [*row, int(_alone(kind, row)[1][-1].argmax())]
    return row[-new:]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("lengths", [(5, 8), (LIMIT - 3, 9), (LIMIT + 4, LIMIT + 9), (LIMIT + 4, 6)])
def test_generation_equals_recomputation(kind: str, lengths: tuple[int, ...]) -> None:
    rows, new = _rows(lengths), 8
    lm = LM(_fresh(kind), None)
    lm.model.generation_config.eos_token_id = lm.model.config.eos_token_id = None
    found = lm.generate_ids(_padded(rows, "left"), max_new_tokens=new)
    assert found.tolist() == [_greedy(kind, row, new) for row in rows]


def test_edits_see_mask_and_roles_of_the_whole_row_where_keys_are_not_kept() -> None:
    from unweave.lm.chat import Role

    lm = LM(_fresh("dynamic"), None)
    lm.model.generation_config.eos_token_id = lm.model.config.eos_token_id = None
    batch = _padded(_rows((LIMIT - 1, LIMIT - 4)), "left")
    seen = []
    lm.generate_ids(batch, {"resid_post.0": lambda _x, at: seen.append(at)}, max_new_tokens=3)
    assert [at.step for at in seen] == [0, 1, 2]
    for at in seen:
        assert at.mask.sum(1).tolist() == [LIMIT - 1 + at.step, LIMIT - 4 + at.step]
        assert (at.roles[:, batch.ids.shape[1] :] == Role.ASSISTANT).all()
        torch.testing.assert_close(at.roles[:, : batch.ids.shape[1]], batch.roles)


def test_an_edit_acts_alike_with_and_without_kept_keys() -> None:
    """The same rows in a model whose frequencies are fixed, and in one where generation cannot keep keys."""
    lm = LM(_fresh("yarn"), None)
    lm.model.generation_config.eos_token_id = lm.model.config.eos_token_id = None
    batch = _padded(_rows((12, 7)), "left")
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))

    def edit(x: torch.Tensor, at: Any) -> torch.Tensor:
        return x + direction * at.mask.unsqueeze(-1) * at.roles.unsqueeze(-1)

    kept = lm.generate_ids(batch, {"resid_post.0": edit}, max_new_tokens=6)
    lm.may_cache = lambda *_: False  # type: ignore[method-assign]
    assert lm.generate_ids(batch, {"resid_post.0": edit}, max_new_tokens=6).tolist() == kept.tolist()


def test_which_kinds_change() -> None:
    assert [(one.limit, one.two_sets) for one in changing(_fresh("longrope"))] == [(LIMIT, True)]
    assert [(one.limit, one.two_sets) for one in changing(_fresh("dynamic"))] == [(LIMIT, False)]
    assert not changing(_fresh("yarn"))


def test_a_judge_answers_as_each_prompt_would_be_answered_alone(make_tokenizer: Any) -> None:
    """Prompts on both sides of the limit that begin alike: neither neighbours nor a kept beginning may matter."""
    from unweave.judge.base import Budget
    from unweave.judge.local import LocalModel
    from unweave.lm.chat import render_many

    lm = LM(_fresh("longrope"), make_tokenizer())
    talks = [[{"role": "user", "content": "a" * n + "b"}] for n in (0, 1, 3, 5, 12, 30)]
    rows = [row for row, _ in render_many(lm.tokenizer, talks, add_generation_prompt=True)]
    assert min(map(len, rows)) + 3 < LIMIT < max(map(len, rows))
    replies = dict(LocalModel(lm, max_new_tokens=3, at_once=6).answer(talks, Budget()))
    for place, row in enumerate(rows):
        wanted = _greedy("longrope", row, 3)
        assert replies[place].text == lm.decode(wanted[: wanted.index(1)] if 1 in wanted else wanted)
