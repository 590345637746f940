"""A hook of MkDocs: files of the repository that pages link to, outside of ``docs``, become pages of the site as well."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?:\.\./)+((?:src|tools|examples|CHANGELOG|README|LICENSE)[^)#]*)(#[^)]*)?\)")
PICTURE = re.compile(r"!\[([^\]]*)\]\((?!https?:)[^)]*\)")  # those of other folders are left out


def on_files(files: Any, config: Any) -> Any:
    for name in sorted({path for page in Path(config.docs_dir).rglob("*.md") for path in _linked(page.read_text())}):
        files.append(File.generated(config, f"files/{name}" + ("" if name.endswith(".md") else ".md"), content=_page(name)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    depth = page.file.src_uri.count("/")
    return LINK.sub(
        lambda link: f"]({'../' * depth}files/{link[1]}{'' if link[1].endswith('.md') else '.md'}{link[2] or ''})", markdown
    )


def _linked(markdown: str) -> set[str]:
    return {found[1] for found in LINK.finditer(markdown)}


def _page(name: str) -> str:
    text = (ROOT / name).read_text()
    if not name.endswith(".md"):
        return f"# {name}\n\n```{'python' if name.endswith('.py') else 'text'}\n{text}\n```\n"
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", PICTURE.sub("", text))  # their links lead elsewhere
