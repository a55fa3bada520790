//! Llamas of random weights: as large as wanted, for speed only.

use std::{fs::File, io::BufWriter, path::Path};

use baton_gguf::{GgufWriter, TensorType};

/// Shape of a Llama with a tied head.
#[derive(Clone, Copy, Debug)]
pub struct RandomLlama {
    /// Layers.
    pub layers: u32,
    /// Width of the residual.
    pub embedding: u32,
    /// Width of the feed-forward block.
    pub feed_forward: u32,
    /// Query heads.
    pub heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Tokens of the vocabulary.
    pub vocabulary: u32,
}

impl RandomLlama {
    /// The shape of Llama 3.2 1B.
    pub const ONE_BILLION: Self = Self {
        layers: 16,
        embedding: 2_048,
        feed_forward: 8_192,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocabulary: 128_256,
    };

    /// Writes it as a GGUF file: Q4_1, embeddings and head in Q8_0, as in the default model. It has no tokenizer. The bytes depend on the shape alone.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let mut out = BufWriter::new(File::create(path)?);
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let tensors = self.tensors();
        let mut types = tensors.iter().map(|tensor| tensor.3);
        self.metadata().stream(&mut out, &tensors, |_, len| {
            let dtype = types.next().expect("a type of each tensor");
            let mut bytes = vec![0; len];
            match dtype {
                TensorType::F32 => bytes
                    .chunks_exact_mut(4)
                    .for_each(|one| one.copy_from_slice(&1f32.to_le_bytes())),
                TensorType::Q4_1 => random.blocks::<20>(&mut bytes, &[SCALE, MINIMUM]),
                _ => random.blocks::<34>(&mut bytes, &[FINE_SCALE]),
            }
            bytes
        })?;
        out.into_inner()?.sync_all()
    }

    fn metadata(&self) -> GgufWriter {
        GgufWriter::new()
            .string("general.architecture", "llama")
            .string("general.name", "random-llama")
            .u32("llama.context_length", 4_096)
            .u32("llama.block_count", self.layers)
            .u32("llama.embedding_length", self.embedding)
            .u32("llama.feed_forward_length", self.feed_forward)
            .u32("llama.attention.head_count", self.heads)
            .u32("llama.attention.head_count_kv", self.kv_heads)
            .u32("llama.attention.key_length", self.head_dim)
            .u32("llama.attention.value_length", self.head_dim)
            .u32("llama.rope.dimension_count", self.head_dim)
            .f32("llama.rope.freq_base", 500_000.0)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            .u32("llama.vocab_size", self.vocabulary)
            .string("tokenizer.ggml.model", "no_vocab")
    }

    fn tensors(&self) -> Vec<(String, u64, u64, TensorType)> {
        let [embedding, feed_forward] = [self.embedding, self.feed_forward].map(u64::from);
        let [attended, kept] = [self.heads, self.kv_heads].map(|heads| u64::from(heads * self.head_dim));
        let tensor = |name: &str, columns, rows, dtype| (format!("{name}.weight"), columns, rows, dtype);
        let mut tensors = vec![tensor(
            "token_embd",
            embedding,
            self.vocabulary.into(),
            TensorType::Q8_0,
        )];
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}");
            for norm in ["attn_norm", "ffn_norm"] {
                tensors.push(tensor(&name(norm), embedding, 1, TensorType::F32));
            }
            for (part, columns, rows) in [
                ("attn_q", embedding, attended),
                ("attn_k", embedding, kept),
                ("attn_v", embedding, kept),
                ("attn_output", attended, embedding),
                ("ffn_gate", embedding, feed_forward),
                ("ffn_up", embedding, feed_forward),
                ("ffn_down", feed_forward, embedding),
            ] {
                tensors.push(tensor(&name(part), columns, rows, TensorType::Q4_1));
            }
        }
        tensors.push(tensor("output_norm", embedding, 1, TensorType::F32));
        tensors
    }
}

// Weights of about ±0.03, whose mean is 0, as f16: 2⁻⁸ times 0..=15, less 7.5 of it; and 2⁻¹² times −128..=127.
const SCALE: u16 = 0x1c00;
const MINIMUM: u16 = 0xa780;
const FINE_SCALE: u16 = 0x0c00;

/// Xorshift (Marsaglia 2003).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Blocks of `SIZE` bytes: `head`, then random bytes.
    fn blocks<const SIZE: usize>(&mut self, bytes: &mut [u8], head: &[u16]) {
        for block in bytes.chunks_exact_mut(SIZE) {
            let (scales, numbers) = block.split_at_mut(2 * head.len());
            for (out, scale) in scales.chunks_exact_mut(2).zip(head) {
                out.copy_from_slice(&scale.to_le_bytes());
            }
            for out in numbers.chunks_mut(8) {
                let word = self.next().to_le_bytes();
                out.copy_from_slice(&word[..out.len()]);
            }
        }
    }
}

#[cfg(test)]
mod tests;
