"""Writes tiny/: random checkpoints of some ten kilobytes in Hugging Face's format, and the logits that transformers gives for some prompts.

  python tests/goldens/make_tiny.py

Takes some seconds. Fields of logits.json: README.md.
"""

import importlib.metadata
import json
import shutil

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
    Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)  # fmt: skip
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.logging import disable_progress_bar

from common import HERE, write

TINY = HERE / "tiny"
VOCABULARY = 272
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=257,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def default_rope(theta):
    return {"rope_type": "default", "rope_theta": theta}


# name: (config, model, stored as, most bytes of a file)
CHECKPOINTS = {
    "llama": (LlamaConfig(**SHAPE, rope_parameters=default_rope(10000.0)), LlamaForCausalLM, torch.bfloat16, None),
    "llama3-rope": (
        LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True), LlamaForCausalLM, torch.float16, None,
    ),
    "mistral": (
        MistralConfig(**SHAPE, head_dim=16, sliding_window=24, rope_parameters=default_rope(10000.0)),
        MistralForCausalLM, torch.bfloat16, 30_000,
    ),
    "qwen2": (
        Qwen2Config(**SHAPE, rope_parameters=default_rope(1000000.0), tie_word_embeddings=True),
        Qwen2ForCausalLM, torch.bfloat16, None,
    ),
    "qwen3": (
        Qwen3Config(
            **{**SHAPE, "intermediate_size": 32, "num_hidden_layers": 1}, head_dim=48, tie_word_embeddings=True,
            rope_parameters=default_rope(1000000.0),
        ),
        Qwen3ForCausalLM, torch.float32, None,
    ),
}  # fmt: skip

# Other switches for the same weights: (checkpoint, keys of its config.json).
VARIANTS = [
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}),
    ("mistral", {"sliding_window": None}),
]
PROMPTS = [[(i * 37 + 5 + length) % VOCABULARY for i in range(length)] for length in (1, 31, 33, 100)]


def bf16_kv(module, query, key, value, *args, **kwargs):
    """Eager attention over keys and values rounded to bf16, as a pool of blocks gives them back."""
    key, value = (x.to(torch.bfloat16).to(x.dtype) for x in (key, value))
    return eager_attention_forward(module, query, key, value, *args, **kwargs)


def bf16_activations(module, args):
    """What a matrix stored as bf16 is multiplied with, rounded as Baton rounds it."""
    return tuple(x.to(torch.bfloat16).to(x.dtype) for x in args)


def tokenizer():
    """GPT-2's byte-level BPE with few merges, and three control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    for index, token in enumerate(["<|im_start|>", "<|im_end|>", "<|endoftext|>"]):
        vocab[token] = 256 + index
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("e", "r"), ("o", "n"), ("Ġ", "a")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    names = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return bpe


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_checkpoint(seed, name):
    config, architecture, dtype, most = CHECKPOINTS[name]
    torch.manual_seed(seed)
    model = architecture(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            # Norms around 1, everything else large enough for attention to look at something.
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.2 * noise if "norm" in key else 0.25 * noise)
    model.to(dtype).save_pretrained(TINY / name, **({"max_shard_size": most} if most else {}))


def cases(name, prompts, **config):
    """Logits after each prompt, in f32, of a checkpoint as it is read back: a model that was rounded in memory has RoPE frequencies that were, too."""
    _, architecture, stored, _ = CHECKPOINTS[name]
    model = architecture.from_pretrained(TINY / name, dtype=torch.float32, **config).eval()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)] if stored == torch.bfloat16 else []
    for prompt in prompts:
        case = {"prompt": prompt}
        for field, attention, rounded in (("f32", "eager", []), ("rounded", "bf16_kv", linears)):
            model.set_attn_implementation(attention)
            hooks = [module.register_forward_pre_hook(bf16_activations) for module in rounded]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt])).logits[0, -1]
            case[field] = [round(x, 6) for x in logits.tolist()]
            for hook in hooks:
                hook.remove()
        yield case


def main():
    disable_progress_bar()
    ALL_ATTENTION_FUNCTIONS.register("bf16_kv", bf16_kv)
    ALL_MASK_ATTENTION_FUNCTIONS.register("bf16_kv", eager_mask)
    shutil.rmtree(TINY, ignore_errors=True)
    for seed, name in enumerate(CHECKPOINTS):
        write_checkpoint(seed, name)
    lines = [{"model": name, **case} for name in CHECKPOINTS for case in cases(name, PROMPTS)]
    lines += [{"model": name, "config": config, **case} for name, config in VARIANTS for case in cases(name, PROMPTS[-1:], **config)]
    tokenizer().save(str(TINY / "llama" / "tokenizer.json"))
    (TINY / "llama" / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}, indent=1) + "\n"
    )
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch", "tokenizers", "safetensors")}
    golden = {"command": "python tests/goldens/make_tiny.py", "versions": versions, "cases": lines}
    write("tiny/logits.json", golden)
    for path in sorted(TINY.rglob("*")):
        if path.is_file():
            print(path.relative_to(TINY), path.stat().st_size)
            assert path.stat().st_size < 120_000, "tiny is what git keeps"


if __name__ == "__main__":
    main()
