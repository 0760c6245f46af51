"""Texts become the tokens that ``tokenizer.json`` gives them, here and when served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from moe_serve.calibration.sequences import tokenizer
from moe_serve.errors import CalibrationError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import change_config, make_model

TEXT = "two  words, na\u00efve\n"
YARN = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}


def declare(model: Path, **settings: Any) -> dict[str, Any]:
    """Change a model's ``tokenizer_config.json``; ``None`` removes a key."""
    file = model / "tokenizer_config.json"
    changed = json.loads(file.read_text()) | settings
    kept = {key: value for key, value in changed.items() if value is not None}
    file.write_text(json.dumps(kept))
    return kept


def begin_with(model: Path, token: str) -> None:
    """What is served begins with this token, as ``tokenizer.json`` has it."""
    file = str(model / "tokenizer.json")
    found = Tokenizer.from_file(file)
    found.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, found.token_to_id(token))]
    )
    found.save(file)


def ids(model: Path) -> list[int]:
    """What the file makes of the text: a token for each byte."""
    found: list[int] = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids
    assert len(found) == len(TEXT.encode())
    return found


def halved(model: Path, output: Path) -> Path:
    """From the weights alone."""
    prune(
        PruneRequest(
            model=model,
            output=output,
            texts=TextOptions(paths=()),
            selection=Selection(keep=0.5),
        ),
        Silent(),
    )
    return output


def test_a_declared_class_does_not_lose_spaces(tmp_path: Path) -> None:
    """DeepSeek-MoE has byte-level tokens and names a class that splits at other signs."""
    model = make_model(tmp_path / "m", "deepseek")
    expected = ids(model)
    begin_with(model, "<|endoftext|>")
    bos = {"add_bos_token": True, "bos_token": "<|endoftext|>"}
    told = declare(model, tokenizer_class="LlamaTokenizerFast", chat_template="{{ m }}", **bos)
    encode, end = tokenizer(model)
    assert end == 0
    assert encode(TEXT) == expected
    before = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    assert len(before(TEXT)["input_ids"]) < len(expected)

    output = halved(model, tmp_path / "out")
    assert json.loads((output / "tokenizer_config.json").read_text()) == told | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    served = AutoTokenizer.from_pretrained(str(output))
    assert served(TEXT)["input_ids"] == [0, *expected]
    assert served("")["input_ids"] == before("")["input_ids"] == [0]


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "PreTrainedTokenizerFast", None])
def test_settings_that_say_the_same_go_over_as_they_are(name: str | None, tmp_path: Path) -> None:
    """Byte for byte."""
    model = make_model(tmp_path / "m", "qwen3_moe")
    declare(model, tokenizer_class=name)
    before = (model / "tokenizer_config.json").read_bytes()
    assert (halved(model, tmp_path / "out") / "tokenizer_config.json").read_bytes() == before


def test_a_config_that_transformers_cannot_read(tmp_path: Path) -> None:
    """Kimi K2's: with ``tokenizer.json`` it does not matter, without it is said what to copy."""
    model = make_model(tmp_path / "m", "kimi_k2")
    change_config(model, rope_scaling=YARN, rope_parameters=None)
    encode, _ = tokenizer(model)
    assert encode(TEXT) == ids(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(CalibrationError, match=r"no usable tokenizer \(.+\); copy tokenizer\.json"):
        tokenizer(model)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "none"}}'])
def test_a_damaged_file_is_said_to_be_no_tokenizer(content: str, tmp_path: Path) -> None:
    """Whatever its reader raises."""
    model = make_model(tmp_path / "m", "qwen3_moe")
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(
        CalibrationError, match=r"m: no usable tokenizer \(.+\); copy tokenizer\.json"
    ):
        tokenizer(model)
    halved(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == content
