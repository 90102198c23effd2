"""Compiled programs that are kept: where, for whom, and that the next process finds them."""

import json
import os
import subprocess
import sys

import pytest

from echovlm_jax.cli.compiled import FOLDER, keep_programs
from echovlm_jax.cli.frame import Parser, add_command


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The user's cache folder; what the command sets is undone."""
    monkeypatch.setenv(FOLDER, "")
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_programs_are_kept_in_a_folder_of_ones_own(cache, capsys) -> None:
    keep_programs(debug=True)
    folder = cache / "echovlm" / "xla"
    assert os.environ[FOLDER] == str(folder)
    assert folder.is_dir() and folder.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err == f"echovlm: compiled programs are kept in {folder}\n"


@pytest.mark.parametrize("said", ["", "/elsewhere"])
def test_who_names_a_folder_has_decided(cache, monkeypatch, said) -> None:
    monkeypatch.setenv(FOLDER, said)
    keep_programs(debug=False)
    assert os.environ[FOLDER] == said and not cache.exists()


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_folder_that_others_write_to_is_not_used(cache, mode, capsys) -> None:
    folder = cache / "echovlm" / "xla"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    keep_programs(debug=True)
    assert FOLDER not in os.environ and "nowhere" in capsys.readouterr().err


def test_where_there_can_be_no_folder_nothing_is_kept(cache) -> None:
    cache.write_text("a file")
    keep_programs(debug=False)
    assert FOLDER not in os.environ


def test_a_relative_cache_folder_is_not_meant(cache, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_programs(debug=False)
    assert os.environ[FOLDER] == str(tmp_path / ".cache" / "echovlm" / "xla")


def test_the_next_process_finds_what_one_has_compiled(cache) -> None:
    code = (
        "from echovlm_jax.cli.compiled import keep_programs; keep_programs(False)\n"
        "import json; from collections import Counter; import jax, jax.numpy as jnp\n"
        "seen = Counter()\n"
        "jax.monitoring.register_event_listener(lambda name, **_: seen.update([name]))\n"
        "jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.ones((8, 8)))\n"
        "print(json.dumps(seen))"
    )
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", code]
    found = [
        json.loads(subprocess.check_output(command, env=environment, text=True)) for _ in range(2)
    ]
    hits = [seen.get("/jax/compilation_cache/cache_hits", 0) for seen in found]
    assert hits[0] == 0 and hits[1] > 0
    assert "/jax/compilation_cache/cache_misses" not in found[1]


def test_a_command_says_in_its_help_that_it_keeps_programs() -> None:
    commands = Parser(prog="echovlm").add_subparsers()
    shown = {
        keeps: add_command(
            commands, f"c{keeps}", lambda args: {}, "do", "echovlm c", keeps_programs=keeps
        ).format_help()
        for keeps in (True, False)
    }
    assert FOLDER in shown[True] and FOLDER not in shown[False]
