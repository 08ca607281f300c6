"""`yuanmoe inspect`: weights made for one RoPE base are told from others, and tokens are found where they went."""

import json
import math
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch

from small_lm import lm_config, small_lm, write_lm
from small_models import random_model
from small_tokenizers import bpe
from yuanmoe.checkpoint.write.save import save_native, save_official
from yuanmoe.cli.main import main
from yuanmoe.config import ModelConfig
from yuanmoe.engine import score as score_file

BLOCK = "def add(first, second):\n    return first + second  # 1734 <tag> quick fox\nfor x in [3]: print('lazy', x)\n"
"""Repeated, its tokens repeat with a fixed distance."""


def copying_weights(config: ModelConfig, distance: int) -> dict[str, torch.Tensor]:
    """Weights that say again what came after the token `distance` back, under the rotary angles of `config`.

    Every query meets every key with sum_i cos(theta_i (offset - distance)): largest at that offset, if the angles are
    the ones it was made with.
    """
    state = random_model(config).state_dict()
    D, C = config.hidden_size, config.head_dim
    constant, names = 0, slice(1, D)
    for name, weight in state.items():
        if not name.endswith("norm.weight") and "router" not in name:
            weight.zero_()
    embedding = state["model.embed_tokens.weight"]
    embedding.copy_(0.1 * torch.randn(embedding.shape).sign())
    embedding[:, constant] = 0.1
    angles = config.rope_theta ** (-torch.arange(0, C, 2) / C) * distance
    attention = "model.layers.0.self_attn"
    state[f"{attention}.q_proj.weight"][:, constant] = 6 * torch.cat([angles.cos(), -angles.sin()])
    state[f"{attention}.k_proj.weight"][: C // 2, constant] = 6
    state[f"{attention}.v_proj.weight"][names, names] = torch.eye(D - 1)
    state[f"{attention}.o_proj.weight"][names, names] = 0.5 * torch.eye(D - 1)
    for name, weight in state.items():
        if name.endswith("norm.weight"):
            weight.fill_(1)
    return state


def write_copier(folder, theta):
    """A checkpoint whose config.json has base 10000, whatever base `theta` its weights are made for."""
    period = len(bpe().encode(BLOCK))
    config = lm_config(
        bpe(),
        hidden_size=128,
        head_dim=128,
        num_attention_heads=1,
        num_hidden_layers=1,
        partial_rotary_factor=1.0,
        max_position_embeddings=512,
    )
    save_native(copying_weights(config.replace(rope_theta=theta), period - 1), config, folder)
    bpe().save(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_lm(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.py"
    file.write_text(BLOCK * 30, encoding="utf-8")
    return file


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `yuanmoe inspect` in this process: exit code, what its last line on stdout says, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["yuanmoe", "inspect", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        return exit_info.value.code or 0, json.loads(lines[-1]) if lines else None, captured.err

    return call


@pytest.mark.parametrize("theta", [10000.0, 40890.0])
def test_weights_are_told_by_the_base_they_were_made_for(tmp_path, run, text, theta):
    write_copier(tmp_path / "model", theta)
    code, report, said = run("--rope", "--model", tmp_path / "model", "--text", text, "--tokens", 1024)
    assert code == 0
    verdict = report["verdict"]
    assert (verdict["rope_theta"], verdict["rope_angles"], verdict["more_tokens"]) == (theta, "float32", None)
    assert verdict["text"].startswith(f"These weights want RoPE base {theta:g}: with ")
    assert "They want float32 angles: with bfloat16 ones it costs " in verdict["text"]
    assert verdict["text"] in said
    assert ("config.json says 10000. To change it: yuanmoe convert" in said) == (theta == 40890.0)
    settings = {(row["rope_theta"], row["rope_angles"]): row for row in report["settings"]}
    assert len(settings) == 4
    best = settings[theta, "float32"]
    assert best["behind_best_nats"] == best["standard_error_nats"] == 0
    assert all(row["perplexity"] > 2 * best["perplexity"] for row in settings.values() if row is not best)
    assert math.log(best["perplexity"]) == pytest.approx(best["nats_per_token"])


def test_a_short_text_settles_nothing_and_says_what_would(run, text, folder):
    _, report, said = run("--rope", "--model", folder, "--text", text, "--tokens", 200)
    assert report["verdict"]["rope_theta"] is None
    assert report["verdict"]["more_tokens"] == 56
    assert [row["standard_error_nats"] for row in report["settings"]] == [None] * 4
    assert "too short to tell: 200 tokens were scored, at least 256 are needed." in said
    assert "The text has 1,470: try --tokens 256." in said


def test_the_base_of_the_config_is_tried_too(run, text, tmp_path):
    write_lm(tmp_path / "model", rope_theta=1e6)
    _, report, said = run("--rope", "--model", tmp_path / "model", "--text", text, "--tokens", 40)
    assert [row["rope_theta"] for row in report["settings"]] == [1e4, 1e4, 40890, 40890, 1e6, 1e6]
    assert report["configured"] == {"rope_theta": 1e6, "rope_angles": "float32"}
    assert "base 1000000, float32 angles (config.json)" in said


def test_where_tokens_went(run, text, folder):
    code, report, said = run("--model", folder, "--text", text, "--tokens", 300, "--context", 100)
    assert code == 0
    assert (report["tokens"], report["text_tokens"], report["context"]) == (300, 1470, 100)
    ids = [bpe().eod_id, *bpe().encode(text.read_text())][:301]
    assert report["bytes"] == sum(len(bpe().surface(token, before)) for before, token in pairwise(ids))
    nats = report["nats_per_token"] * 300
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / report["bytes"])
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    for layer in report["layers"]:
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-3)
        assert 1 <= layer["effective_experts"] <= 8
        assert len(layer["favourites"]) == 8
        assert "matrices" not in layer
    assert f"perplexity {report['perplexity']:,.3f}, {report['bits_per_byte']:.3f} bits a byte" in said
    assert "300 of 1,470 tokens, in windows of 100" in said
    assert "Experts of layer 1" in said
    favourite = next(mine[0] for mine in report["layers"][1]["favourites"] if mine)
    assert favourite["token"] == bpe().token_text(favourite["token_id"])
    assert repr(favourite["token"])[1:-1] in said


def test_one_window_is_the_likelihood_of_the_library(run, tmp_path, folder):
    document = BLOCK + "print(first, second)\n"
    (tmp_path / "text").write_text(document, encoding="utf-8")
    _, report, _ = run("--model", folder, "--text", tmp_path / "text", "--json")
    assert report["perplexity"] == pytest.approx(small_lm().perplexity(document), rel=1e-4)
    assert report["bytes"] == len(document.encode())


def test_json_alone(run, text, folder):
    _, report, said = run("--model", folder, "--text", text, "--tokens", 20, "--json")
    assert report["command"] == "inspect"
    assert said == ""


def test_another_layer_may_be_listed(run, text, tmp_path, monkeypatch):
    write_lm(tmp_path / "model", num_hidden_layers=3, num_experts=(8, 0, 4))
    arguments = ("--model", tmp_path / "model", "--text", text, "--tokens", 60)
    assert "Experts of layer 0" in run(*arguments, "--layer", 0)[2]
    monkeypatch.setattr("yuanmoe.lm.model_of", None)
    code, _, said = run(*arguments, "--layer", 1)
    assert code == 2
    assert "--layer 1 has no experts; layers that have: 0, 2" in said


def test_a_device_that_is_not_here_is_a_wrong_call(run, text, folder, monkeypatch):
    monkeypatch.setattr("yuanmoe.lm.model_of", None)
    code, _, said = run("--model", folder, "--text", text, "--device", "foo")
    assert code == 2
    assert "error: there is no device 'foo' for torch " in said


def test_a_dense_model_has_a_likelihood_only(run, text, tmp_path):
    write_lm(tmp_path / "model", num_experts=0)
    code, report, said = run("--model", tmp_path / "model", "--text", text, "--tokens", 60)
    assert (code, report["layers"]) == (0, [])
    assert "No layer of this model has experts." in said


def test_official_directories_and_longer_contexts(run, text, tmp_path, folder):
    lm = small_lm()
    save_official(lm.model.state_dict(), lm.config, tmp_path / "official")
    lm.tokenizer.save(tmp_path / "official")
    arguments = ("--text", text, "--tokens", 200, "--context", 200)
    official, native = (run("--model", path, *arguments)[1] for path in (tmp_path / "official", folder))
    assert official["context"] == 200 > lm.config.max_position_embeddings
    assert official | {"model": None} == native | {"model": None}


def test_logits_of_a_few_tokens_exist_at_a_time(run, text, folder, monkeypatch):
    rows = []
    logprobs = score_file._logprobs
    monkeypatch.setattr(score_file, "_logprobs", lambda logits, ids: rows.append(len(logits)) or logprobs(logits, ids))
    run("--model", folder, "--text", text, "--context", 1000, "--tokens", 1000)
    assert sum(rows) == 1000
    assert max(rows) <= score_file.HEAD_TOKENS


class Page(HTMLParser):
    """What a browser would fetch, the drawings, and the data of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.fetched, self.data, self.json = [], [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.json = ("type", "application/json") in attrs
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value != "data:,"]

    def handle_data(self, data):
        if self.json:
            self.data, self.json = data, False


def test_the_page_needs_nothing_else_and_holds_every_number(run, tmp_path, folder):
    file = tmp_path / "<b>&.txt"
    file.write_text("</script><script>alert(1)</script> <i> & [/bold] [red]\n" * 30, encoding="utf-8")
    out = tmp_path / "page.html"
    out.write_text("an older one")
    _, report, said = run("--model", folder, "--text", file, "--html", out)
    assert f"wrote {out}" in said
    html = out.read_text(encoding="utf-8")
    parsed = Page(html)
    assert parsed.fetched == []
    assert "://" not in html.replace(str(tmp_path), "")
    assert parsed.tags.count("script") == 2, "nothing of the text became markup"
    assert not {"b", "i"} & set(parsed.tags) - {"b"}
    assert parsed.tags.count("svg") == 1 + 2 * 2, (
        "the loads, and of each layer what works together and what is regarded"
    )
    data = json.loads(parsed.data)
    assert [layer | {"matrices": None} for layer in data["layers"]] == [
        layer | {"matrices": None} for layer in report["layers"]
    ]
    for layer in data["layers"]:
        assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in layer["matrices"]["relations"])
    for svg in html.split("<svg")[1:]:
        drawing = ET.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")
        cells = sum(path.get("d").count("M") for path in drawing.iter("path"))
        assert cells == (2 * 8 if drawing.get("class") == "load" else 8 * 8)
    assert list(tmp_path.glob("*.partial")) == []


def test_the_text_is_refused_before_the_weights_are_read(run, tmp_path, folder, monkeypatch):
    monkeypatch.setattr("yuanmoe.lm.load", None)
    file = tmp_path / "text"

    def refusal():
        code, report, said = run("--model", folder, "--text", file)
        assert (code, report) == (2, None)
        return said

    assert f"cannot read {file}: No such file or directory" in refusal()
    for content, tokens in ((b"", 0), (b"(", 1)):
        file.write_bytes(content)
        assert f"{file} has {tokens} tokens; at least 2 are needed, and some hundreds tell more" in refusal()
    file.write_bytes(b"caf\xe9 au lait")
    assert f"{file} is not UTF-8: byte 3 is 0xe9; convert it first, for example with iconv -f ISO-8859-1" in refusal()


def test_options_that_make_no_sense_are_refused(run, text, tmp_path, folder):
    arguments = ("--model", folder, "--text", text)
    for extra in (("--html", tmp_path / "page.html"), ("--layer", 0)):
        code, _, said = run("--rope", *arguments, *extra)
        assert code == 2
        assert "--rope has nothing to do with experts: give it without --html and --layer" in said
    code, _, said = run(*arguments, "--html", tmp_path / "none" / "page.html")
    assert code == 2
    assert f"there is no folder {tmp_path / 'none'}; create it first" in said
    (tmp_path / "taken").mkdir()
    code, _, said = run(*arguments, "--tokens", 20, "--html", tmp_path / "taken")
    assert code == 2
    assert f"cannot write {tmp_path / 'taken'}: Is a directory" in said


@pytest.mark.parametrize("rope", [(), ("--rope",)])
def test_damaged_weights_are_named(run, text, tmp_path, rope):
    lm = small_lm()
    state = lm.model.state_dict()
    state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], math.inf)
    save_native(state, lm.config, tmp_path / "model")
    lm.tokenizer.save(tmp_path / "model")
    code, _, said = run(*rope, "--model", tmp_path / "model", "--text", text, "--tokens", 50)
    assert code == 1
    assert "50 of 50 tokens have no likelihood under " in said
    assert (
        "the weights are damaged (see yuanmoe verify), or float16 is too narrow for them (try --dtype float32)" in said
    )
