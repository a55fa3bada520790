use baton_kv::{ForeignMemory, KvDtype, MemoryFile};

use super::*;

const TOKENS: usize = 64;
const DIM: usize = 16;
const HEADS: usize = 3;

fn layout() -> KvLayout {
    KvLayout {
        layers: 2,
        heads: HEADS,
        head_dim: DIM,
        block_tokens: TOKENS,
        dtype: KvDtype::Bf16,
    }
}

/// Which number a piece of `tokens` tokens has at each place, as (slot, token, dim).
fn places(tokens: usize) -> Vec<(usize, usize, usize)> {
    let mut places = Vec::new();
    for slot in 0..HEADS {
        for tile in (0..tokens).step_by(TILE) {
            for dim in 0..DIM {
                places.extend((tile..tokens.min(tile + TILE)).map(|token| (slot, token, dim)));
            }
        }
    }
    for slot in HEADS..2 * HEADS {
        places.extend((0..tokens).flat_map(|token| (0..DIM).map(move |dim| (slot, token, dim))));
    }
    places
}

fn number((slot, token, dim): (usize, usize, usize)) -> u16 {
    (1 + slot * TOKENS * DIM + token * DIM + dim) as u16
}

fn piece(tokens: usize) -> Vec<u8> {
    places(tokens)
        .into_iter()
        .flat_map(|place| number(place).to_le_bytes())
        .collect()
}

#[test]
fn pieces_come_back_whole_or_in_part() {
    for shared in [false, true] {
        come_back(CpuKvMemory::new(layout(), 5, shared).unwrap());
    }
}

fn come_back(memory: CpuKvMemory) {
    memory.write(1, BlockId(3), TOKENS, &piece(TOKENS)).unwrap();
    for tokens in [0, 1, 3, 31, 32, 33, 63, 64] {
        let mut out = vec![0; piece(tokens).len()];
        memory.read(1, BlockId(3), tokens, &mut out).unwrap();
        assert_eq!(out, piece(tokens), "{tokens} tokens");
    }

    // Written in part: the rest stays.
    for tokens in [3, 32, 40] {
        memory
            .write(1, BlockId(2), TOKENS, &vec![0; piece(TOKENS).len()])
            .unwrap();
        memory.write(1, BlockId(2), tokens, &piece(tokens)).unwrap();
        let mut out = vec![1; piece(TOKENS).len()];
        memory.read(1, BlockId(2), TOKENS, &mut out).unwrap();
        for (bytes, place) in out.as_chunks::<2>().0.iter().zip(places(TOKENS)) {
            let wanted = if place.1 < tokens { number(place) } else { 0 };
            assert_eq!(u16::from_le_bytes(*bytes), wanted, "{place:?} of {tokens}");
        }
    }

    // Neighbours are untouched.
    let mut out = vec![1; piece(TOKENS).len()];
    for (layer, block) in [(0, 3), (1, 4), (1, 1)] {
        memory.read(layer, BlockId(block), TOKENS, &mut out).unwrap();
        assert!(out.iter().all(|&byte| byte == 0));
    }
}

#[test]
fn ranges_outside_the_pool_are_refused() {
    let memory = CpuKvMemory::new(layout(), 5, false).unwrap();
    let mut out = vec![0; layout().layer_block_bytes()];
    for (layer, block, tokens) in [(2, 0, 64), (0, 5, 64), (0, 0, 65)] {
        assert_eq!(
            memory.read(layer, BlockId(block), tokens, &mut out),
            Err(KvMemoryError::OutOfRange)
        );
        assert_eq!(
            memory.write(layer, BlockId(block), tokens, &out),
            Err(KvMemoryError::OutOfRange)
        );
    }
    let length = KvMemoryError::Length {
        expected: layout().valid_bytes(3) / 2,
        got: out.len(),
    };
    assert_eq!(memory.read(0, BlockId(0), 3, &mut out), Err(length));
    assert_eq!(memory.write(0, BlockId(0), 3, &out), Err(length));
}

#[test]
fn a_pool_beyond_memory_is_refused() {
    for shared in [false, true] {
        assert!(CpuKvMemory::new(layout(), usize::MAX / 4, shared).is_err());
    }
}

/// Bytes of a page on x86-64.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
const PAGE: usize = 4096;

/// Whether the system has given the page in the middle of a piece.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn present(memory: &CpuKvMemory, layer: usize, block: u32) -> bool {
    use std::os::unix::fs::FileExt;

    let middle = memory.block(layer, BlockId(block)) as usize + layout().layer_block_bytes() / 2;
    let mut entry = [0; 8];
    let pages = std::fs::File::open("/proc/self/pagemap").unwrap();
    pages.read_exact_at(&mut entry, (middle / PAGE * 8) as u64).unwrap();
    u64::from_le_bytes(entry) >> 63 == 1
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn prepared_blocks_have_their_pages_and_their_bytes() {
    prepared(CpuKvMemory::new(layout(), 8, false).unwrap());
    prepared(CpuKvMemory::new(layout(), 8, true).unwrap());
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn prepared(memory: CpuKvMemory) {
    memory.write(1, BlockId(3), TOKENS, &piece(TOKENS)).unwrap();
    let given = |memory: &CpuKvMemory| [0, 1].map(|layer| [1, 3, 4, 7].map(|block| present(memory, layer, block)));
    assert_eq!(given(&memory), [[false; 4], [false, true, false, false]]);
    memory.prepare(&[3, 4, 1, 8, u32::MAX].map(BlockId));
    assert_eq!(given(&memory), [[true, true, true, false]; 2], "and no others");
    let mut out = vec![0; piece(TOKENS).len()];
    memory.read(1, BlockId(3), TOKENS, &mut out).unwrap();
    assert_eq!(out, piece(TOKENS));
}

#[test]
fn a_shared_pool_lies_in_its_file_as_the_layout_says() {
    assert!(CpuKvMemory::new(layout(), 5, false).unwrap().shared().is_none());
    let memory = CpuKvMemory::new(layout(), 5, true).unwrap();
    memory.write(1, BlockId(3), TOKENS, &piece(TOKENS)).unwrap();
    let shared = memory.shared().unwrap();
    let bytes = layout().layer_block_bytes();
    let foreign = ForeignMemory::open(MemoryFile::reader(shared.file).unwrap(), 2 * shared.blocks * bytes).unwrap();
    // SAFETY: copied.
    let copy = unsafe { foreign.bytes((shared.blocks + 3) * bytes, bytes) }
        .unwrap()
        .to_vec();
    assert_eq!((shared.blocks, copy), (5, piece(TOKENS)));
}
