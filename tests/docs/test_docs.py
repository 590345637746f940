"""The documentation keeps up with the code: links, the index, and every option of the command line."""

import re
from pathlib import Path

import pytest
import typer

from sgid_transforms.cli import output as codes
from sgid_transforms.cli.app import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS = typer.main.get_command(app).commands


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page):
    """The fragments that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_into_the_repository_leads_somewhere(page):
    missing = []
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)]+)\)", without_code(page.read_text())):
        name, _, fragment = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not there.exists() or (fragment and fragment not in anchors(there)):
            missing.append(target)
    assert not missing


def test_the_index_names_every_page():
    named = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert named == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


def sections():
    """Name of a command -> what docs/cli.md says of it."""
    found = re.split(r"^## sgid (\w+)$", (DOCS / "cli.md").read_text(), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def test_every_command_has_its_section_in_the_order_of_the_help():
    assert list(sections()) == list(COMMANDS)
    index = re.findall(r"^\| \[`sgid (\w+)`\]", (DOCS / "cli.md").read_text(), re.MULTILINE)
    assert index == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented_and_no_other(command):
    rows = [line.split("|")[1] for line in sections()[command].splitlines() if line.startswith("| `-")]
    documented = set(re.findall(r"`(--?[a-z-]+)", " ".join(rows)))
    options = {name for param in COMMANDS[command].params for name in param.opts if name.startswith("-")}
    assert documented == options - {"--help", "-h"}


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_the_documented_ones(command):
    section = sections()[command]
    for param in COMMANDS[command].params:
        row = next((line for line in section.splitlines() if re.match(rf"\| .*`{param.opts[-1]}\b", line)), None)
        cells = row.split("|") if row is not None else []
        plain = param.default is None or isinstance(param.default, bool) or callable(param.default)
        if len(cells) == 5 and cells[2].strip() not in ("", "required", "as above") and "`, `--" not in cells[1] and not plain:
            assert cells[2].strip().strip("`") == str(param.default), param.name


def test_every_exit_code_is_documented():
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", (DOCS / "cli.md").read_text(), re.MULTILINE)}
    assert documented == {0, 2, codes.ERROR, codes.PARTIAL, codes.INTERRUPTED}


def test_the_quoted_error_messages_are_those_of_the_code():
    sources = (path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
    code = re.sub(r'"\n\s+f?"', "", "\n".join(sources))  # strings that go on in the next line
    section = (DOCS / "troubleshooting.md").read_text().partition("## Errors")[2].partition("\n## ")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(quoted) >= 8
    missing = [message for message in quoted for part in message.split("...") if part.strip() not in code]
    assert not missing
