"""Filling in the templates of pages."""

import base64
import hashlib
from pathlib import Path

import jinja2

from jobs.core.text import format_score

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, content: dict, script_name: str = "report.js") -> str:
    """Fill in a template; the page's script is allowed to run by its digest, and no other is."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["score"] = format_score
    script = (TEMPLATES / script_name).read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(content, script=script, script_digest=digest)
