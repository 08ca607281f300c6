"""`yuanmoe serve` and `yuanmoe api-key` as people meet them: what is said and refused, the example that works."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import httpx
import pytest

from serving import CONTEXT, MODEL, serving
from small_adapters import adapted
from small_lm import small_lm, write_lm
from yuanmoe.cli.main import main
from yuanmoe.errors import MissingExtraError, UsageError
from yuanmoe.serve.core.keys import entry_line, new_key, read_keys
from yuanmoe.serve.core.launch import Settings, launch


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process: exit code, stdout, stderr."""

    def call(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["yuanmoe", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return exit_info.value.code or 0, captured.out, captured.err

    return call


def test_a_server_says_where_it_is_and_its_example_works(tmp_path) -> None:
    write_lm(tmp_path / "tiny", max_position_embeddings=64)
    keys = tmp_path / "keys"
    key = new_key()
    keys.write_text(entry_line("me", key))
    options = ["--port", "0", "--host", "0.0.0.0", "--cache-tokens", "100", "--api-keys", str(keys)]
    process = subprocess.Popen(
        [sys.executable, "-m", "yuanmoe", "serve", "--model", str(tmp_path / "tiny"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "400"},
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready == {"command": "serve", "url": ready["url"], "model": "tiny", "cache_tokens": 96, "adapters": []}
        page = httpx.get(ready["url"])
        assert page.headers["content-type"].startswith("text/html")
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        assert httpx.get(f"{ready['url']}/v1/models").status_code == 401
        assert httpx.get(f"{ready['url']}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        said = until_it_waits(process)
        assert f"tiny at {ready['url']}/v1, page at {ready['url']}/" in said
        assert re.search(r"room for 96 tokens of keys and values \(\d.*iB\): 1.5 contexts of 64", said)
        assert "WARNING" not in said
        (example,) = (line for line in said.splitlines() if "curl" in line)
        if shutil.which("curl") is None:
            pytest.skip("curl is not on this machine")
        answer = subprocess.run(
            ["bash", "-c", example], capture_output=True, timeout=20, env=os.environ | {"KEY": key}, check=True
        )
        assert json.loads(answer.stdout)["choices"][0]["finish_reason"] in ("stop", "length")
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()


def until_it_waits(process: subprocess.Popen) -> str:
    """What a server says at its start."""
    said = ""
    while "Ctrl-C ends it" not in said:
        said += process.stderr.readline()
    return said


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--cache-tokens", 64, "--cache-gib", 1), "--cache-tokens and --cache-gib say the same; leave one out"),
        (("--cache-tokens", 31), "a cache of 31 tokens is not one page of 32 .* give more with --cache-tokens"),
        (("--api-keys", "/nowhere/keys"), "cannot read the API keys of /nowhere/keys"),
        (("--host", "203.0.113.1"), r"cannot listen at 203.0.113.1 port \d+: .*; name another with --host and --port"),
        (("--max-body", "much"), "size 'much' is not a number with a unit"),
    ],
)
def test_settings_that_make_no_sense(run, tmp_path, options, complaint) -> None:
    write_lm(tmp_path)
    code, out, err = run("serve", "--model", tmp_path, "--port", 0, *options)
    assert (code, out) == (2, "")
    assert re.search(complaint, err)


def test_a_port_that_is_taken_is_found_before_the_model_is_loaded(run, tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("serve", "--model", tmp_path / "nothing", "--port", port)
    assert code == 2
    assert f"cannot listen at 127.0.0.1 port {port}" in err


def test_listening_for_everybody_without_keys_is_warned_of(run, tmp_path, monkeypatch) -> None:
    write_lm(tmp_path)
    monkeypatch.setattr("yuanmoe.serve.core.server.Server.run", lambda *_, **__: None)
    code, out, err = run("serve", "--model", tmp_path, "--port", 0, "--host", "0.0.0.0")
    assert "WARNING: anybody who reaches this address can use this server" in err
    assert code == 0
    assert json.loads(out)["command"] == "serve"
    assert "WARNING" not in run("serve", "--model", tmp_path, "--port", 0)[2]


def test_keys_are_made_shown_once_and_kept_as_hashes(run, tmp_path) -> None:
    file = tmp_path / "keys"
    code, out, err = run("api-key", "team-a", "--file", file, "--requests-per-minute", 60, "--max-concurrency", 4)
    made = json.loads(out)
    assert (code, made["name"]) == (0, "team-a")
    assert "shown this once" in err
    assert made["key"] not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert run("api-key", "team-b", "--file", file)[0] == 0
    client = read_keys(file, None).client(made["key"])
    assert client is not None
    assert (client.name, client.requests_per_minute, client.max_concurrency) == ("team-a", 60, 4)
    code, _, err = run("api-key", "team-a", "--file", file)
    assert (code, "has a key named team-a; take out its line first" in err) == (2, True)
    assert "must be 1 to 64 letters" in run("api-key", "two words", "--file", file)[2]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# nobody\n", "holds no API key; make one with `yuanmoe api-key NAME --file"),
        ("team-a", "entry 1: an API key is a line `NAME HASH` with 64 hexadecimal digits"),
        ("\nteam-a yuan-plain-text", "entry 2: an API key is a line"),
        (f"a {'0' * 64} speed=3", "entry 1: 'speed=3' is no limit; known are requests_per_minute=N and"),
        (f"a {'0' * 64} max_concurrency=0", "'max_concurrency=0' is no limit"),
        (f"a {'0' * 64}\na {'1' * 64}", "2 API keys have 1 names; give each its own"),
    ],
)
def test_files_of_keys_that_are_none(tmp_path, text, complaint) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(UsageError, match=complaint):
        read_keys(file, None)


def test_keys_of_the_environment() -> None:
    keys = read_keys(None, f"{entry_line('a', 'one')}; {entry_line('b', 'two', concurrency=2)}")
    assert keys.names == ["a", "b"]
    two, none = keys.client("two"), keys.client("three")
    assert two is not None
    assert (two.max_concurrency, none) == (2, None)


def test_without_the_extra_the_way_to_it_is_said(monkeypatch) -> None:
    def version(name: str) -> str:
        if name == "uvicorn":
            raise PackageNotFoundError
        return "1"

    monkeypatch.setattr("importlib.metadata.version", version)
    for name in [name for name in sys.modules if name.startswith("yuanmoe.serve")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=r"serve needs uvicorn, .* pip install 'yuanmoe\[serve\]'"):
        import_module("yuanmoe.serve")


def test_help_imports_no_server() -> None:
    code = (
        "import sys; sys.argv = ['yuanmoe', 'serve', '--help']\n"
        "from yuanmoe.cli.main import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(' '.join({'torch', 'fastapi', 'uvicorn', 'llguidance'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on this machine")
def test_every_example_of_the_documentation_works() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "curl" in block]
    assert len(blocks) >= 4
    lm = small_lm(max_position_embeddings=CONTEXT)
    _, coder = adapted(lm.config)
    with serving(launch(lm, Settings(model_id=MODEL), {"coder": coder})) as url:
        for block in blocks:
            script = block.replace("curl localhost:8000", f"curl -sS --fail-with-body -m 20 {url}")
            done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        (example,) = re.findall(r"```python\n(import openai.*?)```", text, re.DOTALL)
        exec(example.replace("http://localhost:8000", url).replace('model="model"', f'model="{MODEL}"'), {})
