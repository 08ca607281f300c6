"""`yuanmoe generate` and `yuanmoe chat` as people and programs meet them: what goes where, and what errors say."""

import functools
import io
import json
import sys

import pytest

from small_lm import small_lm, write_lm
from yuanmoe.cli.generate import answer, experts
from yuanmoe.cli.main import main
from yuanmoe.plan.device.machine import Rate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_lm(folder)
    return folder


@functools.cache
def lm():
    return small_lm()


@pytest.fixture
def run(monkeypatch, capsys, folder):
    """Runs a command on the small model in this process: exit code, stdout, stderr."""

    def call(command, *arguments, stdin=b"", model=folder):
        monkeypatch.setattr(sys, "argv", ["yuanmoe", command, "--model", str(model), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return exit_info.value.code or 0, captured.out, captured.err

    return call


def test_the_text_is_on_stdout_and_the_statistics_are_not(run):
    code, out, err = run("generate", "def add(", "--max-new-tokens", 6)
    assert (code, out) == (0, lm().generate("def add(", max_new_tokens=6).text + "\n")
    assert "answer: 6 tokens in " in err
    assert " a second" in err


def test_prompts_come_from_files_and_pipes_without_their_last_newline(run, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("写 def\n\n".encode())
    expected = lm().generate("写 def\n", max_new_tokens=6).text + "\n"
    assert run("generate", "--prompt-file", file, "--max-new-tokens", 6)[:2] == (0, expected)
    assert run("generate", "--max-new-tokens", 6, stdin=file.read_bytes())[:2] == (0, expected)


def test_questions_holes_and_sampling_are_those_of_the_library(run):
    common = ("--max-new-tokens", 6)
    asked = lm().chat([{"role": "user", "content": "why?"}], max_new_tokens=6)
    assert run("generate", "why?", "--instruct", *common)[1] == asked.text + "\n"
    filled = lm().fill("def f(", "return x", max_new_tokens=6)
    assert run("generate", "def f(", "--suffix", "return x", *common)[1] == filled.text + "\n"
    sampling = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 3}
    options = [part for name, value in sampling.items() for part in (f"--{name.replace('_', '-')}", value)]
    warm = lm().generate("def", stop=["e", "a"], max_new_tokens=6, **sampling)
    assert run("generate", "def", *common, *options, "--stop", "e", "--stop", "a")[1] == warm.text + "\n"


def test_the_answer_is_limited_by_the_context_and_256_tokens(run):
    assert len(json.loads(run("generate", "def", "--json")[1])["ids"]) == 128 - len(lm().text_ids("def"))


def test_json_is_one_object_on_stdout_with_everything_in_it(run):
    code, out, err = run("generate", "def add(", "--max-new-tokens", 4, "--json", "--show-experts")
    result = json.loads(out)
    expected = lm().generate("def add(", max_new_tokens=4, routing=True)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert (result["text"], result["ids"]) == (expected.text, expected.ids)
    assert result["finish_reason"] == "length"
    assert result["prompt_tokens"] == expected.prompt_tokens
    assert result["logprobs"] == pytest.approx(expected.logprobs)
    assert result["decode_tokens_per_s"] > 0
    assert result["experts"]["layers"] == [0, 1]
    assert result["experts"]["experts"] == [routing.experts.tolist() for routing in expected.routings[:-1]]


def test_the_load_of_each_layer_is_listed(run):
    code, out, err = run("generate", "def add(", "--max-new-tokens", 6, "--show-experts")
    assert (code, out) == (0, lm().generate("def add(", max_new_tokens=6).text + "\n")
    assert "Experts of 5 tokens" in err
    assert "layer 0" in err
    assert "of 8" in err


def test_colours_are_the_experts_own_and_never_run_over_a_line(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    start, end = f"\x1b[30;48;5;{experts.colour(3)}m", "\x1b[0m"
    assert experts.coloured("a\nb", 3) == f"{start}a{end}\n{start}b{end}"
    assert experts.coloured("a", None) == "a"
    assert len({experts.colour(expert) for expert in range(60)}) == 60
    monkeypatch.setenv("NO_COLOR", "1")
    assert experts.coloured("a", 3) == "a"


def test_effective_experts_count_equal_shares():
    assert experts.effective_experts(experts.Counter({1: 5, 2: 5, 7: 5})) == pytest.approx(3)
    assert experts.effective_experts(experts.Counter({4: 9})) == 1
    assert experts.effective_experts(experts.Counter()) == 0


def test_escape_sequences_of_a_model_do_not_reach_a_terminal(monkeypatch):
    said = "a\x1b]52;c;Zm9v\x07\x9b\n\tb\x7f"
    assert answer.visible(said) == said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert answer.visible(said) == "a^[]52;c;Zm9v^G\\x9b\n\tb^?"


def test_a_model_larger_than_caches_is_measured_against_the_memory(run, monkeypatch):
    assert "memory bandwidth" not in run("generate", "def", "--max-new-tokens", 4)[2]
    monkeypatch.setattr(answer, "CACHED_BYTES", 0)
    monkeypatch.setattr(answer, "measure_bandwidth", lambda rounds: Rate(median=2e9, low=1e9, high=3e9))
    assert "that 2.00 GB/s of memory bandwidth allow" in run("generate", "def", "--max-new-tokens", 4)[2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["x", "--top-k", "3"], 2, "--top-k changes nothing at temperature 0; add one, such as --temperature 0.6"),
        (["x", "--seed", "3"], 2, "--seed changes nothing at temperature 0"),
        (["x", "--temperature", "-1"], 2, "temperature is -1.0; it must be between 0"),
        (["x", "--prompt-file", "y"], 2, "the prompt is given twice, as an argument and as --prompt-file"),
        (["--prompt-file", "/nowhere/y"], 2, "cannot read the prompt from /nowhere/y: "),
        ([], 2, "stdin is empty; to start a document from nothing give '' as the prompt"),
        (["x", "--suffix", "y", "--instruct"], 2, "--suffix and --instruct exclude each other"),
        (["x", "--stop", ""], 2, "the stop string is empty"),
        (["x", "--stop", "a", "--stop", ""], 2, "stop string 1 is empty"),
        (["x", "--max-new-tokens", "0"], 2, "max_new_tokens is 0; it must be at least 1"),
        (["x" * 1000], 1, "exceeds the model's context of 128 (max_position_embeddings); shorten it by"),
        (["x", "--suffix", "y" * 1000], 1, "exceeds the model's context of 128 (max_position_embeddings); shorten it"),
        (["x", "--max-new-tokens", "500"], 1, "exceeds the model's context of 128 (max_position_embeddings); ask for"),
        (["x", "--expert-layer", "9"], 2, "--expert-layer 9 has no experts; the layers that have are 0, 1"),
        (["x", "--dtype", "int3"], 2, "unknown dtype 'int3'"),
        (["x", "--device", "foo"], 2, "there is no device 'foo'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_weights_are_read(run, monkeypatch, arguments, code, message):
    monkeypatch.setattr("yuanmoe.lm.model_of", None)
    assert run("generate", *arguments)[0] == code
    assert message in run("generate", *arguments)[2]


@pytest.mark.parametrize(("option", "value", "message"), [
    ("--top-p", 0, "top_p is 0.0; it must be above 0"), ("--max-new-tokens", 0, "max_new_tokens is 0"),
    ("--stop", "", "the stop string is empty"), ("--device", "foo", "there is no device 'foo'"),
])  # fmt: skip
def test_a_talk_that_cannot_go_well_does_not_begin(run, monkeypatch, option, value, message):
    monkeypatch.setattr("yuanmoe.lm.model_of", None)
    code, out, err = run("chat", option, value)
    assert (code, out) == (2, "")
    assert message in err


def test_a_prompt_must_come_from_somewhere_and_be_text(run, monkeypatch):
    assert "cannot read the prompt from stdin: 'utf-8' codec" in run("generate", stdin=b"\xff\xfe")[2]

    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "TextIOWrapper", Terminal)
    assert "there is no prompt; give it as an argument, with --prompt-file FILE, or on stdin" in run("generate")[2]


def test_a_dense_model_has_no_experts_to_show(run, tmp_path):
    write_lm(tmp_path, num_experts=0)
    assert "none of the 2 layers of this model has experts" in run("generate", "x", "--show-experts", model=tmp_path)[2]


def ask(*turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    roles = ["user", "assistant"] * len(turns)
    return messages + [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def test_a_conversation_goes_on_from_what_was_said(run, tmp_path):
    limits = {"temperature": 0.0, "max_new_tokens": 5}
    options = ("--temperature", 0, "--max-new-tokens", 5, "--system", "be short")
    first = lm().chat(ask("hello", system="be short"), **limits).text
    second = lm().chat(ask("hello", first, "more", system="be short"), **limits).text
    afresh = lm().chat(ask("more", system="be short"), **limits).text
    saved = tmp_path / "with spaces.json"
    script = f"hello\n\nmore\n/save {saved}\n/reset\nmore\n/exit\nnever read\n"
    code, out, err = run("chat", *options, stdin=script.encode())
    assert (code, out) == (0, f"{first}\n{second}\n{afresh}\n")
    assert json.loads(saved.read_text("utf-8")) == {"messages": ask("hello", first, "more", second, system="be short")}
    assert f"saved 5 messages to {saved}" in err
    assert "a new conversation" in err


def test_a_question_asked_again_is_answered_anew_in_the_same_place(run, tmp_path):
    saved = tmp_path / "saved.json"
    script = f'"""\ntwo\nlines\n"""\n/regenerate\n/save {saved}\n'
    warm = {"temperature": 1.5, "top_p": 0.95, "max_new_tokens": 6}
    tries = [lm().chat(ask("two\nlines"), seed=seed, **warm).text for seed in (4, 5)]
    options = ("--temperature", 1.5, "--seed", 4, "--max-new-tokens", 6)
    _, out, _ = run("chat", *options, stdin=script.encode())
    assert out == f"{tries[0]}\n{tries[1]}\n"
    assert json.loads(saved.read_text("utf-8")) == {"messages": ask("two\nlines", tries[1])}


def test_a_full_context_is_told_with_the_way_out(run, tmp_path):
    small = write_lm(tmp_path, max_position_embeddings=24)
    script = f"{'x ' * 50}\nhi\nmore and more\n/reset\nhi\n"
    options = ("--temperature", 0, "--max-new-tokens", 100)
    code, out, err = run("chat", *options, stdin=script.encode(), model=tmp_path)
    answer_of_hi = small.chat(ask("hi")).text
    assert (code, out) == (1, f"{answer_of_hi}\n{answer_of_hi}\n")
    assert err.count("the model's context of 24 tokens is full; start anew with /reset") == 2
    assert err.count("error: the conversation with this question has ") == 2
    assert "the model's context holds 24 and needs room for an answer; shorten the question by" in err


def test_commands_that_cannot_be_obeyed_say_so(run, tmp_path):
    script = f"/regenerate\n/save\n/save {tmp_path}/no/where\n/frob\n/help\n /etc is a folder?\n/regenerate\n"
    code, out, err = run("chat", "--max-new-tokens", 2, "--temperature", 0, stdin=script.encode())
    assert code == 1
    assert out == 2 * (lm().chat(ask("/etc is a folder?"), max_new_tokens=2).text + "\n")
    for said in (
        "there is no question yet",
        "name a file: /save FILE",
        f"error: cannot write {tmp_path}/no/where: No such file or directory; name another file",
        "/frob is no command (/help lists them); a question that starts with / takes a space before it",
        "/regenerate  answer the last question again",
        "the same answer comes again at temperature 0; start with --temperature for another",
    ):
        assert said in err
