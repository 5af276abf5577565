"""unweave planted: what is measured of built SAEs is what was planted; of trained ones, what the features say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.methods.saebench.known import view
from unweave.methods.saebench.known.spec import KnownSpec
from unweave.methods.saebench.known.stage import run
from unweave.methods.saebench.planted import Planted
from unweave.methods.train.kinds import TopKSpec
from unweave.methods.train.trainer import SAETrainer

SPEC = KnownSpec(features=24, width=24, tokens=4000)


@pytest.mark.parametrize("absorbed", [1.0, 0.6])
def test_measures_of_built_saes_are_what_was_planted(tmp_path, absorbed):
    done = run(replace(SPEC, absorbed=absorbed), tmp_path)
    of = {(one.sae, one.key): one for one in done.result.measures}
    for key, value in (("explained_variance", 1), ("probing", 1), ("absorption", 0), ("features", 1)):
        one = of["true directions", key]
        assert one.measured == pytest.approx(value, abs=1e-3) and one.truth == pytest.approx(value, abs=1e-3), key
    assert of["true directions", "l0"].measured == pytest.approx(of["true directions", "l0"].truth)
    world = Planted.zipfian(24, 24)
    f = world.sample(4000, 1)[1]
    planted = [
        float((f[f[:, parent] > 0][:, parent + 12] > 0).float().mean()) * absorbed for parent in range(12)
    ]  # the only child of each parent absorbs it
    one = of["absorbing", "absorption"]
    assert one.truth == pytest.approx(sum(planted) / 12, abs=1e-3) == one.measured
    assert of["absorbing", "explained_variance"].measured == pytest.approx(1, abs=1e-3)
    assert (of["absorbing", "probing"].measured < 0.99) == (absorbed == 1)
    random = {key: of["random directions", key] for key in ("probing", "features", "explained_variance")}
    assert random["features"].measured == 0 and random["probing"].truth is None
    assert random["probing"].measured < 0.9 and random["explained_variance"].measured < 0.8
    rows = view.rows(done.result)
    assert ("  absorption", f"{one.measured:.3f}", f"truth {one.truth:.3f}") in rows
    assert "Measures beside the truth" in view.section(done.result).heading


def test_a_frozen_decoder_explains_variance_and_finds_no_feature(tmp_path):
    """What a number can carry: a trained SAE finds features, one with random rows explains much and finds none."""
    world = Planted.zipfian(24, 24)
    x = world.sample(6000, 7)[0]
    for freeze in ("none", "decoder"):
        spec = TopKSpec(expansion=2, k=6, batch=200, tokens=150_000, init="random", lr=3e-3, freeze=freeze)
        trainer = SAETrainer(spec, 24, init_x=x)
        draw = torch.Generator().manual_seed(0)
        while not trainer.done:
            trainer.step(x[torch.randint(0, 6000, (200,), generator=draw)])
        sae = trainer.to_sae()
        sae.read = sae.write = Site("resid_post", 0)
        sae.save(tmp_path / freeze)
    done = run(replace(SPEC, saes=tuple(str(tmp_path / name) for name in ("none", "decoder"))), tmp_path / "runs")
    of = {(one.sae.rpartition("/")[2], one.key): one for one in done.result.measures}
    assert of["none", "features"].measured > 0.5 and of["decoder", "features"].measured == 0
    assert of["decoder", "explained_variance"].measured > 0.4
    assert of["none", "explained_variance"].measured > of["decoder", "explained_variance"].measured
    with pytest.raises(UnweaveError, match="reads 24 dimensions, not 30"):
        run(replace(SPEC, width=30, saes=(str(tmp_path / "none"),)), tmp_path / "runs")


def test_superposition_costs_even_the_perfect_sae(tmp_path):
    done = run(replace(SPEC, features=60), tmp_path)
    of = {(one.sae, one.key): one for one in done.result.measures}
    assert (
        of["true directions", "features"].measured == 1 and of["true directions", "explained_variance"].measured < 0.9
    )
    assert of["true directions", "l0"].measured > 1.2 * of["true directions", "l0"].truth
    assert "in superposition" in view.rows(done.result)[0][2]
