//! Where a token's keys and values lie: `[layer][block][k|v][head]`, and then as the identity's class of numerics has it: `[token][dim]`, or keys by dimension.

/// Element type of keys and values in the pool.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum KvDtype {
    /// bfloat16, 2 bytes.
    Bf16,
}

impl KvDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
        }
    }
}

/// The shape of a pool; negotiated per pair of nodes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct KvLayout {
    /// Transformer layers.
    pub layers: usize,
    /// KV heads.
    pub heads: usize,
    /// Elements of one head's key or value.
    pub head_dim: usize,
    /// Tokens of a full block.
    pub block_tokens: usize,
    /// Element type.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Bytes of one head's keys (or values) for `tokens` tokens: contiguous where they lie by token.
    pub fn head_bytes(&self, tokens: usize) -> usize {
        tokens * self.head_dim * self.dtype.bytes()
    }

    /// Bytes of one block in one layer: `[k|v][head]` of all its tokens.
    pub fn layer_block_bytes(&self) -> usize {
        2 * self.heads * self.head_bytes(self.block_tokens)
    }

    /// Bytes of one full block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.layers * self.layer_block_bytes()
    }

    /// Bytes that travel for a block of which the first `tokens` are valid.
    pub fn valid_bytes(&self, tokens: usize) -> usize {
        self.layers * 2 * self.heads * self.head_bytes(tokens)
    }

    /// Bytes of KV per token.
    pub fn token_bytes(&self) -> usize {
        self.valid_bytes(1)
    }

    /// Blocks needed for `tokens` tokens.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_a_small_llama() {
        let layout = KvLayout {
            layers: 30,
            heads: 3,
            head_dim: 64,
            block_tokens: 32,
            dtype: KvDtype::Bf16,
        };
        assert_eq!(layout.token_bytes(), 23_040);
        assert_eq!(layout.block_bytes(), 32 * 23_040);
        assert_eq!(layout.valid_bytes(32), layout.block_bytes());
        assert_eq!(layout.layer_block_bytes() * 30, layout.block_bytes());
        assert_eq!(layout.head_bytes(5), 5 * 64 * 2);
        assert_eq!([0, 1, 32, 33].map(|tokens| layout.blocks_for(tokens)), [0, 1, 1, 2]);
    }
}
