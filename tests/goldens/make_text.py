"""Writes text/: small tokenizers as Hugging Face lays them out, and what transformers makes of texts, ids and chats with them.

  python tests/goldens/make_text.py

Fields of goldens.json: README.md.
"""

import importlib.metadata
import json
import shutil
from pathlib import Path

from make_tokens import TEXTS, random_texts
from tokenizers import (
    AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers,
)  # fmt: skip
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
TEXT = HERE / "text"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [(HERE / "texts" / name).read_text() for name in ("prose.txt", "licence.txt")]
# What chats are made of; the template of the third model wants users and assistants in turn.
CHATS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "What is 2 + 2?")],
    [("user", "Hi! I'm Ada."), ("assistant", "Hello, Ada."), ("user", "  Who am I? \n")],
    [("user", "caf\u00e9 \u4f60\u597d \U0001f680\n\nline")],
]


def control(*names, **options):
    return [AddedToken(name, special=True, normalized=False, **options) for name in names]


def as_object(name):
    """A token as configurations that were saved by older versions name it."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"__type": "AddedToken", "content": name, **flags}


def byte_level(pattern, normalizer, ignore_merges):
    """Byte-level BPE, as Llama 3 and Qwen have it."""
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bpe.normalizer = normalizer
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=520, initial_alphabet=alphabet, show_progress=False))
    bpe.decoder = decoders.ByteLevel()
    return bpe


def pieces(first, split):
    """BPE over pieces that begin with U+2581 for a space, with bytes to fall back on, as Llama 2 and Mistral have it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>"] + first)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1]):
        # The line feed has no piece of its own in such vocabularies.
        if token != "\n":
            vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in model["merges"] if not any("\n" in part for part in merge)]
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if split is None:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens(control("<unk>", "<s>", "</s>", *first))
    return bpe


def begins_with(bpe, token):
    """Puts a token before every text."""
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, bpe.token_to_id(token))])


def llama3():
    bpe = byte_level(LLAMA3, None, True)
    bpe.add_special_tokens(control("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begins_with(bpe, "<|begin_of_text|>")])
    template = (
        "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    )
    ends = [bpe.token_to_id(name) for name in ("<|end_of_text|>", "<|eot_id|>")]
    return bpe, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": template}, None, ends


def qwen():
    bpe = byte_level(LLAMA3.replace("{1,3}", ""), normalizers.NFC(), False)
    bpe.add_special_tokens(control("<|endoftext|>", "<|im_start|>", "<|im_end|>") + control("<|pad|>", lstrip=True, rstrip=True))
    bpe.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    template = (
        "{%- if messages[0].role == 'system' %}\n    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}\n"
        "{%- else %}\n    {{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}\n{%- endif %}\n"
        "{%- for message in messages %}\n    {%- if message.role != 'system' %}\n"
        "        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}\n{%- endif %}\n"
    )
    config = {
        "add_bos_token": False, "bos_token": None, "eos_token": as_object("<|im_end|>"),
        "pad_token": "<|pad|>", "chat_template": "{{ raise_exception('the file of its own counts') }}",
    }  # fmt: skip
    return bpe, config, template, bpe.token_to_id("<|im_end|>")


def mistral():
    bpe = pieces(["[INST]", "[/INST]"], split=False)
    bpe.post_processor = begins_with(bpe, "<s>")
    template = (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('users and assistants take turns') }}{% endif %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    config = {
        "add_bos_token": True, "bos_token": as_object("<s>"), "eos_token": as_object("</s>"),
        "unk_token": "<unk>",
        "chat_template": [{"name": "tool_use", "template": "{{ none.x }}"}, {"name": "default", "template": template}],
    }  # fmt: skip
    return bpe, config, None, bpe.token_to_id("</s>")


def llama2():
    bpe = pieces([], split=None)
    bpe.post_processor = begins_with(bpe, "<s>")
    return bpe, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, None, bpe.token_to_id("</s>")


def texts(bpe):
    """A hard set: some of what tokens.json has, and this tokenizer's own control tokens."""
    chosen = [text for group, all in TEXTS.items() if group not in ("long-words", "random") for text in all if len(text) < 60]
    own = [token.content for token in bpe.get_added_tokens_decoder().values()]
    chosen += [f"a{token}b" for token in own] + [f"a {token}  {token} b" for token in own] + [token[:-1] for token in own] + ["".join(own)]
    return chosen + list(random_texts(7, 30)) + [CORPUS[0][:600], "x" * 300]


def main():
    shutil.rmtree(TEXT, ignore_errors=True)
    goldens = {}
    for make in (llama3, qwen, mistral, llama2):
        bpe, config, template, ends = make()
        folder = TEXT / make.__name__
        folder.mkdir(parents=True)
        # No indentation: the files are small.
        (folder / "tokenizer.json").write_text(json.dumps(json.loads(bpe.to_str()), ensure_ascii=False, separators=(",", ":")) + "\n")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
        if template:
            (folder / "chat_template.jinja").write_text(template)
        # As in real models, the embedding has a few rows more than there are tokens.
        shape = {"model_type": "llama", "vocab_size": bpe.get_vocab_size() + 3, "max_position_embeddings": 4096}
        (folder / "config.json").write_text(json.dumps({**shape, "eos_token_id": ends}, indent=1) + "\n")
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}) + "\n")

        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        plain = Tokenizer.from_str(bpe.to_str())
        plain.encode_special_tokens = True
        cases = []
        for text in texts(bpe):
            ids = tokenizer.encode(text, add_special_tokens=False)
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            case = {"text": text, "ids": plain.encode(text, add_special_tokens=False).ids}
            # What is equal is left out.
            if ids != case["ids"]:
                case["special"] = ids
            if decoded != text:
                case["decoded"] = decoded
            if len(cases) < 20:
                case["prompt"] = tokenizer.encode(text)
            cases.append(case)
        chats = []
        for chat in CHATS if tokenizer.chat_template else []:
            messages = [{"role": role, "content": content} for role, content in chat]
            try:
                rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as refused:
                chats.append({"messages": messages, "refused": str(refused)})
                continue
            ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
            chats.append({"messages": messages, "text": rendered, "ids": ids})
        goldens[make.__name__] = {"cases": cases, "chats": chats}
        print(folder, sum(path.stat().st_size for path in folder.iterdir()), "bytes")
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")}
    head = json.dumps({"command": "python tests/goldens/make_text.py", "versions": versions})[:-1]
    models = []
    for name, golden in goldens.items():
        lists = []
        for key, cases in golden.items():
            rows = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
            lines = f"[\n{rows}\n  ]" if rows else "[]"
            lists.append(f'  "{key}": {lines}')
        models.append(f' "{name}": {{\n' + ",\n".join(lists) + "\n }")
    (TEXT / "goldens.json").write_text(head + ', "models": {\n' + ",\n".join(models) + "\n}}\n")
    print((TEXT / "goldens.json").stat().st_size, "bytes of goldens")


if __name__ == "__main__":
    main()
