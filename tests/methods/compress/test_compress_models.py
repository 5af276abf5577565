"""Compressing models of every family in place, against plain loops over the Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.models import VOCAB, build_tiny, build_tiny_tokenizer
from unweave.core.errors import UnweaveError
from unweave.lm.model import LM, Tokens
from unweave.lm.projections import projections, watch_inputs
from unweave.methods.compress.masks import Pattern, sparsegpt
from unweave.methods.compress.measure import compare, row_losses
from unweave.methods.compress.models import compress_model, pruning, ranking, rounding

IDS = [torch.randint(4, VOCAB, (rows, 24), generator=torch.Generator().manual_seed(rows)) for rows in (4, 3)]
BATCHES = [Tokens.of(ids) for ids in IDS]


def wide(family: str) -> LM:
    return LM(build_tiny(family).double(), build_tiny_tokenizer())


def matrices(block: Any) -> dict[str, Any]:
    """The modules of a block with a matrix."""
    with_weight = ((name, module) for name, module in block.named_modules() if hasattr(module, "weight"))
    return {name: module for name, module in with_weight if module.weight.ndim == 2}


def as_rows(module: Any) -> Tensor:
    """Its weights [out, in]."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def inputs(lm: LM, modules: dict[str, Any]) -> dict[str, Tensor]:
    """What goes into modules in plain forward passes of the whole model, [N, in] each."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    with ExitStack() as stack, torch.no_grad():
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, 1)))
            stack.callback(hook.remove)
        for ids in IDS:
            lm.model(input_ids=ids)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def wanda_directly(lm: LM, share: float, *, blocks: bool) -> None:
    """WANDA as the paper's code does it: score a block's matrices from one pass, prune them, go on."""
    with torch.no_grad():
        groups = [[block] for block in lm.layout.blocks] if blocks else [list(lm.layout.blocks)]
        for group in groups:
            modules = {f"{i} {name}": m for i, block in enumerate(group) for name, m in matrices(block).items()}
            for name, x in inputs(lm, modules).items():
                weights = as_rows(modules[name])
                order = (weights.abs() * x.square().sum(0).sqrt()).argsort(dim=1, stable=True)
                weights.scatter_(1, order[:, : int(weights.shape[1] * share)], 0.0)


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_wanda_block_by_block_is_the_direct_formula(family: str, share: float) -> None:
    lm, expected = wide(family), wide(family)
    changes = compress_model(lm, projections(lm), pruning("wanda", share), BATCHES)
    wanda_directly(expected, share, blocks=True)
    for (name, ours), theirs in zip(lm.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert len(changes) == sum(len(matrices(block)) for block in lm.layout.blocks)
    for change in changes:
        assert change.zeros == int(change.shape[1] * share) / change.shape[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_pass_scores_every_block_on_the_dense_model(family: str) -> None:
    lm, expected, by_block = wide(family), wide(family), wide(family)
    compress_model(lm, projections(lm), pruning("wanda", 0.5), BATCHES, "one-pass")
    wanda_directly(expected, 0.5, blocks=False)
    wanda_directly(by_block, 0.5, blocks=True)
    pairs = list(zip(lm.model.parameters(), expected.model.parameters(), by_block.model.parameters(), strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs, _ in pairs)
    assert not all(torch.equal(ours, other) for ours, _, other in pairs)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_the_second_order_methods_see_the_products_of_pruned_inputs(family: str) -> None:
    lm, expected = wide(family), wide(family)
    compress_model(lm, projections(lm), pruning("sparsegpt", Pattern(2, 4)), BATCHES)
    with torch.no_grad():
        for block in expected.layout.blocks:
            modules = matrices(block)
            for name, x in inputs(expected, modules).items():
                rows = as_rows(modules[name])
                rows.copy_(sparsegpt(rows, x.T @ x, Pattern(2, 4))[0])
    for ours, theirs in zip(lm.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_magnitude_has_one_threshold_a_matrix_and_needs_no_text(tiny_lm: Callable[..., LM]) -> None:
    lm, dense = tiny_lm(), tiny_lm()
    compress_model(lm, projections(lm), pruning("magnitude", 0.5))
    for ours, before in zip(projections(lm), projections(dense), strict=True):
        kept = before.weight[ours.weight != 0].abs()
        assert torch.equal(ours.weight[ours.weight != 0].abs(), kept)
        assert kept.min() >= before.weight[ours.weight == 0].abs().max()
        assert int((ours.weight == 0).sum()) == ours.weight.numel() // 2


def test_pruning_again_changes_nothing(tiny_lm: Callable[..., LM]) -> None:
    lm = tiny_lm()
    compress_model(lm, projections(lm), pruning("wanda", 0.5), BATCHES)
    before = [projection.weight.clone() for projection in projections(lm)]
    changes = compress_model(lm, projections(lm), pruning("wanda", 0.5), BATCHES)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, projections(lm), strict=True))
    assert all(change.change == 0 and change.zeros_before == change.zeros for change in changes)


def test_only_what_was_chosen_changes(tiny_lm: Callable[..., LM]) -> None:
    lm, dense = tiny_lm(), tiny_lm()
    changes = compress_model(lm, projections(lm, ["1.mlp.*", "*.q_proj"]), pruning("wanda", 0.5), BATCHES)
    names = {f"{change.layer}.{change.name}" for change in changes}
    mlp = {f"1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert names == mlp | {f"{layer}.self_attn.q_proj" for layer in range(3)}
    for (name, ours), before in zip(lm.model.named_parameters(), dense.model.parameters(), strict=True):
        changed = any(name == f"model.layers.{chosen}.weight" for chosen in names)
        assert torch.equal(ours, before) != changed, name
    with pytest.raises(UnweaveError, match="no projection fits 'mpl") as error:
        projections(lm, ["mpl.*"])
    assert "mlp.down_proj" in error.value.remedy


def test_a_block_runs_at_most_twice_and_its_last_matrix_once(tiny_lm: Callable[..., LM]) -> None:
    lm, calls = tiny_lm(), {}
    with ExitStack() as stack:
        for layer, block in enumerate(lm.layout.blocks):
            for name in ("self_attn.o_proj", "mlp.down_proj"):

                def count(*_: Any, key: tuple[int, str] = (layer, name)) -> None:
                    calls[key] = calls.get(key, 0) + 1

                stack.callback(block.get_submodule(name).register_forward_hook(count).remove)
        compress_model(lm, projections(lm), pruning("wanda", 0.5), BATCHES)
    n = len(BATCHES)
    assert calls[0, "self_attn.o_proj"] == 2 * n and calls[2, "self_attn.o_proj"] == n
    assert calls[0, "mlp.down_proj"] == n + 1 and calls[2, "mlp.down_proj"] == 1  # the first batch tells the order


# -- mixtures of experts -----------------------------------------------------------------------------------------------

MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def mixture(kind: str, experts: int = 4) -> LM:
    import transformers as hf

    shared: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "num_experts_per_tok": 2,
    }  # fmt: skip
    moe = {"num_experts": experts, "moe_intermediate_size": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = {
            "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**shared, num_local_experts=experts)),
            "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**shared, num_experts=experts)),
            "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
                hf.Qwen2MoeConfig(**shared, **moe, shared_expert_intermediate_size=24)
            ),
            "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**shared, **moe, head_dim=8)),
        }[kind]()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, 0.0, 0.3)
    return LM(model, build_tiny_tokenizer())


@pytest.mark.parametrize("kind", MIXTURES)
def test_an_expert_is_scored_by_the_tokens_that_it_sees(kind: str) -> None:
    lm, dense = mixture(kind), mixture(kind)
    usual = lm.model.config._experts_implementation
    changes = compress_model(lm, projections(lm), pruning("wanda", 0.5), BATCHES)
    assert lm.model.config._experts_implementation == usual
    names = {change.name for change in changes}
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= names
    assert not any(name.endswith(("gate", "router", "expert_gate")) for name in names)
    mlp, pruned = dense.layout.blocks[0].mlp, lm.layout.blocks[0].mlp
    x = inputs(dense, {"mlp": mlp})["mlp"]  # block 0 is dense when it is scored
    chosen = mlp.gate(x)[2]
    for expert in range(4):
        seen = x[(chosen == expert).any(1)]
        gate, up = F.linear(seen, mlp.experts.gate_up_proj[expert]).chunk(2, 1)
        hidden = F.silu(gate) * up
        for name, into in (("gate_up_proj", seen), ("down_proj", hidden)):
            weights = getattr(mlp.experts, name)[expert].detach()
            order = (weights.abs() * into.square().sum(0).sqrt()).argsort(dim=1, stable=True)
            expected = weights.scatter(1, order[:, : weights.shape[1] // 2], 0.0)
            assert torch.equal(getattr(pruned.experts, name)[expert], expected), (expert, name)


def test_an_expert_that_no_token_reached_is_named() -> None:
    lm = mixture("olmoe", experts=16)
    few = [Tokens.of(IDS[0][:1, :3])]  # three tokens, two experts each
    with pytest.raises(UnweaveError, match=r"no calibration token was routed to 0\.mlp\.experts\.\w+, expert \d+"):
        compress_model(lm, projections(lm), pruning("wanda", 0.5), few)
    compress_model(lm, projections(lm), pruning("magnitude", 0.5))  # needs no tokens


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_have_their_sites_but_for_the_hidden_activation(kind: str) -> None:
    lm = mixture(kind)  # loading confirmed that attention and MLP add up to the block
    points = {site.point for site in lm.sites()}
    assert "mlp_add" in points and "mlp_act" not in points
    with pytest.raises(UnweaveError, match="MLPs are mixtures"):
        lm.site("mlp_act.0")


# -- what is refused, and what it costs --------------------------------------------------------------------------------


def test_what_cannot_be_compressed_is_refused_before_anything_changes(tiny_lm: Callable[..., LM]) -> None:
    lm = tiny_lm()
    before = [projection.weight.clone() for projection in projections(lm)]
    for method, batches, says in (
        (pruning("wanda", Pattern(3, 5)), BATCHES, "3:5 does not divide rows of 32"),
        (rounding(4, 48), [], "groups of 48 do not divide a row of 32"),
        (pruning("sparsegpt", 0.5), [Tokens.of(IDS[0][:1])], "24 tokens do not say how the 64 inputs"),
        (ranking(0.5, aware=True), [Tokens.of(IDS[0][:1])], "24 tokens do not say"),
    ):
        with pytest.raises(UnweaveError, match=says):
            compress_model(lm, projections(lm), method, batches)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, projections(lm), strict=True))


def test_a_model_without_linear_maps_is_refused(tiny_lm: Callable[..., LM], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    monkeypatch.setattr(type(lm.layout.blocks[0]), "named_modules", lambda self: iter([("", self)]))
    with pytest.raises(UnweaveError, match="have no linear maps"):
        projections(lm)


def test_what_sees_inputs_is_gone_afterwards_whatever_happens(tiny_lm: Callable[..., LM]) -> None:
    lm, seen = tiny_lm(), []

    def break_off(projection: Any, x: Tensor) -> Iterator[None]:
        seen.append((str(projection), x.shape))
        raise ValueError

    with pytest.raises(ValueError), watch_inputs(lm, projections(lm), break_off):  # type: ignore[arg-type]
        lm(BATCHES[0])
    lm(BATCHES[0])
    assert seen == [("0.self_attn.q_proj", (4 * 24, 32))]


def test_losses_are_the_models_own_and_their_interval_covers_the_difference(tiny_lm: Callable[..., LM]) -> None:
    lm = tiny_lm()
    before = row_losses(lm, BATCHES)
    assert before.shape == (7, 2) and (before[:, 1] == 23).all()
    with torch.no_grad():
        expected = [float(lm.model(input_ids=row[None], labels=row[None]).loss) for ids in IDS for row in ids]
    assert before[:, 0] / 23 == pytest.approx(expected, rel=1e-5)
    padded = Tokens.pad([(ids.tolist(), [0] * len(ids)) for ids in (IDS[0][0], IDS[0][1][:7])], lm.pad_id)
    assert row_losses(lm, [padded])[0, 0] == pytest.approx(before[0, 0], rel=1e-5)
    compress_model(lm, projections(lm), pruning("magnitude", 0.7))
    loss = compare(before, row_losses(lm, BATCHES))
    assert loss.low is not None and loss.high is not None
    assert loss.low < loss.after - loss.before < loss.high and loss.tokens == 161
    same = compare(before, before)
    assert same.low == same.high == 0 and compare(before[:1], before[:1]).low is None
