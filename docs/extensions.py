"""Help texts of configurations as documentation: an extension of griffe, which reads the code for the site."""

import ast
import re

import griffe

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
