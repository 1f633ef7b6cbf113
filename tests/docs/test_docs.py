"""The documentation is correct: links work, configs are valid, commands and names exist, the quickstart runs."""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import json5
import numpy as np
import pytest
from PIL import Image

from dataloaders import LOADERS
from models import MODELS
from tests.docs.markdown import ROOT, Block, anchors, blocks, commands, lines_of_shell, links, ours, pages, spans
from tests.running import run_here
from utils import config as configs
from utils import optim
from utils.config.schema import Config
from utils.losses import LOSSES

OURS = ("utils", "base", "models", "dataloaders", "trainer", "train", "test", "inference", "benchmarks", "tests")
# The words of a reader who wants to add something.
PLACEHOLDERS = ("mine", "Mine", "old", "test_X", "mine.json", "old.json")

each_page = pytest.mark.parametrize("page", pages())


# -- links ---------------------------------------------------------------------------------------------------------


@each_page
def test_links_lead_somewhere(page: str) -> None:
    dead = []
    for target in links(page):
        if re.match(r"[a-z]+://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path if path else ROOT / page).resolve()
        is_page = anchor and file.suffix == ".md"
        if not file.exists() or (is_page and anchor not in anchors(str(file.relative_to(ROOT)))):
            dead.append(target)
    assert dead == []


def test_the_index_lists_every_page() -> None:
    listed = {target.partition("#")[0] for target in links("docs/README.md")}
    there = {Path(page).name for page in pages() if page.startswith("docs/")} - {"README.md"}
    assert there <= listed


# -- configs -------------------------------------------------------------------------------------------------------


def json_blocks() -> list[Block]:
    found = (b for page in pages() for b in blocks(page) if b.language in ("json", "javascript", "jsonc", "json5"))
    return [b for b in found if "format_version" not in b.text]


def objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a block: a whole object, members without braces, or one of these per line."""
    for candidate in (text, "{" + text.rstrip().rstrip(",") + "}"):
        try:
            found = json5.loads(candidate)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
        return
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise AssertionError(f"not JSON: {text}")
    for line in lines:
        yield from objects(line)


def with_folders(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    raw = json.loads(json.dumps(raw))
    for section in ("train_loader", "val_loader", "test_loader"):
        args = (raw.get(section) or {}).get("args", {})
        if args.get("data_dir"):
            args["data_dir"] = str(folder)
    return raw


BASE: dict[str, Any] = {
    "name": "docs",
    "arch": {"type": "UNet", "args": {}},
    "train_loader": {"type": "Shapes", "args": {"val_split": 0.1}},
    "trainer": {"save_dir": "saved", "log_dir": "saved/runs"},
}


@pytest.mark.parametrize("block", json_blocks(), ids=str)
def test_configs_and_pieces_of_them_are_valid(block: Block, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = list(objects(block.text))
    assert found
    for value in found:
        value = with_folders(value, tmp_path)
        if "type" in value:
            kind = value["type"]
            if kind in MODELS:
                value = {"arch": value}
            elif kind in LOSSES:
                value = {"loss": value}
            else:
                value = {"train_loader": with_folders({"train_loader": value}, tmp_path)["train_loader"]}
        raw = BASE | value
        stages = ("train", "val", "test") if value.get("arch") and value.get("train_loader") else ("train",)
        if stages == ("train",):
            raw["trainer"] = {**BASE["trainer"], **value.get("trainer", {}), "val": False, "monitor": "off"}
        config = configs.resolve(raw, source=str(block), models=MODELS, loaders=LOADERS, stages=stages)
        assert config.name


def test_the_readme_contains_an_annotated_config_with_every_section() -> None:
    whole = [v for b in blocks("README.md") if b.language == "javascript" for v in objects(b.text)]
    assert len(whole) == 1
    fields = {name for name in Config.model_fields if name not in ("about", "tester")}
    assert set(whole[0]) == fields
    for section in ("predict", "trainer"):
        own = Config.model_fields[section].annotation.model_fields
        assert set(own) - set(whole[0][section]) <= {"count_ignored", "bias", "presence_fit"}, section


@cache
def known_keys() -> set[str]:
    """Return all names that can be keys of a config."""
    names: set[str] = set()

    def fields(section: Any) -> None:
        for name, field in section.model_fields.items():
            names.add(name)
            if inspect.isclass(field.annotation) and hasattr(field.annotation, "model_fields"):
                fields(field.annotation)

    fields(Config)
    names.update(optim.OPTIMIZERS.arguments("SGD").model_fields)
    for table in (MODELS, LOSSES, LOADERS):
        names.update(argument for name in table for argument in table.arguments(name).model_fields)
    return names | {"$schema", "out", "aux", *MODELS, *LOADERS, "Mine"}


@each_page
def test_keys_that_sentences_name_exist(page: str) -> None:
    keys = [key for span in spans(page) for key in re.findall(r'"([A-Za-z_$]+)":', span)]
    assert [key for key in keys if key not in known_keys()] == []


def overrides(page: str) -> list[str]:
    """Return the arguments of --set on a page, in commands and in sentences."""
    words = [c.words for c in commands(page)] + [tuple(s.split()) for s in spans(page) if s.startswith("--set ")]
    return [w[i + 1] for w in words for i, word in enumerate(w[:-1]) if word == "--set"]


@each_page
def test_overrides_are_accepted(page: str, root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for item in overrides(page):
        if item in ("PATH=VALUE", "path=value") or "=..." in item:
            continue
        if item.startswith(("arch.args.", "train_loader.args.", "val_loader.args.", "test_loader.args.", "loss.args.")):
            assert re.split(r"[.=]", item)[2] in known_keys(), item
            continue
        raw = configs.override(configs.read(root / "config.json"), [item])
        configs.resolve(raw, source=f"{page}: --set {item}", models=MODELS, loaders=LOADERS, stages=())


# -- commands ------------------------------------------------------------------------------------------------------


@cache
def help_of(start: tuple[str, ...]) -> str:
    return execute_here([*start, "--help"], ROOT)


def parser_of(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the part of a command that has its own --help: script, module, or module and subcommand."""
    start = words[:2] if words[0] == "-m" else words[:1]
    rest = words[len(start) :]
    subcommands = re.search(r"^\s+\{([\w,-]+)\}", help_of(start), re.MULTILINE)
    if rest and not rest[0].startswith("-") and subcommands and rest[0] in subcommands[1].split(","):
        return (*start, rest[0])
    return start


def options(help_text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(--?[A-Za-z][\w-]*)", help_text))


@each_page
def test_commands_exist_and_take_their_options(page: str) -> None:
    for command in commands(page):
        words = ours(command)
        if words is None or "..." in words[:2]:
            continue
        if words[0] == "-m":
            assert importlib.util.find_spec(words[1]) is not None, command
        else:
            assert (ROOT / words[0]).is_file(), command
        start = parser_of(words)
        given = [w.partition("=")[0] for w in words[len(start) :] if re.match(r"--?[A-Za-z]", w)]
        unknown = set(given) - options(help_of(start))
        assert not unknown, f"{command}: {start} does not know {unknown}"


@each_page
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = {
        word for c in commands(page) if c.words[0] == "make" for word in c.words[1:] if re.fullmatch("[a-z-]+", word)
    }
    assert asked <= targets


def test_options_that_sentences_and_tables_name_exist() -> None:
    called = [words for page in pages() for command in commands(page) if (words := ours(command))]
    starts = {parser_of(words) for words in called if "..." not in words[:2]}
    known = {"--help"}.union(*(options(help_of(start)) for start in starts))
    for page in pages():
        for span in spans(page):
            if re.fullmatch(r"--?[a-z][\w-]*( .*)?", span):
                assert span.split()[0].partition("=")[0] in known, f"{page}: {span}"


# -- Python --------------------------------------------------------------------------------------------------------


def python_blocks() -> list[Block]:
    return [b for page in pages() for b in blocks(page) if b.language == "python"]


@pytest.mark.parametrize("block", python_blocks(), ids=str)
def test_python_compiles_and_imports_what_exists(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in OURS:
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            for alias in node.names:
                resolve(f"{node.module}.{alias.name}")


def runs_alone(block: Block) -> bool:
    """Return whether a block uses only files and names that it creates."""
    tree = ast.parse(block.text)
    nodes = list(ast.walk(tree))
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    made = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    imported = [a for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names]
    made |= {a.asname or a.name.split(".")[0] for a in imported}
    return not re.search(r'"[^"]*[./][^"]*"', block.text) and used <= made | set(vars(builtins))


@pytest.mark.parametrize("block", [b for b in python_blocks() if runs_alone(b)], ids=str)
def test_python_without_files_runs(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names or ([a.name for a in node.names] if isinstance(node, ast.Import) else []):
            if name and name.split(".")[0] not in OURS:
                pytest.importorskip(name.split(".")[0])
    exec(compile(block.text, str(block), "exec"), {"__name__": "docs"})


def resolve(dotted: str) -> Any:
    """Import the longest module of a dotted name and look up the rest; AssertionError if it does not exist."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            assert hasattr(found, part), f"{dotted}: {'.'.join(parts[:end])} has no {part}"
            found = getattr(found, part)
        return found
    raise AssertionError(f"{dotted}: no such module")


@each_page
def test_files_and_names_that_sentences_mention_exist(page: str) -> None:
    for span in spans(page):
        if any(place in re.split(r"[./\s]", span) for place in PLACEHOLDERS):
            continue
        if re.fullmatch(r"(utils|base|models|dataloaders|tests|benchmarks|configs|docs|\.ci)/[\w./-]+", span):
            assert (ROOT / span).exists(), span
        elif re.fullmatch(r"(train|test|inference|trainer)\.py", span):
            assert (ROOT / span).is_file()
        elif re.fullmatch(r"(utils|base|models|dataloaders)(\.\w+)+", span):
            resolve(span)


def test_contributing_names_what_is_in_the_files() -> None:
    """Each name in a row of its tables exists in one of the files of that row."""
    recipes = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Adding something")[2]
    checked = 0
    for row in re.findall(r"^\| .*", recipes, re.MULTILINE):
        named = re.findall(r"`([\w./]+)`", row)
        files = [ROOT / name for name in named if "/" in name and (ROOT / name).is_file()]
        files += [path for name in named if name.endswith("/") for path in (ROOT / name).glob("*.py")]
        code = "\n".join(path.read_text(encoding="utf-8") for path in files)
        for name in named if files else ():
            if "/" not in name and not (ROOT / name).exists():
                assert re.search(rf"\b{name.rpartition('.')[2]}\b", code), f"{name}: {row}"
                checked += 1
    assert checked > 20


# -- the quickstart and the page about own data, run ---------------------------------------------------------------

TINY = """
    trainer.epochs=1 trainer.limit_batches=2 arch.args.width=4 n_gpu=0
    train_loader.args.length=8 train_loader.args.size=48 train_loader.args.batch_size=4
    val_loader.args.length=4 val_loader.args.size=48 test_loader.args.length=4 test_loader.args.size=48
"""
TINY_FOLDER = """
    trainer.epochs=1 trainer.limit_batches=2 arch.args.width=4 n_gpu=0
    train_loader.args.crop_size=32 train_loader.args.batch_size=4
    train_loader.args.num_workers=0 val_loader.args.num_workers=0
"""


def execute(words: list[str], folder: Path) -> str:
    """Run ``python`` with ``words`` in a folder as a user would, with one thread; return what it printed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    if words[0] != "-m":
        words = [str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def execute_here(words: list[str], folder: Path) -> str:
    """Do the same as :func:`execute` in this process; return what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = run_here(words, folder)
    assert code == 0, f"{shlex.join(words)}: exit code {code}\n{printed.getvalue()}"
    return printed.getvalue()


def sets(items: str) -> list[str]:
    return [word for item in items.split() for word in ("--set", item)]


def given(page: str, pattern: str) -> list[str]:
    """Return the words of the one command of a page that matches, without ``python``."""
    found = [c for c in commands(page) if re.search(pattern, " ".join(c.words))]
    assert found, f"{page} gives no command like {pattern}"
    words = ours(found[0])
    assert words is not None
    return list(words)


def in_run(words: list[str], run: Path) -> list[str]:
    """Replace a folder that contains MM-DD_HH-MM by the folder of the run."""
    return [re.sub(r"saved/\S*MM-DD_HH-MM", str(run), word) for word in words]


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path) -> None:
    page = "docs/quickstart.md"
    (tmp_path / "config.json").write_text((ROOT / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    execute([*given(page, r"train\.py --config config\.json --set"), *sets(TINY)], tmp_path)
    (run,) = (tmp_path / "saved").glob("UNet_Shapes/*/*/*-*")
    assert {p.name for p in run.iterdir()} >= {"best_model.pth", "latest.pth", "config.json", "log.csv", "log.jsonl"}
    assert list((tmp_path / "saved" / "runs").rglob("events.out.tfevents.*"))

    execute_here([*in_run(given(page, r"train\.py -r \S*latest\.pth"), run), *sets("trainer.epochs=2")], tmp_path)
    assert (run / "log.csv").read_text().count("\n") == 3
    execute_here([*given(page, "-r auto"), *sets(TINY), *sets("trainer.epochs=3")], tmp_path)
    assert (run / "log.csv").read_text().count("\n") == 4

    printed = execute_here(in_run(given(page, r"test\.py .*-p all"), run), tmp_path)
    assert "## Comparison" in printed
    results = json.loads((run / "results.json").read_text())
    assert set(results["procedures"]) >= {"T", "max", "max_present", "rankdice"}  # T_tuned: only after a fit
    assert (run / "per_image.csv").is_file()

    shapes = given(page, "dataloaders.shapes")
    execute_here([*shapes[: shapes.index("--n")], "--n", "4", "--size", "48"], tmp_path)
    execute_here(in_run(given(page, r"inference\.py"), run), tmp_path)
    masks = sorted((tmp_path / "masks").glob("*.png"))
    photos = sorted((tmp_path / "data/shapes/VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))
    assert [m.stem for m in masks] == [p.stem for p in photos]
    assert Image.open(masks[0]).size == (48, 48)
    assert (tmp_path / "masks" / f"{masks[0].stem}_overlay.jpg").is_file()


@pytest.mark.slow
def test_the_page_about_own_data_runs(tmp_path: Path) -> None:
    page = "docs/own-data.md"
    random = np.random.default_rng(0)
    for i in range(10):
        size = (40 + i, 56)  # real images differ in size
        for folder, pixels in (
            ("images", random.integers(0, 256, (*size, 3), np.uint8)),
            ("masks", np.kron(random.integers(0, 3, (size[0], 7)), np.ones((1, 8))).astype(np.uint8)),
        ):
            path = tmp_path / "data" / "mine" / folder / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (block,) = (b for b in blocks(page) if b.language == "json" and '"arch"' in b.text and '"trainer"' in b.text)
    (tmp_path / "mine.json").write_text(block.text, encoding="utf-8")
    printed = execute_here(given(page, "utils.config check"), tmp_path)
    assert json.loads(printed)["name"] == "mine"
    printed = execute_here(given(page, "dataloaders check"), tmp_path)
    assert "no file with a problem" in printed
    assert (tmp_path / "data_check.png").is_file()
    execute_here([*given(page, r"train\.py"), *sets(TINY_FOLDER)], tmp_path)
    (run,) = (tmp_path / "saved").glob("mine/*/*/*-*")
    assert "road" in execute_here(in_run(given(page, r"test\.py"), run), tmp_path)
    (tmp_path / "data" / "mine" / "images").rename(tmp_path / "new_images")
    execute_here(in_run(given(page, r"inference\.py"), run), tmp_path)
    assert len(list((tmp_path / "masks").glob("*.png"))) == 10


def test_pages_contain_commands() -> None:
    """Otherwise the tests above would pass on pages that they cannot read."""
    found = [c for page in pages() for c in commands(page) if ours(c) is not None]
    assert len(found) > 60
    scripts = {ours(c)[0] for c in found}
    assert scripts >= {"train.py", "test.py", "inference.py", "-m"}
    assert len(json_blocks()) > 5
    assert any(list(lines_of_shell(page)) for page in pages())
