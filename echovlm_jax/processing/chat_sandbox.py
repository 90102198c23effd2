"""Renders a checkpoint's chat template: a program of its own, which `chat` starts and talks to.

A template is a program by a stranger. jinja2's immutable sandbox keeps it from the interpreter;
limits of the operating system keep it from this machine's time and memory, which no rule about the
language could bound: one `in` over two long lists takes minutes, one `map` copies gigabytes.
This imports nothing of ours, so that it is there in a tenth of a second.

Speaks JSON, a line each way. First comes {"paths", "source", "seconds", "bytes", "characters"},
then a request {variable: value} as often as wanted. A reply is {"text"}, or an error as
{"invalid"}, {"refuses"} or {"fails"}. The end of its input ends it, and so its parent's death does.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

MAX_SUMS = 500  # places where a template adds texts; each may make as long a text as is allowed
MAX_NUMBER = 10_000  # of a factor, an exponent or a width: `'x' * 10**9` is no chat
_SIZED = (str, bytes, list, tuple, dict, set)
# str's methods that widen a text by a number or a table, and what leads to bytes, whose methods
# are as many again.
_WIDENING = {"center", "ljust", "rjust", "zfill", "expandtabs", "translate", "maketrans"} | {
    "encode",
    "to_bytes",
}


class Refused(Exception):
    """Raised by a template through raise_exception."""


class Words:
    """jinja2's and our own ways to put texts together, none longer than so many characters."""

    def __init__(self, most: int) -> None:
        self.most = most

    def check(self, size: int) -> None:
        if size > self.most:
            raise ValueError(f"it makes more than {self.most} characters of text")

    def concat(self, parts: Iterable[str]) -> str:
        """What every output block, macro and join is put together with."""
        held, total = [], 0
        for part in parts:
            total += len(part)
            self.check(total)
            held.append(part)
        return "".join(held)

    def join(self, value: Iterable[Any], d: str = "", attribute: object = None) -> str:
        if attribute is not None:
            raise ValueError("join takes no attribute here")
        return self.concat([str(d) + str(v) for v in value])[len(str(d)) :]

    def replace(self, value: Any, old: str, new: str, count: int | None = None) -> str:
        text, old, new = str(value), str(old), str(new)
        self.check(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def to_json(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any
    ) -> str:
        """Piece by piece: each tojson of a tojson doubles the backslashes."""
        indent = min(indent, 8) if indent else None
        return self.concat(
            json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent).iterencode(value)
        )


def compile_template(source: str, words: Words) -> Callable[[dict[str, Any]], str]:
    """What Hugging Face's templates rely on, less what makes text without bound."""
    from datetime import datetime

    import jinja2.ext
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator, Frame
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generator(CodeGenerator):
        def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
            """`a ~ b`, by a function that is bounded; jinja2's own is not."""
            self.write("environment.concat(map(str, (")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write(")))")

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%", "//"])
        code_generator_class = Generator
        concat = staticmethod(words.concat)  # type: ignore[assignment]

        def wrap_str_format(self, value: Any) -> None:
            if isinstance(getattr(value, "__self__", None), str) and "format" in value.__name__:
                raise SecurityError("format is not available to templates")

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            wide = attr in _WIDENING or isinstance(obj, bytes | bytearray | memoryview)
            return not wide and super().is_safe_attribute(obj, attr, value)

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            owner = getattr(obj, "__self__", None)
            if isinstance(owner, str) and obj.__name__ in ("join", "replace"):
                joins = obj.__name__ == "join"
                return words.join(args[0], owner) if joins else words.replace(owner, *args)
            return super().call(context, obj, *args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+":
                if isinstance(left, _SIZED) and isinstance(right, _SIZED):
                    words.check(len(left) + len(right))
                return super().call_binop(context, operator, left, right)
            for side in (left, right):
                if not isinstance(side, int | float) or abs(side) > MAX_NUMBER:
                    raise SecurityError(f"the operator {operator} takes numbers up to {MAX_NUMBER}")
            return super().call_binop(context, operator, left, right)

    def refuse(message: object) -> None:
        raise Refused(str(message))

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols],
        optimized=False,  # folding constants would compute outside the limits
    )
    for name in ("center", "format", "indent", "wordwrap", "batch", "slice", "pprint"):
        environment.filters.pop(name, None)
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)
    environment.filters |= {"tojson": words.to_json, "join": words.join, "replace": words.replace}
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    tree = environment.parse(source)
    sums = sum(len(node.nodes) for node in tree.find_all(nodes.Concat))
    if sums + len(list(tree.find_all(nodes.Add))) > MAX_SUMS:
        raise SecurityError(f"it adds texts in more than {MAX_SUMS} places")
    return environment.from_string(source).render


def first_line(error: BaseException) -> str:
    """An error's first line."""
    if isinstance(error, MemoryError):
        return "it takes more memory than a template may"
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def reply_to(line: bytes, render: Callable[[dict[str, Any]], str]) -> dict[str, str]:
    try:
        return {"text": render(json.loads(line))}
    except Refused as error:
        return {"refuses": first_line(error)}
    except BaseException as error:  # the template is foreign code
        return {"fails": first_line(error)}


def main() -> None:
    told = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = told["paths"]

    def say(reply: dict[str, str]) -> None:
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()

    def limit(kind: int, value: int) -> None:
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, most))

    def allow_more_time() -> None:
        # The processor's time, so that a busy machine is no hostile template.
        limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + told["seconds"])

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, told["bytes"])
    allow_more_time()
    try:
        render = compile_template(told["source"], Words(told["characters"]))
    except BaseException as error:
        return say({"invalid": first_line(error)})
    say({})
    while line := sys.stdin.buffer.readline():
        allow_more_time()
        say(reply_to(line, render))


if __name__ == "__main__":
    main()
