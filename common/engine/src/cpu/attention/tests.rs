use super::*;
use crate::cpu::testing::{Random, bits, isas};

struct State {
    running: Vec<Running>,
    acc: Vec<f32>,
}

/// Takes tiles of the given sizes, one after another.
#[allow(unsafe_code)]
fn steps(isa: Isa, heads: usize, d: usize, tiles: &[usize]) -> State {
    let mut random = Random::new(11);
    let queries: Vec<f32> = random.floats(heads * d).iter().map(|x| x * 4.0).collect();
    let mut state = State {
        running: vec![Running::START; heads],
        acc: vec![0.0; heads * d],
    };
    for &tokens in tiles {
        let (mut keys, mut values) = (random.floats(TILE * d), random.floats(TILE * d));
        // What lies beyond the tile's tokens must not matter.
        let poison = if isa == Isa::Portable { 0.0 } else { f32::NAN };
        keys[tokens * d..].fill(poison);
        values[tokens * d..].fill(poison);
        let step = TileStep {
            queries: queries.as_ptr(),
            heads,
            head_dim: d,
            scale: 0.3,
            keys: keys.as_ptr(),
            values: values.as_ptr(),
            tokens,
            running: state.running.as_mut_ptr(),
            acc: state.acc.as_mut_ptr(),
        };
        // SAFETY: `isa` is one of this CPU's; all vectors have the named shapes.
        unsafe { step_fn(isa)(&step) };
    }
    state
}

#[test]
fn every_isa_gives_the_oracle_s_bits() {
    for heads in 1..=9 {
        for d in [16, 32, 48, 64, 80, 96, 128] {
            for tiles in [&[1][..], &[2], &[15], &[16], &[17], &[31], &[32], &[32, 32, 5]] {
                let oracle = steps(Isa::Portable, heads, d, tiles);
                for isa in isas() {
                    let got = steps(isa, heads, d, tiles);
                    assert_eq!(
                        bits(&got.acc),
                        bits(&oracle.acc),
                        "{isa}, {heads} heads of {d}, {tiles:?}"
                    );
                    for (got, oracle) in got.running.iter().zip(&oracle.running) {
                        assert_eq!(bits(&[got.max, got.sum]), bits(&[oracle.max, oracle.sum]));
                    }
                }
            }
        }
    }
}
