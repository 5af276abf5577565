"""latents/stage.py: many autoencoders' records from one pass are what each one's own pass gives."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.result import as_read, as_written
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DataSpec, StreamSpec
from unweave.data.stream import ActivationSource
from unweave.inputs.identity import texts_of
from unweave.inputs.saes import Opened, open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.latents import collect as job
from unweave.latents import stage as latents_job
from unweave.latents import view
from unweave.latents.records import Records
from unweave.latents.result import LatentRecords
from unweave.latents.spec import LatentsSpec
from unweave.latents.stage import records_of
from unweave.lm.model import LM
from unweave.methods.train import stage as train
from unweave.methods.train.kinds import TopKSpec
from unweave.methods.train.spec import TrainSpec
from unweave.sae.module import SAE

TOKENS = 2500
SITES = (Site("mlp_add", 1), Site("resid_post", 1))


@pytest.fixture(autouse=True)
def _crowded() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnweaveWarning)  # special tokens are many among so few characters
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, text/ and runs/ with an autoencoder of each kind: TopK at one site, ReLU at another."""
    folder = tmp_path_factory.mktemp("home")
    build_tiny("llama").save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    words = [
        "the",
        "keys",
        "to",
        "cabinets",
        "are",
        "on",
        "a",
        "table",
        "near",
        "old",
        "doors",
        "she",
        "was",
        "reading",
    ]
    rng = random.Random(0)
    (folder / "text").mkdir()
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(4, 11)))}) for _ in range(300)]
    (folder / "text" / "a.jsonl").write_text("\n".join(lines))
    spec = TrainSpec(
        model=str(folder / "model"),
        sites=tuple(map(str, SITES)),
        variants=({"kind": "relu"}, {"kind": "topk", "k": 4}),
        data=DataSpec(
            sources=(Source(path=str(folder / "text")),),
            pack=PackSpec(context=48),
            tokens=4000,
            heldout=0.3,
            heldout_tokens=1500,
        ),
        stream=StreamSpec(chunk_tokens=700, buffer_tokens=2000, batch_tokens=512),
        sae=TopKSpec(expansion=2, tokens=3000, batch=64),
        device="cpu",
    )
    run = train.run(spec, folder / "runs")
    (folder / "saes").symlink_to(run.path / "sae")
    return folder


@pytest.fixture(scope="module")
def opened(home: Path) -> Opened:
    saes = home / "saes"
    names = [saes / "mlp_add.1" / "relu", saes / "resid_post.1" / "topk-k4"]
    return open_saes(OfSAEsSpec(saes=tuple(map(str, names)), device="cpu"))


@pytest.fixture(scope="module")
def each(home: Path, opened: Opened) -> dict[Site, Records]:
    """What a pass for each of them alone gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnweaveWarning)
        specs = {site: LatentsSpec(sae=Path(name), tokens=TOKENS, device="cpu") for site, name in opened.names.items()}
        return {site: latents_job.load(latents_job.run(spec, home / "runs")) for site, spec in specs.items()}


def same(found: Records, wanted: Records, latents: list[int]) -> None:
    assert found.n_tokens == wanted.n_tokens
    for j in latents:
        a, b = found.latent(j), wanted.latent(j)
        assert (a.count, a.promoted[0][0]) == (b.count, b.promoted[0][0])
        assert a.maximum == pytest.approx(b.maximum, rel=1e-4) and a.rate == b.rate
        for mine, theirs in zip((*a.top, *a.quantile, *a.random), (*b.top, *b.quantile, *b.random), strict=True):
            assert mine.texts == theirs.texts and mine.token == theirs.token and mine.counted == theirs.counted
            assert mine.values == pytest.approx(theirs.values, rel=1e-4, abs=1e-6)


def no_model(self: ActivationSource, index: int) -> Any:
    raise AssertionError("the model ran")


@pytest.mark.parametrize("runs", ["runs", "elsewhere"])
def test_all_latents_of_all_autoencoders_from_the_trainings_cache(
    runs: str, home: Path, opened: Opened, each: dict[Site, Records], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ActivationSource, "_harvest", no_model)
    found = records_of(opened, None, TOKENS, home / runs)
    assert tuple(found) == SITES
    for site, records in found.items():
        assert records.latents is None and len(records) == 64
        same(records, each[site], list(range(64)))
    monkeypatch.setattr(job, "_chunk", no_model)
    again = records_of(opened, None, TOKENS, home / runs)
    assert again[SITES[0]].latent(3) == found[SITES[0]].latent(3)


def test_some_latents_without_a_cache_run_the_model_once_and_keep_no_activations(
    tmp_path: Path, opened: Opened, each: dict[Site, Records], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = replace(opened, names={site: str(tmp_path / str(site)) for site in SITES})  # not beside their training
    firing = {site: records.count.argsort()[::-1][:5].tolist() for site, records in each.items()}
    ran: list[tuple[int, list[Site]]] = []
    harvest = ActivationSource._harvest

    def counted(self: ActivationSource, index: int) -> Any:
        ran.append((index, self.sites))
        return harvest(self, index)

    monkeypatch.setattr(ActivationSource, "_harvest", counted)
    found = records_of(opened, None, TOKENS, tmp_path, firing)
    assert [i for i, _ in ran] == list(range(len(ran))) and all(sites == list(SITES) for _, sites in ran)
    assert not list(tmp_path.glob("activations-*"))
    for site, records in found.items():
        assert records.latents is not None and records.latents.tolist() == sorted(firing[site])
        same(records, each[site], firing[site])
    only = records_of(opened, None, TOKENS, tmp_path, {SITES[1]: firing[SITES[1]][:1], SITES[0]: []})
    assert list(only) == [SITES[1]] and len(only[SITES[1]]) == 1
    same(only[SITES[1]], each[SITES[1]], firing[SITES[1]][:1])
    (run,) = [run for run in tmp_path.glob("latents-*") if len(list((run / "records").iterdir())) == 2]
    assert Run.at(run).done and not (run / "codes").exists()


def test_an_interrupted_pass_goes_on_where_it_was(
    home: Path, tmp_path: Path, opened: Opened, each: dict[Site, Records], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, done = job._chunk, []

    def encoded(*args: Any) -> Any:
        if args[4] == 2 and done == [0, 1] and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        done.append(args[4])
        return encode(*args)

    stopped: list[bool] = []
    monkeypatch.setattr(job, "_chunk", encoded)
    latents = {SITES[0]: [1, 2]}
    with pytest.raises(KeyboardInterrupt):
        records_of(opened, None, TOKENS, tmp_path, latents)
    found = records_of(opened, None, TOKENS, tmp_path, latents)
    assert stopped and done == list(range(len(done))) and len(done) > 2
    same(found[SITES[0]], each[SITES[0]], [1, 2])


def test_other_text_and_neurons(home: Path, tmp_path: Path) -> None:
    spec = OfSAEsSpec(neurons=("resid_post.0",), model=str(home / "model"), device="cpu")
    opened = open_saes(spec)
    with pytest.raises(UnweaveError, match="does not say which text"):
        records_of(opened, None, 500, tmp_path)
    data = DataSpec(sources=(Source(path=str(home / "text")),), pack=PackSpec(context=48))
    found = records_of(opened, data, 500, tmp_path, {Site("resid_post", 0): [3]})
    record = found[Site("resid_post", 0)].latent(3)
    assert 0 < record.rate <= 1 and record.top


def test_a_changed_text_is_read_again(home: Path, tmp_path: Path) -> None:
    name = str(home / "model")
    opened = open_saes(OfSAEsSpec(neurons=("resid_post.0",), model=name, device="cpu"))
    path = tmp_path / "text.jsonl"
    data = DataSpec(sources=(Source(path=str(path)),), pack=PackSpec(context=48))
    seen = []
    for word in ("keys", "keys", "doors"):
        if not seen or word == "doors":
            path.write_text("\n".join(json.dumps({"text": f"{word} {word} {i} {word} {word}"}) for i in range(60)))
        found = records_of(opened, data, 500, tmp_path, {Site("resid_post", 0): [3]})
        seen.append("".join(found[Site("resid_post", 0)].latent(3).top[0].texts))
    assert seen[0] == seen[1] and "keys" in seen[0] and "doors" in seen[2]
    assert len(list(tmp_path.glob("latents-*"))) == 2


def test_what_is_stamped_for_the_text(home: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model and every training's text; or the text that is named. No weights are read."""
    monkeypatch.setattr(SAE, "load", None)
    asked = OfSAEsSpec(saes=tuple(opened.names.values()), device="cpu")
    own = texts_of(asked, None)
    assert set(own) == {"model", str(home / "text")}
    named = DataSpec(sources=(Source(path=str(home / "text" / "a.jsonl")),))
    for spec in (asked, replace(asked, model=str(home / "model"))):
        told = texts_of(spec, named)
        assert set(told) == {"model", named.sources[0].path} and told["model"] == own["model"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"latents": {Site("embed"): [1]}}, "no SAE is at embed"),
        ({"latents": {SITES[0]: [64]}}, "latent 64 does not exist at mlp_add.1"),
        ({"latents": {SITES[0]: [-1]}}, "latent -1 does not exist"),
        ({"tokens": 10**6}, "1,000,000 tokens were asked for"),
        ({"split": "heldout", "tokens": 3000}, "has 1,500"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path: Path, opened: Opened, change: dict[str, Any], says: str) -> None:
    asked = {"data": None, "tokens": TOKENS, "runs": tmp_path} | change
    with pytest.raises(UnweaveError, match=says):
        records_of(opened, **asked)


def test_autoencoders_of_two_trainings_are_two_passes(
    home: Path, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[Site]] = []
    encode = latents_job.encode
    monkeypatch.setattr(latents_job, "encode", lambda *a, **o: (passes.append(list(a[1])), encode(*a, **o))[1])
    site = SITES[1]
    other = open_saes(OfSAEsSpec(saes=(opened.names[site],), device="cpu")).saes[site]
    train_spec = TrainSpec.from_dict(other.provenance["train"])
    short = replace(train_spec.stream, chunk_tokens=900)
    other.provenance = other.provenance | {"train": replace(train_spec, stream=short).to_dict()}
    both = replace(opened, saes={SITES[0]: opened.saes[SITES[0]], site: other})
    found = records_of(both, None, 800, tmp_path, {SITES[0]: [1], site: [1]})
    assert set(found) == set(SITES) and passes == [[SITES[0]], [site]]


def test_the_command_collects_of_one_or_of_many_and_shows_both(
    home: Path, tmp_path: Path, opened: Opened, each: dict[Site, Records], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--saes gives every SAE's records from one run; what a method asks of the same SAEs is that run."""
    names = tuple(opened.names.values())
    many = LatentsSpec(saes=names, tokens=TOKENS, device="cpu")
    done = latents_job.run(many, home / "runs")
    assert [row.site for row in done.result.saes] == list(SITES)
    assert [row.records for row in done.result.saes] == [Path("records", str(site)) for site in SITES]
    for site, records in latents_job.load_all(done).items():
        same(records, each[site], list(range(64)))
    assert as_read(LatentRecords, as_written(done.result), "here") == done.result
    shown = view.section(done.result)
    assert all(str(site) in shown.body for site in SITES) and "mlp_add.1: alive latents" in str(done.result.rows())
    one = latents_job.run(LatentsSpec(sae=Path(names[0]), tokens=TOKENS, device="cpu"), home / "runs").result
    assert one.only.records == Path("records") and one.only.alive == int((each[SITES[0]].count > 0).sum())
    assert "alive latents" in [name for name, _, _ in one.rows()]

    def fail(*args: Any, **options: Any) -> Any:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(LM, "load", fail)
    monkeypatch.setattr(SAE, "load", fail)
    assert latents_job.run(many, home / "runs").reused
    monkeypatch.setattr(ActivationSource, "chunk", fail)
    assert set(records_of(opened, None, TOKENS, home / "runs")) == set(SITES)


def test_latents_are_named_with_their_site_or_alone_where_one_sae_is_asked_about(
    home: Path, tmp_path: Path, opened: Opened, each: dict[Site, Records]
) -> None:
    alone = LatentsSpec(sae=Path(opened.names[SITES[1]]), latents=("3", "1"), tokens=TOKENS, device="cpu")
    records = latents_job.load(latents_job.run(alone, tmp_path))
    assert records.latents is not None and records.latents.tolist() == [1, 3]
    same(records, each[SITES[1]], [1, 3])
    several = LatentsSpec(saes=tuple(opened.names.values()), latents=("3",), tokens=TOKENS, device="cpu")
    with pytest.raises(UnweaveError, match="latent 3 of which of 2"):
        latents_job.run(several, tmp_path)
    with pytest.raises(UnweaveError, match="sae names one SAE"):
        LatentsSpec(sae=Path("x"), saes=("y",))
    with pytest.raises(UnweaveError, match="there are no sites"):
        LatentsSpec()
