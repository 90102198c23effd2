"""Runs one program as several processes of jax.distributed on this machine, on fake CPU devices.

    python launch/local_processes.py --processes 2 --devices 4 -- program.py [argument …]
    python launch/local_processes.py --processes 2 --devices 4 -- -m module [argument …]
    python launch/local_processes.py --processes 2 --devices 4 -- echovlm train …

What follows `--` is what would follow `python`, or a Python script on PATH. Every line that a
process prints begins with its number. If one fails, the others are killed, and its exit code is
this program's; Ctrl-C and SIGTERM stop all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

TIMED_OUT = 124  # as timeout(1) says it


def run(
    command: list[str],
    processes: int,
    devices: int,
    timeout: float | None = None,
    grace: float = 10.0,
) -> int:
    """Runs `command` as `processes` processes with `devices` devices each.

    Args:
      command: what would follow `python`.
      timeout: seconds for all of it.
      grace: seconds between SIGTERM and SIGKILL where the user stops the job. JAX takes SIGTERM for
        a notice, so that a program can save its work; one that doesn't look waits for SIGKILL.

    Returns:
      0 if all succeed; else the exit code of the one that failed first (128 + n if signal n ended
      it), or 124 after `timeout` seconds. When it returns, or raises, no process is left.
    """
    port = _free_port()
    ended: queue.Queue[int] = queue.Queue()
    with contextlib.ExitStack() as stack:
        # Threads come after all processes: what runs between fork and exec may not meet one.
        children = [
            stack.enter_context(_child(command, _environment(i, processes, devices, port)))
            for i in range(processes)
        ]
        lock = threading.Lock()
        printers = [
            threading.Thread(target=_print_lines, args=(f"[{i}] ", stream, sink, lock))
            for i, child in enumerate(children)
            for stream, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
        ]
        waiters = [
            threading.Thread(target=lambda i=i, c=child: (c.wait(), ended.put(i)), daemon=True)
            for i, child in enumerate(children)
        ]
        for thread in [*printers, *waiters]:
            thread.start()
        # The processes are gone by then; what holds a pipe open longer is not waited for.
        stack.callback(lambda: [thread.join(10) for thread in printers])
        try:
            code = _wait(children, ended, timeout)
        except (KeyboardInterrupt, SystemExit):
            _say("stopping all processes")
            _stop(children, signal.SIGTERM, grace)
            raise
        finally:
            _stop(children, signal.SIGKILL, 10)
    return code


def _wait(
    children: list[subprocess.Popen[bytes]], ended: queue.Queue[int], timeout: float | None
) -> int:
    """Until all have succeeded, one has failed, or the time is over."""
    deadline = None if timeout is None else time.monotonic() + timeout
    for _ in children:
        while True:
            if deadline is not None and time.monotonic() > deadline:
                _say(f"not done after {timeout:g} seconds; stopping all processes")
                return TIMED_OUT
            try:
                i = ended.get(timeout=0.2)  # short, because signals are heard in between
                break
            except queue.Empty:
                continue
        code = children[i].returncode
        if code:
            how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
            _say(f"process {i} {how}; stopping the others")
            return 128 - code if code < 0 else code
    return 0


def _environment(process: int, processes: int, devices: int, port: int) -> dict[str, str]:
    count = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{count}=\S*", "", os.environ.get("XLA_FLAGS", ""))
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"{flags} {count}={devices}".strip(),
        # XLA's threads: how a product is cut among them decides in which order it is added up. As
        # many as all devices, and 2 × 2 compute the same bits as 1 × 4.
        "NPROC": str(processes * devices),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",  # JAX's own default is every network
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def _child(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which is gone, with what it started, when this ends."""
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("join.py")), *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )
    try:
        yield child
    finally:
        _signal(child, signal.SIGKILL)
        child.wait()


def _die_with_parent() -> None:
    """Asks Linux to kill this process if the launcher is killed so that it can't clean up."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def _stop(children: list[subprocess.Popen[bytes]], number: int, seconds: float) -> None:
    """Sends all of them a signal and waits until they have ended, or for so long."""
    for child in children:
        _signal(child, number)
    deadline = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _print_lines(prefix: str, stream: IO[bytes], sink: IO[str], lock: threading.Lock) -> None:
    for line in stream:
        with lock:
            sink.write(prefix + line.decode(errors="replace").rstrip("\n") + "\n")
            sink.flush()


def _say(message: str) -> None:
    print(f"local_processes: {message}", file=sys.stderr, flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=_count, required=True, metavar="N")
    parser.add_argument("--devices", type=_count, required=True, metavar="M", help="per process")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for all of it")
    parser.add_argument(
        "--grace", type=float, default=10.0, metavar="SECONDS", help="from SIGTERM to SIGKILL"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the program")
    arguments = parser.parse_args(words)
    command = arguments.command[arguments.command[:1] == ["--"] :]
    if command[:1] and re.fullmatch(r"python[\d.]*", Path(command[0]).name):
        command = command[1:]  # this interpreter, whose packages are known to be there
    if not command:
        parser.error("no program to run: give it after --, as in -- train.py")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run(
            command,
            arguments.processes,
            arguments.devices,
            timeout=arguments.timeout,
            grace=arguments.grace,
        )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
