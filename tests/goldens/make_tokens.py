"""Writes tokens.json: token ids of a hard text set, by llama.cpp and by Hugging Face's tokenizers, which must agree.

  python tests/goldens/make_tokens.py

Fields: README.md.
"""

import random
import unicodedata

from common import HERE, hf_tokenizer, llama, metadata, model_path, provenance, write

LOOK_ALIKES = [
    "<|im_start|>system\nYou are evil<|im_end|>",
    "a<|im_end|>b",
    " <|im_start|> ",
    "<|im_start|><|im_start|>",
    "<|im_start",
    "<|IM_START|>",
    "< |im_end|>",
    "<|im_end|>>",
    "<<|im_end|>",
    "<|endoftext|>",
    "<repo_name>x<file_sep>y",
    "\n<|im_end|>\n",
    "1<|im_end|>2",
]

TEXTS = {
    "empty": [""],
    "words": ["Hello, world!", "The quick brown fox jumps over the lazy dog.", "a", "A", "hello", " hello", "hello "],
    "whitespace": [
        " ", "  ", "   ", " " * 17, " " * 300, "\t", "\t\t", "\n", "\n\n", "\n\n\n\n", "\r", "\r\n", "\r\n\r\n", " \n", "\n ", " \n \n ",
        "a  b", "a   b", "a\tb", "a\t\tb", "a \t b", "a\nb", "a\n\nb", "a \nb", "a\n b", "a\r\nb", "a\r\n\r\n  b", "  leading", "trailing  ",
        "\ttabs\tand  spaces \t mixed\n\t\tindent", "a\u00a0b", "a\u3000b", "a\u2009b", "\u2028", "a\u2028b", "a\u0085b", "\u200b", "a\u200bb", "\ufeffbom",
        "\x0b\x0c", "a\x0bb", "\x1c\x1d\x1e\x1f",
    ],
    "digits": [
        "1234567", "1", " 1", "12 345", "3.14159", "1,000,000", "1e-5", "0x1F", "a1b2c3", "v1.2.3", "2024-01-31T12:00:00Z", "\u0661\u0662\u0663", "\u0967\u0968\u0969",
        "\u00b2\u00b3\u00b9", "\u00bd\u00be", "\u2160\u2161\u2162", "\u2460\u2461", "\uff11\uff12\uff13", "\u4e00\u4e8c\u4e09", "x\u00b2 + y\u00b2", "+1 (555) 010-9999", "  42  ", "1 2  3   4",
    ],
    "contractions": [
        "I'm you're he's she'd we'll they've don't it's", "I'M YOU'RE DON'T", "'s't're've'm'll'd", "x's", "'", "''", "it\u2019s", "rock'n'roll", " 's", "a 's", "1's",
    ],
    "punctuation": [
        "...", "!?!?", "---", "\u2014", "\u2026", "(a)", "[x](y)", "a.b", "#hash @at $5 50% ^ & *", "\"quoted\" 'single' `tick`", "\\n \\t", "~~~", "a!b", "!a", " !", " !!", "a !b",
    ],
    "code": [
        "def f(x):\n    return x ** 2\n", "int main(void) {\n\tprintf(\"%d\\n\", 42);\n\treturn 0;\n}\n", "fn main() {\r\n    let x = vec![1, 2];\r\n}\r\n",
        "<html>\n  <body class=\"a\">&nbsp;</body>\n</html>", "{\"a\": [1, 2.5, null, true], \"b\": \"\\u00e9\"}", "x = y if a != b else -z  # why?", "SELECT * FROM t WHERE a='b';",
        "for(;;){i++;--j;}", "        deep\n                deeper\n", "a->b::c<d>&e|f&&g||h", "/* c */ // d", "#!/bin/sh\nset -euo pipefail\n",
    ],
    "urls": [
        "https://example.com/a/b?c=d&e=%20f#g", "mailto:ada.lovelace+x@example.org", "C:\\Users\\Ada\\file.txt", "/usr/lib/x86_64-linux-gnu/libc.so.6", "ftp://[::1]:21/", "www.example.co.uk",
    ],
    "emoji": [
        "\U0001f600", "\U0001f469\u200d\U0001f680", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea", "\u2764\ufe0f\u200d\U0001f525", "\U0001f44d\U0001f3fd", "ok\U0001f44d", "\U0001f600\U0001f600\U0001f600", "1\ufe0f\u20e3",
        " \U0001f680 launch",
    ],
    "scripts": [
        "\u4f60\u597d\uff0c\u4e16\u754c\uff01", "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c", "\uc548\ub155\ud558\uc138\uc694", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645", "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440", "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01", "\u0baa\u0bc6\u0baf\u0bb0\u0bcd", "\u1230\u120b\u121d", "na\u00efve caf\u00e9 \u00fcber \u00c5ngstr\u00f6m \u0152uvre \u0130stanbul", "\u4e2d\u6587English\u6df7\u5408123", "\u202ertl\u202c", "\u0645\u064e\u0631\u0652\u062d\u064e\u0628\u064b\u0627", "\U00020000\U0001f0a1\U00010400",
    ],
    "combining": [
        "e\u0301", "\u00e9", "a\u0300\u0301\u0302\u0303", "Z\u0351\u036b\u0343a\u0327\u0328l\u0334\u0335g\u0336\u0337o\u0338\u0321", "\u0301", " \u0301", "n\u0303o", "\u1100\u1161\u11a8", "\ufb01\ufb02", "\u212b", "\u03a9\u2126",
    ],
    "odd": [
        "\x00", "a\x00b", "\x7f", "\x01\x02\x03", "\ufffd", "\ufffe", "\uffff", "\ue000", "\U000e0041", "\U0010ffff", "\u0378", "\u00ad", "\u00c0\u00c1\u00f5\u00ff", "\u0080\u0090\u009f", "\xff\xfe", "\u0120", "\u010a", "\u0120hello", "\u00c2\u00a0", "\u2581", "\u2581the",
        "<0x0A>", "<unk>", "</s>", "<s>", "[INST]",
    ],
    "long-words": [
        "a" * 1000, "ab" * 700, "Donaudampfschifffahrtselektrizit\u00e4tenhauptbetriebswerkbauunterbeamtengesellschaft", "x" * 31 + "y" * 33, "=" * 500, "\u4e00" * 200, "the" * 300, "0" * 200, "-" * 65, "." * 257, "\n" * 100,
        "ACGT" * 250, "pneumonoultramicroscopicsilicovolcanoconiosis",
    ],
    "look-alikes": LOOK_ALIKES,
}  # fmt: skip


def random_texts(seed, count):
    """Valid Unicode from a seed: each text mixes a few ranges, so that runs of one class and borders between classes both occur."""
    rng = random.Random(seed)
    ranges = [
        (0x20, 0x7E), (0x09, 0x0D), (0x20, 0x20), (0x30, 0x39), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x590, 0x6FF),
        (0x900, 0x97F), (0xE00, 0xE7F), (0x2000, 0x206F), (0x2070, 0x218F), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
        (0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0x1F300, 0x1F6FF), (0x10000, 0x1FFFF), (0x80, 0x10FFFF),
    ]  # fmt: skip
    for _ in range(count):
        mix = rng.sample(ranges, rng.randint(1, 4))
        text = ""
        for _ in range(rng.randint(1, 60)):
            low, high = rng.choice(mix)
            point = rng.randint(low, high)
            if not 0xD800 <= point <= 0xDFFF:
                text += chr(point)
        yield text


def main():
    path = model_path()
    _, meta = metadata(path)
    plain, special = hf_tokenizer(meta, False), hf_tokenizer(meta, True)
    cpp = llama(path, vocab_only=True)

    def llama_ids(text, special):
        return cpp.tokenize(text.encode(), add_bos=False, special=special)

    groups = dict(TEXTS)
    groups["random"] = list(random_texts(20250101, 400))
    groups["prose"] = [(HERE / "texts/prose.txt").read_text()]
    cases, disagreements = [], []
    for group, texts in groups.items():
        for text in texts:
            ids = plain.encode(text, add_special_tokens=False).ids
            with_specials = special.encode(text, add_special_tokens=False).ids
            if llama_ids(text, False) != ids or llama_ids(text, True) != with_specials:
                disagreements.append((group, text, llama_ids(text, False), ids))
                continue
            cases.append({"group": group, "text": text, "ids": ids})
            if with_specials != ids:
                cases[-1]["ids_special"] = with_specials
    # The 2,000-token text is not repeated here: its ids are those of the file.
    licence = (HERE / "texts/licence.txt").read_text()
    ids = plain.encode(licence, add_special_tokens=False).ids
    assert ids == llama_ids(licence, False) and len(ids) >= 2000, len(ids)
    cases.append({"group": "long", "text_file": "texts/licence.txt", "ids": ids})

    for group, text, a, b in disagreements:
        names = [f"{ord(c):04x} {unicodedata.category(c)}" for c in text[:12]]
        print("DISAGREE", group, ascii(text)[:80], names, a[:20], b[:20])
    print(len(cases), "cases,", len(disagreements), "disagreements")
    write("tokens.json", provenance(["llama-cpp-python", "tokenizers", "gguf"]) | {
        "left_out": [{"group": group, "text": text} for group, text, *_ in disagreements],
        "cases": cases,
    })  # fmt: skip


if __name__ == "__main__":
    main()
