"""docs/troubleshooting.md quotes what the toolkit really says, and names settings that there are."""

import re
from pathlib import Path

from toolkit.recipe.load import recipe_keys

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def said_by_the_toolkit() -> str:
    """All source text, with strings that continue in the next line joined and what is put into them taken out."""
    sources = [
        path.read_text(encoding="utf-8") for room in ("toolkit", "launch") for path in (ROOT / room).rglob("*.py")
    ]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    return re.sub(r"\{[^{}\n]*\}", "…", joined).replace('\\"', '"')


def test_every_quoted_message_is_one_of_ours():
    said = said_by_the_toolkit()
    quoted = [line.strip().removeprefix("> ") for line in TEXT.splitlines() if line.strip().startswith("> ")]
    reasons = re.findall(r"^\| `([^`]+)` \|", TEXT, re.MULTILINE)
    assert len(quoted) > 20 and len(reasons) > 3
    for message in quoted + reasons:
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert part in said, f"nothing says {part!r}"


def test_every_setting_is_a_key_of_recipes():
    known = set(recipe_keys())
    sections = {key.split(".")[0] for key in known} - {"ds"}
    named = re.findall(rf"\b((?:{'|'.join(sections)})(?:\.[a-z_]+)+)", TEXT)
    folders = {"run.dir"}
    unknown = {name for name in named if not any(key == name or key.startswith(f"{name}.") for key in known | folders)}
    assert named and not {name for name in unknown if not name.endswith((".py", ".md", ".html", ".csv"))}


def test_every_symptom_of_the_table_has_its_section():
    headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) == anchors
