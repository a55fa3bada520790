"""Writes blocks.txt: random blocks of every quantised type, and what the `gguf` package makes of them.

  python tests/goldens/make_blocks.py

A line is a type, the blocks' bytes, and their numbers as f32 (little endian), both in hexadecimal.
"""

import importlib.metadata

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from pathlib import Path

# Where the f16 scales of a block lie.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def main():
    rng = np.random.default_rng(7)
    lines = [f"# gguf {importlib.metadata.version('gguf')}, numpy {np.__version__}"]
    for name, halves in HALVES.items():
        dtype = GGMLQuantizationType[name]
        numbers, size = GGML_QUANT_SIZES[dtype]
        blocks = rng.integers(0, 256, (512 // numbers, size), dtype=np.uint8)
        blocks[0] = 0xFF  # every quant and factor at its largest
        for at in halves:
            scales = (rng.standard_normal(len(blocks)) * 0.05).astype(np.float16)
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
        values = dequantize(blocks, dtype).astype("<f4")
        assert values.size == 512 and np.isfinite(values).all()
        lines.append(f"{name} {blocks.tobytes().hex()} {values.tobytes().hex()}")
    path = Path(__file__).resolve().parent / "blocks.txt"
    path.write_text("\n".join(lines) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
