"""The program in which `patterns` matches; imports nothing of ours.

Speaks JSON, a line each way. First comes {"seconds", "milliseconds", "bytes"}: requests may take
that much of the processor's time on average, that many seconds beyond it, and that much memory.
Then come requests {"expression", "how", "text"}; how is a method of `re`, or null for whether this
is an expression. A reply is {"groups": number or name → text, or null where nothing matches},
{"count": of groups}, or {"invalid": why}.
"""

import functools
import json
import re
import resource
import sys
import time
from typing import Any


@functools.cache
def compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


def reply_to(expression: str, how: str | None, text: str) -> dict[str, Any]:
    try:
        pattern = compiled(expression)
    except (re.error, RecursionError, OverflowError) as error:
        return {"invalid": (str(error).splitlines() or [""])[0]}
    if how is None:
        return {"count": pattern.groups}
    if (found := getattr(pattern, how)(text)) is None:
        return {"groups": None}
    return {"groups": dict(enumerate((found[0], *found.groups()))) | found.groupdict()}


def limit(kind: int, value: int) -> None:
    most = resource.getrlimit(kind)[1]
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(kind, (value, most))


def main() -> None:
    told = json.loads(sys.stdin.buffer.readline())
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, told["bytes"])
    left, reply = told["seconds"], {}
    while True:
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
        if not (line := sys.stdin.buffer.readline()):
            return
        began = time.process_time()
        limit(resource.RLIMIT_CPU, int(began + left) + 1)
        reply = reply_to(**json.loads(line))
        spent = time.process_time() - began
        left = min(left - spent + told["milliseconds"] / 1000, told["seconds"])


if __name__ == "__main__":
    main()
