"""Sphinx: pip install -e ".[docs]" && sphinx-build -W docs docs/_build."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import speechbrain_stablequant  # noqa: E402

project = "speechbrain_stablequant"
author = "The speechbrain_stablequant developers"
copyright = f"2026, {author}"
version = release = speechbrain_stablequant.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
add_module_names = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": False}

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"StableQuant {version}"
html_show_sphinx = False


def notebook(path):
    """A notebook's cells as Markdown."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            text = f"```python\n{text}\n```"
        shown = "".join("".join(x["text"]) for x in cell.get("outputs", []))
        parts += [text, *([f"```text\n{shown}```"] if shown else [])]
    return "\n\n".join(parts)


def read(app, name, source):
    """Puts the texts of README and notebook into their pages, and names pages
    of the repository that are not built."""
    text = source[0]
    if name == "tutorial":
        text = notebook(ROOT / "docs" / "tutorial.ipynb")
    if name == "start":
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        text = text.replace(f"# {project}\n", "# Start\n", 1)
        text = re.sub(r"\]\((?!https?:|#)", "](../", text)
        text = text.replace("](../docs/", "](")
    text = text.replace("](../README.md", "](start.md")
    outside = r"\[([^]]+)\]\((?:\.\./)+([^)#]+\.md)(?:#[^)]*)?\)"
    source[0] = re.sub(outside, r"\1 (`\2`)", text)


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", read)
