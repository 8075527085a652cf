"""What is asked of a tokenizer besides texts: whether two are one, and which tokens are no content."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_hash(tokenizer: Any) -> str | None:
    """SHA-256 over the vocabulary (token, id) in id order; ``None`` where there is no tokenizer."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None:
        return None
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def no_content(tokenizer: Any) -> frozenset[int]:
    """Ids that never enter a text's mean: the beginning of text, an attention sink; empty without a tokenizer."""
    return frozenset(i for i in (getattr(tokenizer, "bos_token_id", None),) if i is not None)


def padding(tokenizer: Any) -> int:
    """An id to pad with; masked wherever it is used."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
