//! What the tests share: a small layout, memory in a vector, and KV bytes that depend on all the tokens before them.

use std::{
    ops::Range,
    sync::{Arc, Mutex},
};

use baton_kv::{
    Attempt, BlockId, BlockName, Epoch, KvDtype, KvIdentity, KvLayout, KvMemory, KvMemoryError, MemoryFile, NodeId,
    RequestId, SharedPool, Time, TokenId,
};

use crate::{Capability, FirstToken, ReceiverConfig, Reserve};

pub(crate) const LAYOUT: KvLayout = KvLayout {
    layers: 3,
    heads: 2,
    head_dim: 2,
    block_tokens: 4,
    dtype: KvDtype::Bf16,
};
pub(crate) const IDENTITY: KvIdentity = KvIdentity([7; 32]);
pub(crate) const EPOCH: Epoch = Epoch(11);
pub(crate) const ROOT: BlockName = BlockName([3; 32]);
pub(crate) const VOCABULARY: usize = 1_000;
pub(crate) const LEASE_MS: u64 = 1_000;
pub(crate) const DRAIN_MS: u64 = 200;
pub(crate) const DEADLINE: Time = Time(60_000_000);

pub(crate) fn config() -> ReceiverConfig {
    ReceiverConfig {
        node: NodeId("decode-0".into()),
        address: "127.0.0.1:1".into(),
        epoch: EPOCH,
        identity: IDENTITY,
        layout: LAYOUT,
        vocabulary: VOCABULARY,
        protocol_max: baton_proto::PROTOCOL_MAX,
        lease_ms: LEASE_MS,
        drain_ms: DRAIN_MS,
        max_handoffs: 4,
    }
}

/// With alternatives.
pub(crate) fn first_token() -> FirstToken {
    FirstToken {
        token: 42,
        logprob: -1.0,
        alternatives: vec![(7, -0.5), (42, -1.0)],
    }
}

pub(crate) fn reserve(request: u128, attempt: u32, prompt: &[TokenId]) -> Reserve {
    Reserve {
        request: RequestId(request),
        attempt: Attempt(attempt),
        identity: IDENTITY,
        root: ROOT,
        prompt: prompt.to_vec(),
        deadline: DEADLINE,
        capability: Capability::new([request as u8; 32]),
    }
}

/// Memory of a pool, in a file that can be shared.
pub(crate) struct TestMemory {
    layout: KvLayout,
    blocks: usize,
    file: MemoryFile,
    /// Held by whoever looks into the file.
    lock: Mutex<()>,
}

impl TestMemory {
    pub(crate) fn new(layout: KvLayout, blocks: usize) -> Arc<Self> {
        let memory = Self {
            layout,
            blocks,
            file: MemoryFile::create(blocks * layout.block_bytes()).unwrap(),
            lock: Mutex::new(()),
        };
        memory.with_bytes(|bytes| bytes.fill(0xEE));
        Arc::new(memory)
    }

    fn with_bytes<R>(&self, f: impl FnOnce(&mut [u8]) -> R) -> R {
        let _lock = self.lock.lock().unwrap();
        let len = self.blocks * self.layout.block_bytes();
        // SAFETY: the file's own map, under the lock.
        #[allow(unsafe_code)]
        f(unsafe { std::slice::from_raw_parts_mut(self.file.as_ptr(), len) })
    }

    /// Where each head's valid run lies, in canonical order.
    fn runs(
        &self,
        layer: usize,
        block: BlockId,
        tokens: usize,
        bytes: usize,
    ) -> Result<Vec<(usize, usize)>, KvMemoryError> {
        let layout = &self.layout;
        if layer >= layout.layers || block.0 as usize >= self.blocks || tokens > layout.block_tokens {
            return Err(KvMemoryError::OutOfRange);
        }
        let expected = layout.valid_bytes(tokens) / layout.layers;
        if bytes != expected {
            return Err(KvMemoryError::Length { expected, got: bytes });
        }
        let start = (layer * self.blocks + block.0 as usize) * layout.layer_block_bytes();
        let heads = 2 * layout.heads;
        Ok((0..heads)
            .map(|head| {
                (
                    start + head * layout.head_bytes(layout.block_tokens),
                    layout.head_bytes(tokens),
                )
            })
            .collect())
    }

    /// All layers of a block's valid tokens.
    pub(crate) fn block(&self, block: BlockId, tokens: usize) -> Vec<u8> {
        self.layers(block, 0..self.layout.layers, tokens)
    }

    /// Some layers of a block's valid tokens.
    pub(crate) fn layers(&self, block: BlockId, layers: Range<usize>, tokens: usize) -> Vec<u8> {
        let layer_bytes = self.layout.valid_bytes(tokens) / self.layout.layers;
        let mut bytes = vec![0; layers.len() * layer_bytes];
        for (layer, piece) in layers.zip(bytes.chunks_exact_mut(layer_bytes)) {
            self.read(layer, block, tokens, piece).unwrap();
        }
        bytes
    }

    /// Writes the KV of a whole prompt into `table`, as an engine would.
    pub(crate) fn compute(&self, prompt: &[TokenId], table: &[BlockId]) {
        for (index, block) in table.iter().enumerate() {
            let bytes = kv_of(&self.layout, prompt, index);
            let tokens = (prompt.len() - index * self.layout.block_tokens).min(self.layout.block_tokens);
            let layer_bytes = bytes.len() / self.layout.layers;
            for (layer, piece) in bytes.chunks_exact(layer_bytes).enumerate() {
                self.write(layer, *block, tokens, piece).unwrap();
            }
        }
    }
}

impl KvMemory for TestMemory {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn blocks(&self) -> usize {
        self.blocks
    }

    fn read(&self, layer: usize, block: BlockId, tokens: usize, out: &mut [u8]) -> Result<(), KvMemoryError> {
        let runs = self.runs(layer, block, tokens, out.len())?;
        self.with_bytes(|bytes| {
            let mut at = 0;
            for (start, len) in runs {
                out[at..at + len].copy_from_slice(&bytes[start..start + len]);
                at += len;
            }
        });
        Ok(())
    }

    fn write(&self, layer: usize, block: BlockId, tokens: usize, piece: &[u8]) -> Result<(), KvMemoryError> {
        let runs = self.runs(layer, block, tokens, piece.len())?;
        self.with_bytes(|bytes| {
            let mut at = 0;
            for (start, len) in runs {
                bytes[start..start + len].copy_from_slice(&piece[at..at + len]);
                at += len;
            }
        });
        Ok(())
    }

    fn shared(&self) -> Option<SharedPool<'_>> {
        Some(SharedPool {
            file: self.file.file(),
            blocks: self.blocks,
        })
    }
}

/// The valid bytes of block `index` of a prompt, `[layer][k|v][head][token][dim]`; each depends on every token up to its own.
pub(crate) fn kv_of(layout: &KvLayout, prompt: &[TokenId], index: usize) -> Vec<u8> {
    let first = index * layout.block_tokens;
    let last = prompt.len().min(first + layout.block_tokens);
    let mut prefix = 0xcbf2_9ce4_8422_2325_u64;
    let mut prefixes = Vec::new();
    for token in &prompt[..last] {
        prefix = (prefix ^ u64::from(*token)).wrapping_mul(0x0100_0000_01b3);
        prefixes.push(prefix);
    }
    let mut bytes = Vec::new();
    for run in 0..layout.layers * 2 * layout.heads {
        for prefix in &prefixes[first..last] {
            for byte in 0..layout.head_bytes(1) {
                let mixed = (prefix ^ ((run * 977 + byte) as u64)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                bytes.push((mixed >> 56) as u8);
            }
        }
    }
    bytes
}
