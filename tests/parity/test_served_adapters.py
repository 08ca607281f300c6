"""Adapters on a server, for the official client: each answers as the library does with that adapter attached."""

import asyncio
import dataclasses
import sys

import httpx
import openai
import pytest

import small_adapters
from serving import serving
from small_lm import small_lm, write_lm
from yuanmoe.checkpoint.adapters.adapter import Adapter, base_of, open_adapter, save_adapter
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.cli.main import main
from yuanmoe.errors import CheckpointError, ResourceError, UsageError
from yuanmoe.serve.core.adapters import check_room, read_adapters
from yuanmoe.serve.core.launch import Settings, launch

HELLO = [{"role": "user", "content": "The quick brown fox"}]
ROLES = {"poet": ("q", "v", "experts"), "clerk": ("o", "head")}


def adapters_of(lm) -> dict[str, Adapter]:
    base, made = base_of(lm.model, "small"), {}
    for seed, (name, roles) in enumerate(ROLES.items()):
        settings = small_adapters.settings(*roles)
        factors = small_adapters.factors(lm.model, settings, b_std=0.3, seed=seed)
        made[name] = Adapter(settings=settings, base=base, tensors=factors)
    return made


@pytest.fixture(scope="module")
def lm():
    return small_lm(max_position_embeddings=1024)


@pytest.fixture(scope="module")
def url(lm):
    with serving(launch(lm, Settings(model_id="base"), adapters_of(lm))) as url:
        yield url


@pytest.fixture(scope="module")
def expected(lm) -> dict[str, str]:
    """What the library says with each adapter, and without one."""
    alone = small_lm(max_position_embeddings=1024)
    said = {"base": alone.chat(HELLO, max_new_tokens=12).text}
    for name, adapter in adapters_of(lm).items():
        alone.attach(adapter)
        said[name] = alone.chat(HELLO, max_new_tokens=12).text
    assert len(set(said.values())) == 3
    return said


def test_adapters_are_models_with_a_parent(url) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        cards = {model.id: model.model_dump() for model in client.models.list()}
        assert list(cards) == ["base", "poet", "clerk"]
        assert "parent" not in cards["base"]
        assert cards["poet"]["parent"] == cards["clerk"]["parent"] == "base"
        assert client.models.retrieve("poet").id == "poet"
        with pytest.raises(openai.NotFoundError, match="'base', 'poet', 'clerk'"):
            client.models.retrieve("painter")
    info = httpx.get(f"{url}/v1/info").json()["adapters"]
    assert [each["name"] for each in info] == ["poet", "clerk"]
    assert 0 < info[0]["active_parameters"] < info[0]["parameters"]
    assert info[0]["gflop_per_token"] == pytest.approx(2e-9 * info[0]["active_parameters"])


def test_many_at_once_are_each_answered_by_the_model_they_named(url, expected) -> None:
    async def ask(client, name):
        return await client.chat.completions.create(model=name, messages=HELLO, max_tokens=12, temperature=0)

    async def everybody():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            names = [*expected] * 4
            return names, await asyncio.gather(*(ask(client, name) for name in names))

    names, answers = asyncio.run(everybody())
    assert [answer.model for answer in answers] == names
    assert [answer.choices[0].message.content for answer in answers] == [expected[name] for name in names]
    assert len({answer.system_fingerprint for answer in answers}) == 3


def test_a_stream_and_a_completion_too(url, lm, expected) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="clerk", messages=HELLO, max_tokens=12, temperature=0, stream=True
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert ({chunk.model for chunk in chunks}, text) == ({"clerk"}, expected["clerk"])
        prompt = lm.chat_ids(HELLO)
        said = client.completions.create(model="poet", prompt=prompt, max_tokens=12, temperature=0)
        assert (said.model, said.choices[0].text) == ("poet", expected["poet"])


def test_metrics_tell_adapters_apart(lm) -> None:
    with serving(launch(lm, Settings(model_id="base"), adapters_of(lm))) as url:
        for name in ("poet", "poet", "base", None):
            body = {"messages": HELLO, "max_tokens": 1} | ({} if name is None else {"model": name})
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
        metrics = httpx.get(f"{url}/metrics").text
    assert 'yuanmoe_requests_total{adapter="poet"} 2.0' in metrics
    assert 'yuanmoe_requests_total{adapter=""} 2.0' in metrics


def test_names_and_bases_are_checked_before_weights_are_read(tmp_path) -> None:
    lm = write_lm(tmp_path / "base")
    other = write_lm(tmp_path / "other", hidden_size=24)
    save_adapter(adapters_of(lm)["poet"], tmp_path / "poet")
    save_adapter(adapters_of(other)["poet"], tmp_path / "stranger")
    source = open_checkpoint(tmp_path / "base")
    assert list(read_adapters([f"a={tmp_path}/poet", f"b/1={tmp_path}/poet"], source, "base")) == ["a", "b/1"]
    for named, error, message in (
        (["poet"], UsageError, "NAME=DIRECTORY"),
        (["=poet"], UsageError, "NAME=DIRECTORY"),
        (["a b=poet"], UsageError, "NAME=DIRECTORY"),
        ([f"base={tmp_path}/poet"], UsageError, "the model's own name"),
        ([f"a={tmp_path}/poet"] * 2, UsageError, "that of .*poet"),
        ([f"a={tmp_path}/base"], CheckpointError, "is no adapter"),
        ([f"a={tmp_path}/stranger"], CheckpointError, "belongs to small"),
    ):
        with pytest.raises(error, match=message):
            read_adapters(named, source, "base")


def test_adapters_that_do_not_fit_are_refused_with_the_numbers(lm) -> None:
    made = adapters_of(lm)
    needed = sum(tensor.nbytes for each in made.values() for tensor in each.tensors.values())
    with pytest.raises(ResourceError, match=r"2 adapters need .* beside the model, 100 B are free; load fewer"):
        launch(lm, Settings(model_id="base", free_bytes=100), made)
    for free in (needed, None):
        assert check_room(made, lm.model.model.norm.weight.dtype, free) == needed


def test_the_command_refuses_an_adapter_of_another_model(tmp_path, monkeypatch, capsys) -> None:
    lm = write_lm(tmp_path / "base")
    made = adapters_of(lm)["poet"]
    save_adapter(dataclasses.replace(made, base=dataclasses.replace(made.base, fingerprint="0" * 32)), tmp_path / "no")
    assert open_adapter(tmp_path / "no").settings == made.settings
    arguments = ["serve", "--model", str(tmp_path / "base"), "--port", "0", "--adapter", f"poet={tmp_path / 'no'}"]
    monkeypatch.setattr(sys, "argv", ["yuanmoe", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 1
    assert "give it the base that it was trained on" in " ".join(capsys.readouterr().err.split())
