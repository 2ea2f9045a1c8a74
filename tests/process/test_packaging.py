"""What is built from the tree is whole: real files for links, every module, and it runs."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"PYTHONUTF8": "1"} | env,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(kind: str, *, source: Path, into: Path) -> Path:
    """Call the build backend as an installer would. Needs no network."""
    into.mkdir()
    script = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    run("-c", script, str(into), cwd=source)
    [built] = into.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, links and all, so that the checkout stays clean."""
    work = tmp_path_factory.mktemp("sdist")
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "actors", "store", "gateway"):
        shutil.copytree(ROOT / name, work / "tree" / name, symlinks=True, ignore=leave)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, work / "tree")
    return build("sdist", source=work / "tree", into=work / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist, as an index's users may have to."""
    work = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    [tree] = work.iterdir()
    return build("wheel", source=tree, into=work / "dist")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH that holds the wheel's files and nothing else."""
    place = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def test_the_sdist_holds_files_where_the_tree_has_links(sdist: Path):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if not (member.isfile() or member.isdir())] == []
    names = {member.name.partition("/")[2] for member in members}
    assert {"LICENSE", "src/understudy/actors/__init__.py"} <= names


def test_the_wheel_holds_every_file_of_the_package(installed: Path):
    tree = files(ROOT / "src" / "understudy")
    assert {"py.typed", "actors/core/__init__.py", "store/records.py"} <= tree
    shipped = files(installed / "understudy")
    assert shipped == tree, (
        "\nnot in the wheel; name its package, or the file under package_data, in setup.cfg: "
        f"{sorted(tree - shipped)}\nonly in the wheel: {sorted(shipped - tree)}"
    )


def files(package: Path) -> set[str]:
    # os.walk, because Path.rglob does not follow links.
    return {
        (Path(folder) / name).relative_to(package).as_posix()
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if not name.endswith(".pyc")
    }


def test_every_module_of_the_wheel_imports_by_its_own_name(installed: Path):
    script = (
        "import importlib, pkgutil, understudy\n"
        "def fail(name): raise\n"
        "for found in pkgutil.walk_packages(understudy.__path__, 'understudy.', fail):\n"
        "    if not found.name.endswith('__main__'):\n"
        "        print(importlib.import_module(found.name).__file__)\n"
    )
    paths = run("-c", script, cwd=installed.parent, PYTHONPATH=str(installed)).splitlines()
    assert len(paths) > 1
    assert [path for path in paths if not path.startswith(str(installed))] == []


def test_the_command_runs(installed: Path):
    helped = run("-m", "understudy", "--help", cwd=installed.parent, PYTHONPATH=str(installed))
    assert "understudy" in helped
    script = (
        "from importlib.metadata import entry_points\n"
        "entry_points(group='console_scripts')['understudy'].load()\n"
    )
    run("-c", script, cwd=installed.parent, PYTHONPATH=str(installed))
