import json
from collections import Counter
from functools import partial

import pytest
from webdataset.autodecode import basichandlers

from parallel_clip.data.samples.captions import CaptionRule, RandomBits
from parallel_clip.data.samples.transforms import sample_seed
from parallel_clip.data.storage.shards import BadSampleError, StoredSample


def stored(**files: bytes) -> StoredSample:
    return StoredSample("key", files)


def record(**values) -> StoredSample:
    return stored(json=json.dumps(values).encode())


def drawn(rule: CaptionRule, sample: StoredSample, count: int = 4000) -> Counter[str]:
    return Counter(draw_one(rule, sample, partial(sample_seed, 5, n)) for n in range(count))


def draw_one(rule: CaptionRule, sample: StoredSample, bits: RandomBits) -> str:
    (caption,) = rule.draw(sample, bits, 1)
    return caption


@pytest.mark.parametrize(
    "text, captions",
    [
        ("a dog", ["a dog"]),
        ("a dog\n", ["a dog"]),
        ("a dog\r\n  two dogs\n\n \n", ["a dog", "  two dogs"]),
        ("犬 🐶\u2028one caption\x0bstill", ["犬 🐶\u2028one caption\x0bstill"]),
    ],
)
def test_captions_are_the_lines_of_txt(text, captions):
    assert CaptionRule().captions_of(stored(txt=text.encode())) == captions


@pytest.mark.parametrize("text", ["a dog", "Menu\r\nSoup\n\n$12.99\n", " \x0ba\u2028b "])
def test_the_whole_text_is_what_webdataset_reads(text):
    sample = stored(txt=text.encode())
    whole = basichandlers("txt", sample.files["txt"])
    assert CaptionRule(lines=False).captions_of(sample) == [whole]
    assert drawn(CaptionRule(lines=False), sample, 20) == {whole: 20}


@pytest.mark.parametrize(
    "value, captions", [("a\nb", ["a\nb"]), (["a", " ", "b"], ["a", "b"]), (["a"], ["a"])]
)
def test_captions_of_json(value, captions):
    record = json.dumps({"caption": value, "other": 1}).encode()
    assert CaptionRule("caption").captions_of(stored(json=record, txt=b"not this")) == captions


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_json_in_every_encoding_that_webdataset_reads(encoding):
    data = json.dumps({"caption": "日本 café"}, ensure_ascii=False).encode(encoding)
    expected = basichandlers("json", data)["caption"]
    assert CaptionRule("caption").captions_of(stored(json=data)) == [expected] == ["日本 café"]


@pytest.mark.parametrize(
    "files, key, reason",
    [
        ({"jpg": b""}, None, "no .txt, only .jpg"),
        ({"txt": b""}, None, "caption is empty"),
        ({"txt": b" \n\t\n"}, None, "caption is empty"),
        ({"txt": b"caf\xe9"}, None, "not UTF-8"),
        ({"txt": b"a" * 70_000}, None, "70,000 bytes, at most 65,536"),
        ({"txt": b"a"}, "caption", "no .json, only .txt"),
        ({"json": b"{"}, "caption", "cannot be read"),
        ({"json": b'{"caption": "caf\xe9"}'}, "caption", "cannot be read: 'utf-8' codec"),
        ({"json": b" " * 2**20 + b"{}"}, "caption", "1,048,578 bytes, at most 1,048,576"),
        ({"json": b"[" * 100_000}, "caption", "cannot be read"),
        ({"json": b"[1]"}, "caption", "no text, or list of texts, at 'caption'"),
        ({"json": b'{"caption": 3}'}, "caption", "no text, or list of texts"),
        ({"json": b'{"caption": null}'}, "caption", "no text, or list of texts"),
        ({"json": b'{"caption": ["a", 3]}'}, "caption", "no text, or list of texts"),
        ({"json": b'{"caption": []}'}, "caption", "caption is empty"),
        ({"json": b'{"caption": "\\ud800"}'}, "caption", "half of a surrogate pair"),
        ({"json": b'{"caption": "%s"}' % (b"a" * 70_000)}, "caption", "a caption of 70,000"),
        ({"json": b'{"a": "", "c": "x"}'}, {"a": 1, "b": 2}, "a caption at none of 'a', 'b'"),
        ({"json": b'{"a": "x", "b": 3}'}, {"a": 1, "b": 2}, "list of texts, at 'b'"),
        ({"txt": b"a"}, {"a": 1, "b": 2}, "no .json"),
    ],
)
def test_bad_captions(files, key, reason):
    draw = partial(CaptionRule.draw, bits=lambda purpose: 0, count=2)
    for use in (CaptionRule.captions_of, draw, partial(CaptionRule.first, count=2)):
        with pytest.raises(BadSampleError, match=reason):
            use(CaptionRule(key), stored(**files))


def test_keys_are_drawn_by_their_weights():
    sample = record(caption="a", alt=["b", "c"], title="d")
    found = drawn(CaptionRule({"caption": 7, "alt": 2, "title": 1}), sample)
    expected = {"a": 2800, "b": 400, "c": 400, "d": 400}
    assert set(found) == set(expected)
    for caption, count in expected.items():
        deviation = (count * (1 - count / 4000)) ** 0.5
        assert abs(found[caption] - count) < 4 * deviation


def test_a_key_without_caption_leaves_its_part_to_the_others():
    rule = CaptionRule({"caption": 0.5, "alt": 0.375, "title": 0.125})
    for missing in ({}, {"caption": ""}, {"caption": None}, {"caption": [" "]}):
        found = drawn(rule, record(alt="b", title="d", **missing))
        assert set(found) == {"b", "d"}
        assert abs(found["b"] - 3000) < 4 * (4000 * 0.75 * 0.25) ** 0.5


def test_what_is_drawn_depends_on_neither_order_nor_scale_of_the_weights():
    sample = record(a="a", b="b", c="c")
    bits = [partial(sample_seed, 1, n) for n in range(200)]
    one = [draw_one(CaptionRule({"a": 1, "b": 2, "c": 5}), sample, bit) for bit in bits]
    other = [draw_one(CaptionRule({"c": 10, "a": 2, "b": 4}), sample, bit) for bit in bits]
    assert one == other and set(one) == {"a", "b", "c"}


@pytest.mark.parametrize("bits, caption", [(0, "a"), (2**63, "b"), (2**64 - 1, "b")])
def test_the_ends_of_the_random_numbers(bits, caption):
    rule = CaptionRule({"b": 1.0, "a": 1.0})
    assert rule.draw(record(a="a", b="b"), lambda purpose: bits, 1) == [caption]


@pytest.mark.parametrize("key, caption, text", [(0, 0, "1"), (0, 3, "2"), (2**63, 0, "3")])
def test_key_and_caption_are_drawn_by_numbers_of_their_own(key, caption, text):
    bits = {"caption_key": key, "caption": caption}
    sample = record(a=["1", "2"], b="3")
    assert CaptionRule({"a": 1, "b": 1}).draw(sample, bits.__getitem__, 1) == [text]


LETTERS = "abcde"


@pytest.mark.parametrize("count", [1, 3, 5, 7, 12])
def test_several_are_drawn_without_repetition_until_all_are_there(count):
    sample, firsts = record(caption=list(LETTERS)), []
    for n in range(300):
        found = CaptionRule("caption").draw(sample, partial(sample_seed, 5, n), count)
        assert len(found) == count
        for start in range(0, count, len(LETTERS)):
            turn = found[start : start + len(LETTERS)]
            assert len(set(turn)) == len(turn)
        assert set(found) == set(LETTERS) or count < len(LETTERS)
        firsts += found[: len(LETTERS)]
        # As many as are asked for, the ones before stay.
        more = CaptionRule("caption").draw(sample, partial(sample_seed, 5, n), count + 2)
        assert more[:count] == found
    share = len(firsts) / len(LETTERS)
    assert all(abs(times - share) < 4 * share**0.5 for times in Counter(firsts).values())


def test_of_several_keys_each_draw_is_by_the_weights_of_what_is_left():
    rule = CaptionRule({"caption": 7, "alt": 2, "title": 1})
    sample = record(caption="a", alt=["b", "c"], title="d")
    pairs = Counter(tuple(rule.draw(sample, partial(sample_seed, 5, n), 2)) for n in range(4000))
    firsts = Counter()
    for (first, _), times in pairs.items():
        firsts[first] += times
    assert firsts == drawn(rule, sample)
    # "a" first, 7 of 10; then "alt" has 2 of what is left, 3, for both of its captions together.
    expected = {("a", "b"): 4000 * 0.7 / 3, ("a", "d"): 4000 * 0.7 / 3, ("d", "a"): 400 * 7 / 9}
    expected[("b", "c")] = 4000 * 0.1 * 0.2
    for pair, times in expected.items():
        assert abs(pairs[pair] - times) < 4 * times**0.5, pair
    assert not any(first == second for first, second in pairs)


def test_the_first_captions_are_those_of_the_most_probable_keys_in_order():
    rule = CaptionRule({"x": 1, "y": 3, "z": 3})
    sample = record(x=["1"], y=["2", "2b"], z="3")
    assert rule.first(sample, 1) == rule.captions_of(sample)[:1] == ["2"]
    assert rule.first(sample, 6) == ["2", "2b", "3", "1", "2", "2b"]
    assert rule.first(record(x=["1"], y=" "), 3) == ["1", "1", "1"]
    assert rule.count(sample) == 4 and rule.count(record(x="1")) == 1


def test_evaluation_takes_the_most_probable_key_that_has_captions():
    rule = CaptionRule({"x": 1, "y": 3, "z": 3})
    assert rule.captions_of(record(x="1", y=["2", "2b"], z="3")) == ["2", "2b"]
    assert rule.captions_of(record(x="1", y=" ", z="3")) == ["3"]
    assert rule.captions_of(record(x="1")) == ["1"]


def test_an_empty_caption_may_be_kept():
    keep = CaptionRule(lines=False, keep_empty=True)
    for text in (b"", b" \n"):
        assert keep.captions_of(stored(txt=text)) == [text.decode()]
    with pytest.raises(BadSampleError, match="no .txt"):
        keep.captions_of(stored(jpg=b""))
    assert CaptionRule(keep_empty=True).captions_of(stored(txt=b"a\n")) == ["a"]
    at_key = CaptionRule("caption", keep_empty=True)
    assert at_key.captions_of(record(caption="")) == [""]
    assert at_key.captions_of(record(caption=[])) == [""]
    with pytest.raises(BadSampleError, match="no text"):
        at_key.captions_of(record(alt="a"))


def test_a_kept_key_without_caption_is_an_empty_text_as_often_as_it_is_drawn():
    rule = CaptionRule({"caption": 0.25, "alt": 0.75}, keep_empty=True)
    for missing in ({}, {"alt": None}, {"alt": ""}):
        found = drawn(rule, record(caption="a", **missing))
        assert set(found) == {"a", ""}
        assert abs(found[""] - 3000) < 4 * (4000 * 0.75 * 0.25) ** 0.5
