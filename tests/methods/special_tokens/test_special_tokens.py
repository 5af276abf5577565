"""Special tokens: errors, maxima and steering against loops over single tokens, and the stage end to end."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.core.errors import UnweaveError
from unweave.core.intervals import Interval
from unweave.core.result import as_read, as_written, to_plain
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.data.batches import store_batches
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec, Row
from unweave.data.policy import TokenPolicy
from unweave.data.spec import DataSpec, StreamSpec
from unweave.data.tokens import TokenStore
from unweave.lm.chat import Role, render
from unweave.lm.model import LM, Tokens
from unweave.methods.special_tokens import errors as evaluated
from unweave.methods.special_tokens import view
from unweave.methods.special_tokens.errors import special_token_errors
from unweave.methods.special_tokens.maxima import (
    alpha_sweep,
    average_maxima,
    levels_of,
    random_latents,
    sweet_spot,
    words_changed,
)
from unweave.methods.special_tokens.result import (
    GROUPS,
    Answer,
    ByGroup,
    GroupErrors,
    Level,
    SpecialTokenResult,
)
from unweave.methods.special_tokens.spec import COMMAND, SpecialTokensSpec, Tolerance
from unweave.methods.special_tokens.stage import run as measure
from unweave.methods.train import stage as train
from unweave.methods.train.kinds import TopKSpec
from unweave.methods.train.spec import TrainSpec
from unweave.sae.activations import JumpReLU, ReLU, TopK
from unweave.sae.module import SAE
from unweave.sae.steered import sweep
from unweave.show.pieces import esc
from unweave.tasks.special_tokens import PAPER_IDS, QUESTIONS, SpecialTokens, special_ids

D = 32
START, END = 0, 1
WORDS = re.findall(
    r"\w+", "the keys to cabinet are on a table near old door and she was reading about sea while it rained"
)


def make_sae(kind: str = "relu", site: str = "resid_post.1", seed: int = 0, **options: Any) -> SAE:
    """Random, with parameters that are not zero (trap 21)."""
    g = torch.Generator().manual_seed(seed)
    f = 24 + 8 * seed

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    activation = {"relu": ReLU(), "topk": TopK(5), "jumprelu": JumpReLU(draw(f).abs())}[kind]
    weights = (draw(D, f) / 6, draw(f) * 0.3, draw(f, D) * 0.3, draw(D) * 0.2)
    return SAE(*weights, activation, read=Site.parse(site), **options)


def talks(n: int = 9, seed: int = 0) -> list[list[dict[str, str]]]:
    """Conversations of one or two turns and different lengths, some with a system prompt, all below 64 tokens."""
    rng = random.Random(seed)

    def said(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 2)))[:9]}

    found = []
    for i in range(n):
        system = [said("system")] if i % 3 == 0 else []
        found.append([*system, said("user"), *([said("assistant")] if i % 2 else [])])
    return found


def rows_of(lm: LM, n: int = 9) -> list[tuple[list[int], list[int]]]:
    """Conversations, and two rows of plain text without any special token."""
    rows = [render(lm.tokenizer, talk) for talk in talks(n)]
    plain = [(lm.tokenizer(text)["input_ids"], [int(Role.TEXT)] * len(text)) for text in ("a sea", "it rained on")]
    return rows + plain


def batches_of(lm: LM, sizes: list[int], side: Any = "right") -> list[Tokens]:
    rows = rows_of(lm)
    ends = np.cumsum(sizes)
    assert ends[-1] == len(rows)
    return [Tokens.pad(rows[end - n : end], lm.pad_id, side) for n, end in zip(sizes, ends, strict=True)]


# -- the reference: every row alone, every token alone ----------------------------------------------------------------


def token_table(lm: LM, sae: SAE, special: SpecialTokens) -> list[SimpleNamespace]:
    """One record per token: its row, group, norm, activation, squared error and l0."""
    assert sae.read is not None and sae.write is not None
    table = []
    for r, (ids, roles) in enumerate(rows_of(lm)):
        with lm.taps(read=[sae.read, sae.write]) as seen:
            lm(Tokens.of(torch.tensor(ids)))
        for t, (i, role) in enumerate(zip(ids, roles, strict=True)):
            x, y = seen[sae.read][0, t], seen[sae.write][0, t]
            f = sae.encode(x[None])[0]
            is_special = i in special.ids and (role == Role.SPECIAL or special.where == "anywhere")
            group = "special" if is_special else "template" if role == Role.SPECIAL else Role(role).name.lower()
            table.append(
                SimpleNamespace(
                    row=r, group=group, id=i, norm=float(x.norm()), out=float(y.norm()), y=y.double(), f=f,
                    error=float((y - sae(x[None])[0]).double().square().sum()), l0=int((f > 0).sum()),
                )
            )  # fmt: skip
    return table


def expected(table: list[SimpleNamespace], group: str) -> GroupErrors:
    """The definitions, word by word."""
    inside = {"all": lambda t: True, "other": lambda t: t.group != "special"}.get(group, lambda t: t.group == group)
    tokens = [t for t in table if inside(t)]
    if not tokens:
        return GroupErrors(0, 0, None, None, None, None, None, None)
    of_row = {r: [t.error / len(tokens[0].y) for t in tokens if t.row == r] for r in {t.row for t in tokens}}
    mse = sum(sum(errors) / len(errors) for errors in of_row.values()) / len(of_row)
    total = sum(t.error for t in tokens)
    flat_mean = total / len(tokens) / len(tokens[0].y)
    mean = torch.stack([t.y for t in tokens]).mean(0)
    spread = sum(float((t.y - mean).square().sum()) for t in tokens)
    return GroupErrors(
        len(tokens), len(of_row), mse, math.log2(mse), flat_mean, math.log2(flat_mean),
        total / spread if len(tokens) > 1 else None, sum(t.l0 for t in tokens) / len(tokens),
    )  # fmt: skip


def assert_errors(found: ByGroup, table: list[SimpleNamespace]) -> None:
    assert tuple(vars(found)) == GROUPS
    for group in GROUPS:
        want = expected(table, group)
        for name, value in vars(want).items():
            assert getattr(found.of(group), name) == pytest.approx(value, rel=2e-4), (group, name)


@pytest.fixture
def lm(tiny_lm: Any) -> LM:
    return tiny_lm("llama")


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fam", ["llama", "gpt2", "gemma2", "qwen3", "gpt_neox"])
def test_errors_against_a_loop_over_tokens(tiny_lm: Any, fam: str) -> None:
    lm = tiny_lm(fam)
    saes = {
        "relu": make_sae("relu"),
        "topk": make_sae("topk", "resid_post.0", seed=1),
        "jumprelu": make_sae("jumprelu", "resid_post.1", seed=2),
        "transcoder": make_sae("topk", "mlp_in.1", seed=3, write=Site("mlp_add", 1)),
    }
    special = SpecialTokens.of(lm)
    for sizes, side in (([11], "right"), ([4, 1, 6], "left")):
        found = special_token_errors(lm, saes, batches_of(lm, sizes, side))
        assert list(found) == list(saes)
        for name, sae in saes.items():
            table = token_table(lm, sae, special)
            assert_errors(found[name].everything, table)
            assert found[name].sequences == 11 and found[name].sequences_without_special == 2
            assert found[name].firing_counts.tolist() == sum((t.f > 0).long() for t in table).tolist()
            assert found[name].median_norm == pytest.approx(
                sorted(t.norm for t in table)[(len(table) - 1) // 2], rel=1e-4
            )


def test_the_papers_mean_is_over_sequences_and_not_over_tokens(lm: LM) -> None:
    """Trap 32: two means under one name. Rows of different lengths tell them apart."""
    table = token_table(lm, make_sae(), SpecialTokens.of(lm))
    (found,) = special_token_errors(lm, {"a": make_sae()}, batches_of(lm, [11])).values()
    rows = {t.row: [u.error / D for u in table if u.row == t.row] for t in table}
    assert len({len(errors) for errors in rows.values()}) > 4
    by_sequence = sum(sum(e) / len(e) for e in rows.values()) / len(rows)
    by_token = sum(sum(e) for e in rows.values()) / len(table)
    assert abs(by_sequence / by_token - 1) > 1e-3
    assert found.everything.all.mse == pytest.approx(by_sequence, rel=1e-4)
    assert found.everything.all.mse_tokens == pytest.approx(by_token, rel=1e-4)
    assert found.everything.all.log2_mse == pytest.approx(math.log2(by_sequence), abs=1e-3)
    of_special = [[u.error / D for u in table if u.row == r and u.group == "special"] for r in range(9)]
    assert found.everything.special.mse == pytest.approx(sum(sum(e) / len(e) for e in of_special) / 9, rel=1e-4)


def test_trap_33_how_tokens_are_split_ordered_and_padded_changes_nothing(lm: LM, tmp_path: Path) -> None:
    saes = {"a": make_sae(), "b": make_sae("topk", "resid_post.0", seed=1)}
    together = special_token_errors(lm, saes, batches_of(lm, [11]))
    one_by_one = special_token_errors(lm, saes, batches_of(lm, [1] * 11)[::-1])
    alone = {
        name: special_token_errors(lm, {name: sae}, batches_of(lm, [5, 6], "left"))[name] for name, sae in saes.items()
    }
    rows = rows_of(lm)
    store = TokenStore.write(
        tmp_path / "s", [Row(i, r, n) for n, (i, r) in enumerate(rows)], sum(len(i) for i, _ in rows), {}
    )
    stored = special_token_errors(lm, saes, store_batches(lm, store, range(11), 60))
    for other in (one_by_one, alone, stored):
        for name in saes:
            for which in ("everything", "without_outliers"):
                for group in GROUPS:
                    first, second = (vars(getattr(f[name], which).of(group)) for f in (together, other))
                    assert second == {k: pytest.approx(v, rel=2e-4) for k, v in first.items()}
    fewer = special_token_errors(lm, saes, store_batches(lm, store, [3, 1]))
    assert fewer["a"].sequences == 2 and fewer["a"].everything.all.tokens == len(rows[1][0]) + len(rows[3][0])


def with_sink(lm: LM, scale: float) -> LM:
    """The first token of a turn becomes an attention sink: its embedding is ``scale`` times as long."""
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[START] *= scale
    return lm


@pytest.mark.parametrize("limit", [None, 40.0])
def test_trap_07_outliers_are_counted_and_told_apart(tiny_lm: Any, limit: float | None) -> None:
    lm = with_sink(tiny_lm("llama"), 300.0)
    sae = make_sae(policy=TokenPolicy(max_norm=limit))
    table = token_table(lm, sae, SpecialTokens.of(lm))
    norms = sorted(t.norm for t in table)
    bound = 10 * norms[(len(norms) - 1) // 2] if limit is None else limit
    short = [t for t in table if t.norm <= bound]
    assert 0 < len(table) - len(short) < len(table) / 2
    for sizes in ([11], [1] * 11):
        (found,) = special_token_errors(lm, {"a": sae}, batches_of(lm, sizes)).values()
        assert found.max_norm == pytest.approx(bound, rel=1e-4)
        assert found.outliers == len(table) - len(short)
        assert found.outliers_special == sum(t.norm > bound and t.group == "special" for t in table) > 0
        assert_errors(found.everything, table)
        assert_errors(found.without_outliers, short)
        assert found.median_norm_first > 5 * found.median_norm
    assert found.everything.all.mse is not None and found.without_outliers.all.mse is not None
    assert found.everything.all.mse > 10 * found.without_outliers.all.mse


def test_a_bad_first_guess_of_the_limit_is_made_good(tiny_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch holds only long tokens, so that what is long is guessed far too high."""
    lm = with_sink(tiny_lm("llama"), 3000.0)
    sae = make_sae()
    rows = [([START] * 20, [int(Role.SPECIAL)] * 20), *rows_of(lm)]
    batches = [Tokens.pad([row], lm.pad_id) for row in rows]
    passes = []
    one = evaluated._pass
    monkeypatch.setattr(evaluated, "_pass", lambda *a: (passes.append(1), one(*a))[1])
    (found,) = special_token_errors(lm, {"a": sae}, batches).values()
    assert len(passes) == 2
    (other,) = special_token_errors(lm, {"a": sae}, batches[::-1]).values()
    assert len(passes) == 3
    assert found.outliers == other.outliers > 20
    for group in GROUPS:
        first, second = vars(found.without_outliers.of(group)), vars(other.without_outliers.of(group))
        assert second == {k: pytest.approx(v, rel=2e-4) for k, v in first.items()}


def test_a_transcoders_outliers_are_found_where_it_writes_too(tiny_lm: Any) -> None:
    lm = tiny_lm("llama")
    with torch.no_grad():  # one direction of the MLP's input is answered a thousandfold
        lm.model.get_submodule("model.layers.1.mlp.down_proj").weight[:, 5] *= 1000.0
    sae = make_sae("relu", "mlp_in.1", write=Site("mlp_add", 1))
    table = token_table(lm, sae, SpecialTokens.of(lm))
    reads, writes = (sorted(getattr(t, k) for t in table) for k in ("norm", "out"))
    bounds = [10 * norms[(len(norms) - 1) // 2] for norms in (reads, writes)]
    (found,) = special_token_errors(lm, {"a": sae}, batches_of(lm, [3, 8])).values()
    assert [found.max_norm, found.max_norm_write] == pytest.approx(bounds, rel=1e-4)
    assert (found.site_read, found.site) == ("mlp_in.1", "mlp_add.1")
    assert [found.median_norm, found.median_norm_write] == pytest.approx([b / 10 for b in bounds], rel=1e-4)
    assert found.median_norm_edited == found.median_norm_write
    (plain,) = special_token_errors(lm, {"a": make_sae()}, batches_of(lm, [3, 8])).values()
    assert (plain.site_read, plain.median_norm_write, plain.median_norm_edited) == (plain.site, None, plain.median_norm)
    short = [t for t in table if t.norm <= bounds[0] and t.out <= bounds[1]]
    assert found.outliers == len(table) - len(short)
    assert_errors(found.without_outliers, short)


def test_predicting_the_mean_scores_one_and_a_copy_zero(lm: LM) -> None:
    """Trap 32."""
    table = token_table(lm, make_sae(), SpecialTokens.of(lm))
    mean = torch.stack([t.y for t in table]).mean(0).float()
    nothing = SAE(torch.zeros(D, 1), torch.zeros(1), torch.zeros(1, D), mean, ReLU(), read=Site("resid_post", 1))
    both = torch.cat([torch.eye(D), -torch.eye(D)], 1)
    copy = SAE(both, torch.zeros(2 * D), both.T.contiguous(), torch.zeros(D), ReLU(), read=Site("resid_post", 1))
    found = special_token_errors(lm, {"mean": nothing, "copy": copy}, batches_of(lm, [11]))
    assert found["mean"].everything.all.unexplained_variance == pytest.approx(1, abs=1e-4)
    assert found["mean"].everything.all.l0 == 0
    assert found["copy"].everything.all.unexplained_variance == pytest.approx(0, abs=1e-6)
    assert found["copy"].everything.all.mse == 0 and found["copy"].everything.all.log2_mse is None
    json.dumps(to_plain(found["copy"].plain()), allow_nan=False)


def test_trap_06_what_the_policy_excludes_is_measured_and_said(lm: LM) -> None:
    excluded = (START, END, lm.tokenizer.convert_tokens_to_ids("e"))
    table = token_table(lm, make_sae(), SpecialTokens.of(lm))
    found = special_token_errors(
        lm, {"a": make_sae(policy=TokenPolicy(excluded)), "b": make_sae()}, batches_of(lm, [11])
    )
    assert found["a"].everything == found["b"].everything
    assert found["a"].untrained == sum(t.id in excluded for t in table)
    assert found["a"].untrained_special == sum(t.group == "special" and t.id in excluded for t in table)
    assert found["a"].untrained > found["a"].untrained_special > 0
    assert any("not trained" in note for note in found["a"].notes)
    assert (found["b"].untrained, found["b"].notes) == (0, ())


@pytest.mark.parametrize("where", ["template", "anywhere"])
def test_ids_can_be_named_and_count_where_it_is_said(lm: LM, where: Any) -> None:
    """A role word in somebody's own words is an ordinary word, unless it is to count anywhere."""
    letter = lm.tokenizer.convert_tokens_to_ids("s")  # in "user", "assistant" and in many words
    special = SpecialTokens.of(lm, [START, END, letter], where)
    table = token_table(lm, make_sae(), special)
    (found,) = special_token_errors(lm, {"a": make_sae()}, batches_of(lm, [11]), special=special).values()
    assert_errors(found.everything, table)
    assert (found.special_ids, found.special_where) == ((START, END, letter), where)
    in_words = sum(t.group == "special" and t.id == letter for t in table)
    assert in_words > 0


def test_special_ids_are_the_tokenizers_and_the_role_words(lm: LM, default_lm: LM) -> None:
    letters = {lm.tokenizer.convert_tokens_to_ids(c) for c in "userassistantsystem"}
    assert set(special_ids(lm)) == {0, 1, 2, 3} | letters  # role words are spelled in letters here
    found = special_ids(default_lm)
    assert set(default_lm.special_ids) < set(found)
    words = {default_lm.tokenizer.decode([i]) for i in set(found) - set(default_lm.special_ids)}
    assert words == {"user", "system", "ass", "istant"}  # its vocabulary has no "assistant" without a blank
    tokens = default_lm.chat([[{"role": "user", "content": "Is user a word?"}]])
    marked = SpecialTokens.of(default_lm).mask(tokens)[0]
    assert default_lm.token_strings(tokens.ids[0][marked]) == [
        "<|im_start|>", "system", "<|im_end|>", "<|im_start|>", "user", "<|im_end|>"
    ]  # fmt: skip
    everywhere = SpecialTokens(found, "anywhere").mask(tokens)[0]
    assert default_lm.token_strings(tokens.ids[0][everywhere & ~marked]) in ([], ["user"], [" user"])
    assert 872 in PAPER_IDS["qwen2.5"] and len(set(QUESTIONS)) == 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"saes": {}}, "no SAE"),
        ({"batches": []}, "no tokens"),
        ({"saes": {"a": SAE(torch.ones(D, 2), torch.ones(2), torch.ones(2, D), torch.ones(D), ReLU())}}, "which site"),
    ],
)
def test_questions_without_an_answer_are_refused(lm: LM, wrong: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"saes": {"a": make_sae()}, "batches": batches_of(lm, [11])} | wrong
    with pytest.raises(UnweaveError, match=message):
        special_token_errors(lm, **asked)
    with pytest.raises(UnweaveError, match="no token 97"):
        SpecialTokens.of(lm, [97])
    with pytest.raises(UnweaveError, match="no special tokens"):
        SpecialTokens.of(lm, [])


def test_activations_that_are_not_finite_are_refused_with_their_row(lm: LM) -> None:
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.tokenizer.convert_tokens_to_ids("w")] = float("nan")
    rows = rows_of(lm)
    bad = next(r for r, (ids, _) in enumerate(rows) if lm.tokenizer.convert_tokens_to_ids("w") in ids)
    with pytest.raises(UnweaveError, match="not finite") as caught:
        special_token_errors(lm, {"a": make_sae()}, batches_of(lm, [1] * 11))
    assert f"row {bad} " in str(caught.value)


# -- the special tokens' latents --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_average_maxima_against_a_loop_over_conversations(
    tiny_lm: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece and in many; a conversation counts for a token only where it holds it."""
    lm = with_sink(tiny_lm("llama"), 300.0)
    sae = make_sae(kind)
    special = SpecialTokens.of(lm)
    table = [t for t in token_table(lm, sae, special) if t.group == "special"]
    limit = 10 * sorted(t.norm for t in table)[len(table) // 2]
    everything = average_maxima(lm, sae, batches_of(lm, [4, 7], "left"), special=special, top=3, max_norm=limit)
    monkeypatch.setattr("unweave.methods.special_tokens.maxima._DENSE_ELEMENTS", 60)
    pieces = average_maxima(lm, sae, batches_of(lm, [1] * 11), special=special, top=3, max_norm=limit)
    assert [m.id for m in everything] == [m.id for m in pieces] == sorted({t.id for t in table})
    for found in (*everything, *pieces):
        tokens = [t for t in table if t.id == found.id]
        inside = [t for t in tokens if t.norm <= limit]
        assert (found.tokens, found.outliers) == (len(tokens), len(tokens) - len(inside))
        for some, n, top in (
            (tokens, found.conversations, found.top),
            (inside, found.conversations_without_outliers, found.top_without_outliers),
        ):
            rows = {t.row for t in some}
            assert n == len(rows)
            maxima = [torch.stack([t.f for t in some if t.row == r]).max(0).values for r in sorted(rows)]
            means = torch.stack(maxima).double().mean(0) if maxima else torch.zeros(sae.d_sae).double()
            values, latents = means.topk(3)
            assert [j for j, _ in top] == latents[values > 0].tolist()
            assert [v for _, v in top] == pytest.approx(values[values > 0].tolist(), rel=1e-3)
    (start,) = [m for m in everything if m.id == START]
    assert start.outliers > 0 and start.text == "<|im_start|>"
    with pytest.raises(UnweaveError, match="no token is special"):
        average_maxima(lm, sae, batches_of(lm, [11]), special=SpecialTokens((2,)))


# -- answers along alpha ----------------------------------------------------------------------------------------------


def test_alpha_moves_every_position_by_its_length(lm: LM) -> None:
    """z' = z + alpha d with d of length 1, at special tokens and outliers too, and nowhere at padding."""
    sae = make_sae("topk", policy=TokenPolicy((START, END), max_norm=1e-3))  # leaves no token to an ordinary edit
    d = sae.W_dec[5] / sae.W_dec[5].norm()
    found = alpha_sweep(lm, sae, 5, [0, 3.0], unit=2.0, questions=["Hi", "a sea?"], max_new_tokens=12)
    asked = [[{"role": "user", "content": text}] for text in ("Hi", "a sea?")]
    tokens = lm.chat(asked, side="left", add_generation_prompt=True)
    answers = lm.generate_ids(tokens, {Site("resid_post", 1): lambda x, at: x + 6.0 * d}, max_new_tokens=12)
    assert [a.text for a in found.answers if a.alpha == 3.0] == [lm.decode(row) for row in answers]
    plain = lm.generate_ids(tokens, max_new_tokens=12)
    assert [a.text for a in found.answers if a.alpha == 0.0] == [lm.decode(row) for row in plain]
    assert plain.tolist() != answers.tolist()
    assert [(level.alpha, level.length) for level in found.levels] == [(0.0, 0.0), (3.0, 6.0)]
    edit = sae.add({5: 6.0 / float(sae.W_dec[5].norm())}, where="all")
    with lm.taps(read=["resid_post.1"]) as before:
        lm(tokens)
    with lm.taps(read=["resid_post.1"], edit=edit) as after:
        lm(tokens)
    moved = after["resid_post.1"] - before["resid_post.1"]
    assert torch.allclose(moved, tokens.mask[..., None] * 6.0 * d, atol=1e-4)


def test_controls_move_as_far_and_levels_say_what_the_answers_say(lm: LM) -> None:
    sae = make_sae("topk")
    questions = ["Hi", "a sea?", "why"]
    found = alpha_sweep(lm, sae, 5, [4.0, 0.0, 2.0], questions=questions, controls=[1, 7], max_new_tokens=10)
    assert {a.latent for a in found.control_answers} == set(found.controls) == {1, 7}
    for control in (1, 7):
        length = float(sae.W_dec[control].norm())
        texts = sweep(
            lm, sae, control, questions, [2.0, 4.0], maximum=1 / length, mode="add", where="all", max_new_tokens=10
        )
        own = [a for a in found.control_answers if a.latent == control]
        assert [(a.question, a.text, a.perplexity) for a in own] == [(t.prompt, t.text, t.perplexity) for t in texts]
    for level in found.control_levels:
        here = [a for a in found.control_answers if a.alpha == level.alpha]
        first = {a.question: a for a in found.answers if a.alpha == 0}
        assert level.distinct.value == pytest.approx(sum(a.distinct for a in here) / 6)
        rise = sum(math.log((a.perplexity or 0) / (first[a.question].perplexity or 0)) for a in here) / 6
        assert level.perplexity_ratio is not None
        assert level.perplexity_ratio.value == pytest.approx(math.exp(rise), rel=1e-4)
        assert level.answers_changed.value == pytest.approx(sum(a.text != first[a.question].text for a in here) / 6)
        assert level.distinct.low <= level.distinct.value <= level.distinct.high
    again = alpha_sweep(lm, sae, 5, [4.0, 2.0], questions=questions, controls=[1, 7], max_new_tokens=10)
    assert again == found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alphas": [0.0]}, "cannot move"),
        ({"alphas": [-1.0, 2.0]}, "cannot move"),
        ({"unit": 0.0}, "cannot move"),
        ({"questions": ["Hi", "Hi"]}, "asked twice"),
        ({"latent": 99}, "does not exist"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(lm: LM, wrong: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"latent": 5, "alphas": [1.0], "questions": ["Hi"], "max_new_tokens": 2} | wrong
    with pytest.raises(UnweaveError, match=message):
        alpha_sweep(lm, make_sae(), **asked)


def test_random_latents_fire_and_are_others() -> None:
    counts = torch.tensor([5, 0, 3, 1, 0, 9, 2])
    for seed in range(20):
        drawn = random_latents(3, counts, 2, seed)
        assert len(set(drawn)) == 2 and set(drawn) <= {0, 2, 5, 6}
    assert random_latents(3, counts, 10) == (0, 2, 5, 6)
    assert len({random_latents(3, counts, 2, seed) for seed in range(20)}) > 3


def level_of(
    alpha: float, loss: float, ratio: float | None, changed: float, *, spread: float = 0.0, empty: float = 0
) -> Level:
    def about(value: float) -> Interval:
        return Interval(value, value - spread, value + spread)

    found = None if ratio is None else about(ratio)
    return Level(alpha, alpha, about(0.9 - loss), about(loss), found, found, about(changed), about(changed), empty)


def test_the_sweet_spot_by_hand() -> None:
    levels = [
        level_of(0, 0.0, 1.0, 0.0),
        level_of(1, 0.0, 1.0, 0.2),  # too few answers change
        level_of(2, 0.05, 1.1, 0.8),
        level_of(3, 0.20, 0.9, 1.0),  # repeats itself
        level_of(4, 0.10, 1.25, 0.5),  # just within
        level_of(5, -0.1, 0.6, 1.0),  # better by both numbers is within
        level_of(6, 0.0, 1.5, 1.0),  # improbable
        level_of(7, 0.0, None, 1.0),  # nothing is said
        level_of(8, 0.0, 1.0, 1.0, empty=0.1),  # sometimes nothing is said
    ]
    found = sweet_spot(levels)
    assert found.alphas == (4, 5) and found.certain
    assert sweet_spot(levels, Tolerance(max_distinct_loss=0.2)).alphas == (2, 3, 4, 5)
    assert sweet_spot(levels, Tolerance(max_perplexity_ratio=1.0, min_answers_changed=0.1)).alphas == (1,)
    nothing = sweet_spot(levels[:5], Tolerance(max_distinct_loss=0.0, max_perplexity_ratio=1.0))
    assert nothing.alphas == () and not nothing.certain
    doubtful = [levels[0], level_of(1, 0.05, 1.1, 1.0, spread=0.06), level_of(2, 0.5, 1.1, 1.0)]
    assert sweet_spot(doubtful).alphas == (1,) and not sweet_spot(doubtful).certain


def test_levels_and_intervals_by_hand() -> None:
    def said(question: str, alpha: float, text: str, distinct: float, perplexity: float | None) -> Answer:
        return Answer(question, alpha, 3, text, len(text.split()), distinct, perplexity, words_changed("a b c d", text))

    answers = [
        said("p", 0, "a b c d", 1.0, 4.0), said("p", 2, "a b x d", 0.5, 16.0),
        said("q", 0, "a b c d", 0.8, 2.0), said("q", 2, "", 1.0, None),
    ]  # fmt: skip
    first, second = levels_of([answers], ["p", "q"], [0.0, 2.0], 1.5)
    assert (first.distinct.value, first.words_changed.value, first.empty) == (0.9, 0.0, 0.0)
    assert (second.length, second.empty) == (3.0, 0.5)
    assert second.distinct_loss.value == pytest.approx((0.5 - 0.2) / 2)
    assert second.words_changed.value == pytest.approx((0.25 + 1.0) / 2)
    assert second.answers_changed == Interval(1.0, 1.0, 1.0)
    assert second.perplexity_ratio == Interval(4.0, None, None)  # the empty one has none, and one is too few for bounds
    assert (second.distinct_loss.low, second.distinct_loss.high) == pytest.approx((-0.2, 0.5))
    assert words_changed("a b", "a b") == words_changed("", "") == 0.0
    assert words_changed("a b", "c d") == words_changed("a", "") == 1.0


# -- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, conversations and other text, and an SAE trained on blocks of them."""
    folder = tmp_path_factory.mktemp("special")
    build_tiny("llama").save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text").mkdir()
    questions = [next(m for m in talk if m["role"] == "user") for talk in talks(240)]
    answered = [[question, {"role": "assistant", "content": f"so {i}"}] for i, question in enumerate(questions)]
    lines = [json.dumps({"messages": talk}) for talk in answered]
    (folder / "text" / "talk.jsonl").write_text("\n".join(lines))
    (folder / "text" / "plain.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{i} keys on the old table"}) for i in range(60))
    )
    asked = TrainSpec(
        model=str(folder / "model"),
        sites=("resid_post.1",),
        data=DataSpec(
            sources=(Source(path=str(folder / "text")),),
            pack=PackSpec(context=48, packing="blocks"),
            tokens=3000,
            heldout=0.3,
            heldout_tokens=1500,
        ),
        stream=StreamSpec(chunk_tokens=1000, buffer_tokens=2000, batch_tokens=512, special_tokens="include"),
        sae=TopKSpec(expansion=2, k=4, tokens=6000, batch=64, k_aux=16, dead_after=3000),
        device="cpu",
    )
    run = train.run(asked, folder / "runs")
    (folder / "sae").symlink_to(run.path / "sae")
    return folder


def question(home: Path) -> SpecialTokensSpec:
    return SpecialTokensSpec(
        sae=home / "sae", device="cpu", alphas=(0.5, 1.0), unit="median", questions=("Hi", "a sea?"), controls=2,
        max_new_tokens=6, samples=20,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result_run(home: Path) -> Run[SpecialTokenResult]:
    return measure(question(home), home / "runs")


def test_the_stage_end_to_end(result_run: Run[SpecialTokenResult]) -> None:
    run = result_run
    result = run.result
    groups = result.errors.everything
    assert groups.text.tokens == 0 and groups.user.tokens > 50 and (groups.special.mse or 0) > 0
    assert result.errors.sequences == groups.special.sequences > 20
    assert {m.text for m in result.maxima} >= {"<|im_start|>", "<|im_end|>"}
    assert max(m.conversations for m in result.maxima) == 20
    opening = next(m for m in result.maxima if m.text == "<|im_start|>")
    steering = result.steering
    swept = steering.sweep
    assert (swept.latent, steering.token) == (opening.top[0][0], opening.id) and swept.latent not in swept.controls
    assert view.chosen(result).startswith("largest average maximum on '<|im_start|>': ")
    assert [level.length for level in swept.levels] == pytest.approx(
        [0, 0.5 * result.errors.median_norm, result.errors.median_norm]
    )
    assert len(swept.answers) == 6 and len(swept.control_answers) == 12
    assert 0 < result.errors.alive_fraction <= 1
    assert "was not measured" in view.finding(steering)
    tables = [f"{name}.csv" for name in ("errors", "maxima", "steering", "answers")]
    for name in (*tables, "errors.svg", "errors.png", "steering.svg", "steering.png"):
        assert (run.path / name).stat().st_size > 100, name
    assert (run.path / "errors.png").read_bytes().startswith(b"\x89PNG")
    table = (run.path / "errors.csv").read_text().splitlines()
    assert len(table) == 1 + 2 * len(GROUPS) and table[0].startswith("tokens_of,group,tokens,sequences,mse")


def test_the_result_is_read_as_it_was_written_and_shows_itself(result_run: Run[SpecialTokenResult]) -> None:
    result = result_run.result
    assert COMMAND.result is type(result) is SpecialTokenResult
    assert as_read(SpecialTokenResult, json.loads(json.dumps(as_written(result))), "here") == result
    names = [name for name, _, _ in result.rows()]
    assert {"median norm", "log2 MSE, special", "steered latent", "alpha 1: words changed", "sweet spot"} <= set(names)
    section = view.section(result)
    for part in ("log2 MSE", "special tokens", "Every answer", view.finding(result.steering), "<svg"):
        assert esc(part) in section.body or part in section.body, part
    assert all(esc(answer.text) in section.body for answer in result.steering.sweep.answers)
    assert "uw-embed" in result._repr_html_()


def test_asking_again_loads_nothing(
    home: Path, result_run: Run[SpecialTokenResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(LM, "load", fail)
    monkeypatch.setattr(SAE, "load", fail)
    again = measure(question(home), home / "runs")
    assert again.reused and again.path == result_run.path and again.result == result_run.result


def test_a_transcoder_is_steered_in_units_of_where_it_writes(home: Path, tmp_path: Path) -> None:
    trained = SAE.load(home / "sae")
    sae = make_sae("topk", "mlp_in.1", write=Site("mlp_add", 1), provenance={"train": trained.provenance["train"]})
    asked = SpecialTokensSpec(
        sae=sae.save(tmp_path / "sae"), device="cpu", alphas=(2.0,), unit="median", questions=("Hi",), controls=1,
        max_new_tokens=3, samples=20,
    )  # fmt: skip
    result = measure(asked, tmp_path / "runs").result
    reads, writes = result.errors.median_norm, result.errors.median_norm_write
    assert writes is not None and abs(reads / writes - 1) > 0.1
    assert [level.length for level in result.steering.sweep.levels] == pytest.approx([0, 2 * writes])
    rows = {name: (value, meaning) for name, value, meaning in result.rows()}
    assert rows["median norm"][0] == reads and rows["median norm"][1].startswith("at mlp_in.1, where the SAE reads")
    assert rows["median norm, written"] == (writes, "at mlp_add.1, where it writes")


def test_the_stage_refuses_what_it_cannot_do(home: Path, tmp_path: Path) -> None:
    def asked(**changes: Any) -> SpecialTokensSpec:
        return SpecialTokensSpec(sae=home / "sae", device="cpu", **changes)

    with pytest.raises(UnweaveError, match="not among the special tokens"):
        measure(asked(token="<|nobody|>"), home / "runs")
    (tmp_path / "plain.jsonl").write_text((home / "text" / "plain.jsonl").read_text())
    plain = DataSpec(
        sources=(Source(path=str(tmp_path / "plain.jsonl")),),
        pack=PackSpec(context=48),
        heldout=0.9,
        heldout_tokens=300,
    )
    with pytest.raises(UnweaveError, match="no conversations"):
        measure(asked(data=plain), home / "runs")
    for wrong in ({"alphas": (0.0,)}, {"alphas": (-1.0, 2.0)}, {"samples": 0}):
        with pytest.raises(UnweaveError, match="must be"):
            asked(**wrong)
    with pytest.raises(UnweaveError, match="must be"):
        Tolerance(max_perplexity_ratio=0.5)
