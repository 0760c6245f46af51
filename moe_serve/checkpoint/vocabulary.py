"""The tokenizer beside a checkpoint's weights, as ``tokenizer.json`` has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from moe_serve.files import read_json, write_atomic

_FILE: Final = "tokenizer.json"
_SETTINGS: Final = "tokenizer_config.json"
_CLASS: Final = "tokenizer_class"
_AS_IT_IS: Final = "PreTrainedTokenizerFast"
"""The class that takes ``tokenizer.json`` whole."""
_PROBE: Final = (
    "The  cat's 1234 words,\n\n\tna\u00efve fa\u00e7ade \u2013 \u65e5\u672c\u8a9e "
    "\U0001f642 if (x) {y+=1;}"
)
"""Spaces, letters, digits and signs that a tokenizer may split by."""


def load_tokenizer(folder: Path) -> Any:
    """What ``tokenizer.json`` describes; without it, what transformers makes of the other files.

    A class that ``tokenizer_config.json`` names may split texts in its own way and take no more
    than the vocabulary from the file: LlamaTokenizerFast, which DeepSeek-MoE names, loses every
    space of a byte-level vocabulary.

    Raises:
        Exception: of any kind, where the files do not suffice.
    """
    from transformers import PreTrainedTokenizerFast

    if (folder / _FILE).exists():
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    return _by_class(folder)


def name_class(folder: Path) -> bool:
    """Have servers split texts as ``tokenizer.json`` does; say whether that took a change.

    The settings keep all but the name of the class, which is replaced only where its tokens are
    others.
    """
    settings = folder / _SETTINGS
    if not (folder / _FILE).exists() or not settings.exists():
        return False
    try:
        if _ids(_by_class(folder)) == _ids(load_tokenizer(folder)):
            return False
    except Exception:  # noqa: BLE001 - files that transformers can't read are passed on as they are
        return False
    changed = read_json(settings) | {_CLASS: _AS_IT_IS}
    # Not sorted: the order of added tokens may mean something to whoever reads them.
    write_atomic(settings, (json.dumps(changed, ensure_ascii=False, indent=2) + "\n").encode())
    return True


def _by_class(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _ids(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
