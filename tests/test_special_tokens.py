"""Special tokens: errors, maxima and steering against loops over single tokens, and the stage end to end."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import build_tiny, build_tiny_tokenizer
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.pack import Row
from unweave.data.policy import TokenPolicy
from unweave.data.tokens import TokenStore
from unweave.evaluate import special_tokens as evaluated
from unweave.evaluate.special_metrics import GROUPS, GroupErrors
from unweave.evaluate.special_tokens import batch_errors, token_errors
from unweave.lm.chat import Role, render
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import JumpReLU, ReLU, TopK
from unweave.sae.module import SAE
from unweave.tasks.special_tokens import PAPER_IDS, QUESTIONS, SpecialTokens, special_ids

D = 32
START, END = 0, 1
WORDS = "the keys to cabinet are on a table near old door and she was reading about sea while it rained".split()


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
                    row=r, group=group, id=i, first=t == 0, norm=float(x.norm()), out=float(y.norm()), y=y.double(), f=f,
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


def assert_errors(found: dict[str, GroupErrors], table: list[SimpleNamespace]) -> None:
    assert tuple(found) == GROUPS
    for group in GROUPS:
        want = expected(table, group)
        for name, value in vars(want).items():
            assert getattr(found[group], name) == pytest.approx(value, rel=2e-4), (group, name)


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
        found = batch_errors(lm, saes, batches_of(lm, sizes, side))
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
    (found,) = batch_errors(lm, {"a": make_sae()}, batches_of(lm, [11])).values()
    rows = {t.row: [u.error / D for u in table if u.row == t.row] for t in table}
    assert len({len(errors) for errors in rows.values()}) > 4
    by_sequence = sum(sum(e) / len(e) for e in rows.values()) / len(rows)
    by_token = sum(sum(e) for e in rows.values()) / len(table)
    assert abs(by_sequence / by_token - 1) > 1e-3
    assert found.mse == pytest.approx(by_sequence, rel=1e-4)
    assert found.everything["all"].mse_tokens == pytest.approx(by_token, rel=1e-4)
    assert found.log2_mse == pytest.approx(math.log2(by_sequence), abs=1e-3)
    of_special = [[u.error / D for u in table if u.row == r and u.group == "special"] for r in range(9)]
    assert found.mse_special == pytest.approx(sum(sum(e) / len(e) for e in of_special) / 9, rel=1e-4)


def test_trap_33_how_tokens_are_split_ordered_and_padded_changes_nothing(lm: LM, tmp_path: Path) -> None:
    saes = {"a": make_sae(), "b": make_sae("topk", "resid_post.0", seed=1)}
    together = batch_errors(lm, saes, batches_of(lm, [11]))
    one_by_one = batch_errors(lm, saes, batches_of(lm, [1] * 11)[::-1])
    alone = {name: batch_errors(lm, {name: sae}, batches_of(lm, [5, 6], "left"))[name] for name, sae in saes.items()}
    rows = rows_of(lm)
    store = TokenStore.write(
        tmp_path / "s", [Row(i, r, n) for n, (i, r) in enumerate(rows)], sum(len(i) for i, _ in rows), {}
    )
    stored = token_errors(lm, saes, store, range(11), batch_tokens=60)
    for other in (one_by_one, alone, stored):
        for name in saes:
            for which in ("everything", "without_outliers"):
                for group in GROUPS:
                    first, second = (vars(getattr(f[name], which)[group]) for f in (together, other))
                    assert second == {k: pytest.approx(v, rel=2e-4) for k, v in first.items()}
    fewer = token_errors(lm, saes, store, [3, 1])
    assert fewer["a"].sequences == 2 and fewer["a"].everything["all"].tokens == len(rows[1][0]) + len(rows[3][0])


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
        (found,) = batch_errors(lm, {"a": sae}, batches_of(lm, sizes)).values()
        assert found.max_norm == pytest.approx(bound, rel=1e-4)
        assert found.outliers == len(table) - len(short)
        assert found.outliers_special == sum(t.norm > bound and t.group == "special" for t in table) > 0
        assert_errors(found.everything, table)
        assert_errors(found.without_outliers, short)
        assert found.median_norm_first > 5 * found.median_norm
    assert found.mse is not None and found.without_outliers["all"].mse is not None
    assert found.mse > 10 * found.without_outliers["all"].mse


def test_a_bad_first_guess_of_the_limit_is_made_good(tiny_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch holds only long tokens, so that what is long is guessed far too high."""
    lm = with_sink(tiny_lm("llama"), 3000.0)
    sae = make_sae()
    rows = [([START] * 20, [int(Role.SPECIAL)] * 20), *rows_of(lm)]
    batches = [Tokens.pad([row], lm.pad_id) for row in rows]
    passes = []
    one = evaluated._pass
    monkeypatch.setattr(evaluated, "_pass", lambda *a: (passes.append(1), one(*a))[1])
    (found,) = batch_errors(lm, {"a": sae}, batches).values()
    assert len(passes) == 2
    (other,) = batch_errors(lm, {"a": sae}, batches[::-1]).values()
    assert len(passes) == 3
    assert found.outliers == other.outliers > 20
    for group in GROUPS:
        first, second = vars(found.without_outliers[group]), vars(other.without_outliers[group])
        assert second == {k: pytest.approx(v, rel=2e-4) for k, v in first.items()}


def test_a_transcoders_outliers_are_found_where_it_writes_too(tiny_lm: Any) -> None:
    lm = tiny_lm("llama")
    with torch.no_grad():  # one direction of the MLP's input is answered a thousandfold
        lm.model.get_submodule("model.layers.1.mlp.down_proj").weight[:, 5] *= 1000.0
    sae = make_sae("relu", "mlp_in.1", write=Site("mlp_add", 1))
    table = token_table(lm, sae, SpecialTokens.of(lm))
    reads, writes = (sorted(getattr(t, k) for t in table) for k in ("norm", "out"))
    bounds = [10 * norms[(len(norms) - 1) // 2] for norms in (reads, writes)]
    (found,) = batch_errors(lm, {"a": sae}, batches_of(lm, [3, 8])).values()
    assert [found.max_norm, found.max_norm_write] == pytest.approx(bounds, rel=1e-4)
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
    found = batch_errors(lm, {"mean": nothing, "copy": copy}, batches_of(lm, [11]))
    assert found["mean"].unexplained_variance == pytest.approx(1, abs=1e-4)
    assert found["mean"].l0 == 0
    assert found["copy"].unexplained_variance == pytest.approx(0, abs=1e-6)
    assert found["copy"].mse == 0 and found["copy"].log2_mse is None
    json.dumps(found["copy"].to_dict(), allow_nan=False)


def test_trap_06_what_the_policy_excludes_is_measured_and_said(lm: LM) -> None:
    excluded = (START, END, lm.tokenizer.convert_tokens_to_ids("e"))
    table = token_table(lm, make_sae(), SpecialTokens.of(lm))
    found = batch_errors(lm, {"a": make_sae(policy=TokenPolicy(excluded)), "b": make_sae()}, batches_of(lm, [11]))
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
    (found,) = batch_errors(lm, {"a": make_sae()}, batches_of(lm, [11]), special=special).values()
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
        batch_errors(lm, **asked)
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
        batch_errors(lm, {"a": make_sae()}, batches_of(lm, [1] * 11))
    assert f"row {bad} " in str(caught.value)
