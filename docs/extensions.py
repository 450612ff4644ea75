"""What the site needs beyond mkdocs: help texts of configurations as documentation, folders of records that can
be linked to. Used by `mkdocs.yml` twice, as a hook of mkdocs and as an extension of griffe, which reads the code."""

import ast
import re
from html import escape

import griffe
from mkdocs.structure.files import File, Files

# Cross-references in docstrings are TRL's, such as [`ProxyConfig`] or [`~trl.RLOOConfig`]. These pages have a target.
TARGETS = {"PPOConfig", "PPOTrainer", "ProxyConfig", "ProxyModelForCausalLM", "ProxyPPOConfig", "ProxyPPOTrainer"}


def _reference(match: re.Match) -> str:
    name = match[1].lstrip("~").rpartition(".")[2]
    return f"[`{name}`][trl_proxy.{name}]" if name in TARGETS else f"`{name}`"


class FieldHelp(griffe.Extension):
    """Reads `field(default=..., metadata={"help": ...})` as an attribute with a default and a docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"\[`([~\w.]+)`\]", _reference, obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs) -> None:
        value = attr.value
        if not isinstance(value, griffe.ExprCall) or str(value.function) != "field":
            return
        arguments = {x.name: x.value for x in value.arguments if isinstance(x, griffe.ExprKeyword)}
        if "metadata" in arguments:
            attr.docstring = griffe.Docstring(ast.literal_eval(str(arguments["metadata"]))["help"], parent=attr)
        factory = arguments.get("default_factory")
        attr.value = str(factory).removeprefix("lambda: ") if factory else arguments.get("default")


def on_files(files: Files, config) -> Files:
    """Gives every folder of records a page that lists its files."""
    folders: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.src_uri.rpartition("/")
        if name.endswith(".json"):
            folders.setdefault(folder, []).append(escape(name))
    for folder, names in folders.items():
        items = "".join(f'<li><a href="{name}">{name}</a></li>' for name in sorted(names))
        page = f"<!doctype html><meta charset=utf-8><ul>{items}</ul>\n"
        files.append(File.generated(config, f"{folder}/index.html", content=page))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Links to a folder become links to its list, where there is one; mkdocs checks the others."""

    def to_list(match: re.Match) -> str:
        return match[0] if files.get_file_from_path(f"{match[1]}/index.html") is None else f"]({match[1]}/index.html)"

    return re.sub(r"\]\(([\w./-]+?)/?\)", to_list, markdown)
