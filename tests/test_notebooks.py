"""The notebooks: made from their texts, alike where they begin, and run from top to bottom."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
TEXTS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))
NAMES = [text.stem for text in TEXTS]


@pytest.fixture(scope="module")
def pair() -> ModuleType:
    """notebooks/pair.py, which is no part of the package."""
    made = ModuleType("pair")
    made.__file__ = str(ROOT / "notebooks" / "pair.py")
    exec(compile(Path(made.__file__).read_text("utf-8"), made.__file__, "exec"), made.__dict__)
    return made


def _cells(text: Path) -> list[dict]:
    return json.loads(text.with_suffix(".ipynb").read_text("utf-8"))["cells"]


@pytest.mark.parametrize("text", TEXTS, ids=NAMES)
def test_a_notebook_is_what_its_text_makes(text: Path, pair: ModuleType) -> None:
    made = text.with_suffix(".ipynb").read_text("utf-8")
    assert made == pair.notebook(text), "run: python notebooks/pair.py"
    nbformat.validate(nbformat.reads(made, as_version=4))
    code = [cell for cell in _cells(text) if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_there_are_five_and_none_without_a_text() -> None:
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05"]
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("text", TEXTS, ids=NAMES)
def test_a_notebook_begins_and_ends_as_all_do(text: Path, pair: ModuleType) -> None:
    cells = ["".join(cell["source"]) for cell in _cells(text)]
    address = f"github/{pair.REPOSITORY}/blob/main/notebooks/{text.stem}.ipynb"
    assert address in cells[0] and "**You need**" in cells[0]
    assert cells[1] == "".join(_cells(TEXTS[0])[1]["source"])  # the one install cell
    assert "# @param" in cells[2] and "ECHOVLM_NOTEBOOK" in cells[2]
    assert "print(spent(began))" in cells[-1]
    for cell in cells:
        assert not re.search(r"^(def|class) ", cell, re.M), "logic belongs into the package"


def _run(text: Path, folder: Path) -> str:
    """What a notebook prints."""
    book = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    client = NotebookClient(
        book,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    outputs = [out for cell in book.cells for out in cell.get("outputs", ())]
    return "".join(out["text"] for out in outputs if out.output_type == "stream")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel computes on one device, as on a laptop, and finds the package here."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")


@pytest.mark.parametrize("text", TEXTS, ids=NAMES)
def test_it_runs_with_small_sizes(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: None
) -> None:
    monkeypatch.setenv("ECHOVLM_NOTEBOOK", "short")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert "GiB of memory" in _run(text, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS, ids=NAMES)
def test_it_runs_as_it_is(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: None
) -> None:
    monkeypatch.delenv("ECHOVLM_NOTEBOOK", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    printed = _run(text, tmp_path)
    assert "GiB of memory" in printed
    if text.stem.startswith("03"):  # the fine-tuned organ, beyond chance and beyond the interval
        low = re.search(r"thyroid: .*\((\d+) to \d+\) of", printed)
        difference = re.search(r"thyroid.*\n +difference \S+ \(([+-]\d+) to", printed)
        assert low and int(low[1]) > 20 and difference and int(difference[1]) > 0
