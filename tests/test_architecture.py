"""Rules for the code: who imports whom, nothing heavy before it is needed, docstrings, no paths of one machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("utils", "base", "models", "dataloaders")
SCRIPTS = ("train.py", "test.py", "inference.py")
EVERYTHING = {*ROOMS, "trainer", "tests", "benchmarks", "train", "test", "inference"}

# Room -> the rooms it may import from.
MAY_IMPORT = {
    "utils": {"utils"},
    "base": {"base", "utils"},
    "models": {"models", "base", "utils"},
    "dataloaders": {"dataloaders", "base", "utils"},
    "trainer": {"base", "utils"},
    "train": EVERYTHING - {"tests", "benchmarks", "test", "inference", "train"},
    "test": EVERYTHING - {"tests", "benchmarks", "test", "inference", "train"},
    "inference": EVERYTHING - {"tests", "benchmarks", "test", "inference", "train"},
    "benchmarks": EVERYTHING - {"tests"},
}


@cache
def sources() -> dict[str, ast.Module]:
    """Return the code of the project by path, without the tests."""
    paths = [*ROOT.glob("*.py"), *(p for room in (*ROOMS, "benchmarks") for p in ROOT.glob(f"{room}/**/*.py"))]
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text(encoding="utf-8")) for p in sorted(paths)}


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield every module that is imported anywhere below a node, by statement or by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "import_extra",
            "__import__",
        ):
            name = node.args[0] if node.args else None
            yield (name.value if isinstance(name, ast.Constant) else "?"), node


def commands(tree: ast.Module) -> set[ast.AST]:
    """Return all nodes that only run as a command: inside ``main()`` or below ``if __name__ == "__main__"``."""
    found: set[ast.AST] = set()
    for node in tree.body:
        is_main = isinstance(node, ast.FunctionDef) and node.name == "main"
        is_guard = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
        if is_main or is_guard:
            found.update(ast.walk(node))
    return found


def may(path: str, module: str, node: ast.AST, of_commands: set[ast.AST]) -> bool:
    if path in ("utils/registry.py", "utils/errors.py", "models/external.py") and module == "?":
        return True  # these import what a table, a caller of import_extra, or the user's config names
    if path == "utils/checkpoint/__init__.py" and isinstance(node, ast.Call):
        return module in ("models", "dataloaders", "models.upstream")  # a checkpoint names its model
    if path.endswith("/__main__.py") or room_of(path) == "utils" and node in of_commands:
        return True  # `python -m utils.config` imports from all packages, like the scripts
    return module.split(".")[0] in MAY_IMPORT[room_of(path)]


@pytest.mark.parametrize("path", sources())
def test_rooms_import_only_what_they_may(path) -> None:
    tree = sources()[path]
    of_commands = commands(tree)
    for module, node in imports(tree):
        if module == "?" or module.split(".")[0] in EVERYTHING:
            assert may(path, module, node, of_commands), f"{path}:{node.lineno} imports {module}"


# The rooms of `utils` from the ground up: each may import those before it, and every room that is not named here
# (small helpers, losses, schedules), which in turn import none of these.
FLOORS = (
    *("rankdice", "config", "images", "presence", "predict", "metrics", "checkpoint", "evaluation", "report"),
    *("predictor", "inference", "export", "demo"),
)
# Imports that still run upwards; the list may only become shorter.
UPWARD: set[tuple[str, str]] = set()


def utils_imports() -> Iterator[tuple[str, str]]:
    """Yield (file, room of utils that it imports), without the commands, which are scripts."""
    for path in sources():
        if room_of(path) == "utils" and not path.endswith("/__main__.py"):
            yield from ((path, room_in_utils(file)) for file in modules_imported(path) if file.startswith("utils/"))


def room_in_utils(path: str) -> str:
    return path.split("/")[1].removesuffix(".py")


def test_rooms_of_utils_import_only_rooms_below_them() -> None:
    upward = set()
    for path, name in utils_imports():
        room = room_in_utils(path)
        own = FLOORS.index(room) if room in FLOORS else -1
        if room != name and name in FLOORS and FLOORS.index(name) > own:
            upward.add((path, name))
    assert not upward - UPWARD, "a room imports one above it"
    assert not UPWARD - upward, "no longer imported: take it off the list"


def test_utils_has_at_most_thirty_rooms() -> None:
    assert len({room_in_utils(path) for path in sources() if path.startswith("utils/")} - {"__init__"}) <= 30


# Files that still import each other; the list may only become shorter.
IN_CIRCLES: set[str] = set()


def modules_imported(path: str) -> set[str]:
    """Return our files that a file imports anywhere."""
    names = set()
    for node in ast.walk(sources()[path]):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.split("/")[: -node.level]
                base = ".".join([*package, *([base] if base else [])])
            names |= {name if known(name := f"{base}.{alias.name}") else base for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {file for name in names for file in known(name)} - {path}


def known(module: str) -> set[str]:
    """Return the file of a module, if it is ours."""
    return {f"{module.replace('.', '/')}{end}" for end in (".py", "/__init__.py")} & set(sources())


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {path: modules_imported(path) for path in sources()}
    while leaves := [path for path, targets in graph.items() if not targets]:
        for path in leaves:
            del graph[path]
        graph = {path: targets - set(leaves) for path, targets in graph.items()}
    # What is left are the circles, and the files that lead to them.
    while tops := [p for p in graph if not any(p in targets for targets in graph.values())]:
        for path in tops:
            del graph[path]
    assert set(graph) == IN_CIRCLES, graph


@pytest.mark.parametrize("path", sources())
def test_imports_are_explicit(path) -> None:
    for module, node in imports(sources()[path]):
        if not path.startswith("utils/rankdice/"):  # a folder that can be copied as it is
            assert not module.startswith("."), f"{path}:{node.lineno}: a relative import"
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{path}:{node.lineno}: a star import"


def test_the_rules_notice_what_they_forbid() -> None:
    tree = ast.parse("def f():\n    from models import build\n    import_module('dataloaders')\nfrom x import *")
    found = list(imports(tree))
    assert {module for module, _ in found} == {"models", "dataloaders", "x"}
    assert not any(may("utils/new.py", module, node, set()) for module, node in found if module != "x")
    assert not may("models/new.py", "dataloaders.voc", tree, set())
    assert may("trainer.py", "base.base_trainer", tree, set())


@pytest.mark.parametrize("path", [p for p in sources() if room_of(p) != "benchmarks"])
def test_public_things_have_docstrings(path) -> None:
    tree = sources()[path]
    if tree.body:
        assert ast.get_docstring(tree), f"{path}: no module docstring"
    for owner, node in public(tree):
        assert ast.get_docstring(node), f"{path}:{node.lineno}: {owner}{node.name} has no docstring"


def public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield "", node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                is_setter = any(getattr(d, "attr", "") == "setter" for d in getattr(inner, "decorator_list", ()))
                if isinstance(inner, kinds) and not inner.name.startswith("_") and not is_setter:
                    yield f"{node.name}.", inner


@pytest.mark.parametrize("path", sources())
def test_public_functions_state_their_types(path) -> None:
    for owner, node in public(sources()[path]):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not untyped, f"{path}:{node.lineno}: {owner}{node.name}: {untyped}"
            assert node.returns is not None, f"{path}:{node.lineno}: {owner}{node.name} returns what?"


# -- what is loaded before it is needed ------------------------------------------------------------------------


# utils.config, utils.predict and utils.lr_scheduler are missing: their packages import torch before __main__ runs.
MODULES = ("dataloaders", "models", "utils.demo", "utils.export")


@pytest.mark.parametrize(
    "arguments", [*([script] for script in SCRIPTS), *(["-m", name] for name in MODULES)], ids=" ".join
)
def test_help_does_not_wait_for_torch(arguments) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert "usage:" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    heavy = {"torch", "torchvision", "cv2", "numpy", "tensorboard", "PIL.Image"} & loaded
    assert not heavy, f"--help imports {sorted(heavy)}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "4000 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None PASSIVE")],
)
def test_every_room_tells_idle_threads_to_sleep_before_torch_is_imported(given, expected) -> None:
    """Torch reads it once, when it is imported; each room imports utils first."""
    code = "import os, sys; import dataloaders, models, base, utils; assert 'torch' not in sys.modules; "
    code += "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


def test_tables_import_nothing_until_they_are_asked() -> None:
    code = "import sys, models, dataloaders; print(sorted(m for m in ('torch', 'cv2', 'numpy') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [p for p in sources() if room_of(p) != "benchmarks"])
def test_imports_inside_functions_give_their_reason(path) -> None:
    """A comment on the line of the import, or on the line above it."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    for _, function in functions(path):
        inner = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
        explained: set[int] = set()  # one comment is enough for imports on consecutive lines
        for line in sorted(node.lineno for node in inner):
            above = lines[line - 2].strip()
            if "#" in lines[line - 1] or above.startswith("#") or line - 1 in explained:
                explained.add(line)
            assert line in explained, f"{path}:{line}: why is this import inside a function?"


# -- functions -------------------------------------------------------------------------------------------------

MOST_ARGUMENTS, MOST_LINES = 6, 60
# Arguments of these constructors are fields of the config: argument models are made from their signatures.
NAMED_IN_CONFIGS = ("models/", "dataloaders/", "utils/losses/", "base/base_dataset.py", "base/base_dataloader.py")
# Calls of the documented Python interface, and functions still to be shortened; the list may only become shorter.
MANY_ARGUMENTS = {
    "utils/predictor.py: Predictor.__init__",
    "utils/rankdice/__init__.py: rank_dice",
}


def functions(path: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield all functions and methods of a file with their names, those inside of functions too."""
    for node in ast.walk(sources()[path]):
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{f.name}", f) for f in node.body if isinstance(f, ast.FunctionDef))
        elif isinstance(node, ast.Module | ast.FunctionDef | ast.If | ast.With | ast.Try):
            yield from ((f.name, f) for f in node.body if isinstance(f, ast.FunctionDef))


def test_the_list_of_functions_with_many_arguments_is_up_to_date() -> None:
    long = set()
    for path in sources():
        for name, function in functions(path):
            names = {a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)}
            if len(names - {"self", "cls"}) > MOST_ARGUMENTS:
                long.add(f"{path}: {name}")
    assert long >= MANY_ARGUMENTS, "these take few arguments now: take them off the list"


@pytest.mark.parametrize("path", [p for p in sources() if room_of(p) != "benchmarks"])
def test_functions_are_short_and_take_few_arguments(path) -> None:
    for name, function in functions(path):
        arguments = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        count = len([a for a in arguments if a not in ("self", "cls")])
        of_config = name.endswith(".__init__") and path.startswith(NAMED_IN_CONFIGS)
        allowed = of_config or f"{path}: {name}" in MANY_ARGUMENTS
        assert count <= MOST_ARGUMENTS or allowed, f"{path}:{function.lineno}: {name} takes {count} arguments"
        docstring = function.body[0] if ast.get_docstring(function) else None
        lines = function.end_lineno - function.lineno + 1  # type: ignore[operator]
        lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0  # type: ignore[operator]
        assert lines <= MOST_LINES, f"{path}:{function.lineno}: {name} has {lines} lines"


# -- files -----------------------------------------------------------------------------------------------------


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_place_of_one_machine() -> None:
    """Paths on one person's machine are useless to others."""
    place = re.compile(r"(?<![\w.~-])/(?:" + "|".join(("work", "root", "home", "Users", "mnt")) + r")/[\w.-]+")
    allowed = re.compile(r"/(?:home|mnt)/(?:me|you|user|data)\b")  # made up, in examples
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            found = [m.group() for m in place.finditer(line) if not allowed.match(m.group())]
            assert not found, f"{path.relative_to(ROOT)}:{number}: {found}"


BRITISH = re.compile(
    r"colour|grey|centre|neighbour|behaviour|(?:un)?labelle[dr]|labelling|(?:normal|initial|summar|recogn)is[ei]", re.I
)


def test_text_and_names_have_american_spelling() -> None:
    """With both spellings, one thing would have two names."""
    foreign = {"unlabelled"}  # a class name in a public data set
    for path in tracked():
        if path.suffix in (".py", ".md", ".html") and path != Path(__file__).resolve():
            found = set(BRITISH.findall(path.read_text(encoding="utf-8"))) - foreign
            assert not found, f"{path.relative_to(ROOT)}: {sorted(found)}"


def test_what_runs_leave_behind_is_not_tracked() -> None:
    for path in tracked():
        assert path.suffix not in (".pth", ".pyc", ".npz.tmp"), path
        assert path.relative_to(ROOT).parts[0] not in ("saved", "outputs", ".venv"), path


def test_files_stay_short_enough_to_read() -> None:
    """A longer file usually contains two ideas."""
    for path in sources():
        lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
        assert lines < 450, f"{path}: {lines} lines"


def test_scripts_read_like_recipes() -> None:
    """train.py and test.py build what the config names; no model, data set or loss is named in them."""
    from dataloaders import LOADERS
    from models import MODELS
    from utils.losses import LOSSES

    for script in ("train.py", "test.py", "trainer.py", "base/base_trainer.py"):
        words = {
            n.value for n in ast.walk(sources()[script]) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        words |= {n.id for n in ast.walk(sources()[script]) if isinstance(n, ast.Name)}
        assert not words & {*MODELS, *LOADERS, *LOSSES}, script
