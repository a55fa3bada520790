use baton_kv::KvDtype;

use super::*;

fn layout() -> KvLayout {
    KvLayout {
        layers: 2,
        heads: 3,
        head_dim: 16,
        block_tokens: 4,
        dtype: KvDtype::Bf16,
    }
}

#[test]
fn pieces_come_back_whole_or_in_part() {
    let memory = CpuKvMemory::new(layout(), 5).unwrap();
    let full: Vec<u8> = (0..layout().layer_block_bytes()).map(|i| (i % 251) as u8).collect();
    memory.write(1, BlockId(3), 4, &full).unwrap();
    let mut out = vec![0; full.len()];
    memory.read(1, BlockId(3), 4, &mut out).unwrap();
    assert_eq!(out, full);

    // Part of it: the first tokens of each head's run, without gaps.
    let mut part = vec![0; layout().valid_bytes(3) / 2];
    memory.read(1, BlockId(3), 3, &mut part).unwrap();
    let run = layout().head_bytes(4);
    let expected: Vec<u8> = full
        .chunks_exact(run)
        .flat_map(|head| head[..layout().head_bytes(3)].to_vec())
        .collect();
    assert_eq!(part, expected);

    // Written in part: the rest stays.
    memory.write(1, BlockId(2), 3, &part).unwrap();
    memory.read(1, BlockId(2), 4, &mut out).unwrap();
    for (got, wanted) in out.chunks_exact(run).zip(full.chunks_exact(run)) {
        let (valid, rest) = got.split_at(layout().head_bytes(3));
        assert_eq!(valid, &wanted[..valid.len()]);
        assert!(rest.iter().all(|&byte| byte == 0));
    }

    // Neighbours are untouched.
    for (layer, block) in [(0, 3), (1, 4), (1, 1)] {
        memory.read(layer, BlockId(block), 4, &mut out).unwrap();
        assert!(out.iter().all(|&byte| byte == 0));
    }
    memory.read(0, BlockId(0), 0, &mut []).unwrap();
}

#[test]
fn ranges_outside_the_pool_are_refused() {
    let memory = CpuKvMemory::new(layout(), 5).unwrap();
    let mut out = vec![0; layout().layer_block_bytes()];
    for (layer, block, tokens) in [(2, 0, 4), (0, 5, 4), (0, 0, 5)] {
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
    assert!(CpuKvMemory::new(layout(), usize::MAX / 4).is_err());
}
