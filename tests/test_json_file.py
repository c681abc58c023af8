"""JSON of others: an object, or one error that names the file and the reason."""

import os

import pytest

from parallel_clip.errors import InputError
from parallel_clip.json_file import parse_json_object, read_json_object


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, {"b": "é"}], "c": null}', "utf-8")
    assert read_json_object(tmp_path / "a.json") == {"a": [1, {"b": "é"}], "c": None}
    assert parse_json_object(nested(100), "x")["a"]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1]", "it holds a list, not an object"),
        (b"null", "it holds a NoneType"),
        (b'{"a": "\xe9"}', "'utf-8' codec"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "Exceeds the limit"),
        (nested(101), "it is nested more than 100 deep"),
        (nested(100_000), "it is nested more than 100 deep"),
        (b"[" * 100_000, "it is nested more than 100 deep"),
    ],
    ids=range(9),
)
def test_what_is_no_object_is_named_with_its_reason(tmp_path, content, reason):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=f"a.json cannot be read as JSON: {reason}"):
        read_json_object(tmp_path / "a.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "folder.json").mkdir()
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for name in ("folder.json", "nowhere", "loop", "x" * 300):
        with pytest.raises(InputError, match=f"{name} cannot be read: "):
            read_json_object(tmp_path / name)
