"""The rules of the house that no linter sees: who may import whom, banned calls, file length, and the docs.

Dependencies point one way: launch -> train, infer -> moe_lora -> kernels.
"""

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from wanmoe.moe_lora.errors import WanmoeError

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "moe_lora": {"moe_lora", "kernels"},
    "train": {"train", "moe_lora", "kernels"},
    "infer": {"infer", "moe_lora", "kernels"},
    "launch": {"launch", "train", "infer", "moe_lora", "kernels"},
}
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
LONGEST = 500

Found = Iterator[tuple[int, str]]
Check = Callable[[Path, ast.Module], Found]


def room_files() -> list[Path]:
    return sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def report(check: Check, files: list[Path]) -> list[str]:
    out = []
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        out += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in check(path, tree)]
    return out


def imported(path: Path, tree: ast.Module) -> Found:
    """Absolute names; `from ..kernels import x` in moe_lora/ gives wanmoe.kernels and wanmoe.kernels.x."""
    package = ["wanmoe", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, name
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)


def wrong_way(path: Path, tree: ast.Module) -> Found:
    room = path.relative_to(ROOT).parts[0]
    for line, name in imported(path, tree):
        parts = name.split(".")
        if parts[0] == "wanmoe" and len(parts) > 1 and parts[1] not in MAY_IMPORT[room]:
            yield line, f"{room} must not import {name}"


def bare_root(path: Path, tree: ast.Module) -> Found:
    """`kernels` beside `wanmoe.kernels` would be two module objects, and register every op twice."""
    for line, name in imported(path, tree):
        if name.split(".")[0] in MAY_IMPORT:
            yield line, f"import {name} as wanmoe.{name}"


def pickles(path: Path, tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        # The exception is what a refused torch.load(weights_only=True) raises.
        for name in names:
            if name.split(".")[0] in PICKLES and name != "pickle.UnpicklingError":
                yield node.lineno, f"{name}: no pickle is written or read, use safetensors or JSON"


def torch_files(path: Path, tree: ast.Module) -> Found:
    """torch.load without a literal weights_only=True runs code from the file; torch.save writes a pickle."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            for alias in node.names:
                if alias.name in ("load", "save"):
                    yield node.lineno, f"call torch.{alias.name} by its full name, so that this check sees it"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
        if called == "torch.load" and not safe:
            yield node.lineno, "torch.load needs weights_only=True"
        if called == "torch.save":
            yield node.lineno, "torch.save writes a pickle: use safetensors"


def blind_except(path: Path, tree: ast.Module) -> Found:
    """Catching everything is for cleaning up alone: the handler then ends with a plain `raise`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and ast.unparse(node.body[-1]) != "raise":
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(kind) if kind else "everything" for kind in kinds}
            if names & {"everything", "Exception", "BaseException"}:
                yield node.lineno, f"except of {', '.join(sorted(names))}: name what can happen"


CHECKS = [wrong_way, bare_root, pickles, torch_files, blind_except]


@pytest.mark.parametrize("check", CHECKS)
def test_rooms_keep_the_rule(check: Check) -> None:
    assert report(check, room_files()) == []


def test_tests_import_the_rooms_by_their_full_name() -> None:
    assert report(bare_root, sorted((ROOT / "tests").rglob("*.py"))) == []


@pytest.mark.parametrize(
    ("check", "source", "lines"),
    [
        (
            wrong_way,
            "from ..train import x\nfrom .. import infer\nfrom wanmoe.launch import y\nfrom .wan import z",
            3,
        ),
        (wrong_way, "from ..kernels.lora_moe import x\nfrom . import routing\nimport torch", 0),
        (
            bare_root,
            "import kernels\nfrom train.loop import x\nfrom .infer import y\nimport kernelspec",
            2,
        ),
        (pickles, "import pickle\nfrom pickle import loads\nfrom pickle import UnpicklingError", 2),
        (
            torch_files,
            "torch.load(p)\ntorch.load(p, weights_only=0)\ntorch.load(p, weights_only=True)",
            2,
        ),
        (torch_files, "from torch import load\ntorch.save(x, p)\ntorch.load(p, weights_only=flag)", 3),
        (blind_except, "try: ...\nexcept (OSError, Exception): ...", 1),
        (blind_except, "try: ...\nexcept: ...", 1),
        (blind_except, "try: ...\nexcept OSError: ...", 0),
        (blind_except, "try: ...\nexcept BaseException:\n    clean()\n    raise", 0),
    ],
)
def test_a_check_finds_what_it_is_for(check: Check, source: str, lines: int) -> None:
    found = list(check(ROOT / "moe_lora" / "probe.py", ast.parse(source)))
    assert len({line for line, _ in found}) == lines, found


def test_no_file_is_too_long() -> None:
    files = [*room_files(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "csrc").rglob("*.c*")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files
    }
    assert {name: count for name, count in lengths.items() if count > LONGEST} == {}


def test_only_the_namespaces_lack_an_init() -> None:
    for folder in {path.parent for path in room_files()}:
        name = str(folder.relative_to(ROOT))
        assert (folder / "__init__.py").exists() == (name != "kernels"), name


IMPORT_ALL = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
here = tuple(json.loads(sys.argv[2]))
files = [(name, getattr(module, "__file__", None) or "") for name, module in list(sys.modules.items())]
print("\\n".join(name for name, file in files if file.startswith(here) and not name.startswith("wanmoe.")))
"""


def test_every_module_imports_under_one_name() -> None:
    paths = [path.relative_to(ROOT).with_suffix("").parts for path in room_files() if path.stem != "__main__"]
    names = [".".join(("wanmoe", *(part for part in parts if part != "__init__"))) for parts in paths]
    folders = [f"{ROOT / room}/" for room in MAY_IMPORT]
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(names), json.dumps(folders)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


# ---- the commands in README.md and docs/ ----

FENCE = re.compile(r"^```(?:bash|sh|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TARGET = re.compile(r"^([a-z][\w-]*):", re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """The `wanmoe ...` and `make ...` commands in a page's bash blocks, as words."""
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word[0] not in "();<>|&":
                    words.append(word)
                    continue
                while words and re.match(r"\w+=", words[0]):
                    words.pop(0)
                if words and Path(words[0]).name in ("wanmoe", "make"):
                    yield [Path(words[0]).name, *words[1:]]
                # What follows a redirection is a file name, not a command.
                words = ["file"] if word[0] in "<>" else []


def faults(command: list[str], root: Any, check_key: Callable[[str], object], makefile: str) -> list[str]:
    """What in a command the real command line or the Makefile does not know."""
    if command[0] == "make":
        wanted = [word.split("=")[0] for word in command[1:]]
        known = {*TARGET.findall(makefile), *re.findall(r"\$[({](\w+)[)}]", makefile)}
        return [f"make: nothing named {word}" for word in wanted if word not in known]
    words, level = command[1:], root
    while words and hasattr(level, "commands") and not words[0].startswith("-"):
        if words[0] not in level.commands:
            return [f"wanmoe: no command {words[0]!r}"]
        level = level.commands[words.pop(0)]
    from wanmoe.launch.cli import dashed

    flags = [dashed(word).split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
    known = {"--help", *(name for param in level.params for name in (*param.opts, *param.secondary_opts))}
    out = []
    for flag in flags:
        if "." in flag and level.context_settings.get("ignore_unknown_options"):
            try:
                check_key(flag.lstrip("-"))
            except (WanmoeError, KeyError) as error:
                out.append(f"{flag}: {error}")
        elif flag not in known:
            out.append(f"wanmoe {level.name}: no option {flag}")
    if "--help" not in flags:
        asked = [p for p in level.params if p.required and p.opts[0].startswith("-")]
        out += [f"wanmoe {level.name}: {p.opts[0]} is missing" for p in asked if not {*p.opts} & {*flags}]
    return out


def pages() -> list[Path]:
    named = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in named if path.exists()]


def test_every_command_in_the_docs_is_known() -> None:
    import typer

    from wanmoe.launch import cli, config

    root, makefile = typer.main.get_command(cli.app), (ROOT / "Makefile").read_text()
    found = [(page.name, words) for page in pages() for words in commands(page.read_text(encoding="utf-8"))]
    assert {"make demo", "make test"} <= {" ".join(words) for _, words in found}
    wrong = [
        f"{page}: {' '.join(w)}: {f}"
        for page, w in found
        for f in faults(w, root, config.check_key, makefile)
    ]
    assert wrong == []


def test_a_wrong_command_in_the_docs_is_found() -> None:
    import typer

    app = typer.Typer()

    @app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def train(config: str = typer.Option(...), resume: bool = False) -> None: ...

    @app.command()
    def plan() -> None: ...

    def check_key(key: str) -> None:
        if key != "train.steps":
            raise WanmoeError(f"unknown key {key}")

    page = """
```bash
cd x && WANMOE_DATA=y .venv/bin/wanmoe train --config a.toml \\
  --train.steps=3 --resume > log.txt  # a comment's apostrophe
make demo CLIPS=../clips; make chaos
wanmoe train --resum --config=a.toml --train.stps 3 | tee wanmoe
wanmoe tran
wanmoe train
wanmoe plan --train.steps 3
```
```python
wanmoe = "not a command"
```
"""
    makefile = "demo: x\n\tcommand $(CLIPS)\n"
    root = typer.main.get_command(app)
    assert [faults(words, root, check_key, makefile) for words in commands(page)] == [
        [],
        [],
        ["make: nothing named chaos"],
        ["wanmoe train: no option --resum", "--train.stps: unknown key train.stps"],
        ["wanmoe: no command 'tran'"],
        ["wanmoe train: --config is missing"],
        ["wanmoe plan: no option --train.steps"],
    ]
