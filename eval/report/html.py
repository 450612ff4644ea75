"""Pages that are complete in themselves. They hold their own style and script, and nothing else runs or loads: a
content security policy names the hashes of both."""

import base64
import hashlib
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

SHARED = Path(__file__).parent / "page_template"


@cache
def _environment(folder: Path) -> Environment:
    loader = FileSystemLoader([folder, SHARED])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def _csp_hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def render(template: Path, *, images: bool = False, **values) -> str:
    """HTML of a template with its style and script, files of the same name that end in `.css` and `.js`.

    Args:
        images: whether it has images, as data in the page.
        values: of the template's variables; they are escaped.
    """
    style, script = (template.with_suffix(ending).read_text(encoding="utf-8") for ending in (".css", ".js"))
    return (
        _environment(template.parent)
        .get_template(template.name)
        .render(
            **values,
            style=style,
            script=script,
            policy=(
                f"default-src 'none'; {'img-src data:; ' if images else ''}base-uri 'none'; form-action 'none'; "
                f"style-src {_csp_hash(style)}; script-src {_csp_hash(script)}; "
                "require-trusted-types-for 'script'; trusted-types 'none'"
            ),
        )
    )
