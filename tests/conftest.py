"""What every test gets: eight fake CPU devices, shape checks at run time, and no network."""

import os
import signal
import subprocess
import time
from pathlib import Path

# In a shell's background the tests are started with SIGINT ignored, and so would be every process
# that they start, which then can't be interrupted. A handler isn't inherited as "ignored" is.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: None)

# Before anything imports jax: it reads these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would wait for a metadata server
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # by each of the tests' workers
# The tests compile many small programs and run each for milliseconds: a compiler that optimises
# less makes them three times as fast. XLA_FLAGS that are already set win.
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
_GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_GIVEN, *(f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _GIVEN)]
).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # commands keep nothing in the user's home

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

import echovlm_jax.memory

# A test that calls a command leaves its process's memory as it is, for the tests after it.
echovlm_jax.memory.keep_freed_memory = lambda: False

# Functions imported from here on check the shapes and types that they declare. The hook outlives
# this file, so that a module which is first imported inside a test is checked too.
install_import_hook(["echovlm_jax.ops", "echovlm_jax.model"], "beartype.beartype")

# deadline: a first example may compile. derandomize: a build tests the change, not the day's luck.
hypothesis.settings.register_profile(
    "echovlm", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=False
)
hypothesis.settings.load_profile("echovlm")


# A process may have 65,530 mappings of memory, and a program compiled for eight devices takes a
# thousand: with some sixty of them alive, XLA's next compilation dies.
_MAPPINGS, _MOST_MAPPINGS = Path("/proc/self/maps"), 30_000


@pytest.fixture(autouse=True)
def programs_are_dropped():
    began = time.monotonic()
    yield
    if time.monotonic() - began < 1 or not _MAPPINGS.exists():  # counting takes milliseconds
        return
    if _MAPPINGS.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def no_process_outlives_its_test(monkeypatch):
    """A test that fails half-way leaves no process behind that runs for ever."""
    started: list[subprocess.Popen] = []

    class Popen(subprocess.Popen):
        def __init__(self, *words, **options):
            super().__init__(*words, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    yield
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The folder of public report records; a test that needs it is skipped where it is absent."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ECHOVLM_PUBLIC_DATA", default))
    if not folder.is_dir():
        pytest.skip("no public data: set ECHOVLM_PUBLIC_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory) -> Path:
    """The real Qwen vocabulary as vocab.json and merges.txt: seconds to make, a second to load."""
    from tests.processing.checkpoints import write_qwen_files

    return write_qwen_files(tmp_path_factory.mktemp("qwen"))
