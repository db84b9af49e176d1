"""Pages of the site that are not in docs/: README is the first one, the reference is made from the OpenAPI document."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from openapidocs.mk.v3 import OpenAPIV3DocumentationHandler

ROOT = Path(__file__).parents[2]
PAGES = {
    "index.md": "README.md",
    **{name: name for name in ("CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md", "CHANGELOG.md")},
}
_NOT_IN_THE_SITE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+(?:examples|mta_client)/[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, source in PAGES.items():
        text = (ROOT / source).read_text("utf-8").replace("](docs/", "](").replace("](README.md", "](index.md")
        files.append(File.generated(config, name, content=text))
    document = json.loads((ROOT / "docs/openapi.json").read_text("utf-8"))
    reference = OpenAPIV3DocumentationHandler(document, style="MKDOCS").write()
    files.append(File.generated(config, "reference.md", content=reference))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links lead to the pages above; what the site has not becomes text."""
    for name, source in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}").replace(f"](../../{source}", f"](../{name}")
    return _NOT_IN_THE_SITE.sub(r"\1", markdown)
