"""The documentation builds, its commands run or say why not, its messages and figures are ours."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from echovlm_jax.cli import build_parser
from echovlm_jax.train.config_file import load_config
from tests.pages import ROOT, Block, blocks, commands, words

FIRST = ROOT / "docs" / "index.md"  # makes the files that the others use
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "configs" / "README.md"]
# Their commands take more than ten seconds together.
LONG = {"README.md"} | {
    f"docs/{name}.md" for name in ("convert", "evaluate", "experts", "fine_tune", "mesh", "serve")
}
LANGUAGES = {"bash", "python", "json"}


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _runs(page: Path) -> bool:
    return any(not b.reason and b.language != "json" for b in blocks(page.read_text("utf-8")))


RUN = [
    pytest.param(page, id=_name(page), marks=[pytest.mark.slow] * (_name(page) in LONG))
    for page in PAGES
    if page != FIRST and _runs(page)
]


def _run(page: Path, folder: Path) -> None:
    """A page's commands, in a process of its own with one device, as on a laptop."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_COMPILATION_CACHE_DIR": str(folder / ".programs"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.pages", str(page)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a reader has after the first page."""
    folder = tmp_path_factory.mktemp("begun")
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    _run(FIRST, folder)
    return folder


@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_run_in_order(page: Path, begun: Path, tmp_path: Path) -> None:
    if "echovlm plan" in page.read_text("utf-8"):
        pytest.importorskip("libtpu")
    folder = tmp_path / "work"
    shutil.copytree(begun, folder, symlinks=True)
    _run(page, folder)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_block_is_of_a_kind_that_is_read(page: Path) -> None:
    text = page.read_text("utf-8")
    found = blocks(text)
    assert len(re.findall(r"^ *(?:```|~~~)", text, re.M)) == 2 * len(found)
    assert {block.language for block in found} <= LANGUAGES
    assert set(map(_name, PAGES)) >= LONG
    assert text.count("<!-- not run") == sum(block.reason is not None for block in found)


def _parsed(command: list[str]) -> None:
    """Fails where a command has options, keys, files, extras or targets that there aren't."""
    if command[0] == "echovlm":
        args = build_parser().parse_args(command[1:])
        config = getattr(args, "config", None)
        if config is not None and hasattr(args, "overrides"):
            load_config(ROOT / config, args.overrides)
    for word in command:
        if re.match(r"(configs|launch|notebooks|tests)/", word):
            assert (ROOT / word).exists(), word
        if extras := re.fullmatch(r"(?:\.|echovlm-jax)\[(.+)\]", word):
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert set(extras[1].split(",")) <= project["optional-dependencies"].keys(), word
    if command[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(command[1:2]) <= set(targets), command


def _imported(block: Block) -> None:
    """Fails where a block imports what isn't there."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(
                    f"{node.module}.{name.name}"
                )


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_parses(page: Path) -> None:
    """Also those that are not run."""
    variables: dict[str, str] = {}
    for block in blocks(page.read_text("utf-8")):
        if block.language == "python":
            _imported(block)
        if block.language != "bash":
            continue
        for line, command in commands(block):
            asked = words(command, variables)
            while asked:  # `a && b` are two
                end = asked.index("&&") if "&&" in asked else len(asked)
                try:
                    _parsed(asked[:end])
                except (SystemExit, ValueError) as error:
                    pytest.fail(f"{_name(page)}:{line}: {command}: {error}")
                asked = asked[end + 1 :]


def test_what_can_not_be_parsed_is_found() -> None:
    text = '<!-- not run: no -->\n```bash\nA="--no-such 1"\necho 1  # b\\c\necho \\\n  2\n```\n'
    (block,) = blocks(f"x\n{text}")
    assert (block.line, block.reason) == (4, "no")
    assert [line for line, _ in commands(block)] == [4, 5, 6]
    assert blocks("<!-- not run: no -->\n\n```bash\na\n```\n")[0].reason is None
    variables: dict[str, str] = {}
    assert words('A="--no-such 1"', variables) == [] and words("b $A", variables)[1] == "--no-such"
    for command in (
        "echovlm convert a",
        "echovlm generate a --prompt b --no-such 1",
        "echovlm train --config configs/phantom.py --workdir d --config.mesh.no=1",
        "echovlm train --config configs/no.py --workdir d",
        "launch/no.sh",
        "pip install '.[no]'",
        "make no",
    ):
        with pytest.raises((SystemExit, ValueError, AssertionError)):
            _parsed(words(command, {}))


def _texts(node: ast.AST) -> Iterator[str]:
    """The texts of a module, … in place of what is filled in."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(
            str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from _texts(child)


def _messages(page: str) -> list[str]:
    """The messages that begin an entry of the page on trouble."""
    entries = re.finditer(r"^- (?P<mark>`+)(?P<message>.+?)(?P=mark)", page, re.M | re.S)
    return [" ".join(entry["message"].split()) for entry in entries]


def test_every_message_of_the_page_on_trouble_is_one_of_ours() -> None:
    files = sorted((ROOT / "echovlm_jax").rglob("*.py"))
    ours = {text for file in files for text in _texts(ast.parse(file.read_text("utf-8")))}
    messages = _messages((ROOT / "docs" / "trouble.md").read_text("utf-8"))
    assert len(messages) > 25

    def said(message: str) -> bool:
        shape = ".*".join(map(re.escape, message.split("…")))
        return any(re.fullmatch(shape, text, re.S) for text in ours)

    assert not [message for message in messages if not said(message)]
    assert not said("…: no weights; looked in …") and not said("no weights; looked for …")


def test_the_page_on_meshes_has_the_figures_that_were_measured() -> None:
    def rows(page: str) -> list[str]:
        lines = (ROOT / "docs" / page).read_text("utf-8").splitlines()
        return [line for line in lines if line.startswith("| `") and re.search(r"\d %", line)]

    shown = rows("mesh.md")
    assert len(shown) >= 10 and set(shown) <= set(rows("measured.md"))


def test_docstrings_describe_parameters_that_there_are() -> None:
    """mkdocstrings does not take `a, b: …` for two."""
    described = 0
    for file in sorted((ROOT / "echovlm_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            entries = re.search(r"^Args:\n((?:  .*\n?|\n)+)", ast.get_docstring(node) or "", re.M)
            for line in re.findall(r"^  (\S[^:\n]*):", entries[1] if entries else "", re.M):
                names = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
                assert {name.lstrip("*") for name in line.split(", ")} <= names, (file, line)
                described += 1
    assert described > 500


def test_the_links_of_the_readme_lead_somewhere() -> None:
    """The site's pages are checked where they are built; this is none of them."""
    found = re.findall(r"\]\((?!https:)([^)#]+)(?:#([^)]+))?\)", PAGES[0].read_text("utf-8"))
    assert len(found) > 10
    for path, anchor in found:
        text = (ROOT / path).read_text("utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.M)
        slugs = {re.sub(r"[^\w]+", "-", heading.lower()).strip("-") for heading in headings}
        assert not anchor or anchor in slugs, (path, anchor)


needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="pip install 'echovlm-jax[docs]'",
)


def _build(tree: Path, site: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=tree,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@needs_mkdocs
def test_it_builds_without_warnings_to_pages_that_need_no_network(tmp_path: Path) -> None:
    built = _build(ROOT, tmp_path / "site")
    assert built.returncode == 0, built.stdout
    pages = [page.read_text("utf-8") for page in (tmp_path / "site").glob("*.html")]
    assert len(pages) > 15
    reference = (tmp_path / "site" / "api.html").read_text("utf-8")
    assert "echovlm_jax.load.load_model" in reference and "control_tokens" in reference
    for text in pages:  # links may lead elsewhere; nothing is fetched from there
        assert not re.search(r"<(script|img|link|iframe|source)\b[^>]*(src|href)=\"?https?:", text)
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", sheet.read_text("utf-8"))


@needs_mkdocs
def test_what_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.name != "docs" and not path.name.startswith("."):
            (tree / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", tree / "docs")
    with (tree / "docs" / "serve.md").open("a") as page:
        page.write("\n[a](no_page.md) [b](mesh.md#no-heading) [c](../launch/no_file.py)\n")
    (tree / "docs" / "unlisted.md").write_text("# In no list\n")
    built = _build(tree, tmp_path / "site")
    assert built.returncode != 0
    for name in ("no_page.md", "#no-heading", "no_file.py", "unlisted.md"):
        assert name in built.stdout, name


def test_links_lead_to_the_repository_of_the_notebooks() -> None:
    pair = (ROOT / "notebooks" / "pair.py").read_text("utf-8")
    (name,) = re.findall(r'^REPOSITORY = "(.+)"$', pair, re.M)
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert f"repository: https://github.com/{name}\n" in config
