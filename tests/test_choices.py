"""docs/choices.md and the code name the same differences from LoRI's code."""

import re

from test_structure import FILES, ROOT

MARK = re.compile(r"#\s*DEVIATION from LoRI: ([^;]*?);\s(?:# )?\s*LoRI", re.S)


def marked() -> list[tuple[str, str]]:
    """(file, what is different here) of every comment; one that has no "; LoRI ..." has no end and is not one."""
    found = []
    for path in FILES.values():
        name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        differences = [re.sub(r"\s*\n\s*#\s*", " ", each) for each in MARK.findall(text)]
        assert len(differences) == len(re.findall(r"# DEVIATION", text)), f"{name}: a comment without '; LoRI ...'"
        found += [(name, difference) for difference in differences]
    return found


def listed() -> list[tuple[str, str]]:
    """(file, what is different here) of every line of the page's section on LoRI."""
    page = (ROOT / "docs" / "choices.md").read_text(encoding="utf-8")
    section = re.sub(r"\n  +", " ", re.search(r"\n## LoRI\n(.*?)\n## ", page, re.S)[1])
    lines = [line for line in section.splitlines() if line.startswith("- ")]
    return [re.fullmatch(r"- `(\S+)`: (.*?); LoRI.*\.", line).groups() for line in lines]


def test_every_deviation_in_the_code_is_on_the_page_and_every_line_of_the_page_is_in_the_code():
    assert sorted(listed()) == sorted(marked())
    assert len(listed()) > 10
