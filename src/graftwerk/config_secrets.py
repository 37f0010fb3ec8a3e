"""Secrets in a run file, such as a token in the URL of a source: kept out of run folders, in this user's cache."""

from __future__ import annotations

from typing import Any

from graftwerk.models.cache import recall, remember
from graftwerk.sanitize import REDACTED, redact, redacted, strings_in

SECRETS = "secrets"
"""The file of the cache that holds what run files must not; readable to its owner alone."""


def hide_secrets(tree: Any) -> Any:
    """Return the content of a run file with placeholders for secrets, which are stored in this user's cache."""
    for text in strings_in(tree):
        if redact(text) != text:
            remember(SECRETS, redact(text), text)
    return redacted(tree)


def restore_secrets(tree: Any) -> Any:
    """Return the content of a run file with the secrets that `hide_secrets` replaced, if this user's cache has them."""
    if isinstance(tree, dict):
        return {key: restore_secrets(inner) for key, inner in tree.items()}
    if isinstance(tree, list):
        return [restore_secrets(inner) for inner in tree]
    known = recall(SECRETS, tree) if isinstance(tree, str) and REDACTED in tree else None
    return known if isinstance(known, str) else tree
