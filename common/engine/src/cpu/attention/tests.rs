use super::*;
use crate::cpu::{
    math::{from_bf16, to_bf16},
    testing::{Random, bits, isas},
};

/// The tokens of a tile that are seen, tile by tile.
type Tiles<'a> = &'a [Range<usize>];

struct Inputs {
    /// `[count][d]`.
    queries: Vec<Vec<f32>>,
    /// Per tile `[token][d]`.
    keys: Vec<Vec<Vec<u16>>>,
    values: Vec<Vec<Vec<u16>>>,
}

fn inputs(count: usize, d: usize, tiles: usize) -> Inputs {
    let mut random = Random::new(11);
    let mut floats = |by: f32| -> Vec<f32> { random.floats(d).iter().map(|x| x * by).collect() };
    let queries = (0..count).map(|_| floats(2.0)).collect();
    let mut tokens = || -> Vec<Vec<Vec<u16>>> {
        let mut token = || floats(1.0).into_iter().map(to_bf16).collect();
        (0..tiles).map(|_| (0..TILE).map(|_| token()).collect()).collect()
    };
    Inputs {
        queries,
        keys: tokens(),
        values: tokens(),
    }
}

/// Takes the tiles one after another, `extra` numbers between the queries of one dimension and the next's.
#[allow(unsafe_code)]
fn steps(isa: Isa, inputs: &Inputs, tiles: Tiles<'_>, extra: usize) -> State {
    let (count, d) = (inputs.queries.len(), inputs.queries[0].len());
    let stride = count + extra;
    let mut queries = vec![f32::NAN; stride * d];
    for (q, query) in inputs.queries.iter().enumerate() {
        query.iter().enumerate().for_each(|(i, x)| queries[i * stride + q] = *x);
    }
    let mut state = State::new(count, d).unwrap();
    state.start(count, d);
    for (tile, tokens) in tiles.iter().enumerate() {
        // What is not seen must not matter.
        let nan = to_bf16(f32::NAN);
        let (mut keys, mut values) = (vec![nan; TILE * d], vec![nan; TILE * d]);
        for t in tokens.clone() {
            for i in 0..d {
                keys[i * TILE + t] = inputs.keys[tile][t][i];
                values[t * d + i] = inputs.values[tile][t][i];
            }
        }
        let step = TileStep {
            queries: queries.as_ptr(),
            stride,
            count,
            head_dim: d,
            keys: keys.as_ptr(),
            values: values.as_ptr(),
            seen: [bits_of(tokens.clone()); STEP_QUERIES],
            ahead: [[std::ptr::null(); 2]; 2],
            running: state.running.as_mut_ptr(),
            acc: state.acc.as_mut_slice().as_mut_ptr(),
        };
        // SAFETY: `isa` is one of this CPU's; all vectors have the named shapes.
        unsafe { step_fn(isa)(&step) };
    }
    state
}

fn state_bits(state: &State, queries: Range<usize>, d: usize) -> Vec<u32> {
    let running = state.running[queries.clone()].iter();
    let running = running.flat_map(|running| bits(&running.sums).into_iter().chain([running.max.to_bits()]));
    running
        .chain(bits(&state.acc.as_slice()[queries.start * d..queries.end * d]))
        .collect()
}

const DIMENSIONS: [usize; 7] = [16, 32, 48, 64, 80, 96, 128];

#[test]
fn every_isa_gives_the_oracle_s_bits() {
    for count in 1..=STEP_QUERIES {
        for d in DIMENSIONS {
            let inputs = inputs(count, d, 3);
            let one = [0..1, 0..2, 31..32, 0..16, 16..17, 5..29, 0..32].map(|tokens| vec![tokens]);
            for tiles in one.iter().chain([&vec![7..32, 0..32, 0..5]]) {
                let oracle = steps(Isa::Portable, &inputs, tiles, 0);
                for isa in isas() {
                    let got = steps(isa, &inputs, tiles, 0);
                    assert_eq!(
                        state_bits(&got, 0..count, d),
                        state_bits(&oracle, 0..count, d),
                        "{isa}, {count} queries of {d}, {tiles:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_query_does_not_notice_the_others() {
    let (d, tiles) = (80, [3..32, 0..32]);
    let all = inputs(STEP_QUERIES, d, 2);
    for isa in isas() {
        let together = steps(isa, &all, &tiles, 2);
        for q in 0..STEP_QUERIES {
            let alone = Inputs {
                queries: vec![all.queries[q].clone()],
                keys: all.keys.clone(),
                values: all.values.clone(),
            };
            let alone = steps(isa, &alone, &tiles, 0);
            assert_eq!(
                state_bits(&alone, 0..1, d),
                state_bits(&together, q..q + 1, d),
                "{isa}, query {q}"
            );
        }
    }
}

/// Queries that see different tokens, as the rows of a prefill do: each as if it were alone, where numbers are finite.
#[test]
#[allow(unsafe_code)]
fn each_query_sees_its_own_tokens() {
    let d = 64;
    let all = inputs(STEP_QUERIES, d, 1);
    let ranges: [Range<usize>; STEP_QUERIES] = std::array::from_fn(|q| q / 3..(5 + 2 * q).min(TILE));
    let (mut queries, mut keys, mut values) = (vec![0.0; STEP_QUERIES * d], vec![0; TILE * d], vec![0; TILE * d]);
    for i in 0..d {
        (0..STEP_QUERIES).for_each(|q| queries[i * STEP_QUERIES + q] = all.queries[q][i]);
        (0..TILE).for_each(|t| keys[i * TILE + t] = all.keys[0][t][i]);
        (0..TILE).for_each(|t| values[t * d + i] = all.values[0][t][i]);
    }
    for isa in isas() {
        let mut state = State::new(STEP_QUERIES, d).unwrap();
        state.start(STEP_QUERIES, d);
        let step = TileStep {
            queries: queries.as_ptr(),
            stride: STEP_QUERIES,
            count: STEP_QUERIES,
            head_dim: d,
            keys: keys.as_ptr(),
            values: values.as_ptr(),
            seen: ranges.clone().map(bits_of),
            ahead: [[std::ptr::null(); 2]; 2],
            running: state.running.as_mut_ptr(),
            acc: state.acc.as_mut_slice().as_mut_ptr(),
        };
        // SAFETY: as in `steps`.
        unsafe { step_fn(isa)(&step) };
        for (q, range) in ranges.iter().enumerate() {
            let alone = Inputs {
                queries: vec![all.queries[q].clone()],
                keys: all.keys.clone(),
                values: all.values.clone(),
            };
            let alone = steps(isa, &alone, std::slice::from_ref(range), 0);
            assert_eq!(
                state_bits(&alone, 0..1, d),
                state_bits(&state, q..q + 1, d),
                "{isa}, query {q}"
            );
        }
    }
}

/// Softmax by the textbook, in f64.
fn textbook(inputs: &Inputs, query: usize, tiles: Tiles<'_>) -> Vec<f64> {
    let wide = |x: u16| f64::from(from_bf16(x));
    let seen = || {
        tiles
            .iter()
            .enumerate()
            .flat_map(|(tile, tokens)| tokens.clone().map(move |t| (tile, t)))
    };
    let score = |(tile, t): (usize, usize)| -> f64 {
        let key = inputs.keys[tile][t].iter();
        inputs.queries[query]
            .iter()
            .zip(key)
            .map(|(&q, &k)| f64::from(q) * wide(k))
            .sum()
    };
    let sum: f64 = seen().map(|at| score(at).exp()).sum();
    (0..inputs.queries[query].len())
        .map(|i| {
            seen()
                .map(|at| score(at).exp() / sum * wide(inputs.values[at.0][at.1][i]))
                .sum()
        })
        .collect()
}

fn finished(state: &State, query: usize, d: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; d];
    finish(&state.running[query], &state.acc.as_slice()[query * d..][..d], &mut out);
    out
}

#[test]
fn tiles_and_partitions_are_softmax() {
    for d in DIMENSIONS {
        let inputs = inputs(2, d, 4);
        let tiles = [9..32, 0..32, 0..32, 0..6];
        for isa in isas() {
            // Two partitions, of which the first has two tiles.
            let mut merged = steps(isa, &inputs, &tiles[..2], 0);
            let later = Inputs {
                queries: inputs.queries.clone(),
                keys: inputs.keys[2..].to_vec(),
                values: inputs.values[2..].to_vec(),
            };
            merged.merge(isa, &steps(isa, &later, &tiles[2..], 0), 2);
            let whole = steps(isa, &inputs, &tiles, 0);
            for query in 0..2 {
                let wanted = textbook(&inputs, query, &tiles);
                for state in [&whole, &merged] {
                    for (got, wanted) in finished(state, query, d).iter().zip(&wanted) {
                        assert!(
                            (f64::from(*got) - wanted).abs() < 2e-5,
                            "{isa}, {d}: {got} is not {wanted}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn every_isa_merges_to_the_same_bits() {
    let d = 48;
    let inputs = inputs(3, d, 2);
    let merged = |isa| {
        let one = |tiles: Tiles<'_>| steps(Isa::Portable, &inputs, tiles, 0);
        let mut state = one(&[0..32, 3..9]);
        state.merge(isa, &one(&[4..20, 0..32]), 3);
        state_bits(&state, 0..3, d)
    };
    for isa in isas() {
        assert_eq!(merged(isa), merged(Isa::Portable), "{isa}");
    }
}

#[test]
fn a_partition_without_tokens_changes_no_bit() {
    let d = 48;
    let inputs = inputs(2, d, 1);
    let state = || steps(Isa::Portable, &inputs, std::slice::from_ref(&(2..20)), 0);
    let nothing = || {
        let mut state = State::new(2, d).unwrap();
        state.start(2, d);
        state
    };
    let wanted = state_bits(&state(), 0..2, d);
    let (mut before, mut after) = (nothing(), state());
    before.merge(Isa::Portable, &state(), 2);
    after.merge(Isa::Portable, &nothing(), 2);
    assert_eq!(state_bits(&before, 0..2, d), wanted);
    assert_eq!(state_bits(&after, 0..2, d), wanted);
}

#[test]
#[allow(unsafe_code)]
fn partials_come_back_from_their_slots() {
    let (queries, d) = (3, 16);
    let partials = Partials::new(queries, d).unwrap();
    assert!(partials.has(4) && !partials.has(usize::MAX));
    let state = |seed: u64| {
        let mut state = State::new(queries, d).unwrap();
        let mut random = Random::new(seed);
        state.acc.as_mut_slice().copy_from_slice(&random.floats(queries * d));
        for running in &mut state.running {
            running.max = random.float();
            running.sums.copy_from_slice(&random.floats(LANES));
        }
        state
    };
    // SAFETY: one thread.
    unsafe {
        (0..4).for_each(|slot| partials.put(slot, &state(slot as u64), queries, d));
        for slot in 0..4 {
            let mut got = state(99);
            partials.get(slot, &mut got, queries, d);
            assert_eq!(
                state_bits(&got, 0..queries, d),
                state_bits(&state(slot as u64), 0..queries, d)
            );
        }
    }
}
