"""Read the Markdown pages: links, headings, code and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Block:
    """A fenced code block: where it begins, its language and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command on a page: its place and its words."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def pages() -> list[str]:
    """Return the paths of all pages, relative to the root."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    return sorted(str(p.relative_to(ROOT)) for p in found)


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """Return the fenced blocks of a page."""
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL):
        line = text_of(page).count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match[1], match[2]))
    return tuple(found)


@cache
def prose(page: str) -> str:
    """Return a page without its fenced blocks and its comments."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def spans(page: str) -> list[str]:
    """Return the inline code of a page."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def links(page: str) -> list[str]:
    """Return the targets of links and pictures."""
    outside = re.sub(r"(?<!`)`[^`]+`(?!`)", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", outside)


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    seen: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = seen.get(slug, 0)
        seen[slug] = count + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


PROGRAMS = r"(python3?|torchrun|srun|sbatch|make|pip|tensorboard|pre-commit|docker|git|\S+/python)"


def lines_of_shell(page: str) -> Iterator[str]:
    """Yield what a reader might type: lines of shell blocks and indented blocks, and inline code that is a command."""
    for block in blocks(page):
        lines = block.text.replace("\\\n", " ").splitlines()
        if block.language in ("bash", "sh", "console"):
            yield from lines
        elif not block.language:
            yield from (line for line in lines if re.match(rf"{PROGRAMS} [\w./-]", line))
    for line in prose(page).splitlines():
        if re.match(rf"    {PROGRAMS} [\w./-]", line):
            yield line
    for span in spans(page):
        if re.match(rf"{PROGRAMS} [\w./-]", span):
            yield span


OTHERS = {"venv", "pip", "pytest", "ruff", "mypy"}  # modules of `python -m` that are not part of this project


def ours(command: Command) -> tuple[str, ...] | None:
    """Return a command's words, starting with the script or module; None if it is not part of this project."""
    words = list(command.words)
    if words[0] in ("srun", "torchrun"):
        script = next((i for i, w in enumerate(words) if w.endswith(".py")), None)
        return tuple(words[script:]) if script is not None else None
    if not re.fullmatch(r"(.*/)?python3?", words[0]):
        return None
    if len(words) > 2 and words[1] == "-m":
        return None if words[2] in OTHERS else ("-m", *words[2:])
    return tuple(words[1:]) if len(words) > 1 and words[1].endswith(".py") else None


def commands(page: str) -> list[Command]:
    """Return the single commands of a page, as lists of words."""
    found = []
    for line in lines_of_shell(page):
        found += [Command(page, words) for words in commands_of(line)]
    return found


def commands_of(line: str) -> list[tuple[str, ...]]:
    """Return the single commands of a line of shell, as words: comments, redirections and settings are left out."""
    line = re.sub(r"(^|\s)#.*$", "", line)
    line = re.sub(r'"\$\([^)]*\)([^"]*)"', r"RUN/\1", line)  # "$(ls ...)best_model.pth"
    line = re.sub(r"\s\[[^\]]*\]", "", line)  # [--optional]
    line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line)  # head=$(scontrol ...)
    line = re.sub(r"\s>\s*\S+", "", line)  # > file
    found = []
    for part in re.split(r"&&|\|\||[|;>]", line):
        try:
            words = shlex.split(part)
        except ValueError:
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)  # OMP_NUM_THREADS=1 python ...
        if words and words[0] not in ("...", "…"):
            found.append(tuple(words))
    return found
