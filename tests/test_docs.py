from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "agent/README.md")),
    ROOT / "weights" / "micro" / "MODEL_CARD.md",
    *sorted(DOCS.glob("*.md")),
]
VARIABLE = r"\b(?:SAM2|CVAT_FUNCTIONS)_[A-Z_]+\b"
OPTION = r"--[a-z][a-z-]*"
# Files that read environment variables.
READERS = ["settings.py", "compose.yaml", "agent/compose.yaml", "cvat_ui/compose.cvat-ui.yml"]
LOGIN_OPTIONS = {"--auth", "--profile", "--org", "--insecure"}  # cvat-sdk's


def name_of(page: Path) -> str:
    """Return a page's path within the repository."""
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(page: Path, heading: str) -> str:
    """Return the text of one section of a page, up to the next heading of its level."""
    (text,) = re.findall(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page.read_text(), re.MULTILINE | re.DOTALL
    )
    assert isinstance(text, str)
    return text


def is_source_folder(path: Path) -> bool:
    """Tell whether a path is a folder of the repository, not one of results or caches."""
    if not path.is_dir() or path.name.startswith(".") or path.name in {"out", "shared"}:
        return False
    return any(file.is_file() and file.suffix != ".pyc" for file in path.rglob("*"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """To files, and to headings within them."""
    for file, anchor in re.findall(r"\]\((?!https://)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    """A page without a link is not found."""
    linked = set(re.findall(r"\]\((docs/\w+\.md)", (ROOT / "README.md").read_text()))

    assert linked == {name_of(page) for page in DOCS.glob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_name_variables_and_options_that_exist(page: Path) -> None:
    """What is renamed in the code must be renamed in the docs."""
    text = page.read_text()
    known = set(re.findall(VARIABLE, "".join((ROOT / name).read_text() for name in READERS)))
    script = (ROOT / "deploy" / "deploy_lib.sh").read_text()

    for variable in re.findall(VARIABLE, text):
        is_prefix = variable.endswith("_")  # written as SAM2_INTERACTOR_*
        assert variable in known or (is_prefix and any(v.startswith(variable) for v in known))
    for command in re.findall(r"deploy_[cg]pu\.sh ([^`\n#]*)", text):
        for option in re.findall(OPTION, command):
            assert option in script, option


def test_settings_are_documented() -> None:
    """Each variable that `settings.py` reads has a row in the page, and no other variable has."""
    read = re.findall(rf'"({VARIABLE})"', (ROOT / "settings.py").read_text())
    rows = re.findall(r"^\| (`.*?`) \|", (DOCS / "settings.md").read_text(), flags=re.MULTILINE)

    assert sorted(set(read)) == sorted(re.findall(VARIABLE, " ".join(rows)))


@pytest.mark.parametrize("script", ["track_video.py", "track_task.py"])
def test_options_of_the_command_lines_are_documented(script: str) -> None:
    """Each option has a row in the page, and no other option is mentioned."""
    options = set(re.findall(rf'"({OPTION})"', (ROOT / script).read_text())) - {"--server"}
    text = section(DOCS / "command_lines.md", script)
    rows = " ".join(re.findall(r"^\| (`--.*?`) \|", text, flags=re.MULTILINE))

    assert options == set(re.findall(OPTION, rows))
    assert set(re.findall(OPTION, text)) <= options | LOGIN_OPTIONS | {"--server"}


def test_exit_codes_of_track_task_are_documented() -> None:
    """Scripts rely on them."""
    source = (ROOT / "cvat_task" / "connection.py").read_text()
    codes = set(re.findall(r"exit_code(?:: ClassVar\[int\])? = (\d+)", source))
    text = section(DOCS / "command_lines.md", "track_task.py")

    assert len(codes) > 1
    assert codes | {"0", "2", "130"} == set(re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE))


def test_layout_names_every_module_and_folder() -> None:
    """Of the root."""
    text = section(DOCS / "architecture.md", "Layout")
    modules = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{path.name}/" for path in ROOT.iterdir() if is_source_folder(path)}

    assert len(modules) > 10
    assert len(folders) > 10
    assert {name for name in modules | folders if f"\n{name} " not in text} == set()


def test_troubleshooting_gives_sign_cause_and_fix_of_ten_failures() -> None:
    """Of those that users of such functions report."""
    entries = re.split(
        r"^## \d+\. ", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE
    )[1:]

    assert len(entries) == 10
    for entry in entries:
        assert re.findall(r"^- \*\*(\w+)\*\*: ", entry, flags=re.MULTILINE) == [
            "Sign",
            "Cause",
            "Fix",
        ]
