"""Trains on GKE: fills in tpu.yaml or gpu.yaml, and hands it to kubectl.

    python launch/gke/submit.py --name NAME --topology v5e:4x4 --image IMAGE \\
        --config configs/instruction.py --workdir gs://bucket/run [option …] [-- WORD …]

Needs kubectl, pointed at a cluster with JobSet (v0.7 or newer) and node pools of that topology, and
an image of ../Dockerfile. --config is a file in the image, whose configs/ are this checkout's.
Words after -- are for training. A run that is preempted or killed begins again and goes on where it
was. --xpk prints the same as a command of xpk, for clusters that it made.

Exit codes: 0; 1 where kubectl fails or, with --wait, training did; 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from string import Template
from typing import Any, NoReturn

TPUS = {  # generation: (the node label's name, xpk's)
    "v4": ("tpu-v4-podslice", "v4"),
    "v5e": ("tpu-v5-lite-podslice", "v5litepod"),
    "v5p": ("tpu-v5p-slice", "v5p"),
    "v6e": ("tpu-v6e-slice", "v6e"),
    "tpu7x": ("tpu7x", "tpu7x"),
}
CARDS = {
    "t4": "nvidia-tesla-t4",
    "l4": "nvidia-l4",
    "a100": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
SPOT = "cloud.google.com/gke-spot"
DATA = "/data"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"submit.py: error: {' '.join(message.split())}\n")


def shape(topology: str, chips: int | None = None) -> tuple[str, str, int, int]:
    """(kind, shape, hosts, chips a host): "v5e:4x4" has 4 hosts of 4, "h100:4x8" 4 hosts of 8.

    Raises:
      ValueError: it is no topology, or `chips` a host, 4 by default, don't make it.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*){0,2})", topology)
    kind, text = found.groups() if found else ("", "")
    sizes = [int(size) for size in text.split("x")] if text else []
    if kind in CARDS and len(sizes) <= 2:
        return kind, text, math.prod(sizes[:-1]), sizes[-1]
    if kind not in TPUS or len(sizes) < 2:
        known = ", ".join([*TPUS, *CARDS])
        raise ValueError(f"{topology!r} is not KIND:SHAPE, as v5e:4x4 or h100:4x8, of {known}")
    count = math.prod(sizes)
    chips = chips or min(count, 4)
    if count % chips:
        raise ValueError(f"{topology!r}: {count} chips can't be hosts of {chips}")
    return kind, text, count // chips, chips


def manifest(args: argparse.Namespace, words: list[str]) -> str:
    """The JobSet. Every value goes in as JSON, which YAML reads: no text can leave its place."""
    kind, text, hosts, chips = shape(args.topology, args.chips_per_host)
    if kind in TPUS:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": TPUS[kind][0],
            "cloud.google.com/gke-tpu-topology": text,
        }
    else:
        selector = {"cloud.google.com/gke-accelerator": CARDS[kind]}
    tolerations = [{"key": "google.com/tpu" if kind in TPUS else "nvidia.com/gpu"}]
    if args.spot:
        selector[SPOT] = "true"
        tolerations.append({"key": SPOT})
    filled: dict[str, Any] = {
        "name": args.name,
        "restarts": args.restarts,
        "slices": args.slices,
        "hosts": hosts,
        "chips": chips,
        "image": args.image,
        "args": ["--config", args.config, "--workdir", args.workdir, *words],
        "service_account": args.service_account,
        "node_selector": selector,
        "tolerations": [{**each, "operator": "Exists"} for each in tolerations],
        "annotations": {},
        # Of memory, as large as it gets: 64 MiB, the default, are too few for NCCL.
        "mounts": [{"name": "shm", "mountPath": "/dev/shm"}],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if args.data:
        bucket, _, folder = args.data.removeprefix("gs://").partition("/")
        options = {"bucketName": bucket, "mountOptions": "implicit-dirs"}
        if folder:
            options["mountOptions"] += f",only-dir={folder}"
        csi = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True}
        filled["annotations"] = {"gke-gcsfuse/volumes": "true"}
        filled["mounts"].append({"name": "data", "mountPath": DATA, "readOnly": True})
        filled["volumes"].append({"name": "data", "csi": {**csi, "volumeAttributes": options}})
        filled["args"].append(f"--config.data={DATA}")
    # Kubernetes itself would read $(NAME) in words as a variable; $$(NAME) is the text.
    filled["args"] = [word.replace("$(", "$$(") for word in filled["args"]]
    template = Path(__file__).with_name("tpu.yaml" if kind in TPUS else "gpu.yaml").read_text()
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in filled.items()}
    return Template(template).substitute(texts)


def xpk(args: argparse.Namespace, words: list[str]) -> list[str]:
    """The command of xpk that submits the same."""
    kind, text, _, _ = shape(args.topology)
    program = ["python", "/opt/echovlm/launch/train.py", "--config", args.config]
    program += ["--workdir", args.workdir, *words]
    command = ["xpk", "workload", "create", "--cluster", args.xpk, "--workload", args.name]
    command += [f"--tpu-type={TPUS[kind][1]}-{text}", f"--num-slices={args.slices}"]
    command += [f"--docker-image={args.image}", f"--max-restarts={args.restarts}"]
    command += ["--restart-on-exit-codes=1,69,70,75,137", *(["--spot"] if args.spot else [])]
    return [*command, "--command", " ".join(program)]


def wait(args: argparse.Namespace) -> int:
    """Until the JobSet has ended; 0 where it has completed."""
    look = ["kubectl", "get", "jobset", args.name, "--namespace", args.namespace]
    look += ["--output", "jsonpath={.status.terminalState}"]
    while True:
        done = subprocess.run(look, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return 1
        if done.stdout:
            print(f"submit.py: {args.name}: {done.stdout}", file=sys.stderr)
            return int(done.stdout != "Completed")
        time.sleep(args.poll)


def parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the JobSet: small letters, digits and -")
    parser.add_argument("--topology", required=True, help="as of `echovlm plan`")
    parser.add_argument("--image", required=True, help="registry/name:tag")
    parser.add_argument("--config", required=True, help="a file in the image")
    parser.add_argument("--workdir", required=True, help="gs://… or s3://…")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices; --config.mesh.dcn.data")
    parser.add_argument("--chips-per-host", type=int, help="of the node pool, for TPUs (4)")
    parser.add_argument("--spot", action="store_true", help="cheaper; can be taken away")
    parser.add_argument("--data", help=f"gs://… of a dataset: mounted at {DATA}, and trained on")
    parser.add_argument("--restarts", type=int, default=20, help="before it is given up (20)")
    parser.add_argument("--service-account", default="default", help="that may use the buckets")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--wait", action="store_true", help="end with the run, 1 where it failed")
    parser.add_argument("--poll", type=float, default=30, help="seconds between two looks (30)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the manifest, or xpk's command"
    )
    parser.add_argument("--xpk", metavar="CLUSTER", help="submit by xpk to this cluster of its own")
    args = parser.parse_args(words)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
        parser.error(f"--name {args.name!r}: at most 40 small letters, digits and -")
    if not re.match(r"(gs|s3)://.", args.workdir):
        parser.error("--workdir must be gs://… or s3://…: a pod's disk ends with it")
    if args.data is not None and not re.match(r"gs://.", args.data):
        parser.error(f"--data {args.data!r} must be gs://…")
    try:
        kind = shape(args.topology, args.chips_per_host)[0]
    except ValueError as error:
        parser.error(f"--topology {error}")
    if args.slices < 1 or args.restarts < 0 or (kind in CARDS and args.slices > 1):
        parser.error("--slices and --restarts count from 1 and 0; cards have no slices")
    if args.xpk and (args.data or kind in CARDS):
        parser.error("--xpk is for TPUs, and mounts --data by storage commands of its own")
    return args


def main(words: list[str]) -> int:
    cut = words.index("--") if "--" in words else len(words)
    args, words = parse(words[:cut]), words[cut + 1 :]
    if args.xpk and any(shlex.quote(word) != word for word in words):
        print("submit.py: error: xpk's own quotes don't carry such words", file=sys.stderr)
        return 2
    text = "" if args.xpk else manifest(args, words)
    command = ["kubectl", "apply", "--namespace", args.namespace, "--filename", "-"]
    if args.xpk:
        command = xpk(args, words)
    if args.dry_run:
        print(shlex.join(command) if args.xpk else text.rstrip())
        return 0
    if shutil.which(command[0]) is None:
        print(f"submit.py: error: {command[0]} is not installed", file=sys.stderr)
        return 2
    if subprocess.run(command, input=text, text=True).returncode:
        return 1
    follow = f"kubectl logs --follow --namespace {args.namespace} --max-log-requests 500"
    print(
        f"submit.py: its logs: {follow} --selector jobset.sigs.k8s.io/jobset-name={args.name}\n"
        f"submit.py: end it: kubectl delete jobset {args.name} --namespace {args.namespace}\n"
        "submit.py: nodes cost as long as their pool has them, with or without pods",
        file=sys.stderr,
    )
    return wait(args) if args.wait else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
