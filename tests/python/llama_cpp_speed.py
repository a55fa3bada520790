"""llama.cpp as the benchmarks' peer: one process per model file, told on stdin what to run, one JSON object a line; answers one a line.

usage: llama_cpp_speed.py MODEL THREADS

{"prefill": P, "decode": D, "sequences": S, "flash": BOOL, "batch": B}
    Computes P tokens of each of S sequences in batches of B, then decodes D tokens of each, one batch a token. Answers the seconds of
    each. Only last rows have logits, and batches are filled before the clock starts.
{"perplexity": [ID, ...]}
    Answers the perplexity of all ids but the first, each predicted from all before it.

The first answer comes unasked: {"version": ..., "system_info": ...}.
"""

import ctypes
import json
import math
import os
import sys
import time

import llama_cpp

# OpenMP's threads spin for some milliseconds after a batch. Whoever gets an answer may measure at once.
SPINS_S = 0.2

path, threads = sys.argv[1], int(sys.argv[2])
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the library prints is no answer

llama_cpp.llama_backend_init()
silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
if not model:
    sys.exit(f"llama.cpp cannot load {path}")
vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
contexts = {}


def context_of(tokens, sequences, flash, batch):
    key = (tokens, sequences, flash, batch)
    if key not in contexts:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = tokens * sequences
        params.n_batch = params.n_ubatch = batch
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        on, off = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = on if flash else off
        contexts[key] = llama_cpp.llama_init_from_model(model, params)
        if not contexts[key]:
            sys.exit(f"llama.cpp makes no context for {key}")
    context = contexts[key]
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    return context


def batch_of(rows):
    """`rows`: (token, position, sequence, wants logits)."""
    batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    for index, (token, position, sequence, logits) in enumerate(rows):
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = logits
    return batch


def seconds(context, batches):
    start = time.perf_counter()
    for batch in batches:
        failed = llama_cpp.llama_decode(context, batch)
        if failed:
            sys.exit(f"llama_decode: {failed}")
        llama_cpp.llama_synchronize(context)
    elapsed = time.perf_counter() - start
    for batch in batches:
        llama_cpp.llama_batch_free(batch)
    return elapsed


def speed(prefill, decode, sequences, flash, batch):
    context = context_of((prefill + decode + 63) // 32 * 32, sequences, flash, batch)
    token = lambda position, sequence: (1000 + 7 * position + 31 * sequence) % min(40_000, vocabulary)
    prompts = [
        batch_of([
            (token(position, sequence), position, sequence, position + 1 == prefill)
            for position in range(start, min(start + batch, prefill))
        ])
        for sequence in range(sequences)
        for start in range(0, prefill, batch)
    ]  # fmt: skip
    steps = [
        batch_of([(token(position, sequence), position, sequence, True) for sequence in range(sequences)])
        for position in range(prefill, prefill + decode)
    ]
    return {"prefill_s": seconds(context, prompts), "decode_s": seconds(context, steps)}


def perplexity(tokens):
    import numpy as np

    context = context_of(len(tokens), 1, False, 512)
    sum_logprob = 0.0
    for start in range(0, len(tokens) - 1, 512):
        rows = range(start, min(start + 512, len(tokens) - 1))
        seconds(context, [batch_of([(tokens[row], row, 0, True) for row in rows])])
        for index, row in enumerate(rows):
            logits = llama_cpp.llama_get_logits_ith(context, index)
            logits = np.ctypeslib.as_array(logits, (vocabulary,)).astype(np.float64)
            top = logits.max()
            sum_logprob += float(logits[tokens[row + 1]] - top - np.log(np.exp(logits - top).sum()))
    return {"perplexity": math.exp(-sum_logprob / (len(tokens) - 1))}


def answer(said):
    time.sleep(SPINS_S)
    print(json.dumps(said), file=answers, flush=True)


answer({"version": llama_cpp.__version__, "system_info": llama_cpp.llama_print_system_info().decode()})
for line in sys.stdin:
    asked = json.loads(line)
    answer(perplexity(asked["perplexity"]) if "perplexity" in asked else speed(**asked))
