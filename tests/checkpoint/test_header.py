"""A safetensors file whose header lies: which lie it is."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from moe_serve.checkpoint.header import read_header
from moe_serve.errors import CheckpointError, IncompleteCheckpoint


def file_of(path: Path, header: Any, data: int) -> Path:
    """A file with this header and so many bytes after it."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def entry(begin: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> Any:
    """Of one tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_tensors_are_listed_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    """Not of their names; what is said about the file itself is no tensor."""
    header = {"__metadata__": {"format": "pt"}, "a": entry(8, 16), "b": entry(0, 8)}
    found = read_header(file_of(tmp_path / "w", header, 16))
    assert [(t.name, t.size) for t in found] == [("b", 8), ("a", 8)]
    assert found[1].start - found[0].start == 8


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ([1], 0, "its header is not a JSON object"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensor 'b' overlaps its neighbour"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "tensor 'b' overlaps .* or leaves a gap"),
        ({"a": entry(0, 8)}, 12, r"its header describes \d+ bytes, the file has \d+"),
        ({"a": entry(0, 9)}, 9, "tensor 'a' has an impossible header entry"),
        ({"a": entry(0, 8, dtype="F33")}, 8, "impossible header entry"),
        ({"a": entry(0, 8, shape=(-1, -2))}, 8, "impossible header entry"),
        ({"a": entry(-8, 0)}, 8, "impossible header entry"),
        ({"a": {"dtype": "F32"}}, 8, "impossible header entry"),
    ],
)
def test_each_lie_has_its_words(header: Any, data: int, words: str, tmp_path: Path) -> None:
    """And all say what to do."""
    with pytest.raises(CheckpointError, match=rf"w: .*{words}.*; fetch this file again"):
        read_header(file_of(tmp_path / "w", header, data))


@pytest.mark.parametrize("dtype", ["U32", "U16", "F8_E8M0", "F4"])
def test_an_element_type_of_other_formats_is_no_damage(dtype: str, tmp_path: Path) -> None:
    """Fetching it again would change nothing; the formats that are read are named."""
    words = rf"w: tensor 'a': element type {dtype} is not read here; start from the BF16 .* AWQ$"
    with pytest.raises(CheckpointError, match=words):
        read_header(file_of(tmp_path / "w", {"a": entry(0, 8, dtype=dtype)}, 8))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"1234567", "holds 7 bytes, too few for a header"),
        (struct.pack("<Q", 2**40) + b"{}", f"its header would be {2**40} bytes, the file is 10"),
        (struct.pack("<Q", 2) + b"\xff\xff", "is not valid JSON"),
    ],
)
def test_what_is_no_such_file_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    """Before anything as long as it claims is read."""
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_header(tmp_path / "w")
    with pytest.raises(IncompleteCheckpoint, match="does not exist"):
        read_header(tmp_path / "none")
