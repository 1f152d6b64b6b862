"""The commands that stand in README and docs/: which there are, and what they need that a bare machine lacks."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECORDS = ("RESULTS.md", "LOG.md")  # what was once run, with commit and machine
_BLOCK = re.compile(r"(?:^<!-- needs: (?P<needs>[^>]+) -->\n)?^```[a-z]*\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document: what it needs ("": nothing but the installation), and its lines."""

    document: str
    needs: str
    lines: tuple[str, ...]

    @property
    def is_shell(self) -> bool:
        return any(re.match(r"(\w+=\$\()?(make|python|ray|pip|\.venv/bin/\w+) ", line) for line in self.lines)


def blocks() -> list[Block]:
    """Return the blocks of commands in all documents but the records, continued lines joined, comments taken off."""
    found = []
    for path in DOCUMENTS:
        if path.name in RECORDS:
            continue
        for match in _BLOCK.finditer(path.read_text()):
            text = re.sub(r"\\\n\s*", "", match["text"])
            lines = (re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines())
            found.append(Block(path.name, match["needs"] or "", tuple(line for line in lines if line)))
    return [block for block in found if block.is_shell]
