"""Imported by Transformers 4, called by none of the models here."""

from __future__ import annotations

from typing import Any


def apply_rotary_emb(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("this stand-in has no rotary embedding")
