"""The command line's frame: what it calls, what it prints where, and how it fails."""

import errno
import json
import logging
import os
import shlex
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echovlm_jax.cli import frame, main
from echovlm_jax.cli.measure import COMPILER_ONLY
from echovlm_jax.errors import InputError

INSPECT = "echovlm_jax.convert.inspect"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """`fake("echovlm_jax.x", f=...)` puts a made-up module where the command looks for it."""

    def put(name: str, **members: Any) -> None:
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def _recorder(calls: list, result: dict):
    def function(*args: Any, **kwargs: Any) -> dict:
        calls.append((args, kwargs))
        return result

    return function


def _raiser(error: BaseException):
    def function(*args: Any, **kwargs: Any) -> dict:
        raise error

    return function


CALLS = [
    ("demo", "echovlm_jax.demo", "demo", (Path("demo_out"),), {"image": None, "seed": 0}),
    (
        "demo --out d --image f --seed 3",
        "echovlm_jax.demo",
        "demo",
        (Path("d"),),
        {"image": Path("f"), "seed": 3},
    ),
    (
        "convert a b",
        "echovlm_jax.convert.from_torch",
        "convert",
        (Path("a"), Path("b")),
        {"dtype": None, "adapter": None, "quantize": None, "delete_source_shards": False},
    ),
    (
        "convert a b --dtype bfloat16 --adapter c --quantize int4",
        "echovlm_jax.convert.from_torch",
        "convert",
        (Path("a"), Path("b")),
        {
            "dtype": "bfloat16",
            "adapter": Path("c"),
            "quantize": "int4",
            "delete_source_shards": False,
        },
    ),
    (
        "export a b --max-shard-size 2MB",
        "echovlm_jax.convert.to_torch",
        "export",
        (Path("a"), Path("b")),
        {"max_shard_size": "2MB", "merge_lora": False},
    ),
    (
        "export a b --merge-lora",
        "echovlm_jax.convert.to_torch",
        "export",
        (Path("a"), Path("b")),
        {"max_shard_size": "5GB", "merge_lora": True},
    ),
    (
        "export a b --adapter",
        "echovlm_jax.convert.peft",
        "export_adapter",
        (Path("a"), Path("b")),
        {},
    ),
    ("inspect a", INSPECT, "inspect", (Path("a"),), {}),
    ("verify a", "echovlm_jax.storage.verify", "verify", (Path("a"),), {}),
    (
        "parity a --golden g.npz --atol 1e-3",
        "echovlm_jax.convert.parity",
        "parity",
        (Path("a"), Path("g.npz")),
        {"atol": 1e-3},
    ),
    (
        "bench convert --size tiny --dir d",
        "echovlm_jax.bench.convert",
        "bench_convert",
        (Path("d"),),
        {"size": "tiny", "quantize": None},
    ),
    ("bench cpu --what train", "echovlm_jax.bench.cpu.train", "bench_train", (), {"size": None}),
    ("bench cpu --size tiny", "echovlm_jax.bench.cpu.train", "bench_train", (), {"size": "tiny"}),
    (
        *("bench cpu --what generate", "echovlm_jax.bench.cpu.generation", "bench_generate"),
        *((), {"size": None}),
    ),
    ("bench moe --size tiny", "echovlm_jax.bench.moe", "bench_moe", (), {"size": "tiny"}),
    ("bench burned-in", "echovlm_jax.bench.burned_in", "bench_burned_in", (), {}),
]


@pytest.mark.parametrize(("line", "module", "name", "args", "kwargs"), CALLS)
def test_command_calls_its_function(fake, capsys, line, module, name, args, kwargs) -> None:
    calls: list = []
    fake(module, **{name: _recorder(calls, {"seconds": 1.5})})
    assert main([*line.split(), "--json"]) == 0
    assert calls == [(args, kwargs)]
    assert json.loads(capsys.readouterr().out) == {"seconds": 1.5}


class FakeModel:
    def __init__(self) -> None:
        self.asked: list = []

    def generate(self, images, prompt, *, stream=None, **kwargs):
        self.asked.append((images, prompt, kwargs))
        if stream:
            stream("肝脏")
            stream("正常")
        return {"text": "肝脏正常", "prompt_tokens": 7, "new_tokens": 2}


def test_generate_passes_only_the_options_given(fake, capsys) -> None:
    model = FakeModel()
    fake("echovlm_jax.load", load_model=lambda path, **_: model)
    line = ["generate", "m", "--image", "a.png", "b.dcm", "--image", "c.jpg", "--prompt", "报告"]
    assert main([*line, "--top-k", "5", "--temperature", "0"]) == 0
    images = [Path("a.png"), Path("b.dcm"), Path("c.jpg")]
    sampling = {"top_k": 5, "temperature": 0.0}
    assert model.asked == [(images, "报告", {"system": None, **sampling})]
    out = capsys.readouterr()
    assert out.out == "肝脏正常\n" and "new_tokens: 2" in out.err


def test_generate_streams_once(fake, capsys) -> None:
    fake("echovlm_jax.load", load_model=lambda path, **_: FakeModel())
    assert main(["generate", "m", "--prompt", "x", "--stream"]) == 0
    assert capsys.readouterr().out == "肝脏正常\n"
    assert main(["generate", "m", "--prompt", "x", "--stream", "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["text"] == "肝脏正常" and out.err.startswith("肝脏正常")


def test_generate_batch(fake, capsys) -> None:
    calls: list = []
    fake("echovlm_jax.load", load_model=lambda path, **_: f"model {path}")
    fake("echovlm_jax.generate", generate_file=_recorder(calls, {"done": 2, "failed": 1}))
    line = ["generate", "m", "--batch", "f.jsonl", "--out", "g.jsonl", "--seed", "3"]
    assert main([*line, "--json"]) == 0
    assert calls == [(("model m", Path("f.jsonl"), Path("g.jsonl")), {"seed": 3})]
    assert json.loads(capsys.readouterr().out) == {"done": 2, "failed": 1}


def test_a_batch_in_which_all_failed_exits_1(fake, capsys) -> None:
    fake("echovlm_jax.load", load_model=lambda path, **_: path)
    fake("echovlm_jax.generate", generate_file=lambda *_, **__: {"done": 0, "failed": 2})
    line = ["generate", "m", "--batch", "f.jsonl", "--out", "g.jsonl", "--json"]
    assert main(line) == 1
    out = capsys.readouterr()
    assert json.loads(out.out) == {"done": 0, "failed": 2, "ok": False}
    assert out.err == "echovlm: no record was answered; g.jsonl says why, a line each\n"
    fake("echovlm_jax.generate", generate_file=lambda *_, **__: {"done": 0, "failed": 0})
    assert main(line) == 0


def test_generate_lets_control_tokens_act_where_asked(fake) -> None:
    calls: list = []
    fake("echovlm_jax.load", load_model=_recorder(calls, FakeModel()))
    assert main(["generate", "m", "--prompt", "x", "--control-tokens"]) == 0
    assert calls == [((Path("m"),), {"control_tokens": True})]


PLAN = "plan --config c.py --topology v5e:4x4"
PLANS = [
    (PLAN, [], {"step": "train", "rows_per_chip": None, "slices": 1, "serving": {}}),
    (
        f"{PLAN} --step decode --rows-per-chip 2",
        [],
        {"step": "decode", "rows_per_chip": 2, "slices": 1, "serving": {}},
    ),
    (
        f"{PLAN} --step prefill --rows 3 --quantize int8 --cache int8 --patches 256",
        [],
        {
            "step": "prefill",
            "rows_per_chip": None,
            "slices": 1,
            "serving": {"rows": 3, "patches": 256, "quantize": "int8", "cache": "int8"},
        },
    ),
    (
        "plan --config.a=1 --config c.py --config.mesh.data -1 --topology v5e:4x4 --config.b=x=y "
        "--config.c",
        ["a=1", "mesh.data=-1", "b=x=y", "c"],
        {"step": "train", "rows_per_chip": None, "slices": 1, "serving": {}},
    ),
    (
        f"{PLAN} --host-mtbf-hours 24 --save-seconds 1.5",
        [],
        {
            "step": "train",
            "rows_per_chip": None,
            "slices": 1,
            "serving": {},
            "failures": {"host_mtbf_hours": 24, "save_seconds": 1.5},
        },
    ),
]


def test_warm_up_takes_the_prompt_and_its_limit(fake, capsys) -> None:
    calls: list = []
    fake("echovlm_jax.load", load_model=lambda path, **options: (path, options))
    fake("echovlm_jax.generate.warm_up", warm_up=_recorder(calls, {"prompts": 3}))
    line = "generate m --warm-up --prompt Hm --max-new-tokens 9 --max-pixels 784"
    assert main(line.split()) == 0
    model = (Path("m"), {"max_pixels": 784})
    assert calls == [((model,), {"prompt": "Hm", "max_new_tokens": 9})]
    assert "prompts" in capsys.readouterr().out
    for option in ("--image a.png", "--batch f.jsonl --out g.jsonl", "--out g", "--stream"):
        assert main(["generate", "m", "--warm-up", *option.split()]) == 2
    assert len(calls) == 1 and "--warm-up goes with" in capsys.readouterr().err


@pytest.fixture
def fake_plan(fake, monkeypatch):
    """`fake_plan(result)` → the calls of load_config and plan."""
    for name in COMPILER_ONLY:
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)

    def put(result: dict) -> list:
        calls: list = []
        fake("echovlm_jax.train.config_file", load_config=_recorder(calls, {"a": 1}))

        def plan(*args: Any, **kwargs: Any) -> dict:
            os.write(2, b"noise from C\n")
            calls.append((args, kwargs))
            return result

        fake("echovlm_jax.plan", plan=plan, Serving=dict, Failures=dict)
        return calls

    return put


@pytest.mark.parametrize(("line", "overrides", "kwargs"), PLANS)
def test_plan_loads_the_configuration_with_its_overrides(
    fake_plan, capfd, line, overrides, kwargs
) -> None:
    calls = fake_plan({"ok": True, "chips": 16, "report": "two\nlines"})
    assert main(line.split()) == 0
    kwargs = {"failures": {}, **kwargs}
    assert calls == [((Path("c.py"), overrides), {}), (({"a": 1}, "v5e:4x4"), kwargs)]
    assert {name: os.environ[name] for name in COMPILER_ONLY} == COMPILER_ONLY
    out = capfd.readouterr()
    assert out.out == "two\nlines\n" and out.err == ""
    assert main([*line.split(), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"ok": True, "chips": 16}


@pytest.mark.parametrize("option", ["--rows 2", "--context 9", "--quantize int8", "--cache int8"])
def test_sizes_of_generation_are_not_a_training_steps(fake_plan, capsys, option) -> None:
    calls = fake_plan({"ok": True, "report": ""})
    assert main([*PLAN.split(), *option.split()]) == 2 and not calls
    assert f"{option.split()[0]} is for --step prefill and decode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--step decode --save-seconds 2", "--save-seconds is for --step train; leave it out"),
        ("--host-mtbf-hours 0", "--host-mtbf-hours: must be a number above 0, found '0'"),
        ("--step-seconds inf", "--step-seconds: must be a number above 0, found 'inf'"),
    ],
)
def test_what_failures_cost_is_a_training_steps(fake_plan, capsys, option, said) -> None:
    calls = fake_plan({"ok": True, "report": ""})
    try:
        code = main([*PLAN.split(), *option.split()])
    except SystemExit as end:  # argparse's own refusals
        code = end.code
    assert code == 2 and not calls and said in capsys.readouterr().err


def test_bench_decode_compiles_for_a_topology(fake, capsys, monkeypatch) -> None:
    for name in COMPILER_ONLY:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    calls: list = []
    read = {"bytes": 2e9, "of": "s8[7]", "by": "fusion", "from": "jit(f)/mlp"}
    one = {
        "fits": True, "bytes_per_token": 3e9, "needed_bytes_per_token": 2.5e9, "bytes_ratio": 1.2,
        "largest_reads": [read],
    }  # fmt: skip
    result = {"ratio": 1.2, "what": "bytes", "batches": {"1": one, "8": {"fits": False}}}
    fake("echovlm_jax.bench.decode", bench_decode=_recorder(calls, {**result, "ok": False}))
    line = "bench decode --topology v5e:1x1 --quantize int4 --size tiny"
    assert main(line.split()) == 1
    assert calls == [(("v5e:1x1",), {"quantize": "int4", "size": "tiny"})]
    assert {name: os.environ[name] for name in COMPILER_ONLY} == COMPILER_ONLY
    out = capsys.readouterr().out
    assert "read 3.000 GB a token, needed 2.500 GB: 1.200" in out and "8 rows: does not fit" in out
    assert "2.000 GB a step and chip  s8[7]  jit(f)/mlp" in out
    assert main(["bench", "decode"]) == 2 and len(calls) == 1
    assert "give --topology" in capsys.readouterr().err


def test_plan_that_does_not_fit_exits_1_and_debug_shows_the_compilers_noise(
    fake_plan, capfd
) -> None:
    fake_plan({"ok": False, "report": "too large"})
    assert main([*PLAN.split(), "--debug"]) == 1
    out = capfd.readouterr()
    assert out.out == "too large\n" and out.err == "noise from C\n"


def test_plan_keeps_the_environment_that_is_there(fake_plan, monkeypatch) -> None:
    fake_plan({"ok": True, "report": ""})
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert main(PLAN.split()) == 0
    assert os.environ["JAX_PLATFORMS"] == "tpu"


def test_an_error_behind_hidden_noise_is_shown(fake, fake_plan, capfd) -> None:
    fake_plan({})
    fake(
        "echovlm_jax.plan",
        plan=_raiser(InputError("seq_len 3 is odd")),
        Serving=dict,
        Failures=dict,
    )
    assert main(PLAN.split()) == 2
    assert capfd.readouterr().err == "echovlm: error: seq_len 3 is odd\n"


def test_native_noise_is_dropped_and_pythons_words_are_not() -> None:
    code = (
        "import os, sys; from echovlm_jax.cli.frame import no_native_stderr\n"
        "with no_native_stderr(debug=False):\n"
        "    os.write(2, b'noise'); print('words', file=sys.stderr)\n"
        "print('after', file=sys.stderr); os.write(2, b'end')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "words\nafter\nend"


def test_bench_moe_is_a_table(fake, capsys) -> None:
    row = {"name": "dense", "capacity_factor": None, "extra": 0.0912, "extra_with_tiles": 0.1}
    result = {"ratio": 1.5, "dispatch": [row, {**row, "name": "einsum", "capacity_factor": 1.25}]}
    fake("echovlm_jax.bench.moe", bench_moe=lambda **_: result)
    assert main(["bench", "moe"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "name    capacity_factor  extra  extra_with_tiles",
        "dense   -                9.12%  10.00%",
        "einsum  1.25             9.12%  10.00%",
        "ratio: 1.5",
    ]
    assert main(["bench", "moe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_the_package_runs_as_a_module() -> None:
    line = [sys.executable, "-m", "echovlm_jax.cli", "inspect"]
    run = subprocess.run(line, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("echovlm: error: ")


BAD_USAGE = [
    "",
    "nonsense",
    "convert onlysrc",
    "parity m",
    "parity m --golden g --atol much",
    "generate m --prompt x --max-new 5",
    "generate m --image a.png",
    "generate m --batch f.jsonl",
    "generate m --batch f.jsonl --out g.jsonl --prompt x",
    "generate m --prompt x --out g.jsonl",
    "bench nothing",
    "bench moe --dir d",
    "bench data --size tiny",
    "bench moe --what train",
    "bench cpu --what nothing",
    "plan --config c.py",
    "plan --config c.py --topology v5e:4x4 --step never",
    "plan --config c.py --topology v5e:4x4 --rows-per-chip 0",
    "plan --config c.py --topology v5e:4x4 --confg.steps=3",
    "plan --config c.py --topology v5e:4x4 stray",
    "plan --config c.py --topology v5e:4x4 --step decode --rows 0",
    "plan --config c.py --topology v5e:4x4 --step decode --cache int2",
    "inspect m --config.steps=3",
]


@pytest.mark.parametrize("line", BAD_USAGE)
def test_bad_usage_is_one_line(capsys, line) -> None:
    assert main(line.split()) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("echovlm: error: ") and out.err.count("\n") == 1


BAD_INPUT = [
    (InputError("config.json: hidden_size\nis missing"), "config.json: hidden_size is missing"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "x: No such file"),
    (PermissionError(errno.EACCES, "Permission denied", "y"), "y: Permission denied"),
    (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk; make room"),
]


@pytest.mark.parametrize(("error", "text"), BAD_INPUT)
def test_bad_input_is_one_line(fake, capsys, error, text) -> None:
    fake(INSPECT, inspect=_raiser(error))
    for flags in ([], ["--json"]):
        assert main(["inspect", "m", *flags]) == 2
        out = capsys.readouterr()
        assert out.out == ""
        assert out.err.startswith(f"echovlm: error: {text}") and out.err.count("\n") == 1


def test_debug_shows_the_traceback(fake, capsys) -> None:
    fake(INSPECT, inspect=_raiser(InputError("bad")))
    assert main(["inspect", "m", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.endswith("echovlm: error: bad\n")


def test_a_defect_is_told_from_a_failed_check_and_quotes_nothing(fake, capsys) -> None:
    fake(INSPECT, inspect=_raiser(ValueError("PatientName: Doe^Jane")))
    assert main(["inspect", "m"]) == 70
    error = capsys.readouterr().err
    assert "internal error: ValueError" in error and error.count("\n") == 1
    assert "Doe" not in error


def test_interrupt_is_quiet(fake, capsys) -> None:
    fake(INSPECT, inspect=_raiser(KeyboardInterrupt()))
    assert main(["inspect", "m"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ok", [True, False, np.True_, np.False_])
def test_parity_exit_code_is_its_verdict(fake, capsys, ok) -> None:
    stages = [{"name": "logits", "max_abs_err": 0.25}]
    result = {"ok": ok, "stages": stages, "first_divergence": None}
    fake("echovlm_jax.convert.parity", parity=lambda *args, **kwargs: result)
    for flags in ([], ["--json"]):
        assert main(["parity", "m", "--golden", "g.npz", *flags]) == (0 if ok else 1)
    human, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert f"ok: {'yes' if ok else 'no'}" in human
    assert "name logits  max_abs_err 0.25" in human
    assert json.loads(line) == {"ok": bool(ok), "stages": stages, "first_divergence": None}


def test_json_is_the_only_thing_on_stdout(fake, capfd) -> None:
    def noisy(model: Path) -> dict:
        print("from python")
        os.write(1, b"from C\n")
        return {
            "bytes": np.int64(3),
            "err": np.float32("nan"),
            "path": Path("报告"),
            "by_module": {"text": np.arange(2)},
        }

    fake(INSPECT, inspect=noisy)
    assert main(["inspect", "m", "--json"]) == 0
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "bytes": 3,
        "err": None,
        "path": "报告",
        "by_module": {"text": [0, 1]},
    }
    assert "from python" in err and "from C" in err
    os.write(1, b"again\n")  # given back afterwards
    assert capfd.readouterr().out == "again\n"


def test_summary_for_people(fake, capsys) -> None:
    result = {"params": 11_700_000_000, "bytes": 3 * 2**30, "by_module": {"text": 5}, "missing": []}
    fake(INSPECT, inspect=lambda model: result)
    assert main(["inspect", "m"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "params: 11,700,000,000",
        "bytes: 3,221,225,472 (3.00 GiB)",
        "by_module:",
        "  text: 5",
        "missing: none",
    ]


def test_libraries_are_quiet_unless_debugging(fake, caplog, recwarn) -> None:
    before = logging.getLogger("jax").level

    def inspect(model: Path) -> dict:
        logging.getLogger("jax._src.xla_bridge").warning("no accelerator")
        logging.getLogger("pydicom").error("bad value Doe^Jane")
        warnings.warn("value Doe^Jane", stacklevel=1)
        return {"params": 1}

    fake(INSPECT, inspect=inspect)
    assert main(["inspect", "m"]) == 0
    assert not caplog.records and not recwarn.list
    assert logging.getLogger("jax").level == before
    assert main(["inspect", "m", "--debug"]) == 0
    assert len(caplog.records) == 2 and len(recwarn.list) == 1


def test_help_is_there_without_jax() -> None:
    code = (
        "import sys; from echovlm_jax.cli import main\n"
        "for line in ('--help', '--version', 'generate --help', 'plan --help'):\n"
        "    assert main(line.split()) == 0\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for word in ("convert", "parity", "--prompt", "example:"):
        assert word in run.stdout


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_terminal_can_show_any_text(encoding: str) -> None:
    code = (
        "import sys, types; from echovlm_jax.cli import main\n"
        f"fake = types.ModuleType('{INSPECT}'); fake.inspect = lambda m: {{'text': '肝é'}}\n"
        f"sys.modules['{INSPECT}'] = fake\n"
        "sys.exit(main(['inspect', 'm', '--json']) or main(['inspect', 'm']))"
    )
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.decode().splitlines()
    assert json.loads(first) == {"text": "肝é"}
    assert second == ("text: 肝é" if encoding == "utf-8" else "text: \\u809d\\xe9")


def test_phantom_names_the_command_that_builds_it(capsys, tmp_path):
    folder = tmp_path / "made up"
    assert main(["data", "phantom", "--out", str(folder), "--exams", "2", "--workers", "1"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: echovlm "))
    assert main([*words[:-1], str(tmp_path / "exams"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 2


@pytest.mark.parametrize(
    "option", ["--exams=3", "--balanced", "--views=2", "--language=en", "--workers=9"]
)
def test_an_overview_takes_no_options_of_exams(capsys, tmp_path, option):
    sheet = tmp_path / "sheet.png"
    assert main(["data", "phantom", "--sheet", str(sheet), option]) == 2
    assert option.split("=")[0] in capsys.readouterr().err
    assert not sheet.exists()


def test_a_machine_without_a_tpu_is_not_searched_for_one() -> None:
    """libtpu's own lines of errors were the first thing that every command printed."""
    pytest.importorskip("libtpu")
    if frame.has_tpu():
        pytest.skip("there is a TPU")
    code = (
        "from echovlm_jax.cli import frame; frame.look_for_no_tpu()\n"
        "import jax; print(jax.devices()[0].platform)"
    )
    names = ("JAX_", "TPU_", "CLOUD_TPU")
    env = {key: value for key, value in os.environ.items() if not key.startswith(names)}
    env |= {"TPU_MIN_LOG_LEVEL": "2", "TPU_SKIP_MDS_QUERY": "1"}  # wishes for quiet are no TPU
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0 and run.stdout == "cpu\n" and run.stderr == ""


def test_what_may_be_a_tpu(tmp_path: Path) -> None:
    def machine(name: str, vendor: str, kind: str) -> Path:
        device = tmp_path / name / "sys" / "bus" / "pci" / "devices" / "0000:00:04.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")
        return tmp_path / name

    assert not frame.has_tpu(tmp_path)
    assert not frame.has_tpu(machine("intel", "0x8086", "0x120000"))
    assert not frame.has_tpu(machine("google_network", "0x1ae0", "0x020000"))
    assert frame.has_tpu(machine("google", "0x1ae0", "0x120000"))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "accel0").touch()
    assert frame.has_tpu(tmp_path)


def test_the_environments_wish_for_a_platform_is_kept(monkeypatch) -> None:
    for name, value in (("JAX_PLATFORMS", "tpu"), ("TPU_NAME", "mine")):
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        monkeypatch.setenv(name, value)
        frame.look_for_no_tpu()
        assert os.environ.get("JAX_PLATFORMS") == (value if name == "JAX_PLATFORMS" else None)
