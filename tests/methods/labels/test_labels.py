"""methods/labels on tiny models: frequencies against one text at a time, planted latents found by the command, what is
refused, and that interrupted work goes on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.models import build_tiny, build_tiny_tokenizer
from unweave import SAE, Site
from unweave.cli.app import main
from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.data.policy import TokenPolicy
from unweave.latents import annotations as notes
from unweave.lm.model import LM
from unweave.methods.labels import frequencies, view
from unweave.methods.labels.frequencies import Reading, read
from unweave.methods.labels.labels import label
from unweave.methods.labels.levels import EDGES, threshold_of
from unweave.methods.labels.result import survival
from unweave.methods.labels.spec import LabelsSpec, MatchSpec
from unweave.methods.labels.stage import run
from unweave.sae.activations import JumpReLU, ReLU, TopK
from unweave.show.pieces import percent
from unweave.tasks.tagged.spec import TaggedSpec
from unweave.tasks.tagged.texts import TaggedTexts, open_tagged

F = 40
LETTERS = "qzj"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "cache"))


def write_texts(path: Path, n: int = 240) -> Path:
    """Texts of letters in which q, z and j stand now and then, tagged with those they have, and with chance."""
    draw = random.Random(0)
    rows = []
    for _ in range(n):
        letters = draw.choices("abcdefgh ", k=draw.randint(6, 40))
        tags = []
        for letter in LETTERS:
            if draw.random() < 0.3:
                tags.append(f"has {letter}")
                letters += [letter] * 3
        draw.shuffle(letters)
        rows.append({"text": "".join(letters), "tags": [*tags, *(["chance"] if draw.random() < 0.5 else [])]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def random_sae(site: str, activation: Any, seed: int = 0, policy: TokenPolicy | None = None) -> SAE:
    g = torch.Generator().manual_seed(seed)
    parts = (torch.randn(s, generator=g) for s in ((32, F), (F,), (F, 32), (32,)))
    return SAE(*parts, activation, read=Site.parse(site), policy=policy)


def letter_sae(lm: LM) -> SAE:
    """At the embedding: latent i fires on letter i of q, z, j, and nowhere else; the others are random directions that
    fire on half of all tokens."""
    ids = [lm.tokenize(letter).ids[0, -1] for letter in LETTERS]
    E = lm.model.get_input_embeddings().weight.detach()
    g = torch.Generator().manual_seed(1)
    W = torch.randn(32, 8, generator=g)
    used = torch.tensor([int(lm.tokenize(c).ids[0, -1]) for c in "abcdefgh qzj"])
    rows = torch.linalg.pinv(E[used])  # 12 tokens in 32 dimensions: one is told from the others exactly
    for i, token in enumerate(ids):
        W[:, i] = rows[:, int((used == token).nonzero())]
    b = torch.cat([torch.full((3,), -0.5), torch.zeros(5)])
    return SAE(W, b, torch.randn(8, 32, generator=g), torch.zeros(32), ReLU(), read=Site("embed"))


@pytest.fixture
def texts(tmp_path: Path) -> TaggedTexts:
    return open_tagged(TaggedSpec(source=str(write_texts(tmp_path / "rows.jsonl"))))


def reading(lm: LM, saes: dict[Site, SAE], texts: TaggedTexts, folder: Path, batch_tokens: int = 200) -> Reading:
    which = np.arange(0, len(texts), 8)
    return Reading.of(lm, saes, texts, which, folder, context=24, batch_tokens=batch_tokens)


def levels_of(found: frequencies.Frequencies, site: Site) -> np.ndarray:
    """The level of each text and latent, plus 1; 0 where it does not fire: int [R, F]."""
    level = np.zeros((found.reading.store.n_rows, F), dtype=int)
    for entries in found.blocks(site)(0):
        level[entries.text, entries.latent] = 1 + entries.level
    return level


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_frequencies_are_those_of_one_text_at_a_time_whatever_the_sae_and_the_batches(
    tiny_lm: Callable[..., LM], texts: TaggedTexts, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frequencies, "_CHUNK_TOKENS", 300)
    lm = tiny_lm(name)
    policy = TokenPolicy(exclude_ids=(int(lm.tokenize("a").ids[0, -1]),), max_norm=None)
    saes = {
        Site.parse("resid_post.0"): random_sae("resid_post.0", JumpReLU(torch.full((F,), 8.0))),
        Site.parse("mlp_add.1"): random_sae("mlp_add.1", TopK(5), 1, policy),
        Site.parse("resid_post.1"): random_sae("resid_post.1", ReLU(), 2),
    }
    one = reading(lm, saes, texts, tmp_path / "store")
    assert one.source.n_chunks > 1
    found = read(one, Pieces(tmp_path / "pieces"))
    for site, sae in saes.items():
        rows = {int(text): i for i, text in enumerate(one.texts)}
        dense = np.full((len(rows), F), np.nan)
        maximum = np.zeros(F)
        for text, i in rows.items():
            tokens = lm.tokenize(texts.text(text))
            tokens = tokens.columns(slice(0, 24))
            with lm.taps(read=[site]) as seen:
                lm(tokens)
            keep = sae.policy.keep(seen[site], tokens.ids)[0]
            keep &= ~torch.isin(tokens.ids[0], torch.tensor(lm.special_ids))
            f = sae.encode(seen[site][0][keep])
            assert found.tokens(site)[i] == len(f)
            dense[i] = (f > 0).float().mean(0).numpy()
            maximum = np.maximum(maximum, f.amax(0).numpy())
        level = levels_of(found, site)
        expected = np.where(dense > 0, 1 + np.searchsorted(EDGES, dense.round(12)), 0)
        assert (np.abs(level - expected) <= (dense > 0)).all() and (level == expected).mean() > 0.99
        np.testing.assert_allclose(found.maxima(site), maximum, rtol=1e-4)
    whole = read(reading(lm, saes, texts, tmp_path / "other", batch_tokens=10_000), Pieces(None))
    for site in saes:
        assert (levels_of(whole, site) == levels_of(found, site)).mean() > 0.999


def test_planted_latents_get_their_labels_and_chance_gets_none(
    tiny_lm: Callable[..., LM], texts: TaggedTexts, tmp_path: Path
) -> None:
    lm = tiny_lm()
    match = MatchSpec(support=20, output_score=None, top=6)
    found = label(lm, {Site("embed"): letter_sae(lm)}, texts, match, folder=tmp_path / "work", context=64)
    (site,) = found.sites
    best = {pair.label.label: pair for pair in site.pairs[:3]}
    assert {name: pair.latent for name, pair in best.items()} == {f"has {c}": i for i, c in enumerate(LETTERS)}
    for pair in best.values():
        assert pair.label.auroc == 1 and pair.label.score == 1 and pair.heldout_score == 1
        assert pair.label.threshold == 0 and pair.label.output_score is None
        assert pair.shuffled_auroc is not None and abs(pair.shuffled_auroc - 0.5) < 0.3
        for passage in pair.passages:
            assert passage.tokens[passage.peak] == pair.label.label[-1] and passage.labelled
    assert site.shuffled_best < 0.3 < site.pairs[2].label.score and found.supported == 4
    assert site.labels >= set(best) and "chance" not in site.labels
    assert survival(site, site) == 1 and found.chosen_on.texts + found.heldout.texts == len(texts)


def test_an_interrupted_pass_goes_on_and_gives_the_same(
    tiny_lm: Callable[..., LM], texts: TaggedTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frequencies, "_CHUNK_TOKENS", 500)
    lm, match = tiny_lm(), MatchSpec(support=20, output_score=None, top=6)
    saes = {Site("embed"): letter_sae(lm)}
    whole = label(lm, saes, texts, match, folder=tmp_path / "whole")
    passes = Reading.passes
    calls = []

    def counted(self: Reading, chunk: int) -> Any:
        calls.append(chunk)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return passes(self, chunk)

    monkeypatch.setattr(Reading, "passes", counted)
    with pytest.raises(KeyboardInterrupt):
        label(lm, saes, texts, match, folder=tmp_path / "cut")
    assert label(lm, saes, texts, match, folder=tmp_path / "cut") == whole
    assert calls[:3] == [0, 1, 2] and calls[3] == 2, "finished chunks are not computed again"
    other = MatchSpec(support=20, output_score=None, top=2, prior=0.3)  # the folder knows what it holds
    expected = label(lm, saes, texts, other, folder=tmp_path / "other")
    assert label(lm, saes, texts, other, folder=tmp_path / "whole") == expected != whole
    short = label(lm, saes, texts, match, folder=tmp_path / "whole", context=8)
    assert short == label(lm, saes, texts, match, folder=tmp_path / "short", context=8) != whole


def test_latents_with_a_low_output_score_are_left_out(
    tiny_lm: Callable[..., LM], texts: TaggedTexts, tmp_path: Path
) -> None:
    from unweave.sae.output_score import output_scores

    lm = tiny_lm()
    sae = letter_sae(lm)
    sae.b_enc[3] = 9.0  # something fires at the neutral prompt, by which latents are raised
    scores = {one.latent: one.score for one in output_scores(lm, sae, range(8))}
    least = sorted(scores.values())[4]
    match = MatchSpec(support=20, output_score=least, top=100)
    (site,) = label(lm, {Site("embed"): sae}, texts, match, folder=tmp_path / "work").sites
    assert {pair.latent for pair in site.pairs} <= {j for j, score in scores.items() if score >= least}
    for pair in site.pairs:
        assert pair.label.output_score == pytest.approx(scores[pair.latent], rel=1e-4)
    ordered = [pair.label.score for pair in site.pairs]
    assert ordered == sorted(ordered, reverse=True) and site.tried == 8

    taken: dict[str, int] = {}  # with per_label: the first of each label in the whole list
    for pair in site.pairs:
        taken.setdefault(pair.label.label, pair.latent)
    (few,) = label(lm, {Site("embed"): sae}, texts, replace(match, per_label=1), folder=tmp_path / "few").sites
    assert {pair.label.label: pair.latent for pair in few.pairs} == taken and len(few.pairs) == len(taken)


def test_the_command_labels_several_saes_writes_annotations_and_refuses_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_tiny("llama").save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    lm = LM.load(str(tmp_path / "model"))
    first, other = letter_sae(lm).save(tmp_path / "a"), random_sae("resid_post.1", TopK(5)).save(tmp_path / "b")
    rows = write_texts(tmp_path / "rows.jsonl")
    config = {
        "saes": [str(first), str(other)], "model": str(tmp_path / "model"), "texts": {"source": str(rows)},
        "match": {"support": 20, "output_score": None, "top": 8}, "context": 48,
    }  # fmt: skip
    (tmp_path / "labels.yaml").write_text(json.dumps(config), encoding="utf-8")
    argv = ["labels", str(tmp_path / "labels.yaml"), "--runs", str(tmp_path / "runs")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "held-out AUROC" in out and "shuffled" in out and "has q" in out
    spec = LabelsSpec.from_file(tmp_path / "labels.yaml")
    done = run(spec, tmp_path / "runs")
    assert done.reused and not (done.path / "parts").exists()
    there = notes.pairs(notes.load(done.path / done.result.annotations))
    assert len(there) == sum(len(site.pairs) for site in done.result.sites)
    digests = {info.site: info.digest for info in done.result.subject.saes}
    assert all(pair.sae == digests[pair.site] for pair in there) and len(digests) == 2
    page = view.section(done.result)
    assert "Labels from tagged texts" in page.heading and "<svg" in page.body and "has the label" in page.body
    first_pair = done.result.sites[0].pairs[0]
    share = percent(first_pair.positive / done.result.heldout.texts)
    assert all(passage.labelled for passage in first_pair.passages)
    assert f"below 4 of 4 have the label, of all held-out texts {share}</p>" in page.body
    assert main(["report", str(done.path), "--runs", str(tmp_path / "runs")]) == 0
    for wrong, reason in (
        (["--match.support", "1000"], "no label has 1000"),
        (["--match.prior", "1"], "below 1"),
        (["--texts.source", "nowhere"], "no tagged texts"),
        (["--match.quantiles", "1.5"], "shares from above 0"),
    ):
        assert main([*argv, *wrong]) == 2
        assert reason in capsys.readouterr().err


def test_texts_without_a_counted_token_are_neither_positive_nor_negative(
    tiny_lm: Callable[..., LM], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in write_texts(tmp_path / "rows.jsonl").read_text().splitlines()]
    rows += [{"text": "<|im_end|>" * (i + 1), "tags": ["has q"]} for i in range(20)]  # special tokens alone
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = open_tagged(TaggedSpec(source=str(tmp_path / "rows.jsonl")))
    lm, match = tiny_lm(), MatchSpec(support=20, output_score=None, top=3)
    found = label(lm, {Site("embed"): letter_sae(lm)}, texts, match, folder=tmp_path / "work")
    assert found.uncounted > 5
    assert {pair.label.label: pair.label.auroc for pair in found.sites[0].pairs} == {f"has {c}": 1.0 for c in LETTERS}


def test_a_label_on_exactly_as_many_texts_as_asked_has_support(
    tiny_lm: Callable[..., LM], texts: TaggedTexts, tmp_path: Path
) -> None:
    support = sorted(texts.support(np.flatnonzero(~texts.heldout)).tolist())
    lm, most = tiny_lm(), support[-1]
    assert most > support[-2]

    def labelled(least: int) -> int:
        match = MatchSpec(support=least, output_score=None, top=3)
        return label(lm, {Site("embed"): letter_sae(lm)}, texts, match, folder=tmp_path).supported

    assert labelled(most) == 1 and labelled(support[-2]) >= 2
    with pytest.raises(UnweaveError, match=f"no label has {most + 1} of"):
        labelled(most + 1)


def test_what_cannot_be_labelled_is_refused(tiny_lm: Callable[..., LM], texts: TaggedTexts, tmp_path: Path) -> None:
    lm = tiny_lm()
    with pytest.raises(UnweaveError, match="does not write into the residual stream"):
        sae = random_sae("mlp_act.1", ReLU())
        wide = SAE(torch.randn(64, F), sae.b_enc, torch.randn(F, 64), torch.zeros(64), ReLU(), read=sae.read)
        label(lm, {Site("mlp_act", 1): wide}, texts, MatchSpec(support=5), folder=tmp_path / "a")
    with pytest.raises(UnweaveError, match="no label has 500 of"):
        label(lm, {Site("embed"): letter_sae(lm)}, texts, MatchSpec(support=500), folder=tmp_path / "b")
    draw = random.Random(1)
    apart = ["".join(draw.choices("abcdefgh", k=30)) for _ in range(60)]
    alike = [f"a a a a a b b b b b c c c c c {i % 7} {i}" for i in range(60)]
    for words, tags, reason in (
        (apart, [["x"]] * 60, "no label parts the .. texts to choose on"),
        (alike, [["x"], []] * 30, "60 of the 60 are near duplicates"),
        (["<|im_end|>" * (i + 1) for i in range(60)], [["x"], []] * 30, "no text to choose on has a token that counts"),
    ):
        rows = [{"text": text, "tags": own} for text, own in zip(words, tags, strict=True)]
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        own = open_tagged(TaggedSpec(source=str(tmp_path / "own.jsonl")))
        with pytest.raises(UnweaveError, match=reason):
            label(lm, {Site("embed"): letter_sae(lm)}, own, MatchSpec(support=5, output_score=None), folder=tmp_path)
    silent = random_sae("embed", JumpReLU(torch.full((F,), 1e9)))
    with pytest.raises(UnweaveError, match="no latent at embed has a label: none fires"):
        label(lm, {Site("embed"): silent}, texts, MatchSpec(support=20, output_score=None), folder=tmp_path / "c")
    assert threshold_of(0) == 0
