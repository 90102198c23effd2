"""Makes the notebooks (.ipynb) from their texts (.py): python notebooks/pair.py

The text is what is edited. A notebook is made from it, always the same bytes, and has no outputs.
"""

import json
import re
from pathlib import Path
from typing import Any

import jupytext

HERE = Path(__file__).parent
# Where the project is on GitHub: in the badges and the install cells. Set it before publishing.
REPOSITORY = "OWNER/echovlm-jax"


def texts() -> list[Path]:
    """The notebooks' texts, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def notebook(text: Path) -> str:
    """The content of the .ipynb that belongs to a text."""
    source = text.read_text("utf-8").replace("{REPOSITORY}", REPOSITORY)
    made: dict[str, Any] = jupytext.reads(source, fmt="py:percent")
    cells = []
    for number, cell in enumerate(made["cells"]):
        kept: dict[str, Any] = {
            "cell_type": cell["cell_type"],
            "id": f"cell-{number:02d}",
            "metadata": {},
            "source": cell["source"].splitlines(keepends=True),
        }
        if cell["cell_type"] == "code":
            kept |= {"execution_count": None, "outputs": []}
            title = re.match(r"# @title (.*)\n", cell["source"])
            if title:  # Colab folds it, and shows its form
                kept["metadata"] = {"cellView": "form"}
        cells.append(kept)
    whole = {
        "cells": cells,
        "metadata": {
            "colab": {"provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    for text in texts():
        text.with_suffix(".ipynb").write_text(notebook(text), "utf-8")
        print(text.with_suffix(".ipynb").name)
