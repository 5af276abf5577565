"""What generated tokens are, and where generation ends, against loops and lists written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unweave.lm.chat import Role, encode_text, encode_texts
from unweave.lm.model import LM, Tokens
from unweave.sae.steered import until_end
from unweave.tasks import answers


def _roles_seen(lm: LM, prompt: Tokens, new: int) -> list[list[list[int]]]:
    seen: list[list[list[int]]] = []

    def note(x: torch.Tensor, at: Any) -> None:
        seen.append(at.roles.tolist())

    lm.generate_ids(prompt, {"resid_post.1": note}, max_new_tokens=new)
    return seen


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_generated_tokens_are_the_assistants_after_a_prompt_of_any_length(
    tiny_lm: Callable[..., LM], length: int, rows: int
) -> None:
    lm = tiny_lm()
    ids = torch.randint(4, 97, (rows, length), generator=torch.Generator().manual_seed(0))
    prompt, *later = _roles_seen(lm, Tokens.of(ids), 4)
    assert prompt == [[int(Role.TEXT)] * length] * rows
    assert later and all(roles == [[int(Role.ASSISTANT)]] * rows for roles in later)


@pytest.mark.parametrize("length", [1, 3])
def test_an_edit_by_role_does_something_after_a_prompt_of_one_token(tiny_lm: Callable[..., LM], length: int) -> None:
    """The edited continuation equals the loop that adds the shift to every generated position by hand."""
    lm = tiny_lm()
    shift = 3 * torch.randn(32, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[40, 41, 42][:length]])
    edit = {"resid_post.1": lambda x, at: torch.where((at.roles == Role.ASSISTANT).unsqueeze(-1), x + shift, x)}
    got = lm.generate_ids(Tokens.of(ids), edit, max_new_tokens=4)[0].tolist()
    whole = ids
    for token in got:
        places = (torch.arange(whole.shape[1]) >= length).view(1, -1, 1)
        with lm.taps(edit={"resid_post.1": lambda x, at, places=places: torch.where(places, x + shift, x)}):
            logits = lm(whole)
        assert logits is not None and int(logits[0, -1].argmax()) == token
        whole = torch.cat([whole, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("length", [1, 3])
def test_generated_tokens_are_the_assistants_without_a_cache_too(tiny_lm: Callable[..., LM], length: int) -> None:
    lm = tiny_lm()
    seen: list[list[int]] = []
    prompt = Tokens.of(torch.tensor([[40, 41, 42][:length]]))
    with lm.running(prompt), lm.taps(edit={"embed": lambda x, at: seen.append(at.roles[0].tolist())}):
        for new in range(3):
            ids = torch.cat([prompt.ids, torch.full((1, new), 50)], dim=1)
            lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert seen == [[int(Role.TEXT)] * length + [int(Role.ASSISTANT)] * new for new in range(3)]


def test_two_passes_of_one_length_are_two_texts_not_a_generation(tiny_lm: Callable[..., LM]) -> None:
    lm = tiny_lm()
    seen: list[list[int]] = []
    tokens = Tokens.of(torch.tensor([[40]]))
    with lm.taps(edit={"embed": lambda x, at: seen.append(at.roles[0].tolist())}):
        lm(tokens)
        lm(tokens)
    assert seen == [[int(Role.TEXT)]] * 2


def _likeliest(lm: LM, row: list[int]) -> int:
    logits = lm(Tokens.of(torch.tensor([row])))
    assert logits is not None
    return int(logits[0, -1].argmax())


@pytest.mark.parametrize("where", ["config", "generation", "generation list", "tokenizer", "template"])
def test_generation_ends_at_every_end_token_of_model_tokenizer_and_template(
    tiny_lm: Callable[..., LM], make_tokenizer: Callable[..., Any], where: str
) -> None:
    """The end is the token that the model says second; only one of the places names it."""
    lm = tiny_lm()
    row = [40, 41, 42]
    first = _likeliest(lm, row)
    end = _likeliest(lm, [*row, first])
    lm.tokenizer = make_tokenizer(chat_template=None)
    lm.tokenizer.eos_token = None
    lm.model.generation_config.eos_token_id, lm.model.config.eos_token_id = None, None
    assert first != end and lm.end_ids == ()
    other = next(i for i in range(4, 97) if i not in (first, end))
    name = str(lm.tokenizer.convert_ids_to_tokens(end))
    if where == "config":
        lm.model.config.eos_token_id = end
    elif where == "generation":
        lm.model.generation_config.eos_token_id = end
    elif where == "generation list":
        lm.model.generation_config.eos_token_id = [other, end]
        lm.model.config.eos_token_id = other
    elif where == "tokenizer":
        lm.tokenizer.eos_token = name
    else:
        lm.tokenizer.add_special_tokens({"additional_special_tokens": [name]})
        lm.tokenizer.chat_template = "{% for m in messages %}7: {{ m['content'] }}" + name + "\n{% endfor %}"
    assert end in lm.end_ids
    new = lm.generate_ids(Tokens.of(torch.tensor([row])), max_new_tokens=6)
    assert new.tolist() == [[first, end]]
    assert until_end(lm, new).tolist() == [1]


def test_what_ends_no_turn_is_no_end_token(make_tokenizer: Callable[..., Any], tiny_lm: Callable[..., LM]) -> None:
    lm = tiny_lm()
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    lm.tokenizer = make_tokenizer(chat_template=template)
    assert lm.end_ids == (1,)  # the tokenizer's and the configuration's alone


def _ending(make_tokenizer: Callable[..., Any], single: str) -> Any:
    from tokenizers import processors

    tokenizer = make_tokenizer(chat_template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)]
    )
    return tokenizer


@pytest.mark.parametrize("bos", [False, True])
def test_an_end_token_that_the_tokenizer_appends_is_left_off(make_tokenizer: Callable[..., Any], bos: bool) -> None:
    tokenizer = _ending(make_tokenizer, "<|im_start|> $A <|im_end|>" if bos else "$A <|im_end|>")
    plain = make_tokenizer(add_bos=bos, chat_template=None)
    texts = ["ab c", "", "typed<|im_end|>", "<|im_end|>"]
    assert [ids for ids, _ in encode_texts(tokenizer, texts)] == [plain(text).input_ids for text in texts]
    assert encode_text(tokenizer, "ab")[1] == [int(Role.SPECIAL)] * bos + [int(Role.TEXT)] * 2


def test_inputs_of_a_tokenizer_that_appends_an_end_are_answered_not_ended(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = _ending(make_tokenizer, "<|im_start|> $A <|im_end|>")
    given = answers.Input("ab", "c")
    assert answers.problem_of(tokenizer, given) is None
