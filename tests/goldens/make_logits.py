"""Writes logits.json: greedy continuations by llama.cpp, and the f32 model's view of each of their tokens.

  python tests/goldens/make_logits.py

Takes about six minutes on two busy cores. Fields: README.md.
"""

import ctypes
import math

import numpy as np
import torch

from common import HERE, f32_model, llama, metadata, model_path, provenance, write

STEPS = 64
MARGIN = 0.5  # the check below: where llama.cpp's and the f32 model's top two differ by more, both name the same token


def chat(*messages):
    text = ""
    if messages[0][0] != "system":
        messages = (("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"), *messages)
    for role, content in messages:
        text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


PROSE = (HERE / "texts/prose.txt").read_text()
LICENCE = (HERE / "texts/licence.txt").read_text()

# (name, text, cut to this many tokens)
PROMPTS = [
    ("chat-capital", chat(("user", "What is the capital of France?")), None),
    ("chat-poem", chat(("user", "Write a short poem about the sea.")), None),
    ("chat-system", chat(("system", "You are a terse assistant."), ("user", "Name three primary colours.")), None),
    ("chat-turns", chat(("user", "Hi! I'm Ada."), ("assistant", "Hello, Ada! How can I help?"), ("user", "What's my name?")), None),
    ("chat-arithmetic", chat(("user", "What is 17 + 25? Explain step by step.")), None),
    ("chat-list", chat(("user", "List five uses for an old newspaper.")), None),
    ("chat-emoji", chat(("user", "Explain this: \U0001f469\u200d\U0001f680\U0001f680\u2728")), None),
    ("code-python", "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n", None),
    ("code-rust", "/// Reads a whole file into a string.\npub fn read(path: &Path) -> io::Result<String> {\n", None),
    ("code-c", "#include <stdio.h>\n\nint main(void) {\n\tfor (int i = 0; i < 10; i++) {\n", None),
    ("code-sql", "SELECT name, COUNT(*) AS orders\nFROM customers\nJOIN", None),
    ("code-json", "{\n  \"name\": \"baton\",\n  \"version\": \"0.1.0\",\n  \"dependencies\": {\n", None),
    ("french", "Il \u00e9tait une fois, dans un petit village au bord de la mer,", None),
    ("german", "Die Br\u00fccke \u00fcber den Fluss wurde im Jahr 1890 gebaut und", None),
    ("chinese", "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed", None),
    ("japanese", "\u6614\u3005\u3001\u3042\u308b\u3068\u3053\u308d\u306b", None),
    ("arabic", "\u0643\u0627\u0646 \u064a\u0627 \u0645\u0627 \u0643\u0627\u0646", None),
    ("russian", "\u041c\u043e\u0441\u043a\u0432\u0430 \u2014 \u0441\u0442\u043e\u043b\u0438\u0446\u0430", None),
    ("length-1", "The", 1),
    ("length-31", PROSE, 31),
    ("length-32", PROSE, 32),
    ("length-33", PROSE, 33),
    ("length-64", LICENCE, 64),
    ("length-65", LICENCE, 65),
    ("length-500", PROSE, 500),
    ("length-2000", LICENCE, 2000),
]


def top_two(logits):
    """(id, runner-up's id, difference of their logits), from one row of logits."""
    second, first = np.argpartition(logits, -2)[-2:]
    if logits[second] > logits[first] or (logits[second] == logits[first] and second < first):
        first, second = second, first
    return int(first), int(second), float(logits[first]) - float(logits[second])


def log_softmax(logits):
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def main():
    import llama_cpp

    path = model_path()
    reader, meta = metadata(path)
    cpp = llama(path, n_ctx=2304)
    vocab = cpp.n_vocab()

    def last_logits():
        row = llama_cpp.llama_get_logits_ith(cpp._ctx.ctx, -1)
        return np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (vocab,)).copy()

    cases = []
    for name, text, length in PROMPTS:
        tokens = cpp.tokenize(text.encode(), add_bos=False, special=True)
        if length:
            tokens = tokens[:length]
            assert len(tokens) == length, (name, len(tokens))
        cpp.reset()
        cpp.eval(tokens)
        steps = []
        for _ in range(STEPS):
            logits = last_logits()
            token, second, margin = top_two(logits)
            steps.append((token, second, margin, float(log_softmax(logits)[token])))
            cpp.eval([token])
        cases.append((name, tokens, steps))
        print("llama.cpp", name, len(tokens), flush=True)

    prose = cpp.tokenize(PROSE.encode(), add_bos=False, special=False)
    del cpp
    cpp = llama(path, n_ctx=2304, logits_all=True)
    cpp.eval(prose)
    llama_logprobs = log_softmax(cpp._scores[: len(prose) - 1])[np.arange(len(prose) - 1), prose[1:]]
    del cpp

    model = f32_model(reader, meta)
    golden = []
    wrong, widest, differences = 0, 0.0, []
    with torch.inference_mode():
        for name, prompt, steps in cases:
            tokens = [token for token, *_ in steps]
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :].numpy()
            assert logits.shape == (STEPS, vocab)
            logprobs = log_softmax(logits)
            tops = [top_two(row) for row in logits]
            for index, ((token, _, margin, logprob), (argmax, _, f32_margin)) in enumerate(zip(steps, tops)):
                differences.append(abs(logprob - logprobs[index, token]))
                if argmax != token:
                    widest = max(widest, margin)
                    if max(margin, f32_margin) > MARGIN:
                        wrong += 1
                        print(f"DISAGREE {name} step {index}: llama.cpp {token} by {margin:.3f}, f32 {argmax} by {f32_margin:.3f}")
            golden.append({
                "name": name,
                "prompt": prompt,
                "tokens": tokens,
                "llama_second": [second for _, second, *_ in steps],
                "llama_margin": [round(margin, 4) for _, _, margin, _ in steps],
                "llama_logprob": [round(logprob, 4) for *_, logprob in steps],
                "f32_argmax": [argmax for argmax, *_ in tops],
                "f32_margin": [round(margin, 4) for *_, margin in tops],
                "f32_logprob": [round(float(logprobs[i, token]), 4) for i, token in enumerate(tokens)],
            })  # fmt: skip
            print("f32", name, flush=True)
        logits = model(torch.tensor([prose])).logits[0, :-1].numpy()
        f32_logprobs = log_softmax(logits)[np.arange(len(prose) - 1), prose[1:]]

    positions = sum(len(case["tokens"]) for case in golden)
    agree = sum(a == t for case in golden for a, t in zip(case["f32_argmax"], case["tokens"]))
    print(f"argmax agrees at {agree} of {positions}; beyond a margin of {MARGIN} disagrees at {wrong}")
    assert wrong == 0
    write("logits.json", provenance(["llama-cpp-python", "transformers", "torch", "gguf", "numpy"]) | {
        "llama_settings": "CPU, no flash attention, KV cache f16 (llama.cpp's default), prompt in batches of 512, then one token a step",
        "steps": STEPS,
        "agreement": {
            "positions": positions,
            "argmax_equal": agree,
            "argmax_differs_beyond_margin": {"margin": MARGIN, "count": wrong},
            "largest_llama_margin_where_argmax_differs": round(widest, 4),
            "largest_logprob_difference": round(float(max(differences)), 4),
            "mean_logprob_difference": round(float(np.mean(differences)), 4),
        },
        "perplexity": {
            "text": "texts/prose.txt",
            "tokens": prose,
            "f32_perplexity": round(math.exp(-f32_logprobs.mean()), 5),
            "f32_mean_logprob": round(float(f32_logprobs.mean()), 6),
            "llama_perplexity": round(math.exp(-llama_logprobs.mean()), 5),
        },
        "cases": golden,
    })  # fmt: skip


if __name__ == "__main__":
    main()
