import sys

import pytest

from parallel_clip.errors import InputError
from parallel_clip.evaluate.prompts import DEFAULT_TEMPLATES, fill, read_classes, read_templates


def test_our_templates_are_the_default():
    assert read_templates() == list(DEFAULT_TEMPLATES)
    assert all("{}" in template for template in DEFAULT_TEMPLATES)


def test_openai_is_the_eighty_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    templates = read_templates("openai")
    assert len(templates) == 80
    assert [fill(template, "cat") for template in templates] == [
        template("cat") for template in open_clip.OPENAI_IMAGENET_TEMPLATES
    ]


def test_openai_without_open_clip_says_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match="pip install open_clip_torch"):
        read_templates("openai")


def test_templates_of_a_file(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {} on {{a}} table\n  the {}, {} and {}\n\n")
    templates = read_templates(file)
    assert templates == ["a {} on {{a}} table", "the {}, {} and {}"]
    assert fill(templates[0], "{x}") == "a {x} on {{a}} table"
    assert fill(templates[1], "cat") == "the cat, cat and cat"


def test_template_without_a_place_for_the_name(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {}\na photo\n")
    with pytest.raises(InputError, match="line 2 of .*'a photo'"):
        read_templates(file)


@pytest.mark.parametrize("read", [read_templates, read_classes])
def test_missing_empty_or_binary_file(tmp_path, read):
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match="is empty"):
        read(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read(tmp_path / "binary.txt")


def test_classes(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_bytes(b"\xef\xbb\xbftabby cat\r\n  dog \r\nc\xc3\xa8pe\r\n\r\n")
    assert read_classes(file) == ["tabby cat", "dog", "cèpe"]


def test_classes_with_a_gap(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("cat\n\ndog\n")
    with pytest.raises(InputError, match="line 2 .* class 1"):
        read_classes(file)


def test_a_class_that_comes_twice_is_warned_of(tmp_path, caplog):
    file = tmp_path / "classes.txt"
    file.write_text("crane\ndog\ncrane\n")
    assert read_classes(file) == ["crane", "dog", "crane"]
    assert "lines 1 and 3" in caplog.text
