//! crc64-nvme over a block's valid bytes: `[layer][k|v][head][token < valid][dim]`. Catches accidents, not attackers.

use std::ops::Range;

use crate::{BlockId, KvMemory, KvMemoryError};

/// Whether sums are taken. Only a benchmark that is to know what they cost is built without (feature `unchecked`).
pub const CHECKED: bool = cfg!(not(feature = "unchecked"));

/// The checksum of one block's valid bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Checksum(pub u64);

/// A checksum under way.
pub struct ChecksumState {
    digest: crc_fast::Digest,
}

impl Default for ChecksumState {
    fn default() -> Self {
        Self {
            digest: crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme),
        }
    }
}

impl ChecksumState {
    /// Adds bytes, in order.
    pub fn update(&mut self, bytes: &[u8]) {
        if CHECKED {
            self.digest.update(bytes);
        }
    }

    /// Adds the first `tokens` tokens of one layer of a block where they lie. The caller holds the block. `scratch` can be reused.
    pub fn add_piece(
        &mut self,
        memory: &dyn KvMemory,
        layer: usize,
        block: BlockId,
        tokens: usize,
        scratch: &mut Vec<u8>,
    ) -> Result<(), KvMemoryError> {
        let layout = memory.layout();
        if tokens == layout.block_tokens {
            // SAFETY: the caller holds the block, so that nobody writes it.
            #[allow(unsafe_code)]
            let piece = unsafe { memory.whole(layer, block) };
            if let Some(piece) = piece {
                self.update(piece);
                return Ok(());
            }
        }
        scratch.resize(layout.valid_bytes(tokens) / layout.layers, 0);
        memory.read(layer, block, tokens, scratch)?;
        self.update(scratch);
        Ok(())
    }

    /// The checksum so far.
    pub fn finish(self) -> Checksum {
        Checksum(self.digest.finalize())
    }
}

impl Checksum {
    /// Reads the block back from where it lies and sums its first `tokens` tokens, all layers in order.
    /// `scratch` can be reused.
    pub fn of_block(
        memory: &dyn KvMemory,
        block: BlockId,
        tokens: usize,
        scratch: &mut Vec<u8>,
    ) -> Result<Self, KvMemoryError> {
        Self::of_layers(memory, 0..memory.layout().layers, block, tokens, scratch)
    }

    /// Sums the first `tokens` tokens of some layers of a block where they lie, in order. The caller holds the block. `scratch` can be reused.
    pub fn of_layers(
        memory: &dyn KvMemory,
        layers: Range<usize>,
        block: BlockId,
        tokens: usize,
        scratch: &mut Vec<u8>,
    ) -> Result<Self, KvMemoryError> {
        let mut state = ChecksumState::default();
        for layer in layers {
            state.add_piece(memory, layer, block, tokens, scratch)?;
        }
        Ok(state.finish())
    }

    /// The checksum of this one's bytes followed by `next_bytes` bytes whose checksum is `next`: a CRC is a remainder, so that the first is multiplied by x to the
    /// number of bits that follow.
    #[must_use]
    pub fn then(self, next: Self, next_bytes: usize) -> Self {
        Self(product(self.0, power(8 * next_bytes as u64)) ^ next.0)
    }
}

/// crc64-nvme's polynomial without its leading term; bit 63 is x⁰, as in the checksums.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// a · b modulo the polynomial.
fn product(a: u64, mut b: u64) -> u64 {
    (0..u64::BITS).rev().fold(0, |sum, bit| {
        let term = if a >> bit & 1 == 1 { b } else { 0 };
        b = (b >> 1) ^ if b & 1 == 1 { POLYNOMIAL } else { 0 };
        sum ^ term
    })
}

/// x to the `exponent` modulo the polynomial.
fn power(mut exponent: u64) -> u64 {
    let (mut result, mut square) = (1 << 63, 1 << 62);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result = product(result, square);
        }
        square = product(square, square);
        exponent >>= 1;
    }
    result
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::{KvDtype, KvLayout};

    const LAYOUT: KvLayout = KvLayout {
        layers: 2,
        heads: 1,
        head_dim: 2,
        block_tokens: 4,
        dtype: KvDtype::Bf16,
    };

    /// Whole blocks, `[layer][block]`.
    struct Memory(Mutex<Vec<Vec<u8>>>);

    impl Memory {
        fn with<R>(&self, layer: usize, block: BlockId, tokens: usize, f: impl Fn(&mut [u8], usize) -> R) -> Vec<R> {
            let full = LAYOUT.head_bytes(LAYOUT.block_tokens);
            let mut pieces = self.0.lock().unwrap();
            let heads = pieces[layer * 3 + block.0 as usize].chunks_exact_mut(full);
            let valid = LAYOUT.head_bytes(tokens);
            heads
                .enumerate()
                .map(|(at, head)| f(&mut head[..valid], at * valid))
                .collect()
        }
    }

    impl KvMemory for Memory {
        fn layout(&self) -> &KvLayout {
            &LAYOUT
        }
        fn blocks(&self) -> usize {
            3
        }
        fn read(&self, layer: usize, block: BlockId, tokens: usize, out: &mut [u8]) -> Result<(), KvMemoryError> {
            let heads = self.with(layer, block, tokens, |head, _| head.to_vec());
            out.copy_from_slice(&heads.concat());
            Ok(())
        }
        fn write(&self, layer: usize, block: BlockId, tokens: usize, bytes: &[u8]) -> Result<(), KvMemoryError> {
            self.with(layer, block, tokens, |head, at| {
                let len = head.len();
                head.copy_from_slice(&bytes[at..at + len]);
            });
            Ok(())
        }
    }

    #[test]
    fn sums_of_parts_make_the_sum_of_the_whole() {
        let bytes: Vec<u8> = (0..1000u32).map(|i| ((i * 7919) >> 3) as u8).collect();
        let sum = |bytes: &[u8]| {
            let mut state = ChecksumState::default();
            state.update(bytes);
            state.finish()
        };
        for cut in [0, 1, 31, 500, 999, 1000] {
            let (first, second) = bytes.split_at(cut);
            assert_eq!(sum(first).then(sum(second), second.len()), sum(&bytes), "{cut}");
        }
    }

    #[test]
    fn it_is_crc64_nvme() {
        let mut state = ChecksumState::default();
        state.update(b"1234");
        state.update(b"56789");
        assert_eq!(state.finish(), Checksum(0xae8b_1486_0a79_9888));
    }

    #[test]
    fn every_valid_byte_counts_and_no_other() {
        let block = BlockId(1);
        let piece = LAYOUT.layer_block_bytes();
        let memory = Memory(Mutex::new(vec![vec![7; piece]; 2 * 3]));
        let of = |tokens| Checksum::of_block(&memory, block, tokens, &mut Vec::new()).unwrap();
        for tokens in 1..=LAYOUT.block_tokens {
            let before = of(tokens);
            let mut changes = 0;
            for at in 0..2 * piece {
                let flip = || memory.0.lock().unwrap()[at / piece * 3 + 1][at % piece] ^= 1;
                flip();
                changes += usize::from(of(tokens) != before);
                flip();
            }
            assert_eq!(changes, LAYOUT.valid_bytes(tokens), "{tokens} tokens");
            memory.0.lock().unwrap()[0].fill(0);
            assert_eq!(of(tokens), before, "another block");
        }
    }

    #[test]
    fn a_block_that_was_copied_has_the_same_sum() {
        let memory = Memory(Mutex::new(
            (0..6).map(|at| vec![at; LAYOUT.layer_block_bytes()]).collect(),
        ));
        let mut piece = vec![0; LAYOUT.valid_bytes(3) / LAYOUT.layers];
        let mut scratch = Vec::new();
        for layer in 0..LAYOUT.layers {
            memory.read(layer, BlockId(0), 3, &mut piece).unwrap();
            memory.write(layer, BlockId(2), 3, &piece).unwrap();
        }
        let mut of = |block, tokens| Checksum::of_block(&memory, BlockId(block), tokens, &mut scratch).unwrap();
        assert_eq!(of(0, 3), of(2, 3));
        assert_ne!(of(0, 4), of(2, 4));
    }
}
