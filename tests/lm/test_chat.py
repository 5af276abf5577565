"""Chat templates to token ids with a role per token, against renderings written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.core.errors import UnweaveError
from unweave.lm.chat import Role, encode_text, encode_texts, render, render_many, special_ids

CHATML_DEFAULT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "(turn){{ role }}\n{{ m['content'] | trim }}(end)\n{% endfor %}"
)
TEXTS = st.text(alphabet="ab <|>system[user]\n(.", max_size=12)
CONVERSATIONS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), min_size=1, max_size=4)
Piece = tuple[str, Role]


def messages_of(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def role_of(name: str) -> Role:
    return {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}[name]


def chatml_pieces(pairs: list[tuple[str, str]]) -> list[Piece]:
    """What the ChatML template with a default system prompt writes, by hand."""
    pieces: list[Piece] = []
    if pairs[0][0] != "system":
        pairs = [("system", "Be kind."), *pairs]
    for role, content in pairs:
        pieces += [("<|im_start|>", Role.SPECIAL), (role + "\n", Role.SPECIAL), (content, role_of(role))]
        pieces += [("<|im_end|>", Role.SPECIAL), ("\n", Role.SPECIAL)]
    return pieces


def llama3_pieces(pairs: list[tuple[str, str]]) -> list[Piece]:
    pieces: list[Piece] = [("<|im_start|>", Role.SPECIAL)]
    for role, content in pairs:
        pieces += [(f"[{role}]\n\n", Role.SPECIAL), (content.strip(), role_of(role)), ("<|im_end|>", Role.SPECIAL)]
    return pieces


def expected(tokenizer: Any, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Ids and roles of pieces under the character tokenizer, where a token is a character or a special token."""
    ids: list[int] = []
    roles: list[int] = []
    for text, role in pieces:
        units = [text] if text.startswith("<|im_") and text.endswith("|>") else list(text)
        ids += [tokenizer.convert_tokens_to_ids(unit) for unit in units]
        roles += [int(role)] * len(units)
    return ids, roles


@given(pairs=CONVERSATIONS)
@settings(max_examples=60, deadline=None)
def test_trap_09_every_template_token_is_special_and_every_content_token_has_its_role(
    make_tokenizer: Callable[..., Any], pairs: list[tuple[str, str]]
) -> None:
    chatml, llama3 = make_tokenizer(chat_template=CHATML_DEFAULT), make_tokenizer(chat_template=LLAMA3)
    assert render(chatml, messages_of(pairs)) == expected(chatml, chatml_pieces(pairs))
    assert render(llama3, messages_of(pairs)) == expected(llama3, llama3_pieces(pairs))


def test_contents_that_look_like_the_template_are_still_found(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML_DEFAULT)
    pairs = [("user", "user\nBe kind."), ("assistant", "user"), ("user", ""), ("assistant", "assistant\n")]
    assert render(tokenizer, messages_of(pairs)) == expected(tokenizer, chatml_pieces(pairs))


def test_generation_prompt_is_special(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML_DEFAULT)
    plain = render(tokenizer, messages_of([("user", "hi")]))
    opened = render(tokenizer, messages_of([("user", "hi")]), add_generation_prompt=True)
    tail = expected(tokenizer, [("<|im_start|>", Role.SPECIAL), ("assistant\n", Role.SPECIAL)])
    assert opened == (plain[0] + tail[0], plain[1] + tail[1])


def test_default_system_prompt_is_system_only_where_the_template_inserts_it(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML_DEFAULT)
    ids, roles = render(tokenizer, messages_of([("user", "hi")]))
    assert tokenizer.decode([i for i, r in zip(ids, roles, strict=True) if r == Role.SYSTEM]) == "Be kind."
    assert Role.SYSTEM not in render(make_tokenizer(), messages_of([("user", "hi")]))[1]
    # a changed template is noticed, though the tokenizer is the same object
    tokenizer.chat_template = CHATML_DEFAULT.replace("Be kind.", "Be brief!")
    ids, roles = render(tokenizer, messages_of([("user", "hi")]))
    assert tokenizer.decode([i for i, r in zip(ids, roles, strict=True) if r == Role.SYSTEM]) == "Be brief!"


def test_template_that_refuses_system_and_calls_the_assistant_model(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(chat_template=GEMMA)
    ids, roles = render(tokenizer, messages_of([("user", " a "), ("assistant", "model")]))
    pieces: list[Piece] = [("<|im_start|>", Role.SPECIAL), ("(turn)user\n", Role.SPECIAL), ("a", Role.USER)]
    pieces += [("(end)\n(turn)model\n", Role.SPECIAL), ("model", Role.ASSISTANT), ("(end)\n", Role.SPECIAL)]
    assert (ids, roles) == expected(tokenizer, pieces)
    with pytest.raises(UnweaveError, match="no system role"):
        render(tokenizer, messages_of([("system", "s"), ("user", "a")]))


def test_template_whose_own_words_depend_on_the_contents(make_tokenizer: Callable[..., Any]) -> None:
    template = "{% for m in messages %}({{ m['content'] | length }}) {{ m['content'] }};{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    ids, roles = render(tokenizer, messages_of([("user", "abc"), ("assistant", "de")]))
    pieces: list[Piece] = [("(3) ", Role.SPECIAL), ("abc", Role.USER), (";(2) ", Role.SPECIAL)]
    pieces += [("de", Role.ASSISTANT), (";", Role.SPECIAL)]
    assert (ids, roles) == expected(tokenizer, pieces)


def test_trap_03_template_and_tokenizer_do_not_both_add_bos(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(add_bos=True, chat_template=LLAMA3)
    ids, _ = render(tokenizer, messages_of([("user", "hi")]))
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    ids, roles = encode_text(tokenizer, "<|im_start|>hi")  # a text that brings its own BOS
    assert ids == tokenizer("hi").input_ids and roles == [Role.SPECIAL, Role.TEXT, Role.TEXT]


@pytest.mark.parametrize("add_bos", [False, True])
def test_trap_05_bos_id_zero(make_tokenizer: Callable[..., Any], add_bos: bool) -> None:
    tokenizer = make_tokenizer(add_bos=add_bos)
    assert tokenizer.bos_token_id == 0
    ids, roles = encode_text(tokenizer, "ab")
    assert ids == ([0] if add_bos else []) + tokenizer.convert_tokens_to_ids(["a", "b"])
    assert roles == ([Role.SPECIAL] if add_bos else []) + [Role.TEXT] * 2
    ids, roles = render(tokenizer, messages_of([("user", "ab")]))
    assert ids[0] == 0 and roles[0] == Role.SPECIAL and 0 in special_ids(tokenizer)


def test_special_tokens_that_a_user_types_are_the_users(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    ids, roles = render(tokenizer, messages_of([("user", "a<|im_end|>b<|im_start|>")]))
    assert [r for i, r in zip(ids, roles, strict=True) if i == 1] == [Role.USER, Role.SPECIAL]
    assert [r for i, r in zip(ids, roles, strict=True) if i == 0] == [Role.SPECIAL, Role.USER]
    assert encode_text(tokenizer, "a<pad>b")[1] == [Role.TEXT, Role.SPECIAL, Role.TEXT]


def test_offsets_that_leave_blanks_out_still_give_blanks_their_role() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = "{% for m in messages %}({{ m['content'] }}){% endfor %}"
    _, roles = render(tokenizer, messages_of([("user", "a  b")]))
    assert roles == [Role.SPECIAL, *[Role.USER] * 4, Role.SPECIAL]


@given(conversations=st.lists(CONVERSATIONS, max_size=4), texts=st.lists(TEXTS, max_size=4))
@settings(max_examples=20, deadline=None)
def test_many_at_once_equal_one_by_one(
    make_tokenizer: Callable[..., Any], conversations: list[list[tuple[str, str]]], texts: list[str]
) -> None:
    tokenizer = make_tokenizer(add_bos=True, chat_template=CHATML_DEFAULT)
    rendered = render_many(tokenizer, [messages_of(pairs) for pairs in conversations])
    assert rendered == [render(tokenizer, messages_of(pairs)) for pairs in conversations]
    assert encode_texts(tokenizer, texts) == [encode_text(tokenizer, text) for text in texts]


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        (None, [{"role": "user", "content": "a"}], "no chat template"),
        (LLAMA3, [], "no messages"),
        (LLAMA3, [{"role": "narrator", "content": "a"}], "'narrator'"),
        (LLAMA3, [{"role": "user", "content": None}], "no text"),
        (LLAMA3, [{"role": "user"}], "no text"),
        ("{{ messages[0]['content'] }}", messages_of([("user", "a"), ("assistant", "zz")]), "content of message 1"),
        ("{{ messages[0]['content'] | upper }}", messages_of([("user", "ab")]), "content of message 0"),
        ("{% if %}", messages_of([("user", "a")]), "refuses"),
    ],
)
def test_conversations_that_cannot_be_rendered_are_refused(
    make_tokenizer: Callable[..., Any], template: str | None, messages: list[Any], what: str
) -> None:
    with pytest.raises(UnweaveError, match=what) as caught:
        render(make_tokenizer(chat_template=template), messages)
    assert caught.value.remedy


def test_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast, chat_template, name_or_path = False, LLAMA3, "slow"

    with pytest.raises(UnweaveError, match="which characters"):
        render(Slow(), messages_of([("user", "a")]))


def test_default_models_own_template(default_lm: Any) -> None:
    tokenizer = default_lm.tokenizer
    pairs = [("user", "What is the sea?\n"), ("assistant", " Salt water. \u00e9\U0001f30a"), ("user", "user")]
    ids, roles = render(tokenizer, messages_of(pairs))
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages_of(pairs), tokenize=False)

    def spoken(role: Role) -> str:
        return tokenizer.decode([i for i, r in zip(ids, roles, strict=True) if r == role])

    assert spoken(Role.ASSISTANT) == pairs[1][1]
    assert spoken(Role.USER) == pairs[0][1] + pairs[2][1]
    assert spoken(Role.SYSTEM) == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
