//! Where a token's keys and values lie: `[layer][block][k|v][head][token][dim]`.

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
    /// Bytes of one head's key (or value) for `tokens` tokens: the longest run that is contiguous for a partial block.
    pub fn head_bytes(&self, tokens: usize) -> usize {
        tokens * self.head_dim * self.dtype.bytes()
    }

    /// Bytes of one block in one layer: `[k|v][head][token][dim]`.
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
