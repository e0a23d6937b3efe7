"""The wheel, the sdist and the editable install: the right files, importable from anywhere, only `wanmoe`.

All is built from a copy of the tree, offline: `--no-isolation` takes setuptools from this environment.
"""

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "moe_lora", "train", "infer", "launch")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS")}
    # Without the CUDA library, whatever this machine could build: the lists of files stay the same.
    clean |= {"WANMOE_BUILD_CUDA": "0"}
    done = subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy(files: list[str], target: Path) -> Path:
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


def in_rooms(files: list[str]) -> list[str]:
    return [name for name in files if name.split("/")[0] in ROOMS]


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def files() -> list[str]:
    """What git knows or would add: the measure of what belongs in a package."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a git checkout, to know which files belong to the project")
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    # Benchmark results are for readers of the repository; nothing that runs reads them.
    kept = {name for name in listed if not name.startswith("kernels/bench/results/")}
    return sorted(name for name in kept if (ROOT / name).is_file())


@pytest.fixture(scope="module")
def from_tree(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `make wheel` makes where an older build/ still lies about; beside it the sdist."""
    tree = copy(files, tmp_path_factory.mktemp("tree"))
    stale = tree / "build" / "lib" / "wanmoe" / "kernels" / "removed_long_ago.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    # A stand-in for `make`'s own environment: this one, already complete.
    python = tree / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tree / ".venv" / ".ready").touch()
    run("make", "wheel", cwd=tree)
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sdist(from_tree: Path) -> Path:
    (archive,) = from_tree.parent.glob("*.tar.gz")
    return archive


def test_wheel_has_the_files_of_the_rooms_and_no_others(files: list[str], from_tree: Path) -> None:
    packed = {name for name in contents(from_tree) if ".dist-info/" not in name}
    expected = {f"wanmoe/{name}" for name in in_rooms(files) if not name.endswith(".md")}
    assert packed - expected == set(), "not in git: a stale build, or a wrong mapping"
    assert expected - packed == set(), "left out: add the pattern to DATA in setup.py"
    assert not packed & {"wanmoe/__init__.py", "wanmoe/kernels/__init__.py"}


def test_wheel_has_one_top_level_name(from_tree: Path) -> None:
    tops = {name.split("/")[0] for name in contents(from_tree)}
    assert tops == {"wanmoe", f"wanmoe-{VERSION}.dist-info"}


def test_sdist_has_everything_that_git_has(files: list[str], sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert set(files) - packed == set(), "left out: add it to MANIFEST.in"
    assert packed >= {"LICENSE", "PKG-INFO"}


def test_wheel_of_the_sdist_is_the_wheel_of_the_tree(from_tree: Path, tmp_path: Path) -> None:
    # `make wheel` builds the wheel out of the sdist; here it comes from the tree itself.
    leftovers = shutil.ignore_patterns("build", "dist", "*.egg-info")
    tree = shutil.copytree(from_tree.parent.parent, tmp_path / "tree", ignore=leftovers)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, cwd=tree)
    ours, theirs = contents(tmp_path / from_tree.name), contents(from_tree)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_installed_wheel_imports_from_anywhere(from_tree: Path, files: list[str], tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ("--quiet", "--no-deps", "--no-index", "--target", str(site))
    run(sys.executable, "-m", "pip", "install", *options, from_tree, cwd=tmp_path)
    assert {path.name for path in site.iterdir()} == {"bin", "wanmoe", f"wanmoe-{VERSION}.dist-info"}
    code = "import wanmoe.moe_lora as m, wanmoe.kernels.lora_moe as k; print(m.__file__, k.__file__)"
    places = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert [str(site) in place for place in places] == [True, True], places
    data = [name for name in in_rooms(files) if not name.endswith((".py", ".md"))]
    assert [name for name in data if not (site / "wanmoe" / name).is_file()] == []


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_install_works_from_anywhere(mode: str, files: list[str], tmp_path: Path) -> None:
    tree = copy(files, tmp_path / "tree")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    # A path line makes this environment's packages visible there, but not its own editable install of wanmoe.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(str(Path(pytest.__file__).parent.parent) + "\n")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    options += [f"--config-settings=editable_mode={mode}"]
    run(python, "-m", "pip", "install", *options, "-e", tree, cwd=tmp_path)
    ours = {path.name for path in site.iterdir()} - {"borrowed.pth", "__pycache__"}
    assert [name for name in ours if not name.startswith(("wanmoe-", "__editable__"))] == []
    code = "import wanmoe.moe_lora as m, wanmoe.kernels.lora_moe as k; print(m.__file__, k.__file__)"
    places = run(python, "-c", code, cwd=tmp_path).split()
    assert [str(tree) in place for place in places] == [True, True], places
    assert "Usage" in run(tmp_path / "venv" / "bin" / "wanmoe", "--help", cwd=tmp_path)


FAKE = '__version__ = "0.12.0"\ndef __getattr__(name): return type(name, (), {})\n'


def test_the_checkout_does_not_shadow_the_kernels_package(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FAKE)
    info = tmp_path / "kernels-0.12.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.12.0\n")
    code = (
        "import kernels, transformers, diffusers\n"
        "from transformers import UMT5EncoderModel\n"
        "from diffusers import AutoencoderKLWan, UniPCMultistepScheduler\n"
        "import wanmoe.kernels.lora_moe as ours\nprint(kernels.__file__, ours.__file__)"
    )
    theirs, ours = run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path)).split()[-2:]
    assert theirs == str(tmp_path / "kernels" / "__init__.py")
    assert ours == str(ROOT / "kernels" / "lora_moe" / "__init__.py")


def third_party(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Top-level names of absolute imports, each with whether it is made when the module is."""
    early = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], id(node) in early) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], id(node) in early


def test_what_is_imported_is_declared() -> None:
    """A package that is here only because another needs it would one day be gone."""
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    extra = {canonicalize_name(Requirement(text).name) for text in PROJECT["optional-dependencies"]["bench"]}
    owners = importlib.metadata.packages_distributions()
    missing = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for name, early in third_party(ast.parse(path.read_text(encoding="utf-8"))):
            if name in sys.stdlib_module_names or name in ("wanmoe", "__future__", "triton"):
                continue
            owned = {canonicalize_name(owner) for owner in owners.get(name, [])}
            allowed = declared if early else declared | extra
            # Not installed and imported inside a function: an optional backend.
            if not owned & allowed and (owned or early):
                missing.add(f"{path.relative_to(ROOT)}: {name}")
    assert missing == set()
