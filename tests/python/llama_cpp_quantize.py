"""Writes a model file anew in llama.cpp's other formats. Prints one JSON object: format -> path, or null where llama.cpp refuses.

usage: llama_cpp_quantize.py MODEL FOLDER
"""

import ctypes
import json
import os
import sys

import llama_cpp

FORMATS = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
}

model, folder = sys.argv[1:3]
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
llama_cpp.llama_backend_init()
silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))

files = {}
for name, number in FORMATS.items():
    path = os.path.join(folder, f"{name}.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = number
    params.allow_requantize = True
    refused = llama_cpp.llama_model_quantize(model.encode(), path.encode(), ctypes.byref(params))
    files[name] = None if refused else path
print(json.dumps(files), file=answers)
