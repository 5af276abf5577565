"""``unweave steer`` with edits: names become latents, strengths values; what is asked is what the library does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.jobs import spec_of, write_home
from unweave.cli.app import main
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.inputs.inputs import load_lm
from unweave.latents import stage as latents
from unweave.latents.spec import LatentsSpec
from unweave.methods.steer import stage as steer
from unweave.methods.steer import view
from unweave.methods.steer.changes import open_edits
from unweave.methods.steer.spec import EditSpec, SteerSpec, condition
from unweave.methods.train import stage as train
from unweave.sae.edits import Change
from unweave.sae.module import SAE
from unweave.sae.steered import side_by_side

LOW, HIGH = Site("resid_post", 0), Site("resid_post", 1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_home(folder)
    train.run(spec_of(folder, sites=("resid_post.{0,1}",)), folder / "runs")
    return folder


def asked(home: Path, **fields: Any) -> SteerSpec:
    (folder,) = (home / "runs").glob("train-*/sae")
    fields = {"device": "cpu", "max_new_tokens": 6, "strengths": [1.0, 2.0], "latents_tokens": 1000} | fields
    return SteerSpec.from_dict({"sae": str(folder / "resid_post.1"), "more": [str(folder / "resid_post.0")]} | fields)


def test_latents_of_several_saes_are_changed_together(home: Path) -> None:
    edits = [
        {"latent": "resid_post.1/3", "mode": "add", "value": 4.0, "where": "answer"},
        {"latent": "resid_post.0/5", "strength": 0.5, "when": "resid_post.0/7>0.25", "where": "user+assistant"},
        {"latent": "resid_post.1/9", "mode": "project"},
    ]
    run = steer.run(asked(home, edits=edits, prompts=["on the table", "keys"]), home / "runs")
    result = run.result
    lm = load_lm(str(home / "model"), "float32", "cpu")
    saes = {site: SAE.load(home / "runs" / _train(home) / "sae" / str(site)) for site in (LOW, HIGH)}
    half = result.edits[1].amount
    assert [(e.name, e.mode, e.where, e.when) for e in result.edits] == [
        ("resid_post.1/3", "add", "answer", None),
        ("resid_post.0/5", "clamp", "user+assistant", "resid_post.0/7>0.25"),
        ("resid_post.1/9", "project", "policy", None),
    ]
    assert [result.edits[0].amount, result.edits[2].amount] == [4.0, 1.0] and half > 0

    def changes(s: float) -> list[Change]:
        return [
            Change(saes[HIGH], 3, 4.0 * s, "add", "answer"),
            Change(saes[LOW], 5, half * s, "clamp", ["user", "assistant"], saes[LOW].fires(7, 0.25)),
            Change(saes[HIGH], 9, s, "project"),
        ]

    expected = side_by_side(lm, ["on the table", "keys"], [(s, changes(s)) for s in (1.0, 2.0)], max_new_tokens=6)
    assert [(s.prompt, s.strength, s.text) for s in result.samples] == [
        (t.prompt, t.strength, t.text) for t in expected
    ]
    assert [s.kl for s in result.samples] == pytest.approx([t.kl for t in expected], rel=1e-4)
    words = view.note(result)
    assert "clamp resid_post.0/5" in words and "on answer" in words and "while resid_post.0/7>0.25" in words
    assert "KL" in view.section(result).body
    assert [e.held is None for e in result.edits] == [True, False, True]


def test_a_condition_that_never_held_is_named(home: Path) -> None:
    when = {"often": "resid_post.0/7>-1", "never": "resid_post.0/7>1e9"}
    edits = [{"latent": f"resid_post.1/{j}", "value": 9.0, "when": when[w]} for j, w in ((3, "often"), (4, "never"))]
    result = steer.run(asked(home, edits=edits, prompts=["keys"]), home / "runs").result
    assert [e.held for e in result.edits] == [True, False]
    assert ("never edited", "resid_post.1/4", "resid_post.0/7>1e9 held at no token") in view.rows(result)
    assert "resid_post.1/4 was not edited anywhere" in view.section(result).body
    alone = steer.run(asked(home, edits=edits[1:], prompts=["keys"]), home / "runs").result
    assert len({sample.text for sample in alone.samples}) == 1 and [e.held for e in alone.edits] == [False]
    told = {"latent": 3, "when": "resid_post.1/3>-1", "where": "answer:7", "more": []}  # six tokens are written
    assert not steer.run(asked(home, **told), home / "runs").result.edits[0].held


def _train(home: Path) -> str:
    (folder,) = (home / "runs").glob("train-*")
    return folder.name


def test_one_latent_in_every_mode_and_without_persistence(home: Path) -> None:
    for mode in ("multiply", "cap", "min-clamp"):
        result = steer.run(asked(home, latent=3, mode=mode, persist=mode == "cap"), home / "runs").result
        amount = 1.0 if mode == "multiply" else result.largest_activation
        assert result.latent == 3 and result.edits[0].amount == pytest.approx(amount)
        assert (result.samples[1].kl is None) == (mode != "cap")
        assert view.rows(result) and ("do not persist" in view.note(result)) == (mode != "cap")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"edits": [{"latent": "resid_post.2/3"}]}, "no SAE is at resid_post.2"),
        ({"edits": [{"latent": "resid_post.1/99999"}]}, "latent 99999 does not exist"),
        ({"edits": [{"latent": "3"}]}, "of which of 2 SAEs"),
        ({"edits": [{"latent": "sea"}]}, "sea"),
        ({"edits": [{"latent": "resid_post.0/3", "when": "resid_post.1/3>0"}]}, "read later"),
        ({"edits": [{"latent": "resid_post.0/3", "when": "resid_post.1/x"}]}, "x"),
        ({"edits": [{"latent": "resid_post.0/3"}, {"latent": "resid_post.0/3"}]}, "set twice"),
        ({"edits": [{"latent": "resid_post.0/3", "value": 1, "strength": 2}]}, "only where value is not given"),
        ({"edits": [{"latent": "resid_post.0/3"}], "latent": 4}, "only where no edits are named"),
        ({"edits": [{"latent": "resid_post.0/3"}], "where": "all"}, "only where no edits are named"),
        ({"latent": 3, "where": "answers"}, "policy, all, prompt, answer"),
        ({"latent": 3, "when": "resid_post.1/3>>2"}, "of the form"),
        ({"latent": 3, "when": "resid_post.1/3<2"}, "of the form"),
        ({"latent": 3, "mode": "turn"}, "turn"),
    ],
)
def test_what_cannot_be_done_is_refused_before_records_and_text(
    home: Path, fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steer, "_records", None)
    with pytest.raises(UnweaveError, match=message):
        steer.run(asked(home, **fields), home / "runs")


def test_a_latent_that_never_fired_has_no_strength(home: Path) -> None:
    lm = load_lm(str(home / "model"), "float32", "cpu")
    saes = {HIGH: SAE.load(home / "runs" / _train(home) / "sae" / str(HIGH))}
    with pytest.raises(UnweaveError, match=r"resid_post\.1/3 never fired"):
        open_edits(lm, [EditSpec(latent="3")], saes, lambda site, latent: 0.0)
    (edit,) = open_edits(lm, [EditSpec(latent=" 3", value=2.0)], saes, lambda site, latent: 0.0)
    assert edit.change(1.5).value == 3.0 and edit.name == "resid_post.1/3"


def test_conditions_are_read() -> None:
    assert condition("resid_post.9/12>0.5") == ("resid_post.9/12", 0.5)
    assert condition("12 > -1e-2") == ("12", -0.01)
    assert condition("resid_post.9/12") == ("resid_post.9/12", 0.0)
    with pytest.raises(UnweaveError, match="not a number"):
        condition("12>1.2.3")


def test_the_command_serves_what_it_was_given(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import uvicorn
    from starlette.testclient import TestClient

    answers: list[Any] = []

    def run(self: Any, sockets: Any) -> None:
        assert sockets[0].getsockname()[0] == "127.0.0.1"
        own = {"edits": [{"latent": "resid_post.1/3", "strength": 0.5}]}
        asked = {"messages": [{"role": "user", "content": "keys"}], "max_tokens": 4, "temperature": 0, "unweave": own}
        with TestClient(self.config.app, base_url="http://127.0.0.1") as client:
            answers.append(client.post("/v1/chat/completions", json=asked).json())

    monkeypatch.setattr(uvicorn.Server, "run", run)
    sae = home / "runs" / _train(home) / "sae" / "resid_post.1"
    asked = LatentsSpec(sae=sae, device="cpu", tokens=1000)
    records = latents.run(asked, home / "runs")
    command = ["serve", "--saes", str(sae), "--edits", "{latent: 5, value: 2}", "--device", "cpu", "--port", "0"]
    assert main([*command, "--records", str(records.path)]) == 0
    assert "http://127.0.0.1:" in capsys.readouterr().out
    lm, steered = load_lm(str(home / "model"), "float32", "cpu"), SAE.load(sae)
    half = latents.load(records).latent(3).maximum / 2
    edits = [steered.clamp({5: 2.0, 3: half})]
    assert answers[0]["choices"][0]["message"]["content"] == lm.generate("keys", edits, max_new_tokens=4)
    assert main(command) == 0 and "give a value" in answers[1]["error"]["message"]
    for wrong, message in (
        (["--port", "99999999"], "99999999 is no port"),
        (["--edits", "{latnet: 3}"], "latnet"),
        (["--edits", "3", "--port", "0"], "give a value"),
    ):
        assert main(["serve", "--saes", str(sae), *wrong]) == 2
        assert message in capsys.readouterr().err
