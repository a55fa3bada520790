"""What the golden scripts share: the model file, its tokenizer and its f32 weights, each built without Baton's code.

Needs: numpy, gguf, torch, tokenizers, transformers, llama-cpp-python (the versions used are written into each golden file).
The model file is $BATON_MODEL, else <workspace>/.models/SmolLM2-135M-Instruct.Q4_1.gguf.
"""

import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def model_path():
    path = Path(os.environ.get("BATON_MODEL") or HERE.parent.parent / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != MODEL_SHA256:
        sys.exit(f"{path} has SHA-256 {digest}, not {MODEL_SHA256}")
    return path


def provenance(packages):
    import llama_cpp

    return {
        "command": " ".join(["python", "tests/goldens/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "model_sha256": MODEL_SHA256,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "llama_system_info": llama_cpp.llama_print_system_info().decode().strip(),
    }


def metadata(path):
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return reader, {key: field.contents() for key, field in reader.fields.items()}


def hf_tokenizer(meta, specials):
    """SmolLM2's tokenizer.json rebuilt from the file's vocabulary: digits one by one, then GPT-2's byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    assert meta["tokenizer.ggml.model"] == "gpt2" and meta["tokenizer.ggml.pre"] == "smollm"
    vocab = {token: index for index, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if specials:
        types = meta["tokenizer.ggml.token_type"]
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t, kind in zip(vocab, types) if kind == 3]
        )
    return tokenizer


def f32_model(reader, meta):
    """A transformers LlamaForCausalLM in f32 over the file's weights, dequantised by the `gguf` package."""
    import numpy as np
    import torch
    from gguf import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        attn_implementation="eager",
        dtype=torch.float32,
    )
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                # The file interleaves each head's halves for its RoPE; transformers rotates halves.
                count = heads if parts[2] == "attn_q" else kv_heads
                rows, columns = weight.shape
                weight = weight.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
            name = f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]] + ".weight"
        state[name] = torch.from_numpy(np.ascontiguousarray(weight))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    model.load_state_dict(state, strict=True)
    return model


def llama(path, **options):
    """llama.cpp on the CPU: no flash attention; its KV cache is f16, its default."""
    from llama_cpp import Llama

    return Llama(str(path), n_gpu_layers=0, flash_attn=False, n_batch=512, n_ubatch=512, n_threads=2, verbose=False, **options)


def write(name, golden):
    """One line per field and per case, so that a diff shows what changed."""
    cases = golden.pop("cases")
    head = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in golden.items())
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    path = HERE / name
    path.write_text(f'{{\n{head} "cases": [\n{lines}\n]}}\n')
    print(path, path.stat().st_size, "bytes")
