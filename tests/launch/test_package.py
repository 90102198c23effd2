"""launch/ reaches those who install the package, and pins what the package asks for."""

import json
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from echovlm_jax.cli import main

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGET = {"python_version": "3.12", "sys_platform": "linux", "platform_system": "Linux"}


def test_the_command_says_where_the_programs_are(capsys):
    assert main(["launch"]) == 0
    folder = capsys.readouterr().out.rstrip("\n")
    assert main(["launch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": folder}
    assert (Path(folder) / "train.py").is_file()


def test_the_wheel_has_the_programs():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["launch"] == "echovlm_jax/launch"


def test_pins_are_what_the_package_accepts():
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *extras["tpu"], *extras["cuda"]]
    for requirement in map(Requirement, asked):
        if requirement.marker is None or requirement.marker.evaluate(TARGET):
            name = requirement.name.lower().replace("_", "-")
            assert requirement.specifier.contains(pins[name]), requirement


def test_the_container_has_the_python_of_the_pins():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    assert "FROM python:3.12." in text and "\nUSER 1000\n" in text
    for script in ("tpu_worker.sh", "sky.yaml"):
        assert "--python 3.12 " in (ROOT / "launch" / script).read_text()
