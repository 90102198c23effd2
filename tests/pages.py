"""The code blocks of the documentation: found, parsed, and run as a reader would, in order."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# A comment right above a block says why the tests leave it alone.
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
_ASSIGNMENT = re.compile(r'([A-Z_]+)="(.*)"')


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
      line: of its first line within the fence, from 1.
      language: what stands behind the fence, or nothing.
      text: what is within.
      reason: why it is not run; None where it is.
    """

    line: int
    language: str
    text: str
    reason: str | None


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    return [
        Block(
            text.count("\n", 0, match.start("text")) + 1,
            *match.group("language", "text", "reason"),
        )
        for match in _BLOCK.finditer(text)
    ]


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """The commands of a bash block with their lines; one that `\\` carries on is one."""
    number, command = block.line, ""
    for offset, line in enumerate(block.text.splitlines()):
        number = number if command else block.line + offset
        command += line
        if command.endswith("\\"):
            command = command[:-1]
            continue
        if command.strip() and not command.lstrip().startswith("#"):
            yield number, command.strip()
        command = ""
    assert not command, f"line {number}: nothing follows the last \\"


def words(command: str, variables: dict[str, str]) -> list[str]:
    """A command's words as bash splits them. `NAME="…"` has none, and is kept in `variables`."""
    if assignment := _ASSIGNMENT.fullmatch(command):
        variables[assignment[1]] = assignment[2]
        return []
    return shlex.split(Template(command).safe_substitute(variables), comments=True)


def run(page: Path) -> None:
    """Runs a page's blocks here, in the working folder, and says of each command where it stands.

    `echovlm` is called within this process, which has then waited for JAX once; the rest is bash's.
    Exits with a command's code where that is not 0.
    """
    from echovlm_jax.cli import main

    began = time.monotonic()
    variables: dict[str, str] = {}
    names: dict[str, object] = {}

    def tell(line: int, what: str) -> None:
        print(f"[{time.monotonic() - began:.0f} s] {page.name}:{line} {what}", flush=True)

    for block in blocks(page.read_text("utf-8")):
        if block.reason or block.language not in ("bash", "python"):
            continue
        if block.language == "python":
            tell(block.line, "python")
            exec(compile(block.text, f"{page.name}:{block.line}", "exec"), names)
            continue
        for number, command in commands(block):
            tell(number, command)
            asked = words(command, variables)
            if asked[:1] == ["echovlm"]:
                code = main(asked[1:])
            else:
                code = subprocess.run(
                    ["bash", "-c", command], env=os.environ | variables
                ).returncode
            if code:
                sys.exit(code)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
