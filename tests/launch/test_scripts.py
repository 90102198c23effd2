"""The shell programs: what they would run, and what a false gcloud or sbatch is really given."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent
HARD = ['--config.model=gs://b/it\'s "my" model; rm -rf / #', "--config.x=$HOME `ls` \\ *"]
TPU = {"--name": "echo", "--zone": "us-west4-a", "--topology": "v5e:4x4"}
TPU |= {"--config": "configs/phantom.py", "--workdir": "gs://bucket/it's; a run"}
SLURM = {"--nodes": "4", "--config": "configs/phantom.py", "--workdir": "/scratch/it's; a run"}
# Writes down its words; its exit code and output are the next of a list, where there is one.
FALSE = """#!{python} -SE
import json, pathlib, sys
here = pathlib.Path(__file__)
name, words = here.name, sys.argv[1:]
with open(here.with_name("calls"), "a") as calls:
    print(json.dumps([name, *words]), file=calls)
kinds = [word for word in ("describe", "create", "delete", "scp") if word in words]
kinds += [word for word in ("follow", "start") if f"tpu_worker.sh {{word}}" in " ".join(words)]
kind = (kinds + [name])[0]
plan = here.with_name("plan.json")
answers = json.loads(plan.read_text()) if plan.exists() else {{}}
code, text = answers.get(kind, []).pop(0) if answers.get(kind) else (0, "")
plan.write_text(json.dumps(answers))
print(text, file=sys.stderr if code else sys.stdout)
sys.exit(code)
"""


def tool(name: str) -> str:
    return shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ['PATH']}") or name


def flags(given: dict[str, str | None]) -> list[str]:
    return [part for name, value in given.items() if value is not None for part in (name, value)]


def bash(script: str, *words: str, path: Path | None = None) -> subprocess.CompletedProcess:
    found = f"{path}{os.pathsep}{os.environ['PATH']}" if path else os.environ["PATH"]
    command = ["bash", str(LAUNCH / script), *words]
    environment = {**os.environ, "PATH": found}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def false(tmp_path):
    """A folder with false gcloud, sbatch, srun, scontrol and python3; `plan` says their answers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcloud", "sbatch", "srun", "scontrol", "python3"):
        (folder / name).write_text(FALSE.format(python=sys.executable))
        (folder / name).chmod(0o755)
    return folder


def plan(false: Path, **answers: list) -> None:
    (false / "plan.json").write_text(json.dumps(answers))


def calls(false: Path, kind: str = "") -> list[list[str]]:
    lines = [json.loads(line) for line in (false / "calls").read_text().splitlines()]
    return [line for line in lines if not kind or kind in line or f" {kind}" in line[-1]]


def run_tpu(false: Path, *options: str, words: list[str] | None = None):
    scripted = ["run", *flags(TPU), "--poll", "0", *options, "--", *(words or [])]
    return bash("tpu_vm.sh", *scripted, path=false)


def test_the_programs_pass_the_linters():
    scripts = [str(path) for path in (*LAUNCH.rglob("*.sh"), *Path(__file__).parent.glob("*.sh"))]
    assert len(scripts) == 4
    done = subprocess.run([tool("shellcheck"), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="hadolint's package is for Linux alone")
def test_the_container_passes_its_linter():
    done = subprocess.run(
        [tool("hadolint"), str(LAUNCH / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("spot", [[], ["--spot"]])
@pytest.mark.parametrize(
    ("topology", "accelerator", "chips"),
    [
        ("v4:2x2x2", "v4-16", 8),
        ("v5e:4x4", "v5litepod-16", 16),
        ("v5p:4x4x8", "v5p-256", 128),
        ("v6e:16x16", "v6e-256", 256),
    ],
)
def test_a_dry_run_says_what_is_made_and_what_it_costs(topology, accelerator, chips, spot):
    given = {**TPU, "--topology": topology}
    done = bash("tpu_vm.sh", "run", *flags(given), *spot, "--slices", "2", "--dry-run")
    assert done.returncode == 0, done.stderr
    made, *rest = (shlex.split(line) for line in done.stdout.splitlines())
    assert made[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "echo"]
    assert made[made.index("--accelerator-type") + 1] == accelerator
    assert made[made.index("--node-count") + 1] == "2"
    assert ("--spot" in made) == bool(spot)
    assert rest[-1][-1] == "bash echovlm/tpu_worker.sh follow"
    assert f"{2 * chips} chip-hours for each hour" in done.stderr
    assert "https://cloud.google.com/tpu/pricing" in done.stderr


def test_a_dry_run_needs_and_runs_nothing(false):
    done = bash("tpu_vm.sh", "run", *flags(TPU), "--dry-run", path=false)
    assert done.returncode == 0 and not (false / "calls").exists()
    done = bash("slurm.sh", *flags(SLURM), "--dry-run", path=false)
    assert done.returncode == 0 and not (false / "calls").exists()


def test_words_for_training_arrive_as_they_are(false):
    plan(false, describe=[[0, "ACTIVE"]])
    done = run_tpu(false, "--data", "gs://bucket/my exams", words=HARD)
    assert done.returncode == 0, done.stderr
    [start] = calls(false, "start")
    assert start[-2] == "--command"
    # What the worker's shell makes of it.
    worker = subprocess.run(
        ["bash", "-c", f"bash() {{ printf '%s\\n' \"$@\"; }}; {start[-1]}"],
        capture_output=True,
        text=True,
    )
    training = ["--config", "config.py", "--workdir", TPU["--workdir"], "--config.data=data"]
    wanted = ["echovlm/tpu_worker.sh", "start", "", *training, *HARD]
    assert worker.stdout.splitlines() == wanted
    [install] = calls(false, "install")
    assert shlex.split(install[-1])[-1] == "gs://bucket/my exams"


def test_a_slice_that_is_there_is_taken(false):
    plan(false, describe=[[0, "ACTIVE"]])
    done = run_tpu(false)
    assert done.returncode == 0 and not calls(false, "create")
    assert [call[0] for call in calls(false)].count("gcloud") == 7
    everywhere = [call for call in calls(false) if "ssh" in call or "scp" in call]
    assert all(call[call.index("--worker") + 1] == "all" for call in everywhere)
    assert "until you run" in done.stderr.splitlines()[-3]


def test_a_slice_that_is_missing_is_made_and_waited_for(false):
    missing, waits = [1, "ERROR: NOT_FOUND: no such resource"], [0, "WAITING_FOR_RESOURCES"]
    plan(false, describe=[missing, waits, waits, [0, "ACTIVE"]])
    done = run_tpu(false, "--spot", "--delete-when-done")
    assert done.returncode == 0, done.stderr
    assert len(calls(false, "create")) == 1 and len(calls(false, "delete")) == 1
    assert calls(false)[-1][4] == "delete"
    assert "--force" in calls(false)[-1]


def test_a_slice_that_was_taken_away_is_made_anew(false):
    plan(false, describe=[[0, "SUSPENDED"], [1, "NOT_FOUND"], [0, "ACTIVE"]])
    assert run_tpu(false).returncode == 0
    kinds = [word for call in calls(false) for word in ("delete", "create") if word in call]
    assert kinds == ["delete", "create"]


def test_a_request_that_fails_twice_is_given_up(false):
    plan(false, describe=[[0, "FAILED"], [1, "NOT_FOUND"], [0, "FAILED"]])
    done = run_tpu(false)
    assert done.returncode == 1 and not calls(false, "start")


def test_gcloud_that_refuses_is_heard(false):
    plan(false, describe=[[1, "ERROR: you do not have permission"]])
    done = run_tpu(false, "--retry", "3")
    assert done.returncode == 1 and "you do not have permission" in done.stderr
    assert not calls(false, "create")


@pytest.mark.parametrize("step", ["scp", "start", "follow"])
def test_a_worker_that_fails_ends_the_run_with_its_code(false, step):
    plan(false, describe=[[0, "ACTIVE"]] * 9, **{step: [[7, "no"]]})
    done = run_tpu(false, "--retry", "3")
    assert done.returncode == (7 if step == "follow" else 1)
    assert len(calls(false, "follow")) == (step == "follow")


def test_a_preempted_run_begins_again(false):
    gone = [[0, "ACTIVE"], [0, "SUSPENDED"], [0, "SUSPENDED"], [1, "NOT_FOUND"], [0, "ACTIVE"]]
    plan(false, describe=gone, follow=[[255, "no connection"], [0, "done"]])
    done = run_tpu(false, "--retry", "1")
    assert done.returncode == 0, done.stderr
    assert len(calls(false, "install")) == 2  # its disks are new
    plan(false, describe=[[0, "ACTIVE"]] * 9, follow=[[75, ""]] * 9)
    (false / "calls").unlink()
    done = run_tpu(false, "--retry", "2")
    assert done.returncode == 75 and "the same command goes on" in done.stderr
    assert len(calls(false, "follow")) == 3 and len(calls(false, "install")) == 1


def test_a_run_that_lost_a_process_begins_again_on_the_same_slice(false):
    plan(false, describe=[[0, "ACTIVE"]] * 9, follow=[[69, ""], [137, ""], [0, "done"]])
    done = run_tpu(false, "--retry", "2")
    assert done.returncode == 0, done.stderr
    assert len(calls(false, "follow")) == 3 and len(calls(false, "install")) == 1
    plan(false, describe=[[0, "ACTIVE"]] * 9, follow=[[69, ""]])
    done = run_tpu(false)
    assert done.returncode == 69 and "lost or hung" in done.stderr


def test_bad_input_is_not_tried_again(false):
    plan(false, describe=[[0, "ACTIVE"]] * 9, follow=[[2, "config key steps"]])
    assert run_tpu(false, "--retry", "5").returncode == 2
    assert len(calls(false, "follow")) == 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"--name": None}, "--name is missing"),
        ({"--name": "a b"}, "--name 'a b'"),
        ({"--zone": None}, "--zone is missing"),
        ({"--topology": None}, "--topology is missing"),
        ({"--topology": "tpu7x:2x2x1"}, "--topology 'tpu7x:2x2x1'"),
        ({"--config": None}, "--config is missing"),
        ({"--config": "nowhere.py"}, "--config nowhere.py: no such file"),
        ({"--workdir": None}, "--workdir must be gs://"),
        ({"--workdir": "/home/me"}, "--workdir must be gs://"),
        ({"--programs": "/home/me"}, "--programs '/home/me' must be gs://"),
        ({"--slices": "two"}, "--slices 'two'"),
        ({"--color": "red"}, "unknown option --color"),
    ],
)
def test_what_a_slice_lacks_is_one_line(changed, named):
    done = bash("tpu_vm.sh", "run", *flags({**TPU, **changed}), "--dry-run")
    assert done.returncode == 2 and not done.stdout
    assert named in done.stderr and done.stderr.count("\n") == 1


def test_slurm_is_given_whole_nodes_and_the_words_as_they_are(false):
    done = bash("slurm.sh", *flags(SLURM), "--wait", "--time", "1:0:0", "--", *HARD, path=false)
    assert done.returncode == 0, done.stderr
    [[_, *given]] = calls(false)
    assert given[given.index("--nodes") + 1] == "4"
    assert given[given.index("--ntasks-per-node") + 1] == "8"
    assert given[given.index("--signal") + 1] == "TERM@300"
    assert {"--requeue", "--wait", "--time"} <= set(given)
    job = given[given.index(str(LAUNCH / "slurm.sh")) :]
    wanted = ["--config", SLURM["--config"], "--workdir", SLURM["--workdir"], *HARD]
    assert job[1:3] == ["in-job", str(LAUNCH)] and job[4:] == ["10", *wanted]
    assert "32 card-hours" in done.stderr
    # As sbatch would start it, from a copy.
    copy = false / "script"
    copy.write_bytes((LAUNCH / "slurm.sh").read_bytes())
    (false / "calls").unlink()
    command = ["bash", str(copy), *job[1:]]
    environment = {**os.environ, "PATH": f"{false}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    assert subprocess.run(command, env=environment).returncode == 0
    [[name, *step]] = calls(false)
    assert name == "srun" and step[3:] == [str(LAUNCH / "train.py"), *wanted]


@pytest.mark.parametrize(
    ("code", "times", "again"),
    [
        *((0, 0, False), (2, 0, False), (9, 0, False), (75, 0, True), (75, 99, True)),
        *((69, 0, True), (69, 2, True), (69, 3, False), (137, 0, False)),
    ],
)
def test_a_job_of_slurm_ends_with_trainings_code_and_is_queued_again(false, code, times, again):
    plan(false, srun=[[code, ""]])
    environment = {"SLURM_JOB_ID": "17", "PATH": f"{false}:{os.environ['PATH']}"}
    environment |= {"SLURM_RESTART_COUNT": str(times)} if times else {}
    command = ["bash", str(LAUNCH / "slurm.sh"), "in-job", str(LAUNCH), "python", "3"]
    command += ["--config", "a"]
    assert subprocess.run(command, env={**os.environ, **environment}).returncode == code
    requeued = [call for call in calls(false) if call[0] == "scontrol"]
    assert requeued == ([["scontrol", "requeue", "17"]] if again else [])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"--nodes": None}, "--nodes is missing"),
        ({"--nodes": "0"}, "--nodes '0'"),
        ({"--config": None}, "--config is missing"),
        ({"--workdir": None}, "--workdir is missing"),
        ({"--gpu": "8"}, "unknown option --gpu"),
    ],
)
def test_what_slurm_lacks_is_one_line(changed, named):
    done = bash("slurm.sh", *flags({**SLURM, **changed}), "--dry-run")
    assert done.returncode == 2 and not done.stdout
    assert named in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def worker(tmp_path):
    """A worker's folder, with a train.py that ends as its first word says."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    shutil.copy(LAUNCH / "tpu_worker.sh", tmp_path)
    (tmp_path / "launch" / "train.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('words', sys.argv[1:], os.environ['JAX_COMPILATION_CACHE_DIR'], flush=True)\n"
        "time.sleep(60) if sys.argv[1] == 'wait' else sys.exit(int(sys.argv[1]))\n"
    )

    def run(*words: str) -> subprocess.CompletedProcess:
        command = ["bash", str(tmp_path / "tpu_worker.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    yield run, tmp_path
    if (tmp_path / "pid").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("code", [0, 2, 7])
def test_following_a_worker_ends_with_its_code(worker, code):
    run, _ = worker
    assert run("start", "gs://b/programs", str(code), *HARD).returncode == 0
    for _ in range(2):  # again, as after a lost connection
        done = run("follow")
        assert done.returncode == code
        assert f"{[str(code), *HARD]!r} gs://b/programs" in done.stdout


def test_a_worker_that_trains_is_left_to_it_until_it_is_stopped(worker):
    run, folder = worker
    run("start", "", "wait")
    while not (folder / "log").exists() or "words" not in (folder / "log").read_text():
        time.sleep(0.05)
    pid = (folder / "pid").read_text()
    assert "is training already" in run("start", "", "0").stderr
    assert (folder / "pid").read_text() == pid
    assert run("stop").returncode == 0
    assert run("follow").returncode == 75
    assert "is not training" in run("stop").stderr


def test_a_killed_worker_is_told(worker):
    run, folder = worker
    assert run("follow").returncode == 2
    run("start", "", "wait")
    while not (folder / "pid").exists():
        time.sleep(0.05)
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    assert run("follow").returncode == 137
