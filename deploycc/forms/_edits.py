"""Structural edits as JSON: how a module's architecture is made anew out of what its source makes, without pickle.

An edit is a mapping with a "kind"; `_edit_KIND.py` holds `apply(module, edit) -> module`. "resize" is the general one: the classes in
the tree stay, some of their plain attributes and tensor shapes change (pruned channels, another head).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from deploycc.errors import StoreError

if TYPE_CHECKING:
    from torch import nn

Edit = Mapping[str, Any]


def apply_edits(module: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """`module`, which may be changed in place (give a copy), after all `edits`. Its new weights are undefined. Raises StoreError."""
    for edit in edits:
        kind = str(edit.get("kind"))
        try:
            plugin = importlib.import_module(f"deploycc.forms._edit_{kind}")
        except ModuleNotFoundError:
            raise StoreError(f"nothing applies an edit of the kind '{kind}'", fix="use the deploycc version that wrote it") from None
        module = plugin.apply(module, edit)
    return module


def resize_edit(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """The edit of kind "resize" that leads from `before` to `after`. Raises ValueError when their trees differ in more than that."""
    from deploycc.forms._edit_resize import between

    return between(before, after)
