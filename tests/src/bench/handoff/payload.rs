//! What travels: paged KV of a known pattern.

use baton_kv::{BlockId, Epoch, KvDtype, KvIdentity, KvLayout, KvMemory, TokenId};

/// Both ends' identity.
pub const IDENTITY: KvIdentity = KvIdentity([7; 32]);
/// The sender's life.
pub const SENDER_EPOCH: Epoch = Epoch(2);
/// Tokens are below it.
pub const VOCABULARY: usize = 50_000;

/// Most blocks of one prompt: its manifest has to fit into a message.
const PROMPT_BLOCKS: usize = 16_384;

/// Prompts that are pushed one after the other, their blocks full.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Payload {
    layers: usize,
    heads: usize,
    head_dim: usize,
    /// Of one prompt.
    pub blocks: usize,
    /// How many.
    pub prompts: usize,
}

impl Payload {
    /// `bytes` in blocks of one layer, `block_bytes` each, which must be 4 KiB times a power of two.
    pub fn paged(block_bytes: usize, bytes: usize) -> Self {
        // Keys and values of 32 tokens, two bytes a number.
        let numbers = block_bytes / (2 * 2 * 32);
        let head_dim = numbers.min(128);
        let blocks = bytes / block_bytes;
        Self {
            layers: 1,
            heads: numbers / head_dim,
            head_dim,
            blocks: blocks.min(PROMPT_BLOCKS),
            prompts: blocks.div_ceil(PROMPT_BLOCKS),
        }
    }

    /// One prompt of so many blocks of the default model's KV.
    pub fn of_default_model(blocks: usize) -> Self {
        Self {
            layers: 30,
            heads: 3,
            head_dim: 64,
            blocks,
            prompts: 1,
        }
    }

    /// Of both pools.
    pub fn layout(&self) -> KvLayout {
        KvLayout {
            layers: self.layers,
            heads: self.heads,
            head_dim: self.head_dim,
            block_tokens: 32,
            dtype: KvDtype::Bf16,
        }
    }

    /// Of all prompts.
    pub fn all_blocks(&self) -> usize {
        self.blocks * self.prompts
    }

    /// Of all prompts.
    pub fn bytes(&self) -> usize {
        self.all_blocks() * self.layout().block_bytes()
    }

    /// The prompt of request `request`: no two begin alike, so that no block of it is held.
    pub fn prompt(&self, request: u64) -> Vec<TokenId> {
        let tokens = self.blocks * self.layout().block_tokens;
        let mut prompt: Vec<TokenId> = (0..tokens).map(|at| (at * 7 % VOCABULARY) as TokenId).collect();
        prompt[..2].copy_from_slice(&[
            (request % VOCABULARY as u64) as TokenId,
            (request / VOCABULARY as u64) as TokenId,
        ]);
        prompt
    }

    /// The sender's block of each block of the payload: permuted, so that no neighbours belong together.
    pub fn places(&self) -> Vec<BlockId> {
        let mut places: Vec<BlockId> = (0..self.all_blocks() as u32).map(BlockId).collect();
        // Fisher and Yates, with a linear congruential generator.
        let mut state = 7_u64;
        for at in (1..places.len()).rev() {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            places.swap(at, ((state >> 33) % (at as u64 + 1)) as usize);
        }
        places
    }

    /// Writes the payload's blocks into `table`.
    pub fn fill(&self, memory: &dyn KvMemory, table: &[BlockId]) -> anyhow::Result<()> {
        self.each_piece(table, |layer, block, tokens, piece| {
            Ok(memory.write(layer, block, tokens, piece)?)
        })
    }

    /// Compares every byte of the payload's blocks in `table`.
    pub fn check(&self, memory: &dyn KvMemory, table: &[BlockId]) -> anyhow::Result<()> {
        anyhow::ensure!(table.len() == self.all_blocks(), "{} blocks came", table.len());
        let mut read = vec![0; self.layout().layer_block_bytes()];
        self.each_piece(table, |layer, block, tokens, piece| {
            memory.read(layer, block, tokens, &mut read)?;
            anyhow::ensure!(read == piece, "wrong bytes in layer {layer} of {block:?}");
            Ok(())
        })
    }

    /// Every eight bytes say where they belong.
    fn each_piece(
        &self,
        table: &[BlockId],
        mut act: impl FnMut(usize, BlockId, usize, &[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let layout = self.layout();
        let mut piece = vec![0_u8; layout.layer_block_bytes()];
        let words = piece.len() / 8;
        for (index, &block) in table.iter().enumerate() {
            for layer in 0..layout.layers {
                let first = (index * layout.layers + layer) * words;
                for (at, bytes) in piece.chunks_exact_mut(8).enumerate() {
                    let word = ((first + at) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    bytes.copy_from_slice(&word.to_le_bytes());
                }
                act(layer, block, layout.block_tokens, &piece)?;
            }
        }
        Ok(())
    }
}
