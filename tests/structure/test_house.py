"""The house stays readable: every public name in one module, few doors in a corridor, a sentence on each folder.

That imports run one way is import-linter's to check (`pyproject.toml`).
"""

import ast
from collections import defaultdict
from pathlib import Path

import yuanmoe

ROOT = Path(yuanmoe.__file__).parent
MOST_SIBLINGS = 14
NOT_ROOMS = {"__pycache__", "small"}


def _folders() -> list[Path]:
    return [ROOT, *(path for path in ROOT.rglob("*") if path.is_dir() and not NOT_ROOMS & set(path.parts))]


def _public_names(path: Path) -> list[str]:
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    named = [node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    return [name for name in named if not name.startswith("_")]


def test_a_public_name_is_defined_in_one_module():
    modules: dict[str, list[str]] = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        for name in _public_names(path):
            modules[name].append(str(path.relative_to(ROOT)))
    assert len(modules) > 500, "the modules were not found"
    assert {name: places for name, places in modules.items() if len(set(places)) > 1} == {}


def test_no_folder_has_more_doors_than_a_reader_can_hold():
    # The package itself is the list of rooms; every other folder is one.
    crowded = {}
    for folder in _folders():
        doors = [path for path in folder.iterdir() if path.name not in {"__init__.py", *NOT_ROOMS}]
        files = [path for path in doors if path.is_file() and path.suffix in {".py", ".cpp", ".h", ".js", ".css"}]
        rooms = [path for path in doors if path.is_dir()]
        counted = files if folder == ROOT else [*files, *rooms]
        if len(counted) > MOST_SIBLINGS:
            crowded[str(folder.relative_to(ROOT))] = len(counted)
    assert crowded == {}


def test_every_folder_of_modules_says_what_it_is_for():
    for folder in _folders():
        if any(path.suffix == ".py" for path in folder.iterdir()):
            docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
            assert docstring, f"{folder.relative_to(ROOT)}/__init__.py has no sentence on what the folder is for"
