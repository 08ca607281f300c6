"""`yuanmoe plan --cluster` as people and programs meet it."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from yuanmoe import estimate
from yuanmoe.cli.main import main
from yuanmoe.cli.plan import command as plan_file
from yuanmoe.plan.device.devices import DEVICES
from yuanmoe.plan.device.machine import Rate

Run = Callable[..., tuple[int, str, str]]

M32 = ("plan", "M32", "--cluster", "8xh100-80")
LARGE = (*M32, "--nodes", "12", "--global-batch", "1536")
PUBLISHED = (*LARGE, "--layout", "PP8 ep1 full mb2 optimizer")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the program in this process: exit code, stdout, stderr."""

    def call(*arguments: str, columns: int = 200) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["yuanmoe", *arguments])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        code = exit_info.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


def last_line(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])


def test_it_says_for_people_what_it_says_for_programs(run: Run) -> None:
    code, out, err = run(*PUBLISHED, "--tokens", "2e12")
    report = last_line(out)
    assert (code, report["fits"], report["cluster"]["devices"]) == (0, True, 96)
    plan = report["plan"]
    assert plan["layout"] == "dp12 pp8 ep1 optimizer mb2 full"
    assert (sum(plan["layers"]), plan["accumulation"]) == (24, 64)
    assert plan["tokens_per_s"] == pytest.approx(1536 * 4096 / plan["time_s"]["total"])
    budget = report["budget"]
    assert budget["steps"] == pytest.approx(2e12 / (1536 * 4096))
    assert budget["days"] == pytest.approx(2e12 / plan["tokens_per_s"] / 86_400)
    assert budget["device_days"] == 96 * budget["days"]
    assert budget["petaflops_days"] == pytest.approx(2e12 * 6 * 3_704_055_808 / 86_400e15)
    assert 0.2 < plan["mfu"] < 0.4
    # The paper's equation shares the work equally; here a head and 24 layers cannot be, so one stage has four of them.
    assert 0.7 * plan["time_s"]["total"] < report["equation_4_s"] < plan["time_s"]["total"]
    for said in (
        "yuan2-m32 on 12 x 8 x h100-80, 1,536 x 4,096 tokens a step",
        "device: 80.0 GiB, 989 TFLOP/s, of which it keeps up 50% (NVIDIA H100 SXM data sheet)",
        "within a node: 450 GB/s each way (NVIDIA DGX H100: NVLink, 900 GB/s both ways)",
        "dp12 pp8 ep1 optimizer mb2 full",
        "2.00 T tokens: 317,891 steps",
        "514 PetaFLOP/s-days of model FLOPs",
        "Fits: ",
    ):
        assert said in err


def test_tables_fit_80_columns(run: Run) -> None:
    _, _, err = run(*PUBLISHED, columns=80)
    for row in ("stage   layers   weights   grads", "bubble ", "dp12 pp8 ep1 optimizer mb2 full "):
        assert row in err
    assert max(map(len, err.splitlines())) <= 80


def test_for_programs_alone_with_runners_up(run: Run) -> None:
    code, out, err = run(*LARGE, "--layout", "mb1", "--json")
    assert (code, err, len(out.splitlines())) == (0, "", 1)
    report = last_line(out)
    times = [plan["time_s"]["total"] for plan in (report["plan"], *report["runners_up"])]
    assert (len(times), times) == (6, sorted(times))


def test_what_does_not_fit_says_what_would(run: Run) -> None:
    code, out, err = run(*M32, "--seq", "8192", "--layout", "full")
    report = last_line(out)
    assert (code, report["fits"], report["runners_up"]) == (0, False, [])
    assert report["training"]["global_batch"] == 512
    for said in ("No layout fits; this one misses by least", "Does not fit: ", "--nodes 2\n", "--cluster 8xh200"):
        assert said in err
    assert "8,192 tokens are more than the 4,096 the model is made for" in err


def test_stages_and_wires_may_be_given(run: Run) -> None:
    stages = "2,3,3,3,3,4,4,2"
    _, out, err = run(
        *PUBLISHED, "--stages", stages, "--link", "200GB/s", "--network", "200Gb/s", "--efficiency", "0.4"
    )
    report = last_line(out)
    assert report["plan"]["layers"] == [2, 3, 3, 3, 3, 4, 4, 2]
    assert (report["cluster"]["wires"]["link"], report["cluster"]["wires"]["card"]) == (200e9, 25e9)
    assert "within a node: 200 GB/s each way (--link)" in err
    assert "network card: 25.0 GB/s each way (--network)" in err
    assert "of which it keeps up 40%" in err


def test_machines_like_this_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "device_named", lambda name, ram: DEVICES["24gib-2core" if name is None else name])
    _, out, err = run("plan", "nano", "--cluster", "cpu", "--nodes", "4", "--global-batch", "64")
    assert last_line(out)["fits"] is True
    assert "nano on 4 x 24gib-2core, 64 x 512 tokens a step" in err


def test_the_commands_of_the_documentation_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = Rate(median=33e9, low=33e9, high=33e9)
    monkeypatch.setattr(estimate, "measure_bandwidth", lambda: rate)
    monkeypatch.setattr(estimate, "measure_matmul", lambda: rate)
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    commands = [line for line in page.splitlines() if line.startswith("yuanmoe plan ")]
    assert len(commands) >= 6
    for command in commands:
        code, out, _ = run(*shlex.split(command, comments=True)[1:])
        assert (code, last_line(out)["command"]) == (0, "plan"), command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "M32", "--nodes", "2"), "error: --nodes is about training; it needs --cluster"),
        (("plan", "M32", "--global-batch", "2"), "error: --global-batch is about training; it needs --cluster"),
        ((*M32, "--bits", "4"), "error: --bits is about running a model; leave it out with --cluster"),
        ((*M32, "--kv-dtype", "int8"), "error: --kv-dtype is about running a model; leave it out with --cluster"),
        ((*M32, "--stages", "a,b"), "error: stages 'a,b' is not a list of numbers such as 2,3,3,2"),
        ((*M32, "--stages", "12,6,6"), "error: 8 devices are not a multiple of 3 stages; there can be 1, 2, 4, 8"),
        ((*M32, "--tokens", "0"), "error: tokens is 0.0; it must be a number above 0"),
        ((*M32, "--tokens", "nan"), "error: tokens is nan; it must be a number above 0"),
        ((*M32, "--seq", "0"), "error: sequence length is 0; it must be at least 1"),
        ((*M32, "--network", "1GB"), "error: rate '1GB' is not a number with a unit; write it like 450GB/s"),
        (("plan", "M32", "--cluster", "8xh10"), "error: unknown cluster '8xh10'"),
        (("plan", "M32", "--cluster", "0xh200"), "error: devices per node is 0; it must be at least 1"),
    ],
)
def test_clean_errors(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
