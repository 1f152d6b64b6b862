"""The commands that stand in the documents: which there are, and what they need that a bare machine lacks."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster/kuberay/README.md"]
RECORDS = ("RESULTS.md", "LOG.md")  # what was once run, with commit and machine
_BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>[^>]+) -->\n)?^```(?P<language>[a-z]*)\n(?P<text>.*?)^```$", re.M | re.S
)
_JOB = re.compile(r"python -m (jobs\.[a-z_]+)([^`|;)\n]*)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document: what it needs ("": nothing but the installation), and its text.

    lines: of the text, continued ones joined, comments taken off.
    """

    document: Path
    needs: str
    language: str
    text: str

    @property
    def lines(self) -> tuple[str, ...]:
        lines = (re.sub(r"\s+#.*", "", line).strip() for line in re.sub(r"\\\n\s*", "", self.text).splitlines())
        return tuple(line for line in lines if line)

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}-{self.lines[0][:30]}"


def blocks(*languages: str) -> list[Block]:
    """Return the blocks in these languages of all documents but the records; a block without one holds commands."""
    return [
        Block(path, match["needs"] or "", match["language"], match["text"])
        for path in DOCUMENTS
        if path.name not in RECORDS
        for match in _BLOCK.finditer(path.read_text())
        if match["language"] in languages
    ]


def job_commands(text: str) -> list[tuple[str, str]]:
    """Return (job, its arguments) of every command in a text, continued lines joined."""
    return [(match[1], match[2]) for match in _JOB.finditer(re.sub(r"\\\n\s*", "", text))]


def inline_commands(path: Path) -> list[tuple[str, str]]:
    """Return (job, its arguments) of the commands that stand between backticks within a document's sentences."""
    spans = re.findall(r"`([^`]+)`", _BLOCK.sub("", path.read_text()))
    return [command for span in spans for command in job_commands(" ".join(span.split()))]
