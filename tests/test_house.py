"""The house rules, enforced by reading the source: who imports whom, and what nobody may do.

A rule is a function (module name, source) -> complaints. Each stands in `RULES` beside a made-up
source that breaks it and one that keeps it, so that a rule which can no longer fail is found out.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from echovlm_jax.cli import build_parser

ROOT = Path(__file__).parents[1]
PACKAGE = "echovlm_jax"

# Who may import whom of ours; the longest matching name rules. A part may always import itself
# and `errors`. `config` is where all data flows from: whatever is after it may read it.
_CONVERT = {
    *("config", "model.abstract_params", "model.param_specs", "mesh", "model.ParamSpec"),
    *("ops.product.weight", "quantize", "storage", "progress", "patterns", "memory"),
}
_LOAD = {"chips", "config", "mesh", "model", "processing", "convert", "generate", "storage"}
_LOAD |= {"ops.product.weight"}
ANYTHING = {""}
MAY_IMPORT = {
    "errors": set(),
    "progress": set(),
    "child": set(),
    "patterns": {"child", "pattern_child"},
    "pattern_child": set(),
    "memory": set(),
    "config": set(),
    "ops": set(),
    "flops": {"config", "model", "ops"},  # of ops, how attention cuts its work
    "cards": set(),
    "chips": {"cards"},
    "mesh": {"config", "ops.layout"},
    "model": {"config", "ops"},
    "processing": {"config", "storage", "child"},
    "data": {"config", "processing", "storage", "progress", "patterns"},
    "data.dataset": {"config", "data", "phantom", "processing", "storage"},
    "phantom": {"data", "processing", "progress"},
    "convert": _CONVERT,
    "convert.parity": _CONVERT | {"model", "ops", "processing", "generate", "load"},
    "convert.layerwise": _CONVERT | {"model", "ops"},  # parity's forward pass
    "convert.upcycle": _CONVERT | {"processing"},  # its measurement's prompt
    "storage": {"progress"},
    "verify": {"storage"},
    "checkpoint": {"config", "mesh", "storage", "progress"},
    "train": {
        *("config", "chips", "flops", "mesh", "model", "ops", "data", "checkpoint"),
        *("memory", "quantize", "storage", "progress", "patterns"),
    },
    "train.start": {"config", "model", "convert", "data", "processing", "storage", "train"},
    "quantize": {"config", "model", "ops"},
    "generate": {"chips", "config", "mesh", "model", "ops", "processing", "storage", "progress"},
    "load": _LOAD,
    "evaluate": {"config", "data", "generate", "load", "processing", "storage", "progress"},
    "plan": {
        *("cards", "config", "chips", "data", "flops", "mesh", "model", "quantize", "train"),
        *("generate", "progress"),
    },
    "web": {"data", "evaluate", "generate", "phantom.words", "processing"},
    # The package's front door, and the commands that go the whole way.
    "": {"load"},
    "demo": ANYTHING,
    "bench": ANYTHING,
    "bench.torch_model": {"config"},
    "cli": ANYTHING,
}
NOBODY_IMPORTS = ("cli", "launch", "configs", "tests")
# `storage.bucket`: the endpoint, as all clients of S3 read it, in worker processes too.
# `burned_in` tells its OCR engine, which listens to nothing else, to report to nobody.
READS_THE_OUTSIDE = ("cli", "launch", "storage.bucket", "processing.burned_in")

# Who has files of his own: datasets and users' pictures, `demo` its folder, `cli` the terminal,
# `web` uploads, which it deletes.
HAVE_FILES = ("storage", "processing", "data", "phantom", "bench", "demo", "cli", "web")
# Calls on what is never in a bucket.
DISK_ONLY = {
    ("convert.safetensors", "open"),  # a bucket's objects have a reader of their own
    ("convert.safetensors", "os.open"),
    ("convert.journal", "self._folder.rmdir"),
}

# Another file of that name.
SAME_WORD = {("config.hugging_face", "config.json")}

# What is above the limits of CONTRIBUTING.md today; none may grow, none is added.
LONGEST = {
    ("processing.chat_sandbox", "compile_template"): 68,
    ("train.loop", "train"): 90,
    ("train.program", "make_program"): 80,
    ("train.step", "make_train_step"): 70,
}
MOST_PARAMETERS = {
    ("generate.offline", "generate"): 10,
    ("load", "generate"): 10,  # a promise
    ("ops.attention.dispatch", "attention"): 9,
    ("ops.moe.ragged", "_on_device"): 10,
    ("train.step", "make_train_step"): 10,
}
# Import name -> name on PyPI, where they differ.
PYPI_NAMES = {"PIL": "pillow", "orbax": "orbax-checkpoint", "gdcm": "python-gdcm"}
TOP_LEVEL = {
    *("pyproject.toml", "Makefile", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"),
    *(".ci", ".gitignore", ".gitattributes", ".pre-commit-config.yaml", PACKAGE, "tests"),
    "mkdocs.yml",
}
TOP_LEVEL_LATER = {"configs", "docs", "launch", "notebooks"}  # git keeps no empty folder


def _imports(module: str, source: str) -> Iterator[tuple[str, bool]]:
    """Every dotted name that `source` imports, and whether only inside a function."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        lazy = id(node) in inside
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # For a relative import, `module` stands for a file: its first dot is its folder.
            here = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*here, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", lazy) for alias in node.names)


def _matches(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _own(module: str) -> str:
    """`echovlm_jax.model.vision` -> `model.vision`; the package itself -> the empty string."""
    return re.sub(rf"^{PACKAGE}\.?|\.?__init__$", "", module)


def imports_of_ours(module: str, source: str) -> list[str]:
    own = _own(module)
    rules = [rule for rule in MAY_IMPORT if rule and _matches(own, rule)]
    if own and not rules:
        return [f"{module} is not in MAY_IMPORT: say what it may import"]
    allowed = MAY_IMPORT[max(rules, key=len, default="")]
    part = own.split(".")[0]
    complaints = []
    for name, _ in _imports(module, source):
        ours = _matches(name, PACKAGE)
        target = _own(name) if ours else name
        if (ours or target.split(".")[0] in ("configs", "launch", "tests")) and (
            any(_matches(target, nobody) for nobody in NOBODY_IMPORTS if nobody != part)
            or not any(_matches(target, prefix) for prefix in {*allowed, part or "load", "errors"})
        ):
            complaints.append(f"{module} may not import {name}")
    return complaints


def flax_linen(module: str, source: str) -> list[str]:
    names = [name for name, _ in _imports(module, source)]
    found = any(_matches(name, "flax.linen") for name in names)
    return [f"{module} imports flax.linen"] if found and not _matches(_own(module), "model") else []


def torch_is_lazy(module: str, source: str) -> list[str]:
    """torch only in convert, and where we measure against it, inside functions: everybody else runs
    without it."""
    imports = [lazy for name, lazy in _imports(module, source) if _matches(name, "torch")]
    parts = ("convert", "bench.cpu", "bench.data", "bench.torch_model")
    allowed = any(_matches(_own(module), part) for part in parts)
    return [f"{module} imports torch" for lazy in imports if not (lazy and allowed)]


def declared_dependencies(module: str, source: str) -> list[str]:
    """What the package imports is what installing it brings, or inside functions an extra; not what
    the tests bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    normal = re.compile(r"[-_.]+")
    declared = {
        normal.sub("-", re.split(r"[^\w.-]", line)[0]).lower() for line in project["dependencies"]
    }
    extras = {
        normal.sub("-", re.split(r"[^\w.-]", line)[0]).lower()
        for extra, lines in project["optional-dependencies"].items()
        for line in lines
        if extra not in ("dev", "test")
    }
    complaints = []
    for name, lazy in _imports(module, source):
        top = name.split(".")[0]
        pypi = normal.sub("-", PYPI_NAMES.get(top, top)).lower()
        ours = top in (PACKAGE, "torch") or top in sys.stdlib_module_names
        if not ours and pypi not in declared and not (lazy and pypi in extras):
            complaints.append(f"{module} imports {top}, which is not among the dependencies")
    return complaints


def one_product(module: str, source: str) -> list[str]:
    """Weights are multiplied, and tables looked up, in `ops.product` alone. Attention and the
    experts' dispatch multiply activations with one another, telemetry counts, sampling sorts."""
    own = _own(module)
    if _matches(own, "ops.product") or _matches(own, "bench"):
        return []
    banned = {*("dot", "matmul", "tensordot", "vdot", "dot_general", "ragged_dot"), "einsum"}
    banned |= {"ragged_dot_general", "conv_general_dilated", "take"}
    activations = ("ops.attention", "ops.moe", "ops.sampling", "train.telemetry")
    if any(_matches(own, part) for part in activations):
        banned -= {"einsum", "take"}
    nodes = list(ast.walk(ast.parse(source)))
    imported = [name for name, _ in _imports(module, source)]
    names = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)] + imported
    found = [name for name in names if name.split(".")[0] in ("jnp", "jax", "lax")]
    complaints = [f"{module} uses {name}" for name in found if name.split(".")[-1] in banned]
    if any(_matches(name, "jax") for name in imported):  # without it, arrays are numpy's
        products = [node for node in nodes if isinstance(node, ast.BinOp | ast.AugAssign)]
        products = [node for node in products if isinstance(node.op, ast.MatMult)]
        complaints += [f"{module}:{node.lineno} multiplies by @" for node in products]
    return complaints


def files_are_storages(module: str, source: str) -> list[str]:
    """What touches files of runs, models and answers is in `storage`, so that a bucket's path works
    everywhere. `processing` reads users' own files; `data` writes datasets, which need a disk."""
    own = _own(module)
    if any(_matches(own, part) for part in HAVE_FILES):
        return []
    banned = {"open", "os.replace", "os.rename", "os.open", "fcntl.flock", "os.fsync"}
    banned |= {"shutil.rmtree", "shutil.copyfile", "shutil.copytree"}
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    names = [ast.unparse(call.func) for call in calls]
    found = [name for name in names if name in banned or name.endswith((".mkdir", ".rmdir"))]
    return [f"{module} calls {name}" for name in found if (own, name) not in DISK_ONLY]


def never_unpickles(module: str, source: str) -> list[str]:
    """A pickle runs whatever code its maker put in it; a checkpoint comes from strangers."""
    complaints = []
    for name, _ in _imports(module, source):
        if name.split(".")[0] in ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"):
            complaints.append(f"{module} imports {name}")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if keywords.get("allow_pickle", "False") != "False":
            complaints.append(f"{module}:{node.lineno} allows pickles")
        if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
            complaints.append(f"{module}:{node.lineno} calls torch.load without weights_only=True")
    return complaints


def outside_world(module: str, source: str) -> list[str]:
    """Flags, environment and process start-up belong to the command line."""
    if any(_matches(_own(module), reader) for reader in READS_THE_OUTSIDE):
        return []
    names = [name for name, _ in _imports(module, source)]
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
    names += [ast.unparse(node) for node in nodes]
    banned = ("os.environ", "os.getenv", "sys.argv", "argparse", "absl.flags", "jax.distributed")
    return [f"{module} uses {name}" for name in names if any(_matches(name, b) for b in banned)]


def short_files(module: str, source: str) -> list[str]:
    lines = source.count("\n")
    return [f"{module} has {lines} lines: split it"] if lines > 450 else []


def short_functions(module: str, source: str) -> list[str]:
    """Lines of code, docstrings not counted; nested functions count with the one around them."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
            lines = (node.end_lineno or 0) - first.lineno + 1
            if lines > LONGEST.get((_own(module), node.name), 60):
                complaints.append(f"{module}.{node.name} has {lines} lines of code: split it")
    return complaints


def few_parameters(module: str, source: str) -> list[str]:
    """`self` is not counted; functions of arrays (ops, model) and promises may have more."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [
                a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MOST_PARAMETERS.get((_own(module), node.name), 8):
                complaints.append(f"{module}.{node.name} has {count} parameters: give it a record")
    return complaints


def _expiries(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each `until:` note."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and re.search(
            r"\buntil\s*:", token.string, re.IGNORECASE
        ):
            yield token.start[0], token.string.removeprefix("#").strip()


def workarounds_expire(module: str, source: str) -> list[str]:
    """A workaround's note is `# until: PACKAGE RELEASE`, of a declared dependency and newer than
    what pyproject.toml asks for, or `# until: URL` of the issue. At that release, look again."""
    least = _least_releases()
    complaints = []
    for line, note in _expiries(source):
        release = re.fullmatch(r"until: ([\w.-]+) (\d[\d.]*)", note)
        if release:
            name = release[1].lower().replace("_", "-")
            if name not in least:
                complaints.append(f"{module}:{line} {note}: pyproject.toml does not ask for it")
            elif Version(release[2]) <= least[name]:
                complaints.append(f"{module}:{line} {note}: is the minimum now, take it out")
        elif not re.fullmatch(r"until: https://\S+", note):
            complaints.append(f"{module}:{line} {note}: names no release and no issue")
    return complaints


def _least_releases() -> dict[str, Version]:
    """The lowest release that pyproject.toml accepts of each dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for lines in extras for line in lines)]
    least: dict[str, Version] = {}
    for requirement in map(Requirement, lines):
        for bound in requirement.specifier:
            name, release = requirement.name.lower().replace("_", "-"), Version(bound.version)
            least[name] = min(least.get(name, release), release)
    return least


def no_utils(module: str, source: str) -> list[str]:
    bad = module.split(".")[-1] in ("utils", "util", "helpers", "misc", "common")
    return [f"{module}: name the file after what is in it"] if bad else []


Rule = Callable[[str, str], list[str]]
# Each rule with sources, as (module, source), that break it, and with sources that keep it.
RULES: dict[Rule, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    imports_of_ours: (
        [
            ("echovlm_jax.config", "from echovlm_jax.model import EchoVLM"),
            ("echovlm_jax.ops.rope", "from echovlm_jax.config import ModelConfig"),
            ("echovlm_jax.model.layers", "def f():\n    from echovlm_jax.mesh import Mesh"),
            ("echovlm_jax.model.layers", "from ..processing import images"),
            ("echovlm_jax.model.layers", "from echovlm_jax import mesh"),
            ("echovlm_jax.data.pipeline", "import echovlm_jax.model.vision"),
            ("echovlm_jax.convert.from_torch", "from echovlm_jax.model import EchoVLM"),
            ("echovlm_jax.convert.from_torch", "from echovlm_jax.load import load_model"),
            ("echovlm_jax.evaluate.report", "from echovlm_jax.train.loop import train"),
            ("echovlm_jax.demo", "from echovlm_jax.cli import main"),
            ("echovlm_jax.demo", "from echovlm_jax.cli.frame import Parser"),
            ("echovlm_jax.cli.measure", "from tests.golden import make_golden"),
            ("echovlm_jax.demo", "from tests.golden import make_golden"),
            ("echovlm_jax.train.loop", "import launch.pod"),
            ("echovlm_jax.__init__", "from echovlm_jax.model import EchoVLM"),
            ("echovlm_jax.nowhere", ""),
        ],
        [
            ("echovlm_jax.model.layers", "from echovlm_jax.ops import rope"),
            ("echovlm_jax.model.layers", "from . import cache\nfrom ..ops import rope"),
            ("echovlm_jax.config", "from echovlm_jax.errors import InputError"),
            ("echovlm_jax.convert.keys", "from echovlm_jax.model import abstract_params"),
            ("echovlm_jax.convert.parity", "from echovlm_jax.load import load_model"),
            ("echovlm_jax.__init__", "from echovlm_jax.load import load_model"),
            ("echovlm_jax.cli", "from echovlm_jax.train.loop import train"),
            ("echovlm_jax.cli.measure", "from echovlm_jax.cli.frame import Parser"),
        ],
    ),
    flax_linen: (
        [
            ("echovlm_jax.ops.x", "import flax.linen as nn"),
            ("echovlm_jax.train.x", "import flax.linen"),
            ("echovlm_jax.train.x", "def f():\n    from flax import linen"),
        ],
        [
            ("echovlm_jax.model.x", "import flax.linen as nn"),
            ("echovlm_jax.train.x", "import flax"),
        ],
    ),
    torch_is_lazy: (
        [
            ("echovlm_jax.convert.x", "import torch"),
            ("echovlm_jax.convert.x", "try:\n    from torch import nn\nexcept ImportError: pass"),
            ("echovlm_jax.generate", "def f():\n    import torch"),
        ],
        [("echovlm_jax.convert.x", "def f():\n    import torch")],
    ),
    declared_dependencies: (
        [
            ("echovlm_jax.x", "import safetensors"),
            ("echovlm_jax.x", "from scipy import stats"),
            ("echovlm_jax.x", "import apache_beam"),  # of an extra: inside functions only
        ],
        [
            (
                "echovlm_jax.x",
                "import os, jax\nfrom PIL import Image\nimport ml_dtypes, flax.linen",
            ),
            ("echovlm_jax.x", "def f():\n    import apache_beam as beam"),
        ],
    ),
    one_product: (
        [
            ("echovlm_jax.model.x", "y = jnp.einsum('BTD,FD->BTF', x, w)"),
            ("echovlm_jax.train.x", "y = jnp.dot(x, w)"),
            ("echovlm_jax.train.x", "from jax.numpy import dot"),
            ("echovlm_jax.train.x", "product = functools.partial(jax.lax.dot_general, x)"),
            ("echovlm_jax.generate.x", "import jax\ny = x @ w"),
            ("echovlm_jax.model.x", "y = jnp.take(table, tokens, axis=0)"),
            ("echovlm_jax.ops.moe.x", "y = jax.lax.ragged_dot(x, w, sizes)"),
        ],
        [
            ("echovlm_jax.ops.product.x", "y = jnp.einsum('BTD,FD->BTF', x, w)"),
            ("echovlm_jax.ops.attention.x", "y = jnp.einsum('BTNH,BSNH->BNTS', q, k)"),
            ("echovlm_jax.model.x", "y = einsum('BTD,FD->BTF', x, w)"),
            ("echovlm_jax.convert.x", "import numpy as np\ny = b @ a"),
        ],
    ),
    files_are_storages: (
        [
            ("echovlm_jax.train.x", "open(path, 'w')"),
            ("echovlm_jax.convert.x", "os.replace(a, b)"),
            ("echovlm_jax.evaluate.x", "path.mkdir(parents=True)"),
        ],
        [
            ("echovlm_jax.storage.x", "os.replace(a, b)"),
            ("echovlm_jax.processing.x", "open(path, 'rb')"),
            ("echovlm_jax.convert.source", "os.fdopen(fd)"),
        ],
    ),
    never_unpickles: (
        [
            ("echovlm_jax.x", "import pickle"),
            ("echovlm_jax.x", "from cloudpickle import loads"),
            ("echovlm_jax.x", "np.load(f, allow_pickle=True)"),
            ("echovlm_jax.x", "np.load(f, allow_pickle=flag)"),
            ("echovlm_jax.x", "torch.load(f)"),
            ("echovlm_jax.x", "torch.load(f, weights_only=False)"),
        ],
        [("echovlm_jax.x", "np.load(f, allow_pickle=False); torch.load(f, weights_only=True)")],
    ),
    outside_world: (
        [
            ("echovlm_jax.x", "import os\nos.environ.get('A')"),
            ("echovlm_jax.x", "from os import getenv"),
            ("echovlm_jax.x", "import argparse"),
            ("echovlm_jax.x", "import jax\njax.distributed.initialize()"),
        ],
        [
            ("echovlm_jax.cli", "import os, argparse\nos.environ['A']"),
            ("echovlm_jax.cli.measure", "import os, argparse\nos.environ['A']"),
            ("echovlm_jax.x", "import os"),
        ],
    ),
    short_files: ([("echovlm_jax.x", "x = 1\n" * 451)], [("echovlm_jax.x", "x = 1\n" * 450)]),
    short_functions: (
        [("echovlm_jax.x", "def f():\n" + "    x = 1\n" * 61)],
        [("echovlm_jax.x", 'def f():\n    """A\n\n    B."""\n' + "    x = 1\n" * 60)],
    ),
    few_parameters: (
        [("echovlm_jax.x", "def f(a, b, c, d, e, *, f, g, h, i): pass")],
        [("echovlm_jax.x", "class A:\n    def f(self, a, b, c, d, *, e, f, g, h): pass")],
    ),
    workarounds_expire: (
        [
            ("echovlm_jax.x", "# until: pydicom"),
            ("echovlm_jax.x", "x = 1  # until: the next release"),
            ("echovlm_jax.x", "# Until : pydicom 99"),
            ("echovlm_jax.x", "# until: imaginary 99"),
            ("echovlm_jax.x", "# until: pydicom 3.0.2"),
        ],
        [
            ("echovlm_jax.x", "# until: pydicom 99\nx = 'until: then'"),
            ("echovlm_jax.x", "# until: https://github.com/google/grain/issues/1"),
            ("echovlm_jax.x", "x = 1  # until the end"),
        ],
    ),
    no_utils: ([("echovlm_jax.ops.utils", "")], [("echovlm_jax.ops.einsum", "")]),
}
EXAMPLES = [
    (rule, module, source, breaks)
    for rule, (bad, good) in RULES.items()
    for breaks, cases in ((True, bad), (False, good))
    for module, source in cases
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_rule(rule: Rule) -> None:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert len(files) > 5
    complaints = []
    for file in files:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        complaints += rule(module, file.read_text(encoding="utf-8"))
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(("rule", "module", "source", "breaks"), EXAMPLES)
def test_rule_tells_good_from_bad(rule: Rule, module: str, source: str, breaks: bool) -> None:
    assert bool(rule(module, source)) == breaks


def test_each_file_of_a_run_or_a_model_is_named_once() -> None:
    """In `storage.layout`; an evaluation's in `evaluate.folder`."""
    from echovlm_jax.evaluate import folder
    from echovlm_jax.storage import layout

    places = {layout: "storage.layout", folder: "evaluate.folder"}
    names = {
        value: place
        for module, place in places.items()
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str) and re.search(r"[._]|^[A-Z]|^checkp", value)
    }
    assert {"XXH128SUMS", "checkpoints", "metrics.jsonl", "predictions.jsonl"} <= names.keys()
    again = []
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        module = _own(".".join(file.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            value = node.value if isinstance(node, ast.Constant) else None
            if names.get(value, module) != module and (module, value) not in SAME_WORD:
                again.append(f"{module}:{node.lineno} {value}")
    assert not again


def _circles(sources: dict[str, str]) -> list[str]:
    """The modules that import each other in a circle, imports inside functions included.

    A module is dropped once nothing that is left imports it, or it imports nothing that is left;
    what stays is tied.
    """

    def target(name: str) -> str:
        while name and name not in sources:
            name = name.rpartition(".")[0]
        return name

    imports = {
        module: {target(name) for name, _ in _imports(module, source)} - {module, ""}
        for module, source in sources.items()
    }
    while True:
        imported = set().union(*imports.values()) if imports else set()
        free = {module for module, names in imports.items() if not names or module not in imported}
        if not free:
            return sorted(imports)
        imports = {module: names - free for module, names in imports.items() if module not in free}


def test_no_module_imports_itself_by_way_of_others() -> None:
    sources = {}
    for file in (ROOT / PACKAGE).rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        sources[module.removesuffix(".__init__")] = file.read_text(encoding="utf-8")
    assert len(sources) > 100 and not _circles(sources)


def test_the_check_for_circles_can_fail() -> None:
    straight = {
        "echovlm_jax.a": "from echovlm_jax import b",
        "echovlm_jax.b": "from echovlm_jax.c import x",
        "echovlm_jax.c": "",
    }
    assert not _circles(straight)
    planted = straight | {"echovlm_jax.c": "def f():\n    from echovlm_jax.a import y"}
    assert _circles(planted) == ["echovlm_jax.a", "echovlm_jax.b", "echovlm_jax.c"]
    inside = straight | {"echovlm_jax.c": "def f():\n    import echovlm_jax.b as z"}
    assert _circles(inside) == ["echovlm_jax.b", "echovlm_jax.c"]


def _misplaced(entries: set[str]) -> list[str]:
    missing = [f"{name} is missing" for name in sorted(TOP_LEVEL - entries)]
    extra = [f"{name} does not belong" for name in sorted(entries - TOP_LEVEL - TOP_LEVEL_LATER)]
    return missing + extra


def test_top_level_is_as_planned() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    assert not _misplaced({line.split("/")[0] for line in listing.stdout.splitlines()})


def test_top_level_check_can_fail() -> None:
    assert not _misplaced(TOP_LEVEL)
    assert _misplaced(TOP_LEVEL - {"LICENSE"}) == ["LICENSE is missing"]
    assert _misplaced(TOP_LEVEL | {"scratch.py"}) == ["scratch.py does not belong"]


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def _without_example(parser: argparse.ArgumentParser) -> list[str]:
    return [
        name
        for name, command in _commands(parser).items()
        if not re.search(rf"example:\n  {parser.prog} {name} ", command.format_help())
        and not re.search(rf"example:\n  {parser.prog} {name}$", command.format_help(), re.M)
    ]


def test_every_command_has_an_example_that_parses() -> None:
    parser = build_parser()
    assert not _without_example(parser)
    for name, command in _commands(parser).items():
        for line in re.findall(rf"^  echovlm ({name}.*)$", command.format_help(), re.M):
            words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", line)]
            assert parser.parse_args(words).run, line


def test_example_check_can_fail() -> None:
    parser = argparse.ArgumentParser(prog="echovlm")
    commands = parser.add_subparsers()
    commands.add_parser("bare")
    commands.add_parser("other", epilog="example:\n  echovlm bare x")
    assert _without_example(parser) == ["bare", "other"]
