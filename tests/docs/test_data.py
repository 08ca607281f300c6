"""`yuanmoe data` as people and programs call it: what is printed, what is exact, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from small_tokenizers import bpe
from yuanmoe.cli.data.preview import marked
from yuanmoe.cli.main import main
from yuanmoe.presets import preset

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "sleeps"},
]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The program in this process, in a folder with `tok`, `talks.jsonl` and `code`: exit code, JSON, stderr."""
    bpe().save(tmp_path / "tok")
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": TALK}) + '\n{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "code").mkdir()
    for name in ("a", "b", "c", "d", "e", "f"):
        (tmp_path / "code" / f"{name}.py").write_text(f"{name} = 1\n")
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["yuanmoe", "data", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        code = exit_info.value.code or 0
        return code, json.loads(captured.out.splitlines()[-1]) if captured.out and not code else None, captured.err

    return call


def test_pack_info_verify_preview(run):
    code, packed, err = run("pack", "talks.jsonl", "out", "--tokenizer", "tok", "--format", "chat", "--workers", "1")
    assert code == 0
    (made,) = packed["datasets"]
    assert (made["documents"], made["skipped"]) == (2, {})
    assert f"out: {made['tokens']:.1f} tokens of 2 documents" in err
    code, found, err = run("info", "out")
    assert {name: found[name] for name in made} == made
    assert found["settings"]["read"]["format"] == "chat"
    assert "trained_tokens" in err
    assert run("verify", "out", "--tokenizer", "tok")[1]["verified_bytes"] > 0
    code, shown, err = run("preview", "out")
    assert err.startswith("Be brief.\nthe fox\n{+jumps+}\nthe dog{+<sep>sleeps<eod>+}\ndocument 0 of 2: ")
    assert sum(shown["learned"]) < shown["tokens"] == len(shown["ids"])
    code, shown, err = run("preview", "out", "--document", "1", "--tokens", "2")
    assert err == "a{+<sep>+}\ndocument 1 of 2: 1 of 2 tokens are learned, 2 more follow\n"
    assert run("preview", "out", "--document", "2")[0] == 2


def test_colours_say_the_same():
    text = marked(bpe(), bpe().encode("the fox<sep>jumps"), [False, False, True, True, True], colour=True)
    assert text.plain == "the fox<sep>jumps"[: len(text.plain)]
    assert {str(span.style) for span in text.spans} == {"dim", "green"}


def test_trees_suffixes_and_a_part_held_out(run):
    line = ("pack", "code", "parts", "--tokenizer", "tok", "--suffix", "py", "--heldout", "0.4", "--workers", "1")
    _, packed, err = run(*line)
    train, heldout = packed["datasets"]
    assert train["documents"] + heldout["documents"] == 6
    assert train["path"] == "parts/train"
    assert f"left out: {heldout['documents']} of the other part" in err
    assert run(*line)[0] == 1, "what is there is left as it is"
    assert run(*line, "--overwrite")[0] == 0


def test_megatron_pairs_are_written_looked_at_and_checked(run):
    run("pack", "code", "out", "--tokenizer", "tok", "--workers", "1")
    code, written, err = run("export", "out", "pairs/code_text_document")
    assert (code, written["path"]) == (0, "pairs/code_text_document")
    assert run("info", "pairs/code_text_document")[1]["format"] == "megatron"
    assert run("verify", "pairs/code_text_document.idx", "--tokenizer", "tok")[0] == 0
    code, _, err = run("preview", "pairs/code_text_document", "--tokenizer", "tok", "--document", "1")
    assert err.startswith("{+b = 1\n<eod>+}\n")
    code, _, err = run("preview", "pairs/code_text_document")
    assert (code, err) == (2, "error: pairs/code_text_document has no tokenizer beside it; give one with --tokenizer\n")
    code, _, err = run("export", "pairs/code_text_document", "again")
    assert (code, err) == (
        2,
        "error: pairs/code_text_document does not say how many ids there are; give --vocab-size\n",
    )


def test_names_that_look_like_markup_are_names(run):
    code, _, err = run("pack", "code", "a[red]/b[/green]", "--tokenizer", "tok", "--workers", "1")
    assert (code, "a[red]/b[/green]: " in err) == (0, True)


def test_what_is_left_out_is_printed(run):
    _, packed, err = run("pack", "code/a.py", "code", "out", "--tokenizer", "tok", "--workers", "1")
    assert packed["datasets"][0]["documents"] == 6
    assert "  left out: 1 the same file again\n" in err


def test_alpaca_lines_are_packed_by_name(run, tmp_path):
    (tmp_path / "alpaca.jsonl").write_text(json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n")
    line = ("pack", "alpaca.jsonl", "out", "--tokenizer", "tok", "--workers", "1")
    code, _, err = run(*line, "--format", "chat")
    assert (code, "looks like --format alpaca. Mend it, or leave such records out (--skip-bad)" in err) == (1, True)
    assert run(*line, "--format", "alpaca")[0] == 0
    assert run("preview", "out")[2].startswith("a{+<sep>b<eod>+}\n")


def test_wrong_calls(run):
    code, _, err = run("pack", "code", "--tokenizer", "tok")
    assert (code, err) == (2, "error: one path, code, is given; name what to read, and then the folder to write\n")
    assert run("pack", "code", "out", "--tokenizer", "nowhere")[0] == 1
    assert run("info", "code")[2].startswith("error: code is no dataset")


def test_help_is_there_without_what_it_takes_to_run():
    code = (
        "import sys; sys.argv = ['yuanmoe', 'data', 'pack', '--help']\n"
        "from yuanmoe.cli.main import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(' '.join({'torch', 'numpy', 'sentencepiece'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--max-document" in done.stdout


def test_ctrl_c_says_where_the_work_is(run, tmp_path):
    with (tmp_path / "long.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"number {place} " * 300}) + "\n" for place in range(2000))
    line = ("data", "pack", "long.jsonl", "out", "--tokenizer", "tok", "--shard-tokens", "10000", "--workers", "2")
    command = [sys.executable, "-m", "yuanmoe", *line]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        journal = tmp_path / "out.partial" / "dataset" / "journal.json"
        deadline = time.monotonic() + 60
        while not journal.is_file():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted; the finished shards are in out.partial, the same command goes on with them\n"


DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"


def test_what_the_document_shows_works(run, tmp_path):
    lines = [{"text": f"def number_{place}(): return {place}\n" * 5} for place in range(400)]
    (tmp_path / "code").rename(tmp_path / "corpus")
    (tmp_path / "tok").rename(tmp_path / "model")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "more.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    blocks = re.findall(r"```(?:python)?\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    commands, preview, python = blocks
    for command in re.findall(r"^yuanmoe data (.*?) *(?:#.*)?$", commands, re.MULTILINE):
        code, _, err = run(*command.split())
        assert code == 0, err
        if command == "preview tuning":
            assert err.startswith(preview)
    names = {"tokenizer": bpe(), "config": preset("tiny", vocab_size=400)}
    exec(python, names)
    batch = names["batch"]
    assert [each.shape for each in (batch.ids, batch.loss_mask, batch.documents)] == [(4, 257), (4, 256), (4, 256)]
    assert names["state"]["samples"] == 8
