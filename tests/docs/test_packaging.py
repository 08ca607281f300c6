"""The public frame: what PyPI shows, what a wheel holds, what the workflows call, and that versions agree."""

import glob
import re
import runpy
import tomllib
from pathlib import Path

import pytest
import setuptools
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PROJECT["project"]["urls"]["Repository"]
TAG = f"v{PROJECT['project']['version']}"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def build():
    """What setup.py defines and passes to setuptools, without building anything."""
    passed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **arguments: passed.update(arguments))
        return runpy.run_path("setup.py") | passed


def steps(workflow):
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


def test_no_link_on_pypi_leads_into_the_void(build):
    shown = build["long_description"]
    targets = re.findall(r"\]\(([^)\s]+)", shown) + re.findall(r'\b(?:src|srcset|href)="([^"]+)', shown)
    assert [target for target in targets if not re.match(r"https?:|mailto:|#", target)] == []
    inside = [re.fullmatch(rf"{REPOSITORY}/(?:blob|raw)/{TAG}/([^#]+)(#.*)?", target) for target in targets]
    paths = [match[1] for match in inside if match]
    assert "docs/log.md" in paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[map](docs/a.md#part)", "[map](R/blob/T/docs/a.md#part)"),
        ("![page](docs/p.png)", "![page](R/raw/T/docs/p.png)"),
        ("[![page](docs/p.png)](docs/page.md)", "[![page](R/raw/T/docs/p.png)](R/blob/T/docs/page.md)"),
        (
            '<a href="docs/a.md"><img src="docs/p.png"></a>',
            '<a href="R/blob/T/docs/a.md"><img src="R/raw/T/docs/p.png"></a>',
        ),
        ('<source srcset="docs/dark.png">', '<source srcset="R/raw/T/docs/dark.png">'),
        ("[arXiv](https://arxiv.org) [part](#part) [mail](mailto:a@b.c)",) * 2,
    ],
    ids=["link", "picture", "picture in a link", "html", "dark picture", "elsewhere"],
)
def test_links_are_made_absolute(build, written, shown):
    assert build["absolute_links"](written, "T") == shown.replace("R/", REPOSITORY + "/")


def test_every_file_beside_the_code_is_packaged():
    package = ROOT / "src" / "yuanmoe"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["yuanmoe"]
    packaged = {Path(found) for pattern in patterns for found in glob.glob(str(package / pattern), recursive=True)}
    left_out = [
        path
        for path in sorted(package.rglob("*"))
        if path.is_file() and path not in packaged
        if path.suffix not in (".py", ".pyc", ".so") and "csrc" not in path.parts
    ]
    assert left_out == []


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in (ROOT / "src" / "yuanmoe").rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_what_git_ignores_is_no_source():
    """Patterns without a leading slash match at any depth, and ruff leaves out what git ignores."""
    ignored = [
        line for line in (ROOT / ".gitignore").read_text().splitlines() if line.endswith("/") and line[0] not in "./#_"
    ]
    names = {path.name for path in (ROOT / "src" / "yuanmoe").rglob("*") if path.is_dir()}
    assert [line for line in ignored if line.rstrip("/") in names] == []


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["project"]["version"]
    assert [paper["identifiers"][0]["value"] for paper in citation["references"]] == [
        "arXiv:2405.17976",
        "arXiv:2311.15786",
    ]


def test_workflows_call_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    called = {
        target
        for workflow in WORKFLOWS
        for step in steps(workflow)
        for target in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))
    }
    assert called >= {"check", "test", "docs", "wheel", "arm64"}
    assert called <= targets


def test_workflows_test_every_python_that_is_promised():
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    classifiers = "\n".join(PROJECT["project"]["classifiers"])
    promised = re.findall(r":: (3\.\d+)$", classifiers, re.MULTILINE)
    assert tests["jobs"]["test"]["strategy"]["matrix"]["python"] == promised


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_only_read_unless_they_publish(workflow):
    parsed = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert parsed["permissions"] == {"contents": "read"}
    more = {name for name, job in parsed["jobs"].items() if "permissions" in job}
    assert more <= {"publish"}


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/platforms.md", "docs/releasing.md"]
)
def test_links_of_the_front_pages_lead_somewhere(name):
    page = ROOT / name
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [each for each in targets if "://" not in each and not (page.parent / each).exists()] == []
