"""Writes sampler.json: logits after bias and penalties, and the distribution that temperature, min-p, top-k and top-p leave of them.

  python tests/goldens/make_sampler.py

Bias, repetition penalty and filters are transformers' own logits processors, in the order that Baton documents; frequency and presence penalty are OpenAI's
published formula, in torch. Fields: README.md.
"""

import importlib.metadata
import json
import random

import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common import HERE

VOCABULARY = 64

# What each case asks for, beside its name; what is absent is neutral.
CASES = [
    ("nothing", dict(temperature=1.0)),
    ("repetition", dict(temperature=1.0, repetition_penalty=1.3)),
    ("repetition below 1", dict(temperature=1.0, repetition_penalty=0.7)),
    ("repetition, greedy", dict(repetition_penalty=2.5)),
    ("frequency", dict(temperature=1.0, frequency_penalty=0.8)),
    ("frequency below 0", dict(temperature=0.7, frequency_penalty=-1.1)),
    ("presence", dict(temperature=1.0, presence_penalty=1.5)),
    ("presence below 0", dict(temperature=1.4, presence_penalty=-2.0)),
    ("bias", dict(temperature=1.0, logit_bias={3: 4.25, 17: -100.0, 40: 0.3})),
    ("bias of tokens that are penalised", dict(temperature=1.0, repetition_penalty=1.2, logit_bias={5: -3.0, 6: 3.0, 7: 0.1})),
    ("all", dict(temperature=0.9, repetition_penalty=1.15, frequency_penalty=0.4, presence_penalty=0.6, logit_bias={2: 1.5, 9: -1.5})),
    ("all, filtered", dict(temperature=0.8, top_k=12, top_p=0.85, min_p=0.02, repetition_penalty=1.1, frequency_penalty=0.3,
                           presence_penalty=-0.5, logit_bias={1: 2.0, 60: -100.0})),
    ("all, greedy", dict(repetition_penalty=1.4, frequency_penalty=1.0, presence_penalty=1.0, logit_bias={8: 2.0})),
    ("min-p alone", dict(temperature=1.3, min_p=0.1, presence_penalty=0.5)),
    ("top-k alone", dict(temperature=1.3, top_k=5, frequency_penalty=0.5)),
    ("top-p alone", dict(temperature=1.3, top_p=0.5, repetition_penalty=1.5)),
]  # fmt: skip


def case(seed, name, asked):
    rng = random.Random(seed)
    # Quarters of small numbers repeat, and penalties meet both signs and 0.
    logits = [rng.choice([rng.gauss(0.0, 3.0), rng.randrange(-8, 9) / 4]) for _ in range(VOCABULARY)]
    prompt = [rng.randrange(10) for _ in range(12)] + [rng.randrange(VOCABULARY) for _ in range(8)]
    output = [rng.randrange(5, 15) for _ in range(9)] + [rng.randrange(VOCABULARY) for _ in range(6)]

    logits = torch.tensor([logits], dtype=torch.float32)
    history = torch.tensor([prompt + output])
    scores = logits
    if bias := asked.get("logit_bias"):
        scores = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(history, scores)
    if penalty := asked.get("repetition_penalty"):
        scores = RepetitionPenaltyLogitsProcessor(penalty)(history, scores)
    counts = torch.bincount(torch.tensor(output), minlength=VOCABULARY).to(torch.float32)
    scores = scores - asked.get("frequency_penalty", 0.0) * counts
    scores = scores - asked.get("presence_penalty", 0.0) * (counts > 0)
    adjusted = scores

    kept = []
    if temperature := asked.get("temperature"):
        scores = TemperatureLogitsWarper(temperature)(history, scores)
        if min_p := asked.get("min_p"):
            scores = MinPLogitsWarper(min_p)(history, scores)
        if top_k := asked.get("top_k"):
            scores = TopKLogitsWarper(top_k)(history, scores)
        if top_p := asked.get("top_p"):
            scores = TopPLogitsWarper(top_p)(history, scores)
        probabilities = torch.softmax(scores[0].double(), -1)
        ranked = sorted(range(VOCABULARY), key=lambda token: (-adjusted[0, token].item(), token))
        kept = [[token, round(probabilities[token].item(), 9)] for token in ranked if probabilities[token] > 0]
    else:
        kept = [[int(adjusted[0].argmax()), 1.0]]
    return {
        "name": name,
        "params": {**asked, **({"logit_bias": list(map(list, bias.items()))} if bias else {})},
        "prompt": prompt,
        "output": output,
        "logits": logits[0].tolist(),
        "adjusted": adjusted[0].tolist(),
        "logprobs": [round(value, 6) for value in torch.log_softmax(logits[0].double(), -1).tolist()],
        "kept": kept,
    }


golden = {
    "command": "python tests/goldens/make_sampler.py",
    "versions": {name: importlib.metadata.version(name) for name in ["torch", "transformers"]},
    "cases": [case(seed, name, asked) for seed, (name, asked) in enumerate(CASES)],
}
lines = ",\n".join(json.dumps(case) for case in golden.pop("cases"))
head = json.dumps(golden)[:-1]
(HERE / "sampler.json").write_text(f'{head}, "cases": [\n{lines}\n]}}\n')
