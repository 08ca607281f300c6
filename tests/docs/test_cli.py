"""The command line as people and programs meet it: help, the JSON line, exit codes, and what is said when it fails."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from yuanmoe.cli import main as main_file
from yuanmoe.cli.doctor import command as doctor_file
from yuanmoe.cli.main import COMMANDS, load_command, main
from yuanmoe.errors import ContextLengthError
from yuanmoe.plan.device.machine import Machine, Rate
from yuanmoe.presets import preset

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the program in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["yuanmoe", *arguments])
        monkeypatch.setenv("COLUMNS", "200")  # tables and messages in whole lines
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        code = exit_info.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


def last_line(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])


def test_help_lists_every_command_and_imports_nothing_large() -> None:
    code = (
        "import sys; sys.argv = ['yuanmoe', '--help']\n"
        "from yuanmoe.cli.main import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(' '.join({'torch', 'numpy', 'transformers', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['yuanmoe', 'plan', 'M32', '--device', 'h200']\n"
        "from yuanmoe.cli.main import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, last_line(done.stdout)["fits"]) == (0, True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run: Run, name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert out.startswith(f"Usage: yuanmoe {name}")
    assert not out.splitlines()[2].startswith(("Arguments:", "Options:")), "the docstring says what the command does"


def test_module_and_version() -> None:
    done = subprocess.run([sys.executable, "-m", "yuanmoe", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"yuanmoe {version('yuanmoe')}\n", "")


def test_plan_says_for_people_what_it_says_for_programs(run: Run) -> None:
    code, out, err = run("plan", "M32", "--bits", "4", "--ram", "24GiB")
    report = last_line(out)
    assert code == 0
    assert report["parameters"]["total"] == 39_942_842_368
    assert report["active_parameters"]["total"] == 3_704_055_808
    assert (report["kv_bytes_per_token"], report["lfa_bytes_per_sequence"]) == (393_216, 147_456)
    assert report["fits"] is True
    assert report["device"]["memory_bytes"] == 24 * 2**30
    first = report["decode"][0]["first_token"]
    assert 0 < first["tokens_per_s_predicted"] < first["tokens_per_s_bound"]
    assert first["tokens_per_s_bound"] <= report["device"]["bandwidth"] / first["bytes_read"] * (1 + 1e-9)
    for said in ("yuan2-m32", "39,942,842,368", "7.41 GFLOP", "140 GFLOP", "0.0026 PetaFLOP/s-days", "0.05 PetaFLOP"):
        assert said in err
    assert "Fits: 1.27 GiB to spare." in err


def test_plan_for_programs_alone(run: Run) -> None:
    code, out, err = run("plan", "2b", "--device", "rtx-3090", "--json")
    assert (code, err, len(out.splitlines())) == (0, "", 1)
    assert last_line(out)["load"] == {"bits": 16, "context": 8192, "batch": 1, "kv_bits": 16}


def test_plan_says_what_would_fit(run: Run) -> None:
    code, out, err = run("plan", "M32", "--bits", "16", "--device", "L40S", "--context", "5000")
    assert code == 0
    assert [remedy["options"] for remedy in last_line(out)["remedies"]] == ["--bits 8", "--device a100-80"]
    assert "Does not fit: 29.5 GiB too much." in err
    assert "--bits 8: 41.4 GiB" in err
    assert "5,000 tokens are more than the 4,096 the model is made for" in err
    _, _, err = run("plan", "102b", "--bits", "4", "--device", "laptop-16", "--batch", "64")
    assert "no device in the table is large enough" in err


def test_plan_without_a_matmul_rate_leaves_prefill_unknown(run: Run) -> None:
    _, out, err = run("plan", "M32", "--device", "mac-m4-pro-24")
    assert last_line(out)["prefill"] is None
    assert "unknown" in err


def test_plan_reads_directories(run: Run, tmp_path: Path, golden: Path) -> None:
    native = tmp_path / "native"
    native.mkdir()
    values = {"format": "yuanmoe", "version": 1, "dtype": "bfloat16", "model": preset("tiny").to_dict()}
    (native / "config.json").write_text(json.dumps(values))
    _, out, _ = run("plan", str(native), "--device", "h200", "--json")
    assert (last_line(out)["model"], last_line(out)["parameters"]["total"]) == ("native", 315_008)
    _, out, _ = run("plan", str(golden / "moe-tiny"), "--device", "h200", "--json")
    assert last_line(out)["parameters"]["router"] == 3 * 3 * 8 * 64


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "nosuch"], 2, "error: 'nosuch' is neither a directory nor a preset; presets: yuan2-m32, "),
        (["plan", "M32", "--bits", "5", "--device", "h200"], 2, "error: 5 bits: weights are kept in 16, 8, 4 bits"),
        (["plan", "M32", "--ram", "lots"], 2, "error: size 'lots' is not a number with a unit"),
        (["plan", "M32", "--device", "rtx-490"], 2, "error: unknown device 'rtx-490'; did you mean rtx-4090?"),
        (["plan", "M32", "--device", "h200", "--batch", "0"], 2, "error: batch is 0; it must be at least 1"),
        (["plan", "M32", "--device", "h200", "--context", "0"], 2, "error: context is 0; it must be at least 1"),
        (["plan", "."], 1, "error: "),
        (["plan"], 2, "Missing argument"),
        (["paln"], 2, "Did you mean 'plan'?"),
    ],
)
def test_errors_are_one_line_and_a_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def stand_in_for_plan(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def plan() -> None:
        raise error

    monkeypatch.setattr("yuanmoe.cli.plan.command.plan", plan)


def test_an_error_of_ours_exits_1_and_shows_its_traceback_on_demand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_plan(monkeypatch, ContextLengthError("9 tokens are more than 8"))
    assert run("plan") == (1, "", "error: 9 tokens are more than 8\n")
    monkeypatch.setenv("YUANMOE_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["yuanmoe", "plan"])
    with pytest.raises(ContextLengthError):
        main()


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_plan(monkeypatch, ZeroDivisionError("a bug"))
    monkeypatch.setattr(sys, "argv", ["yuanmoe", "plan"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_ctrl_c_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_plan(monkeypatch, KeyboardInterrupt())
    assert run("plan") == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="pipes close differently on Windows")
def test_a_reader_that_went_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "yuanmoe", "plan", "M32", "--device", "h200", "--json"]
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_doctor_examines_this_machine(run: Run) -> None:
    code, out, err = run("doctor")
    report = last_line(out)
    assert code == 0
    assert report["machine"]["cores"] >= 1
    assert report["measured"]["read_bandwidth"]["median"] > 1e8
    assert report["torch"]["bf16_flops"]["median"] > 0
    assert {row["model"] for row in report["models"]} >= {"yuan2-m32", "yuan2-2b", "yuan2-102b"}
    assert not [finding for finding in report["findings"] if finding["level"] == "broken"]
    assert "GB/s (" in err


HEALTHY = {
    "packages": dict.fromkeys((*doctor_file.REQUIRED, *doctor_file.EXTRAS), "1.0"),
    "torch": {"build": "cpu", "threads": 2, "gpus": []},
}


@pytest.mark.parametrize(
    ("changes", "level", "what"),
    [
        ({"packages": HEALTHY["packages"] | {"sentencepiece": None}}, "broken", "sentencepiece is not installed"),
        ({"packages": HEALTHY["packages"] | {"peft": None}}, "advice", "peft is not installed"),
        ({"torch": {"error": "libgomp is gone"}}, "broken", "torch does not import: libgomp is gone"),
    ],
)
def test_doctor_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], level: str, what: str
) -> None:
    monkeypatch.setattr(doctor_file.shutil, "which", lambda name: None)
    assert list(doctor_file.missing_parts(HEALTHY)) == []
    (finding,) = doctor_file.missing_parts(HEALTHY | changes)
    assert (finding.level, finding.what) == (level, what)


def test_doctor_names_what_is_slow() -> None:
    machine = Machine(cpu="old", cores=4, features=("fma",), memory_bytes=1, available_bytes=1, load=2.5)
    report = {
        "torch": {"threads": 2, "kernels_reason": "they were not built; install g++ and then yuanmoe again"},
        "machine": {"disk_free_bytes": 1000},
    }
    findings = list(doctor_file.slow(machine, report))
    assert {finding.level for finding in findings} == {"advice"}
    assert [(finding.what, finding.do) for finding in findings] == [
        ("this CPU has neither AVX2 nor Arm dot products", "expect slow answers"),
        ("compiled kernels are missing or slow", "they were not built; install g++ and then yuanmoe again"),
        ("torch uses 2 threads on 4 cores", "set OMP_NUM_THREADS=4"),
        (
            "other programs were busy (load 2.5 on 4 cores): measured rates are low",
            "ask again when they are done",
        ),
        ("1000 B of disk are free here; M32 beside its converted copy takes 149 GiB", "convert it on another disk"),
    ]
    large = {"torch": {"error": "gone"}, "machine": {"disk_free_bytes": 2**40}}
    modern = dataclasses.replace(machine, features=("avx2",), load=2.0)
    assert list(doctor_file.slow(modern, large)) == []


def test_doctor_sees_a_gpu_that_torch_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_file.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (finding,) = doctor_file.missing_parts(HEALTHY)
    assert finding.what == "an NVIDIA driver is here, but torch (build: cpu) sees no GPU"


def test_doctor_fails_when_something_is_broken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_file, "probe", lambda: ({"error": "no such library"}, []))
    for measure in ("measure_bandwidth", "measure_matmul"):
        monkeypatch.setattr(doctor_file, measure, lambda: Rate(median=1e10, low=1e10, high=1e10))
    code, out, err = run("doctor")
    assert code == 1
    assert last_line(out)["findings"][0]["level"] == "broken"
    assert "broken: torch does not import: no such library" in err


def test_commands_are_loaded_only_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(main_file.COMMANDS, "plan", ("nosuch", "gone"))
    with pytest.raises(ModuleNotFoundError):
        load_command("plan")
