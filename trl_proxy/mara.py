"""The old module of [`modeling.mara.load_mara_actor`]."""

from .modeling.mara import load_mara_actor

__all__ = ["load_mara_actor"]
