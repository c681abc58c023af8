"""Captions that take tokenizers apart."""

import random
import string

ODD = [
    "",
    " ",
    "a photo of a dog",
    "DON'T we'll I'm they'RE you'Ve he'd it's 'S",
    "caf\u00e9 cafe\u0301 na\u00efve \u0130stanbul stra\u00dfe \u017fhort K",
    "\u72ac\u304c\u8d70\u308b \ud55c\uad6d\uc5b4 \u0e20\u0e32 \u0645\u0631\u062d \u05e9\u05dc",
    "\U0001f436\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd",
    "tabs\tand\nlines\r\nand\x0b\x0c\x1c\x85\u2028\u3000spaces",
    "control\x00\x01\x07\x1b[31mred\x7f\ufeff",
    "&lt;b&gt; &amp;amp; &amp;lt;i&amp;gt; &#128054; &#xD800; &nbsp;x &copy",
    "cr\u00c3\u00a8me br\u00c3\u00bbl\u00c3\u00a9e \u00e2\u20ac\u0153quotes\u00e2\u20ac\u009d",
    "<start_of_text> <END_of_text><|endoftext|> <end_of_text>x",
    "1234567890 \u0661\u0662\u0663 \u00bd \u2167 3.14e-10",
    "https://example.com/a_b?c=d&e=f#g",
    "!!!???...---___\u2014\u2026\u201c\u201d",
    "lone \ud800 surrogate",
    "x" * 3000,
    "word " * 500,
    "\U0001f600" * 200,
    "\u0000",
    # What a SentencePiece model and its settings have special tokens, bytes and spaces for.
    "a</s>b </s> <eos> <bos> <pad>x<unk>y <h1>t</h1> <unused1> <extra_id_3> <start_of_turn>",
    *"</s>|</s> a|a </s>|a </s> b</s>|</S>|<unk>|a<unk>b|<pad>|<eos>|<EOS>|a <mask> b".split("|"),
    *"\ufe64/s\ufe65 \ufe64unk\ufe65 \uff1c/s\uff1e <0x41><0xE3> <H1>x</H1> a\u2460\u2460b".split(),
    *[
        "\u2581",
        "0 \u2581\u2581",
        "\u2581 \u2581a b\u2581c",
        "\u200b",
        " a  b   c ",
        "\n\n\n a",
        "\u00ad",
        "\u0301",
    ],
    "\u03a3\u039f\u03a6\u039f\u03a3 \u0391\u03a3",  # a final sigma
    "e\u0301\u0302\u0327 \u1e9b\u0323 \u0344 \u0915\u093c \u1100\u1161\u11a8 \uff76\uff9e \ufb01",
    "\u202eright to left\u202c \u200f\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",
    "\U000e0001\ufffe",
    *["word " * 62 + "</s> more", "word " * 63 + "</s>"],
]


def random_captions(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    pieces = [
        *string.printable,
        *"\u00e9\u00fc\u00df\u0131\u017f\u212a\u0434\u72ac\u304c\ud55c\u0e20\u0645\u05e9\U0001f436\u200d\ufe0f\u00a0\u2028\x85\x1c\u0301",
        *"\u0302\u0327\u0323\u0308\u200b\u200e\u202e\u2581\u3000\ufeff\ufffd\ufb01\u00ad\u0344\uff21\u0958\u1e9b\u1100\u1161\u3099",
        *["the ", "photo", " dog", "'s", "&amp;", "&#39;", "\u00c3\u00a9", "<end_of_text>", "123"],
        *"</s> <unk> <pad> <eos> <bos> <h1> <unused1> <0x0A> <extra_id_1>".split(),
        *[chr(generator.randrange(0xA0, 0xD000)) for _ in range(300)],
        *[chr(generator.randrange(0x10000, 0x20000)) for _ in range(100)],
    ]
    return ["".join(generator.choices(pieces, k=generator.randrange(60))) for _ in range(count)]
