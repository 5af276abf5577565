"""Tiny random models of each family, and a tiny tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCAB = 97
N_LAYERS = 3
D_MODEL = 32

# "gpt_neox" adds attention and MLP in parallel (there is no resid_mid); "gpt_neox_sequential" does not.
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "phi3",
    "smollm3",
    "gpt2",
    "gpt_neox",
    "gpt_neox_sequential",
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Character level and 97 ids, so that it fits the tiny models.  The BOS id is 0 on purpose: code that asks
# `if tokenizer.bos_token_id` instead of `is not None` fails with it.
SPECIALS = ("<|im_start|>", "<|im_end|>", "<pad>", "<unk>")
CHARACTERS = [chr(c) for c in range(32, 127) if chr(c) not in "`~^"] + ["\n"]


def build_tiny(family: str, seed: int = 0, vocab_size: int = VOCAB) -> Any:
    """A random Hugging Face causal LM of `family`, fp32, eval mode: 3 layers, d 32, 4 heads, 97 ids, 64 positions.

    Weights are larger than a fresh initialisation's and norms and biases are not at 1 and 0, so that attention is not
    uniform and a forgotten norm or bias changes the numbers.  The global random state is left as it was.
    """
    import transformers as hf

    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": vocab_size}
    base: dict[str, Any] = {
        **ids,
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    kv: dict[str, Any] = {**base, "num_key_value_heads": 2}
    gemma: dict[str, Any] = {**kv, "head_dim": 8}
    gpt2: dict[str, Any] = {**ids, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64}
    recipes: dict[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**kv)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**kv)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**kv)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**kv, head_dim=8)),
        "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**gemma)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**gemma, sliding_window=8)),
        "gemma3_text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**gemma, sliding_window=8)),
        "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**kv)),
        "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**kv)),
        "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**kv)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
        "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**base, use_parallel_residual=True)),
        "gpt_neox_sequential": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**base, use_parallel_residual=False)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipes[family]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.normal_(0.0, 0.15)
    return model


def build_tiny_tokenizer(add_bos: bool = False, chat_template: str | None = CHATML) -> Any:
    """A fast character-level tokenizer of 97 ids: `<|im_start|>` 0 is BOS, `<|im_end|>` 1 EOS, `<pad>` 2, `<unk>` 3.

    `add_bos` makes `tokenizer(text)` put a BOS in front, as Llama's and Gemma's do; `chat_template=None` gives one
    that cannot chat.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIALS, *CHARACTERS])}
    assert len(vocab) == VOCAB
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", pair="<|im_start|> $A <|im_start|> $B", special_tokens=[("<|im_start|>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer
