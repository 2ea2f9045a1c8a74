"""The house keeps its own rules: what ships, and who may import whom."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[2]


def test_setup_cfg_names_every_package_and_no_other():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    named = set(config["options"]["packages"].split())
    found = set(find_packages(str(ROOT / "src")))
    assert named == found, (
        "[options] packages in setup.cfg is out of date, so the wheel would be too."
        f"\n  add to the list: {sorted(found - named)}"
        f"\n  take out of it, or give an __init__.py: {sorted(named - found)}"
    )


def lint_imports(src: Path, *contracts: str) -> subprocess.CompletedProcess[str]:
    """Check the package in ``src``, whatever understudy is installed."""
    command = [
        Path(sys.executable).with_name("lint-imports"),
        *("--config", ROOT / "pyproject.toml", "--no-cache", "--no-logo"),
        *(argument for contract in contracts for argument in ("--contract", contract)),
    ]
    env = os.environ | {"PYTHONPATH": str(src), "PYTHONUTF8": "1"}
    return subprocess.run(  # noqa: PLW1510 - the caller judges the exit status
        command, cwd=src, env=env, capture_output=True, encoding="utf-8"
    )


def test_imports_point_one_way():
    lint = lint_imports(ROOT / "src")
    assert lint.returncode == 0, f"{lint.stdout}\n{lint.stderr}"


def loaded_by(statement: str) -> set[str]:
    """The modules that a new interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_front_door_loads_its_dependencies_and_nothing_else():
    """No extra, no way in from outside, no doubles of tests: who embeds it pays for none."""
    dependencies = "import asyncio, blinker, msgspec, peewee, pykka, tenacity"
    ours = loaded_by("import understudy") - loaded_by(dependencies)
    assert {name.partition(".")[0] for name in ours} - sys.stdlib_module_names == {"understudy"}
    unwanted = ("understudy.gateway", "understudy.testing", "understudy.actors.tools.workspace")
    heavy = ("argparse", "email", "http", "importlib.metadata", "multiprocessing", "unittest")
    assert sorted(name for name in ours if name.startswith((*unwanted, *heavy))) == []


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A copy of the package, with files for links, to break rules in."""
    copy = tmp_path / "src"
    shutil.copytree(
        ROOT / "src" / "understudy",
        copy / "understudy",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return copy


@pytest.mark.parametrize(
    ("contract", "module", "line"),
    [
        ("layers", "store/rogue.py", "import understudy.actors.models"),
        ("layers", "actors/rogue.py", "from understudy import gateway"),
        ("layers", "errors.py", "from understudy.store import records"),
        ("pure", "actors/core/rogue.py", "import time"),
        ("pure", "actors/core/rogue.py", "from concurrent.futures import Future"),
        ("data", "actors/core/rogue.py", "from understudy.actors import tools"),
        ("data", "actors/core/rogue.py", "from understudy.store import migrations"),
        ("data", "actors/core/rogue.py", "import understudy"),
    ],
)
def test_a_wrong_import_breaks_its_contract(src: Path, contract: str, module: str, line: str):
    with (src / "understudy" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    lint = lint_imports(src, contract)
    assert lint.returncode == 1, f"{lint.stdout}\n{lint.stderr}"
    importer = f"understudy.{module.removesuffix('.py').replace('/', '.')}"
    assert f"{importer} -> " in lint.stdout, f"{lint.stdout}\n{lint.stderr}"


def test_the_session_logic_may_import_its_data(src: Path):
    (src / "understudy" / "actors" / "core" / "rogue.py").write_text(
        "import understudy.actors.core\n"
        "from understudy.actors.models.protocol import ToolSpec\n"
        "from understudy.errors import InvalidInput\n"
        "from understudy.store.records import Session\n",
        encoding="utf-8",
    )
    lint = lint_imports(src)
    assert "rogue" not in lint.stdout, lint.stdout
