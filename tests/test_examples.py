"""The documentation is true: snippets run, commands parse, names exist, links lead somewhere, tables are right."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import build_tiny, build_tiny_tokenizer
from helpers.pages import EXAMPLES, FENCE, fenced, write_text_and_pairs
from helpers.paths import ROOT, SOURCE, TESTS
from unweave.cli import bridge
from unweave.cli.app import build_app, main
from unweave.cli.convert import convert
from unweave.cli.fields import leaves
from unweave.cli.runs import runs
from unweave.cli.serve import serve
from unweave.cli.stages import GROUPS, stages
from unweave.core.errors import UnweaveError
from unweave.core.site import LAYER_POINTS, MODEL_POINTS, Site
from unweave.core.spec import read_mapping
from unweave.judge import base as judge_base
from unweave.judge.scripted import Scripted
from unweave.lm.model import LM
from unweave.methods.train import spec as train_spec
from unweave.methods.train.spec import TrainSpec

PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "src/unweave/papers/README.md",
]  # fmt: skip


def snippets(page: Path) -> list[str]:
    """The Python blocks of a page, but for files to be added, which ``test_adding.py`` puts in their places."""
    return [code for code in fenced(page, "python") if not code.startswith(("# src/", "# tests/"))]


def inline(page: Path) -> list[str]:
    """What stands between single backticks outside of code blocks."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def lines(page: Path) -> list[str]:
    """The command lines of a page's shell blocks, comments taken off."""
    found = [line for block in fenced(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [bare for line in found if (bare := re.sub(r"(^|\s)#.*", "", line).strip())]


# -- commands ---------------------------------------------------------------------------------------------------------


class Understood(Exception):
    """Stops a command once its Spec is made."""


def understand(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses a command line as the real one and makes its Spec; a configuration file is taken as empty."""

    def execute(stage: Any, config: Path | None, overrides: dict[str, Any], runs: Path, machine: bool) -> None:
        stage.spec.from_file(None, overrides)
        raise Understood

    monkeypatch.setattr(bridge, "execute", execute)
    command, bound, _ = build_app().parse_args(shlex.split(line)[1:], print_error=False, exit_on_error=False)
    if command.__name__ == "command":
        with pytest.raises(Understood):
            command(*bound.args, **bound.kwargs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in lines(page):
        program = line.split()[0]
        if program in ("unweave", "torchrun"):
            understand(line[line.index("unweave") :], monkeypatch)
        elif program == "python":
            text = (ROOT / line.split()[1]).read_text(encoding="utf-8")
            assert all(f'"{option}"' in text or f'"{option[2:]}"' in text for option in options_of(line)), line
        elif program == "make":
            check_target(line)
        else:
            assert program in ("export", ".ci/run"), f"who checks this? {line}"
    for code in inline(page):
        if code.startswith("unweave "):
            assert set(options_of(code)) <= options(), code
            first, inner = code.split()[1], code.split()[2:3]
            assert first in (
                *stages(),
                *GROUPS,
                "models",
                "runs",
                "dedup",
                "convert",
                "annotate",
                "serve",
                "COMMAND",
                "--help",
            ), code
            assert first not in GROUPS or not inner or f"{first} {inner[0]}" in stages(), code
        elif re.match(r"make \w", code):
            check_target(code)


def options_of(line: str) -> list[str]:
    return [word for word in line.split() if re.match(r"--[a-z]", word)]


def check_target(line: str) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    target = next(word for word in line.split()[1:] if "=" not in word)
    assert target in targets, line


@cache
def options() -> frozenset[str]:
    """Every option of every command, and of the scripts in benchmarks and examples."""
    found = {"--runs", "--json", "--help", "--config", "--version"}
    for stage in stages().values():
        found |= {f"--{leaf.name.replace('_', dash)}" for leaf in leaves(stage.spec) for dash in "_-"}
        found |= {f"--no-{leaf.name}" for leaf in leaves(stage.spec) if leaf.is_flag}
    found |= {f"--{name}" for command in (convert, runs, serve) for name in inspect.signature(command).parameters}
    for script in (*EXAMPLES, *(ROOT / "benchmarks").glob("*.py")):
        text = script.read_text(encoding="utf-8")
        found |= set(re.findall(r'add_argument\("(--[\w-]+)"', text))
        found |= {f"--{name}" for name in re.findall(r'\("(\w+)", \d+\)', text)}
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_and_fields_that_are_named_exist(page: Path) -> None:
    fields = {leaf.name for leaf in leaves(TrainSpec)}
    groups = {name.rpartition(".")[0] for name in fields}
    for code in inline(page):
        if code.startswith("--"):
            assert code.split()[0] in options(), code
        elif re.fullmatch(r"(data|stream|sae)(\.[a-z_0-9]+)+", code) and not hasattr_of("sae", code):
            assert code in fields | groups, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configurations_make_specs(page: Path, tmp_path: Path) -> None:
    for language in ("yaml", "toml"):
        for block in fenced(page, language):
            path = tmp_path / f"file.{language}"
            path.write_text(block)
            assert TrainSpec.from_dict(read_mapping(path)) != TrainSpec()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_extras_that_are_named_are_declared(page: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set(re.findall(r"unweave\[(\w+)\]", page.read_text(encoding="utf-8")))
    assert named <= set(project["optional-dependencies"])


def test_what_does_not_exist_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ("unweave train --sae.kk 3", "unweave steer --latent 3", "unweave trane"):
        with pytest.raises(Exception, match=r"kk|sae|trane"):
            understand(line, monkeypatch)
    assert "--sae.kk" not in options() and "--sae.k" in options()
    for code in (
        "from unweave.lm.model import Nothing",
        "lm.tapps()",
        "lm.generate('a', editt=1)",
        "sae.clamp({}, at=1)",
    ):
        assert list(problems(ast.parse(code)))


# -- snippets ---------------------------------------------------------------------------------------------------------

HOMES = {
    "lm": "unweave.lm.model:LM",
    "sae": "unweave.sae.module:SAE",
    "tokens": "unweave.lm.model:Tokens",
    "records": "unweave.latents.records:Records",
    "trained": "unweave.core.run:Run",
    "trainer": "unweave.methods.train.trainer:SAETrainer",
}
"""What the snippets' usual names stand for."""


@cache
def home_of(name: str) -> Any:
    module, _, cls = HOMES[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def hasattr_of(name: str, code: str) -> bool:
    """Whether ``sae.policy`` and the like is an attribute, set in the class or in its ``__init__``."""
    cls, attribute = home_of(name), code.split(".")[1].partition("(")[0]
    return (
        hasattr(cls, attribute)
        or attribute in getattr(cls, "__annotations__", {})
        or f"self.{attribute}" in inspect.getsource(cls)
    )


def imported(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """(local name, object) of all that a snippet imports from this package; None where there is no such thing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "unweave":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError:
                        yield alias.name, None
                        continue
                yield alias.asname or alias.name, getattr(module, alias.name)


def problems(tree: ast.AST) -> Iterator[str]:
    """Imports, attributes and keywords of a snippet that do not exist."""
    names = dict(imported(tree))
    yield from (f"import of {name}" for name, value in names.items() if value is None)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = node.value.id
            if owner in HOMES and not hasattr_of(owner, f"{owner}.{node.attr}"):
                yield f"{owner}.{node.attr}"
        if isinstance(node, ast.Call) and (called := target(node.func, names)) is not None:
            known = inspect.signature(called).parameters
            yield from (f"{ast.unparse(node.func)}({k.arg}=)" for k in node.keywords if k.arg and k.arg not in known)


def target(function: ast.expr, names: dict[str, Any]) -> Any:
    """The function or class that is called, where it can be told."""
    if isinstance(function, ast.Name):
        return names.get(function.id)
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        owner = function.value.id
        found = getattr(home_of(owner) if owner in HOMES else names.get(owner), function.attr, None)
        return found if callable(found) else None
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_snippets_name_what_exists(page: Path) -> None:
    for snippet in snippets(page):
        compile(snippet, str(page), "exec")
        assert list(problems(ast.parse(snippet))) == []


SMALL = {
    "data": {"tokens": 4000, "heldout_tokens": 500, "pack": {"context": 48}},
    "sae": {"expansion": 40, "k": 24, "tokens": 8000, "batch": 500},
}
"""A training that takes a second, with so many latents (1,280) that those which the pages name are among them."""


def small(asked: dict[str, Any], home: Path) -> TrainSpec:
    """What a page asks for, of a tiny model and little text."""
    data = SMALL["data"] | {"sources": [{"path": str(home / "text")}]}
    return TrainSpec.from_dict(TrainSpec(**asked).to_dict() | SMALL | {"model": str(home / "model"), "data": data})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which what the pages name is there: a model of ten blocks, an SAE, its records, pairs, text."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("pages")
    config = build_tiny("llama").config
    config.num_hidden_layers = 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)
    model.save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    write_text_and_pairs(folder)
    (folder / "mine.jsonl").write_text((folder / "pairs.jsonl").read_text())
    spec, runs = folder / "small.yaml", folder / "runs"
    spec.write_text(json.dumps(small({"sites": ("resid_post.9",)}, folder).to_dict()))
    sae = runs / "train-0123456789ab" / "sae"
    for stage, options in (("train", [str(spec)]), ("latents", ["--sae", str(sae), "--tokens", "3000"])):
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([stage, *options, "--runs", str(runs)]) == 0
        (made,) = runs.glob(f"{stage}-*")
        (runs / f"{stage}-0123456789ab").symlink_to(made)
    return folder


@pytest.fixture
def as_a_reader(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That folder; the tiny model whatever name is loaded, a small training whatever is asked, a scripted judge."""
    load = LM.load
    monkeypatch.setattr(LM, "load", lambda source, **options: load(str(home / "model"), device="cpu"))
    monkeypatch.setattr(train_spec, "TrainSpec", lambda **asked: small(asked, home))
    judge = Scripted(lambda conversation: "name: [[a word]], score: [[3]]")
    monkeypatch.setattr(judge_base, "open_judge", lambda spec, folder: judge)
    monkeypatch.chdir(home)


@pytest.mark.usefixtures("as_a_reader")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_snippets_run(page: Path) -> None:
    """As they stand: nothing in their text is changed."""
    text = page.read_text(encoding="utf-8")
    for snippet in snippets(page):
        above = "\n" * text[: text.index(snippet)].count("\n")  # so that an error names the page's own line
        exec(compile(above + snippet, str(page), "exec"), {"__name__": "snippet"})


# -- links and tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", text):
        if not re.match(r"https?://", link):
            path, _, anchor = link.partition("#")
            target_page = page.parent / path if path else page
            assert target_page.exists(), link
            assert not anchor or anchor in anchors(target_page), link


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ("CHANGELOG.md", "adding.md")], ids=lambda page: page.name
)
def test_source_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"(?<![\w/.-])[\w/-]+\.py\b", page.read_text(encoding="utf-8")):
        places = (ROOT, SOURCE, ROOT / "examples", page.parent)
        anywhere = "/" not in name and any(any(tree.rglob(name)) for tree in (SOURCE, TESTS))  # as "a method's spec.py"
        assert anywhere or any((place / name).is_file() for place in places), name


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have in links."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(page: Path, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading, without its head."""
    after = page.read_text(encoding="utf-8").split(heading, 1)[1]
    rows = [
        line for line in re.split(r"\n\n(?!\|)", after[after.index("\n|") + 1 :])[0].splitlines() if line[:1] == "|"
    ]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_table_of_sites_is_right() -> None:
    found = {row[0].strip("`"): row[-1] for row in table(ROOT / "docs" / "library.md", "## Sites")}
    for point in (*LAYER_POINTS, *MODEL_POINTS):
        site = Site(point, 3 if point in LAYER_POINTS else None)
        try:
            name = f"`{site.to_transformer_lens().replace('blocks.3', 'blocks.N')}`"
        except UnweaveError:
            name = "none"
        assert found.pop(point if site.layer is None else f"{point}.N") == name
    assert list(found) == ["path.MODULE"]


def test_every_metric_is_explained() -> None:
    from unweave.sae.measure.metrics import CoreMetrics

    measure = (ROOT / "docs" / "measure.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", measure))
    assert set(CoreMetrics.__dataclass_fields__) - {"firing_counts"} <= named
