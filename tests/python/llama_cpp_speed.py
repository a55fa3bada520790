"""llama.cpp on the same file: tokens/s of prefill and decode. Prints one JSON object.

usage: llama_cpp_speed.py MODEL THREADS PREFILL_TOKENS DECODE_TOKENS REPEATS
"""

import ctypes
import json
import statistics
import sys
import time

import llama_cpp

model_path, (threads, prefill, decode, repeats) = sys.argv[1], map(int, sys.argv[2:6])

llama_cpp.llama_backend_init()
silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
model = llama_cpp.llama_model_load_from_file(model_path.encode(), llama_cpp.llama_model_default_params())
params = llama_cpp.llama_context_default_params()
params.n_ctx = prefill + decode + 64
params.n_batch = params.n_ubatch = prefill
params.n_threads = params.n_threads_batch = threads
context = llama_cpp.llama_init_from_model(model, params)
memory = llama_cpp.llama_get_memory(context)
tokens = [(1000 + 7 * index) % 40000 for index in range(prefill + decode)]


def step(ids):
    """Decodes one batch; only the last row's logits are wanted."""
    array = (llama_cpp.llama_token * len(ids))(*ids)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))) == 0
    llama_cpp.llama_synchronize(context)


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def decode_all():
    for token in tokens[prefill : prefill + decode]:
        step([token])


def fresh():
    llama_cpp.llama_memory_clear(memory, True)


result = {"prefill": [], "decode": [], "decode_at": []}
for repeat in range(repeats + 1):
    fresh()
    prefill_s = timed(lambda: step(tokens[:prefill]))
    at_s = timed(decode_all)
    fresh()
    step(tokens[:1])
    decode_s = timed(decode_all)
    if repeat:  # the first warms up
        result["prefill"].append(prefill / prefill_s)
        result["decode_at"].append(decode / at_s)
        result["decode"].append(decode / decode_s)

print(
    json.dumps(
        {
            **{name: statistics.median(values) for name, values in result.items()},
            "system_info": llama_cpp.llama_print_system_info().decode(),
            "version": llama_cpp.__version__,
        }
    )
)
