"""mkdocs' hooks: guides that lie beside what they describe are pages too, and a link that leaves
docs/ leads to the file in the repository. A file that is not there stays mkdocs' warning."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
GUIDES = {"configs/README.md": "configs.md", "launch/README.md": "launch.md"}
_SOURCES = {page: path for path, page in GUIDES.items()}
_LINK = re.compile(r"\]\(([^):#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for path, page in GUIDES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    source = _SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def lead(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        if path in GUIDES:
            path = GUIDES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif (ROOT / path).exists():
            path = f"{config.extra['repository']}/blob/main/{path}"
        else:
            return link[0]
        return f"]({path}{link[2] or ''})"

    return _LINK.sub(lead, markdown)
