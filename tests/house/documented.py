"""Every command line that the repository shows: in documents, in the heads of scripts, in the comments of recipes."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("ds_configs/*.md")])
SCRIPTS = sorted([*ROOT.glob("launch/*.py"), *ROOT.glob("launch/*.sh")])
RECIPES = sorted(path for path in ROOT.glob("recipes/*.yaml") if not path.name.startswith("_"))

# A name alone (`srun`, `launch/train.py`) is a program; with arguments it is a command.
PROGRAM = r"(?:make|python|sbatch|(?:deepspeed|srun)(?= .*launch/)|launch/\w+\.\w+) "
# `cat clip.pose | python ...` and `MASTER_PORT=29501 launch/...` are commands, too.
COMMAND = re.compile(rf"(?:cat [\w./-]+ \| )?(?:[A-Z_]+=\S+ )*{PROGRAM}.+")
OPTION = re.compile(r"--ds \w+|--num_gpus \d+|\b[a-z_]+(?:\.[a-z0-9_]+)+=[^\s,;]*[^\s,;.)]")


class Command(NamedTuple):
    """A command line and the file that shows it."""

    place: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words of what it runs: no variables before it, no pipe into it, no file behind it, no comment."""
        words = shlex.split(self.text, comments=True)
        if "|" in words:
            words = words[words.index("|") + 1 :]
        if ">" in words:
            words = words[: words.index(">")]
        while re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        return words


def documented() -> list[Command]:
    """All of them; one that several files show comes once, from the first."""
    first: dict[str, Command] = {}
    for path in (*DOCUMENTS, *SCRIPTS, *RECIPES):
        for text in commands_of(path):
            first.setdefault(text, Command(str(path.relative_to(ROOT)), text))
    return list(first.values())


def commands_of(path: Path) -> list[str]:
    """The command lines that a file shows."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        lines = code_of(text)
    elif path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
        lines = text.splitlines()
    else:
        text = "\n".join(comments_of(text))
        # A comment may lead up to its command: `First try: python launch/...`.
        lines = [re.sub(rf"^[A-Z][^`]*?: (?={PROGRAM})", "", line) for line in text.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", text)
    found = [trimmed for part in (*lines, *inline) if COMMAND.fullmatch(trimmed := trim(part))]
    if path.suffix == ".sh":
        found += [f"{path.relative_to(ROOT)} {arguments}" for arguments in arguments_of(path, text)]
    if path in RECIPES:
        found += options_of(path, text)
    return found


def trim(line: str) -> str:
    """Without indentation, and without the words that explain it: two spaces or more keep them apart."""
    return re.split(r"\s{2,}", line.strip(), maxsplit=1)[0]


def code_of(markdown: str) -> list[str]:
    """Its lines of code, fenced or indented; those that continue in the next line are joined."""
    lines, fenced = [], False
    for line in re.sub(r" *\\\n\s*", " ", markdown).splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line)
    return lines


def comments_of(text: str) -> list[str]:
    """Comments of a shell script or YAML that stand alone, and what a shell script prints about its usage."""
    usages = "\n".join(re.findall(r"<<'USAGE'\n(.*?)\nUSAGE\n", text, re.DOTALL))
    return [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")] + usages.splitlines()


def arguments_of(script: Path, text: str) -> list[str]:
    """What a short form says that it takes: `ARGUMENT  anything that launch/train.py takes: --ds zero3, --json ...`."""
    ranks = "2 " if "train_multi_gpu" in script.name else ""
    listed = re.findall(r"^ *ARGUMENT .*?: (.+?)(?: \.\.\.)?$", text, re.MULTILINE)
    return [f"t5_small {ranks}{arguments}" for line in listed for arguments in line.split(", ")]


def options_of(recipe: Path, comments: str) -> list[str]:
    """The recipe's command with what its comments say to add to it, sentence by sentence."""
    sentences = [
        sentence
        for line in comments.splitlines()
        if "launch/" not in line
        for sentence in re.split(r"[.;](?: |$)", line)
    ]
    commands = []
    for options in filter(None, map(OPTION.findall, sentences)):
        launchers = [option for option in options if option.startswith("--num_gpus")]
        others = [option for option in options if option not in launchers]
        commands.append(" ".join(["deepspeed", *launchers, "launch/train.py --recipe", recipe.stem, *others]))
    return commands
