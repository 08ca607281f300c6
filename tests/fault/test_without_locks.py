"""What Python cannot lock files on (Windows): models load and answer, and nothing is written half-protected."""

import subprocess
import sys

import pytest

WITHOUT_LOCKS = "import sys; sys.modules['fcntl'] = None\n"


def python(program, *arguments):
    command = [sys.executable, "-c", WITHOUT_LOCKS + program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_shipped_model_loads_and_answers():
    result = python(
        "import yuanmoe\nprint(len(yuanmoe.load('small', device='cpu').generate('def f', max_new_tokens=4).ids))"
    )
    assert (result.returncode, result.stdout) == (0, "4\n"), result.stderr


def test_every_command_explains_itself():
    result = python("from yuanmoe.cli.main import main\nsys.argv = ['yuanmoe', '--help']\nmain()")
    assert result.returncode == 0, result.stderr
    assert "generate" in result.stdout


@pytest.mark.parametrize("exists", [False, True], ids=["new", "overwritten"])
def test_writing_a_checkpoint_is_refused_and_changes_nothing(tmp_path, exists):
    target = tmp_path / "model"
    if exists:
        target.mkdir()
        (target / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    result = python(
        "from pathlib import Path\n"
        "from yuanmoe.storage.folder import new_folder\n"
        "from yuanmoe.errors import CheckpointError\n"
        "try:\n"
        "    with new_folder(Path(sys.argv[1]), overwrite=True): print('written')\n"
        "except CheckpointError as error: print(error)",
        target,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        f"writing {target} needs a file lock, which Python lacks here (Windows); use Linux, macOS or WSL\n"
    )
    assert sorted(tmp_path.rglob("*")) == before
