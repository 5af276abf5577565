"""What training runs refuse, how they go on with an SAE, several variants, checkpoints, and what doctor looks at."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from helpers.jobs import small, spec_of
from helpers.models import build_tiny, build_tiny_tokenizer
from helpers.paths import TESTS
from unweave.core import checkpoint
from unweave.core import run as run_module
from unweave.core.dist import SOLO, Group
from unweave.core.errors import UnweaveError
from unweave.core.files import read_json
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.core.writing import write_json
from unweave.data.stream import ActivationSource, Chunk, RowBatches
from unweave.data.tokens import TokenStore
from unweave.lm.model import LM
from unweave.methods.train import doctor, start
from unweave.methods.train import stage as train
from unweave.methods.train.kinds import MatryoshkaSpec, SAESpec, TopKSpec
from unweave.methods.train.members import members, variants_of
from unweave.methods.train.presets import PRESETS
from unweave.methods.train.result import Training
from unweave.methods.train.spec import DoctorSpec, TrainSpec
from unweave.methods.train.stage import last_checkpoint
from unweave.methods.train.trainer import SAETrainer
from unweave.sae.activations import ReLU, TopK
from unweave.sae.module import SAE

SITE = Site("resid_post", 1)


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(build_tiny("llama"), None)


def random_sae(n_latents: int = 128, **options: Any) -> SAE:
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(n_latents, 32, generator=g), dim=1)
    tensors = torch.randn(32, n_latents, generator=g), 0.1 * torch.randn(n_latents, generator=g), rows, torch.ones(32)
    return SAE(*tensors, options.pop("activation", TopK(4)), **options)


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sites": ("resid_post.{0,1}",)}, r"one site at a time, not at 2: resid_post\.0, resid_post\.1"),
        ({"sites": ("mlp_in.1->mlp_add.1",)}, "transcoders"),
        ({"sae": MatryoshkaSpec()}, "take no part"),
        ({"variants": ({"kind": "topk", "multi_topk": [0.0, 0.1]},)}, "take no part"),
    ],
)
def test_trap_31_what_end_to_end_training_would_ignore(
    lm: LM, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    spec = spec_of(tmp_path, objective="end-to-end", **changes)
    with pytest.raises(UnweaveError, match=says):
        members(spec, lm)
    assert members(replace(spec, objective="reconstruction"), lm)


def test_end_to_end_reports_what_its_own_rows_lost(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Run, "_remove_pieces", lambda self: None)
    base = small(home, objective="end-to-end")
    spec = replace(base, stream=replace(base.stream, max_norm_ratio=1.3), sae=replace(base.sae, tokens=4000))
    run = train.run(spec, tmp_path)
    (folder,) = (p for p in tmp_path.glob("tokens-*") if read_json(p / "spec.json")["spec"]["split"] == "train")
    store = train.TokenStore.open(folder / "store")
    found = LM.load(spec.model)
    limit = SAE.load(run.path / "sae").policy.max_norm
    assert limit is not None
    rows, counted, outliers, steps = RowBatches(store, found.pad_id, batch_tokens=64, seed=spec.seed), 0, 0, 0
    while counted < 4000:
        tokens, _ = rows.next()
        with found.taps(read=[SITE]) as seen:
            found(tokens)
        ordinary = tokens.mask & ~torch.isin(tokens.ids, torch.arange(4))
        inside = ordinary & (seen[SITE].norm(dim=-1) <= limit)
        counted, steps = counted + int(inside.sum()), steps + 1
        outliers += int((ordinary & ~inside).sum())
    assert run.result.tokens == counted
    assert run.result.outliers_dropped == outliers > 100
    assert run.result.epochs == pytest.approx(rows.epoch + rows.position / store.n_rows)
    assert [path.name for path in run.path.glob("checkpoint-*.pt")] == [f"checkpoint-{steps}-0.pt"]


def test_passes_and_outliers_are_those_of_what_was_trained_on(home: Path, tmp_path: Path) -> None:
    """The buffer holds passes of which little is served: the text is drawn many times over."""
    base = small(home)
    stream = replace(base.stream, max_norm_ratio=1.3, buffer_tokens=20_000)
    run = train.run(replace(base, stream=stream, sae=replace(base.sae, tokens=64 * 50)), tmp_path)
    (folder,) = (p for p in tmp_path.glob("tokens-*") if read_json(p / "spec.json")["spec"]["split"] == "train")
    store, found = train.TokenStore.open(folder / "store"), LM.load(base.model)
    limit = SAE.load(run.path / "sae").policy.max_norm
    assert limit is not None
    ordinary, outliers = 0, 0
    for row in range(store.n_rows):
        tokens, _ = store.batch([row], found.pad_id)
        with found.taps(read=[SITE]) as seen:
            found(tokens)
        norms = seen[SITE].norm(dim=-1)[tokens.mask & ~torch.isin(tokens.ids, torch.arange(4))]
        ordinary, outliers = ordinary + len(norms), outliers + int((norms > limit).sum())
    assert run.result.epochs == pytest.approx(3200 / len(store.ids))
    assert run.result.outliers_dropped == pytest.approx(3200 * outliers / (ordinary - outliers), abs=1)
    assert outliers > 100


def test_a_resumed_training_took_as_long_as_all_its_processes(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, step, stops = [0.0], SAETrainer.step, [3, 7, 8]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0])
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(run_module, "time", clock)

    def slow(self: SAETrainer, *args: torch.Tensor) -> dict[str, float]:
        if stops and self.steps == stops[0]:
            del stops[0]
            raise KeyboardInterrupt
        now[0] += 2.0
        return step(self, *args)

    monkeypatch.setattr(SAETrainer, "step", slow)
    spec = replace(small(home), checkpoint_seconds=1.0)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train.run(spec, tmp_path)
        now[0] += 1000.0  # in which nobody works
    run = train.run(spec, tmp_path)
    assert len(run.events("resumed")) == 3
    assert run.seconds == 20.0  # ten steps
    assert "seconds" not in (run.path / "result.json").read_text()


END_TO_END = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from helpers.jobs import small
from unweave.methods.train import stage as train
spec = small(Path(sys.argv[2]), objective="end-to-end")
train.run(replace(spec, sae=replace(spec.sae, batch=4, tokens=300)), Path(sys.argv[3]))
"""


def test_two_processes_train_end_to_end_on_rows_longer_than_a_batch(home: Path, tmp_path: Path) -> None:
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    common["MASTER_PORT"] = str(random.SystemRandom().randint(20_000, 60_000))
    command = [sys.executable, "-c", END_TO_END, str(TESTS), str(home), str(tmp_path)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(i)}, stderr=subprocess.PIPE) for i in (0, 1)
    ]
    errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    (path,) = tmp_path.glob("train-*")
    assert Run.at(path, Training).result.processes == 2


# -- several processes ------------------------------------------------------------------------------------------------


def test_batches_smaller_than_the_processes_are_refused(home: Path, lm: LM) -> None:
    spec = replace(spec_of(home), sae=TopKSpec(batch=3, tokens=300))
    found = members(spec, lm)
    with pytest.raises(UnweaveError, match=r"batches of 3 tokens cannot be divided among 4 processes"):
        train._refuse_empty_shares(spec, found, Group(0, 4))
    train._refuse_empty_shares(spec, found, Group(0, 3))
    train._refuse_empty_shares(spec, found * 4, Group(0, 4))  # whole batches each


def test_trap_10_excluded_tokens_are_counted_in_slices(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_SLICE", 7)
    ids = np.random.default_rng(0).integers(0, 9, 100).astype(np.uint32)
    counted = sum(int(i) not in (2, 5) for i in ids)
    store, source = cast(Any, SimpleNamespace(ids=ids, n_tokens=100)), cast(Any, SimpleNamespace(exclude_ids=(2, 5)))
    spec = replace(spec_of(home), epochs=1.0)
    assert train._counted(store, source) == counted
    train._refuse_too_little(replace(spec, sae=replace(spec.sae, tokens=counted)), counted, "")
    with pytest.raises(UnweaveError, match=f"over the {counted} distinct tokens"):
        train._refuse_too_little(replace(spec, sae=replace(spec.sae, tokens=counted + 1)), counted, "")


def test_checkpoints_hold_for_each_process_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked, load = Run.open(tmp_path, "train", TopKSpec()), [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **how: asked.append(how) or load(*args, **how))
    assert last_checkpoint(run.path, ["a"]) is None
    state = {"stream": {"x": torch.arange(3)}, "trainers": {"a": {"w": torch.ones(2)}, "b": {"w": torch.zeros(2)}}}
    torch.save({"trainers": {"b": {"w": torch.full((2,), 9.0)}}}, run.path / "checkpoint-5-1.pt")  # of another time
    checkpoint.save(run.path, state, 5, SOLO, True)
    assert sorted(path.name for path in run.path.glob("checkpoint-*.pt")) == ["checkpoint-5-0.pt"]
    found = last_checkpoint(run.path, ["b"])
    assert found is not None
    assert list(found["trainers"]) == ["b"] and found["trainers"]["b"]["w"].tolist() == [0, 0]
    assert found["stream"]["x"].tolist() == [0, 1, 2]
    torch.save({"stream": {"x": torch.zeros(3)}, "trainers": {"c": {}}}, run.path / "checkpoint-5-1.pt")
    write_json(run.path / "checkpoint.json", {"step": 5, "files": ["checkpoint-5-0.pt", "checkpoint-5-1.pt"]})
    found = last_checkpoint(run.path, ["a", "c"])
    assert found is not None and set(found["trainers"]) == {"a", "c"}
    assert found["stream"]["x"].tolist() == [0, 1, 2]  # the first process's
    assert asked and all(str(how["map_location"]) == "cpu" for how in asked)  # of a GPU that may be another's now


# -- going on with an SAE ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_sae(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield train.run(small(home), tmp_path_factory.mktemp("base")).path / "sae"


def test_trap_25_going_on_in_another_model_is_refused_unless_accepted_and_then_recorded(
    home: Path,
    base_sae: Path,
    tmp_path: Path,
) -> None:
    build_tiny("llama", seed=3).save_pretrained(tmp_path / "other")
    build_tiny_tokenizer().save_pretrained(tmp_path / "other")
    spec = small(home, model=str(tmp_path / "other"), start=base_sae)
    with pytest.raises(UnweaveError, match=r"trained on[\s\S]*--accept-mismatch"):
        train.run(spec, tmp_path)
    run = train.run(replace(spec, accept_mismatch="base model's SAE"), tmp_path)
    about = SAE.load(run.path / "sae").provenance
    assert about["start_accepted"]["reason"] == about["train"]["accept_mismatch"] == "base model's SAE"
    assert about["start_accepted"]["distance"] > 0.01
    other = train.run(replace(spec, accept_mismatch="for another reason"), tmp_path)
    assert other.path != run.path  # what is recorded is another
    with pytest.raises(UnweaveError, match="nothing to accept"):
        replace(spec, start=None, accept_mismatch="why not")


def test_accepting_leaves_the_digests_of_specs_as_they_were(home: Path) -> None:
    spec = spec_of(home, start=Path("x"))
    assert replace(spec, accept_mismatch="y").digest() == spec.digest()
    assert start.inputs(spec_of(home)) == {}
    assert "accept_mismatch" not in spec.to_dict(result_only=True)


def test_an_sae_of_any_format_is_a_start(home: Path, base_sae: Path, tmp_path: Path) -> None:
    foreign = SAE.load(base_sae).save(tmp_path / "foreign", "dictionary_learning")
    assert not list(foreign.rglob("cfg.json"))
    spec = small(home, start=foreign)
    run = train.run(replace(spec, sae=replace(spec.sae, tokens=64, lr=1e-9)), tmp_path)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    after, before = SAE.load(run.path / "sae"), SAE.load(base_sae)
    torch.testing.assert_close(after.encode(x), before.encode(x), rtol=1e-4, atol=1e-4)


def test_a_start_of_another_site_is_refused_by_what_it_reads_and_writes(
    home: Path,
    lm: LM,
    tmp_path: Path,
) -> None:
    read, write = Site("mlp_in", 1), Site("mlp_add", 1)
    random_sae(read=read, write=write).save(tmp_path / "transcoder")
    spec = spec_of(home, start=tmp_path / "transcoder")
    with pytest.raises(UnweaveError, match=r"is of mlp_in\.1->mlp_add\.1, not of mlp_in\.1"):
        start.opened(spec, lm, "", read, read)
    assert start.opened(spec, lm, "", read, write)[0] is not None
    random_sae().save(tmp_path / "nameless")
    found, _ = start.opened(replace(spec, start=tmp_path / "nameless"), lm, "", SITE, SITE)
    assert found is not None and found.read == found.write == SITE


def test_a_start_of_any_width_trains(home: Path, tmp_path: Path) -> None:
    random_sae(100, read=SITE).save(tmp_path / "uneven")  # of 32 dimensions
    spec = small(home, start=tmp_path / "uneven")
    plain = replace(spec.sae, expansion=TopKSpec().expansion)
    assert SAE.load(train.run(replace(spec, sae=plain), tmp_path).path / "sae").d_sae == 100
    with pytest.raises(UnweaveError, match="100 latents, which is no multiple of its width 32: expansion 4"):
        train.run(spec, tmp_path)


# -- what is refused before work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sites": ("resid_post.99",)}, "resid_post.99"),
        ({"sites": ("mlp_in.*->mlp_add.1",)}, "3 sites to read and 1 to write"),
        ({"sites": ("path.model.layers.0",)}, "path"),
        ({"sae": {"k": 1000}}, "k = 1000 of only 128 latents"),
        ({"variants": ({"kind": "matryoshka", "groups": [[0.001, 0.999]]},)}, "one has none"),
        ({"sae": {"skip": "zero"}}, "identity"),
        ({"sae": {"tokens": 50_000}}, "epochs"),
        ({"start": "other"}, r"is of resid_post\.0, not of resid_post\.1"),
        ({"start": "own", "sae": {"expansion": 2}}, "32 -> 128 latents -> 32, not 32 -> 64"),
        ({"start": "own", "sae": {"kind": "relu"}}, "use kind topk"),
        ({"start": "own", "sae": {"init": "random"}}, "no effect"),
    ],
)
def test_what_no_text_can_mend_is_refused_before_any_is_read(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.setattr(train, "token_store", lambda *args: pytest.fail("text was asked for"))
    random_sae(read=Site("resid_post", 0)).save(tmp_path / "other")
    random_sae(read=SITE).save(tmp_path / "own")
    spec, changes = spec_of(home), dict(changes)
    if "start" in changes:
        changes["start"] = tmp_path / changes["start"]
    if "sae" in changes:
        changes["sae"] = SAESpec.from_dict(changes["sae"], base=spec.sae)
    with pytest.raises(UnweaveError, match=says):
        train.run(replace(spec, **changes), tmp_path)


def test_variants_are_refused_before_the_model_loads(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "load_lm", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(UnweaveError, match="variants share one stream"):
        train.run(spec_of(home, variants=({"tokens": [100]},)), tmp_path)


# -- measured on held-out text --------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [("resid_post.1",), ("mlp_in.1->mlp_add.1", "resid_post.0")])
def test_held_out_text_is_measured_pass_by_pass(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sites: tuple[str, ...],
) -> None:
    """No more rows at once than go through the model, and the numbers are those of all of them together."""
    held, passes = [], ActivationSource.passes

    def watched(self: ActivationSource, index: int) -> Iterator[Chunk]:
        for chunk in passes(self, index):
            held.append(len(chunk.where))
            yield chunk

    monkeypatch.setattr(ActivationSource, "passes", watched)
    spec = small(home, sites=sites)
    run = train.run(replace(spec, stream=replace(spec.stream, batch_tokens=128)), tmp_path)
    assert len(held) > 10 and max(held) <= 128
    whole = sum(held)
    for row in run.result.saes:
        sae = SAE.load(train.sae_folder(run, row.name))
        store = _heldout_store(tmp_path)
        source = ActivationSource(
            LM.load(spec.model), store, [sae.read, sae.write], chunk_tokens=store.n_tokens, batch_tokens=128,
            exclude_ids=sae.policy.exclude_ids,
        )  # fmt: skip
        chunk = source.chunk(0)
        assert len(chunk.where) == whole
        inside = chunk.x[sae.read].norm(dim=1) <= sae.policy.max_norm
        x, goal = chunk.x[sae.read][inside], chunk.x[sae.write][inside]
        codes = sae.codes(x)
        missed = (goal - sae.explained(codes, x)).double().square().sum()
        spread = (goal.double() - goal.double().mean(0)).square().sum()
        about = row.reference
        assert about.unexplained_variance == pytest.approx(float(missed / spread), rel=1e-6)
        assert about.l0 == pytest.approx(len(codes.values) / len(x), rel=1e-6) and about.tokens == len(x)


def _heldout_store(runs: Path) -> TokenStore:
    (folder,) = (p for p in runs.glob("tokens-*") if read_json(p / "spec.json")["spec"]["split"] == "heldout")
    return TokenStore.open(folder / "store")


# -- variants ---------------------------------------------------------------------------------------------------------


def test_presets_as_variants_share_the_stream_and_what_sae_says_itself() -> None:
    both = [{"preset": ["fast-jumprelu", "fast-relu"]}]
    for base in (TopKSpec(), TopKSpec(tokens=5000, batch=100, lr=1e-3, expansion=4)):
        found = variants_of(base, both)
        assert [spec.kind for spec in found.values()] == ["jumprelu", "relu"]
        for spec in found.values():
            assert (spec.tokens, spec.batch) == (base.tokens, base.batch)
            assert spec.lr == (1e-3 if base.expansion == 4 else 7e-5) and spec.expansion == base.expansion
            assert (spec.sparsity_warmup, spec.init) == (10_000 / 320_000, "independent")
    # What the variant says itself wins over both.
    (wide,) = variants_of(TopKSpec(expansion=4), [{"preset": "fast-relu", "expansion": 2}]).values()
    assert wide.expansion == 2
    # A preset as the base says nothing beside itself, and another one replaces it.
    base = SAESpec.from_dict({"preset": "fast-jumprelu", "tokens": 5000})
    found = variants_of(base, [{"preset": ["fast-jumprelu", "fast-relu"], "expansion": [8, 16]}])
    assert found["fast-relu-expansion16"] == SAESpec.from_dict({"preset": "fast-relu", "tokens": 5000, "expansion": 16})
    assert found["fast-jumprelu-expansion8"] == base


def test_trap_31_what_sae_says_and_a_preset_cannot_honour_is_an_error() -> None:
    with pytest.raises(UnweaveError, match=r"preset fast-relu does not go with what sae says itself \(k\).*no effect"):
        variants_of(TopKSpec(k=8), [{"preset": "fast-relu"}])
    (spec,) = variants_of(TopKSpec(k=8), [{"preset": "fast-relu", "k": 32}]).values()
    assert spec.sparsity == PRESETS["fast-relu"]["sparsity"]
    with pytest.raises(UnweaveError, match="no preset 'fast'"):
        variants_of(TopKSpec(k=8), [{"preset": "fast"}])


def test_a_variant_of_a_list_is_a_list_of_lists() -> None:
    base = MatryoshkaSpec()
    with pytest.raises(UnweaveError, match=r"groups is a list itself[\s\S]*groups: \[\[0\.5, 0\.5\]\]"):
        variants_of(base, [{"groups": [0.5, 0.5]}])
    found = variants_of(base, [{"groups": [[0.5, 0.5], [0.25, 0.75]]}])
    assert [spec.groups for spec in found.values()] == [(0.5, 0.5), (0.25, 0.75)]


# -- doctor -----------------------------------------------------------------------------------------------------------


def doctor_of(spec: TrainSpec) -> DoctorSpec:
    return DoctorSpec(**{f.name: getattr(spec, f.name) for f in fields(TrainSpec)})


def test_doctor_lists_what_training_would_refuse(home: Path, tmp_path: Path) -> None:
    base = spec_of(home)
    too_many = doctor.run(doctor_of(replace(base, sae=replace(base.sae, k=1000))), tmp_path).result.problems
    assert any("k = 1000 of only 128" in problem for problem in too_many)
    random_sae(activation=ReLU(), read=Site("resid_post", 0)).save(tmp_path / "other")
    elsewhere = doctor.run(doctor_of(replace(base, start=tmp_path / "other")), tmp_path).result.problems
    assert any("is of resid_post.0, not of resid_post.1" in problem for problem in elsewhere)
    random_sae(100, read=SITE).save(tmp_path / "uneven")
    uneven = replace(base, start=tmp_path / "uneven", sae=replace(base.sae, expansion=TopKSpec().expansion))
    found = doctor.run(doctor_of(uneven), tmp_path).result
    assert found.problems == () and found.cost is not None and found.cost.latents == 100


def test_doctor_times_short_trainings_and_those_end_to_end(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = spec_of(home)
    short = replace(base, sae=replace(base.sae, tokens=64))  # a single step
    assert doctor.run(doctor_of(short), tmp_path).result.problems == ()
    calls, step = [], doctor.end_to_end_step
    monkeypatch.setattr(doctor, "end_to_end_step", lambda *args, **how: calls.append(1) or step(*args, **how))
    found = doctor.run(doctor_of(replace(short, objective="end-to-end")), tmp_path).result
    assert found.problems == () and len(calls) == 3
    assert found.cost is not None and found.cost.train_tokens_per_second > 0
