"""The manifests for Kubernetes and SkyPilot, by the schemas of those who read them."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
SUBMIT = [sys.executable, str(ROOT / "launch" / "gke" / "submit.py")]
SCHEMA = json.loads(Path(__file__).with_name("jobset.schema.json").read_text())
NEEDED = {"--name": "echo", "--image": "registry/echovlm:tpu", "--config": "configs/phantom.py"}
NEEDED["--workdir"] = "gs://bucket/run"
HARD = ['--config.model=gs://b/it\'s "my" model; rm -rf / #', "--config.x=$HOME: [$(A), é\n- b]"]


def submit(topology: str, *options: str, words: list[str] | None = None, **changed: str | None):
    given = {**NEEDED, "--topology": topology, **{f"--{k}": v for k, v in changed.items()}}
    flags = [part for name, value in given.items() if value is not None for part in (name, value)]
    command = [*SUBMIT, *flags, *options, *(["--", *words] if words else [])]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def manifest(topology: str, *options: str, **changed) -> dict:
    done = submit(topology, "--dry-run", *options, **changed)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def check(jobset: dict) -> None:
    """Raises where JobSet's own schema, or Kubernetes' of the jobs inside, is broken."""
    jsonschema.validate(jobset, SCHEMA)
    for job in jobset["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}}
        kubernetes_validate.validate({**whole, **job["template"]}, "1.37", strict=True)


def pod(jobset: dict) -> dict:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("spot", [[], ["--spot"]])
@pytest.mark.parametrize(
    ("topology", "hosts", "resource", "chips"),
    [
        ("v5e:1x1", 1, "google.com/tpu", 1),
        ("v5e:4x4", 4, "google.com/tpu", 4),
        ("v5p:4x4x8", 32, "google.com/tpu", 4),
        ("tpu7x:2x2x1", 1, "google.com/tpu", 4),
        ("h100:8", 1, "nvidia.com/gpu", 8),
        ("a100:4x8", 4, "nvidia.com/gpu", 8),
    ],
)
def test_manifests_are_what_kubernetes_and_jobset_read(topology, hosts, resource, chips, spot):
    jobset = manifest(topology, *spot, "--data", "gs://bucket/exams/liver")
    check(jobset)
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == hosts
    [container] = pod(jobset)["containers"]
    assert container["resources"]["limits"] == {resource: chips}
    selector = pod(jobset)["nodeSelector"]
    assert ("cloud.google.com/gke-spot" in selector) == bool(spot)
    if resource == "google.com/tpu":
        assert selector["cloud.google.com/gke-tpu-topology"] == topology.split(":")[1]
    assert container["args"][-1] == "--config.data=/data"
    [volume] = [each for each in pod(jobset)["volumes"] if each["name"] == "data"]
    assert volume["csi"]["volumeAttributes"] == {
        "bucketName": "bucket",
        "mountOptions": "implicit-dirs,only-dir=exams/liver",
    }


def test_slices_are_jobs_and_hosts_may_have_eight_chips():
    jobset = manifest("v5e:2x4", "--slices", "3", "--chips-per-host", "8")
    [job] = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == 3 and job["template"]["spec"]["parallelism"] == 1


def test_hosts_of_cards_find_one_another():
    env = pod(manifest("h100:4x8"))["containers"][0]["env"]
    told = {each["name"]: each.get("value") for each in env}
    assert told["JAX_COORDINATOR_ADDRESS"] == "$(COORDINATOR):8476"
    assert told["JAX_NUM_PROCESSES"] == "4"
    assert "JAX_PROCESS_ID" in told


def test_bad_input_ends_a_job_and_all_else_begins_it_again():
    for topology in ("v5e:4x4", "h100:8"):
        spec = manifest(topology, "--restarts", "7")["spec"]
        assert spec["failurePolicy"]["maxRestarts"] == 7
        [rule] = spec["failurePolicy"]["rules"]
        assert rule["action"] == "FailJobSet"
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
        job = spec["replicatedJobs"][0]["template"]["spec"]
        [rule] = job["podFailurePolicy"]["rules"]
        assert rule["onExitCodes"]["values"] == [2] and rule["action"] == "FailJob"
        assert job["backoffLimit"] == 0


@pytest.mark.parametrize("topology", ["v5e:4x4", "h100:8"])
def test_words_arrive_as_they_are(topology):
    done = submit(topology, "--dry-run", words=HARD, image="a: [b]", workdir="gs://b/it's; a run")
    jobset = yaml.safe_load(done.stdout)
    check(jobset)
    [container] = pod(jobset)["containers"]
    wanted = ["--config", "configs/phantom.py", "--workdir", "gs://b/it's; a run", *HARD]
    # What Kubernetes makes of $$.
    assert [word.replace("$$(", "$(") for word in container["args"]] == wanted
    assert all("$(" not in word.replace("$$(", "") for word in container["args"])
    assert container["image"] == "a: [b]"


def test_the_schemas_can_refuse():
    good = manifest("v5e:4x4")

    def broken(change) -> None:
        bad = copy.deepcopy(good)
        change(bad)
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check(bad)

    broken(lambda jobset: jobset["spec"].update(failurePolice={}))
    broken(lambda jobset: jobset["spec"]["failurePolicy"]["rules"][0].update(action="Fail"))
    broken(lambda jobset: jobset.update(apiVersion="jobset.x-k8s.io/v1"))
    broken(lambda jobset: pod(jobset).update(restartpolicy="Never"))
    broken(lambda jobset: pod(jobset)["containers"][0].update(args="--config"))


def test_xpk_gets_the_same_run():
    done = submit(
        "v5p:4x4x8", "--dry-run", "--slices", "2", "--xpk", "mine", words=["--config.a=b"]
    )
    for part in ("--cluster mine", "--workload echo", "--tpu-type=v5p-4x4x8", "--num-slices=2"):
        assert part in done.stdout
    assert "--workdir gs://bucket/run --config.a=b'" in done.stdout
    done = submit("v5p:4x4x8", "--dry-run", "--xpk", "mine", words=HARD)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"name": None}, "--name"),
        ({"name": "My Run"}, "'My Run'"),
        ({"workdir": "/home/me/run"}, "--workdir must be gs://"),
        ({"workdir": None}, "--workdir"),
        ({"topology": "h100"}, "'h100' is not KIND:SHAPE"),
        ({"topology": "v9:4x4"}, "'v9:4x4'"),
        ({"topology": "v5e:2x3"}, "6 chips can't be hosts of 4"),
        ({"slices": "0"}, "--slices"),
        ({"topology": "h100:8", "slices": "2"}, "cards have no slices"),
        ({"data": "exams/"}, "--data 'exams/'"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(changed, named):
    done = submit(**{"topology": "v5e:4x4", **changed})
    assert done.returncode == 2 and not done.stdout
    assert named in done.stderr and done.stderr.count("\n") == 1


def test_the_task_of_skypilot_has_only_what_it_reads():
    task = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
    known = {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    assert task.keys() == known
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [69, 75]}
    assert task["envs"] == {"WORKDIR": None, "CONFIG": None, "WORDS": ""}
