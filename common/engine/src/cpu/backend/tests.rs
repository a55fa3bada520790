use baton_gguf::TensorType;
use baton_kv::{BlockId, KvDtype, KvLayout, KvMemory};
use baton_scheduler::{Sample, SamplingParams, SequenceId, Span};

use super::*;
use crate::{
    cpu::testing::{OwnedTensor, Random, TYPES, bits, isas},
    ops::{AttentionShape, Ops, QkvPost, Vector, Weight},
};

const BLOCKS: usize = 24;
const MAX_ROWS: usize = 128;

fn config(isa: Isa, threads: usize) -> CpuConfig {
    CpuConfig {
        threads,
        isa: Some(isa),
        layout: KvLayout {
            layers: 2,
            heads: 2,
            head_dim: 32,
            block_tokens: 32,
            dtype: KvDtype::Bf16,
        },
        blocks: BLOCKS,
        shared_pool: false,
        shape: AttentionShape {
            heads: 6,
            kv_heads: 2,
            head_dim: 32,
            rope_dim: 32,
            rope_base: 10_000.0,
            rope_interleaved: true,
            window: None,
        },
        max_rows: MAX_ROWS,
        max_sampling_rows: 8,
        max_context: 512,
    }
}

/// A model of one layer, twice: enough that every operation meets every other.
struct Small {
    backend: CpuBackend,
    table: Weight,
    qkv_weight: Weight,
    out_weight: Weight,
    gate_up_weight: Weight,
    down_weight: Weight,
    norm: Vector,
    x: Buffer,
    normed: Buffer,
    qkv: Buffer,
    attended: Buffer,
    delta: Buffer,
    product: Buffer,
    last: Buffer,
    logits: Buffer,
}

const WIDTH: usize = 96;
const VOCABULARY: usize = 50;

fn small(config: CpuConfig) -> Small {
    let mut builder = CpuBackendBuilder::new(config).unwrap();
    let random = |dtype, rows, columns, seed| OwnedTensor::random(dtype, rows, columns, seed);
    let table = random(TensorType::Q8_0, VOCABULARY, WIDTH, 1);
    let qkv = [
        random(TensorType::Q4_1, 192, WIDTH, 2),
        random(TensorType::Q4_0, 64, WIDTH, 3),
        random(TensorType::Bf16, 64, WIDTH, 4),
    ];
    let out = random(TensorType::Q4_0, WIDTH, 192, 5);
    let gate_up = [
        random(TensorType::Q4_1, 160, WIDTH, 6),
        random(TensorType::Q8_0, 160, WIDTH, 7),
    ];
    let down = random(TensorType::Bf16, WIDTH, 160, 8);
    let norm = random(TensorType::F32, 1, WIDTH, 9);
    let rows = config.max_rows;
    let small = Small {
        table: builder.embedding(table.tensor()).unwrap(),
        qkv_weight: builder.matrix(&qkv.each_ref().map(OwnedTensor::tensor)).unwrap(),
        out_weight: builder.matrix(&[out.tensor()]).unwrap(),
        gate_up_weight: builder.matrix(&gate_up.each_ref().map(OwnedTensor::tensor)).unwrap(),
        down_weight: builder.matrix(&[down.tensor()]).unwrap(),
        norm: builder.vector(norm.tensor()).unwrap(),
        x: builder.buffer(WIDTH, rows),
        normed: builder.buffer(WIDTH, rows),
        qkv: builder.buffer(320, rows),
        attended: builder.buffer(192, rows),
        delta: builder.buffer(WIDTH, rows),
        product: builder.buffer(160, rows),
        last: builder.buffer(WIDTH, config.max_sampling_rows),
        logits: builder.buffer(VOCABULARY, config.max_sampling_rows),
        backend: builder.build().unwrap(),
    };
    assert_eq!(small.backend.isa(), config.isa.unwrap());
    assert!(small.backend.weight_bytes() > 0);
    small
}

impl Small {
    fn step(&mut self, plan: &StepPlan) -> Vec<Sampled> {
        let Small {
            table,
            qkv_weight,
            out_weight,
            gate_up_weight,
            down_weight,
            norm,
            ..
        } = *self;
        let Small {
            x,
            normed,
            qkv,
            attended,
            delta,
            product,
            last,
            logits,
            ..
        } = *self;
        self.backend
            .run(plan, &|ops| {
                ops.embed(table, x);
                ops.rms_norm(x, norm, 1e-5, normed);
                for layer in 0..2 {
                    ops.linear(qkv_weight, normed, qkv);
                    ops.qkv_post(layer, &QkvPost::default(), qkv);
                    ops.attention(layer, qkv, attended);
                    ops.linear(out_weight, attended, delta);
                    ops.add_rms_norm(x, delta, norm, 1e-5, normed);
                    ops.gated(gate_up_weight, normed, product);
                    ops.linear(down_weight, product, delta);
                    ops.add_rms_norm(x, delta, norm, 1e-5, normed);
                }
                ops.gather_rows(normed, last);
                ops.logits(table, last, logits);
                ops.sample(logits);
            })
            .unwrap();
        assert_eq!(self.backend.sampled().len(), plan.sampling_spans().count());
        self.backend.sampled().to_vec()
    }
}

fn greedy() -> Option<Sample> {
    Some(Sample::new(SamplingParams::greedy(), 0))
}

/// Adds a span of `tokens` at `context`.
fn push(plan: &mut StepPlan, sequence: u64, context: usize, tokens: &[u32], table: &[u32], sample: Option<Sample>) {
    let (row, block) = (plan.tokens.len(), plan.tables.len());
    plan.tokens.extend(tokens);
    plan.tables.extend(table.iter().map(|&block| BlockId(block)));
    plan.spans.push(Span {
        sequence: SequenceId(sequence),
        rows: row..plan.tokens.len(),
        context,
        table: block..plan.tables.len(),
        sample,
    });
}

fn tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..len)
        .map(|_| (random.bits() >> 33) as u32 % VOCABULARY as u32)
        .collect()
}

/// Logits of every position of one sequence, alone, in chunks of at most `chunk` tokens.
fn chunked(small: &mut Small, tokens: &[u32], chunk: usize, table: &[u32]) -> Vec<Vec<u32>> {
    let mut rows = Vec::new();
    let mut context = 0;
    for tokens in tokens.chunks(chunk) {
        let mut plan = StepPlan::default();
        push(&mut plan, 1, context, tokens, table, greedy());
        small.step(&plan);
        rows.extend((0..tokens.len()).map(|row| bits(small.backend.row(small.normed, row))));
        context += tokens.len();
    }
    rows
}

#[test]
fn isa_threads_chunk_and_batch_change_no_bit() {
    let sequence = tokens(1, 100);
    let table = [5, 2, 9, 0];
    let oracle = chunked(&mut small(config(Isa::Portable, 1)), &sequence, 100, &table);
    for isa in isas() {
        for threads in [1, 2, 3] {
            let mut small = small(config(isa, threads));
            for chunk in [100, 32, 7, 1] {
                let rows = chunked(&mut small, &sequence, chunk, &table);
                assert_eq!(rows, oracle, "{isa}, {threads} threads, chunk {chunk}");
            }
            // With others around it: three decode rows, then this sequence's chunk, then another prefill.
            for (context, chunk) in [(0, 40), (40, 33), (73, 27)] {
                let mut plan = StepPlan::default();
                for other in 0..3 {
                    push(
                        &mut plan,
                        10 + other,
                        3 + other as usize,
                        &[other as u32],
                        &[20 + other as u32],
                        greedy(),
                    );
                }
                push(
                    &mut plan,
                    1,
                    context,
                    &sequence[context..context + chunk],
                    &[11, 10, 13, 12],
                    None,
                );
                push(&mut plan, 2, 0, &tokens(2, 35), &[14, 16], greedy());
                assert_eq!(small.step(&plan).len(), 4);
                for (row, oracle) in oracle[context..context + chunk].iter().enumerate() {
                    assert_eq!(
                        &bits(small.backend.row(small.normed, 3 + row)),
                        oracle,
                        "row {row} at {context}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_decode_row_is_that_row_of_a_prefill_at_every_border() {
    for isa in isas() {
        let mut small = small(config(isa, 2));
        let sequence = tokens(3, 101);
        let prefill = chunked(&mut small, &sequence, 101, &[7, 1, 4, 3]);
        for context in [0, 1, 31, 32, 33, 63, 64, 100] {
            let table = [8, 6, 2, 0];
            let _ = chunked(&mut small, &sequence[..context], MAX_ROWS, &table);
            let mut plan = StepPlan::default();
            push(&mut plan, 1, context, &sequence[context..=context], &table, greedy());
            small.step(&plan);
            assert_eq!(
                bits(small.backend.row(small.normed, 0)),
                prefill[context],
                "{isa} at {context}"
            );
        }
    }
}

#[test]
fn other_block_sizes_give_the_same_bits() {
    let sequence = tokens(4, 90);
    let oracle = chunked(&mut small(config(Isa::Portable, 1)), &sequence, 90, &[5, 2, 9]);
    for (block_tokens, table) in [(64, &[1, 0][..]), (96, &[2])] {
        let mut config = config(Isa::detect(), 2);
        config.layout.block_tokens = block_tokens;
        assert_eq!(
            chunked(&mut small(config), &sequence, 90, table),
            oracle,
            "blocks of {block_tokens}"
        );
    }
}

/// Attention of one sequence by the textbook, in f64, over K and V rounded to bf16. `qkv`: rows as `qkv_post` left them.
fn textbook(qkv: &[Vec<f32>], values: &[Vec<f32>], row: usize, head: usize) -> Vec<f64> {
    let bf16 = |x: f32| f64::from(half::bf16::from_f32(x).to_f32());
    let kv_head = head / 3;
    let part = |row: &[f32], slot: usize| row[slot * 32..(slot + 1) * 32].to_vec();
    let query = part(&qkv[row], head);
    let scores: Vec<f64> = (0..=row)
        .map(|t| {
            let key = part(&qkv[t], 6 + kv_head);
            query.iter().zip(key).map(|(&q, k)| f64::from(q) * bf16(k)).sum::<f64>() / 32f64.sqrt()
        })
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    (0..32)
        .map(|i| {
            (0..=row)
                .map(|t| weights[t] / sum * bf16(values[t][(8 + kv_head) * 32 + i]))
                .sum()
        })
        .collect()
}

#[test]
fn rope_and_attention_are_the_textbook_s() {
    for interleaved in [false, true] {
        let mut config = config(Isa::Portable, 2);
        config.shape.rope_interleaved = interleaved;
        let mut small = small(config);
        let mut plan = StepPlan::default();
        push(&mut plan, 1, 0, &tokens(5, 70), &[5, 2, 9], None);
        let Small {
            table,
            qkv_weight,
            norm,
            x,
            normed,
            qkv,
            attended,
            ..
        } = small;
        let read = |small: &Small, buffer| -> Vec<Vec<f32>> {
            (0..70).map(|row| small.backend.row(buffer, row).to_vec()).collect()
        };
        let project = |ops: &mut CpuOps<'_>| {
            ops.embed(table, x);
            ops.rms_norm(x, norm, 1e-5, normed);
            ops.linear(qkv_weight, normed, qkv);
        };
        small.backend.run(&plan, &project).unwrap();
        let before = read(&small, qkv);
        let run = |ops: &mut CpuOps<'_>| {
            project(ops);
            ops.qkv_post(1, &QkvPost::default(), qkv);
            ops.attention(1, qkv, attended);
        };
        small.backend.run(&plan, &run).unwrap();
        let (turned, out) = (read(&small, qkv), read(&small, attended));
        for row in [0, 1, 31, 32, 33, 63, 64, 69] {
            for head in 0..10 {
                for pair in 0..16 {
                    let (a, b) = if interleaved {
                        (2 * pair, 2 * pair + 1)
                    } else {
                        (pair, pair + 16)
                    };
                    let [u, v] = [a, b].map(|i| f64::from(before[row][head * 32 + i]));
                    let angle = row as f64 * 10_000f64.powf(-(pair as f64) / 16.0);
                    let angle = if head < 8 { angle } else { 0.0 };
                    let wanted = [u * angle.cos() - v * angle.sin(), u * angle.sin() + v * angle.cos()];
                    for (i, wanted) in [a, b].into_iter().zip(wanted) {
                        let got = f64::from(turned[row][head * 32 + i]);
                        assert!(
                            (got - wanted).abs() < 1e-5 * (1.0 + u.abs() + v.abs()),
                            "row {row}, head {head}, {i}"
                        );
                    }
                }
            }
            for head in 0..6 {
                let wanted = textbook(&turned, &before, row, head);
                for (i, wanted) in wanted.into_iter().enumerate() {
                    let got = f64::from(out[row][head * 32 + i]);
                    assert!(
                        (got - wanted).abs() < 1e-4 * (1.0 + wanted.abs()),
                        "row {row}, head {head}: {got}, {wanted}"
                    );
                }
            }
        }

        // The pool holds the turned keys, by dimension, and the values, by token, rounded.
        let memory = small.backend.memory();
        let mut piece = vec![0; memory.layout().layer_block_bytes()];
        memory.read(1, BlockId(2), 32, &mut piece).unwrap();
        let element = |slot: usize, token: usize, dim: usize| {
            let (row, column) = if slot < 2 { (dim, token) } else { (token, dim) };
            let at = 2 * ((slot * 32 + row) * 32 + column);
            half::bf16::from_le_bytes([piece[at], piece[at + 1]])
        };
        for slot in 0..4 {
            for (token, dim) in [(0, 0), (5, 31), (31, 7)] {
                let wanted = half::bf16::from_f32(turned[32 + token][(6 + slot) * 32 + dim]);
                assert_eq!(element(slot, token, dim), wanted);
            }
        }
    }
}

#[test]
fn a_linear_row_is_the_same_alone_and_in_any_batch() {
    for dtype in TYPES {
        let weight = OwnedTensor::random(dtype, 200, 256, 1);
        let mut results: Vec<Vec<Vec<u32>>> = Vec::new();
        for isa in isas() {
            for threads in [1, 3] {
                let mut builder = CpuBackendBuilder::new(config(isa, threads)).unwrap();
                let table = OwnedTensor::random(TensorType::F32, VOCABULARY, 256, 2);
                let table = builder.embedding(table.tensor()).unwrap();
                let weight = builder.matrix(&[weight.tensor()]).unwrap();
                let (x, out) = (builder.buffer(256, MAX_ROWS), builder.buffer(200, MAX_ROWS));
                let mut backend = builder.build().unwrap();
                let tokens = tokens(6, MAX_ROWS);
                let mut all = Vec::new();
                // Many, then fewer: each row as in the largest batch.
                for rows in [MAX_ROWS, 70, 40, 17, 9, 8, 7, 3, 2, 1] {
                    let mut plan = StepPlan::default();
                    let first = MAX_ROWS - rows;
                    push(&mut plan, 1, 0, &tokens[first..], &[0, 1, 2, 3], None);
                    backend
                        .run(&plan, &|ops| {
                            ops.embed(table, x);
                            ops.linear(weight, x, out);
                        })
                        .unwrap();
                    let got: Vec<_> = (0..rows).map(|row| bits(backend.row(out, row))).collect();
                    if all.is_empty() {
                        all = got;
                    } else {
                        assert_eq!(got, all[first..], "{isa} {dtype}, {rows} rows");
                    }
                }
                results.push(all);
            }
        }
        assert!(results.iter().all(|result| *result == results[0]), "{dtype}");
    }
}

#[test]
fn embedded_rows_are_the_table_s() {
    let owned = OwnedTensor::random(TensorType::Q4_1, VOCABULARY, WIDTH, 12);
    let mut builder = CpuBackendBuilder::new(config(Isa::detect(), 2)).unwrap();
    let table = builder.embedding(owned.tensor()).unwrap();
    let x = builder.buffer(WIDTH, MAX_ROWS);
    let mut backend = builder.build().unwrap();
    let mut plan = StepPlan::default();
    push(&mut plan, 1, 0, &[0, 17, 49], &[0], None);
    backend.run(&plan, &|ops| ops.embed(table, x)).unwrap();
    for (row, &token) in plan.tokens.iter().enumerate() {
        assert_eq!(bits(backend.row(x, row)), bits(&owned.row(token as usize)));
    }
}

#[test]
fn plans_that_break_a_bound_are_refused_and_harm_nothing() {
    let mut small = small(config(Isa::detect(), 2));
    let good = {
        let mut plan = StepPlan::default();
        push(&mut plan, 1, 30, &[1, 2, 3], &[4, 5], greedy());
        plan
    };
    let check = |small: &mut Small, break_it: &dyn Fn(&mut StepPlan)| {
        let mut plan = good.clone();
        break_it(&mut plan);
        let result = small.backend.run(&plan, &|_| panic!("a refused plan ran"));
        assert!(matches!(result, Err(StepError::Plan(_))), "{plan:?}: {result:?}");
    };
    check(&mut small, &|plan| plan.tokens[1] = VOCABULARY as u32);
    check(&mut small, &|plan| plan.tables[0] = BlockId(BLOCKS as u32));
    check(&mut small, &|plan| plan.spans[0].context = 62);
    check(&mut small, &|plan| plan.spans[0].context = usize::MAX);
    check(&mut small, &|plan| plan.spans[0].context = 510);
    check(&mut small, &|plan| plan.spans[0].rows = 0..2);
    check(&mut small, &|plan| plan.spans[0].rows = 0..4);
    check(&mut small, &|plan| plan.spans[0].rows = 1..3);
    check(&mut small, &|plan| plan.spans[0].rows = 0..0);
    check(&mut small, &|plan| plan.spans[0].table = 0..3);
    check(&mut small, &|plan| plan.spans[0].table = 1..2);
    check(&mut small, &|plan| plan.tables[1] = plan.tables[0]);
    check(&mut small, &|plan| push(plan, 2, 0, &[1], &[5], None));
    check(&mut small, &|plan| plan.spans.clear());
    check(&mut small, &|plan| {
        plan.tokens = vec![0; MAX_ROWS + 1];
        plan.spans[0].rows = 0..MAX_ROWS + 1;
    });
    check(&mut small, &|plan| {
        plan.clear();
        (0..9).for_each(|i| push(plan, i, 0, &[1], &[i as u32], greedy()));
    });
    assert_eq!(small.step(&good).len(), 1);
    assert_eq!(small.step(&StepPlan::default()).len(), 0, "an empty step is a step");
}

#[test]
fn logits_that_are_no_numbers_fail_the_step_and_not_the_next() {
    let mut builder = CpuBackendBuilder::new(config(Isa::detect(), 2)).unwrap();
    let mut values = vec![1.0; 2 * 32];
    values[40] = f32::NAN;
    let table = OwnedTensor::floats(2, 32, &values);
    let head = OwnedTensor::random(TensorType::Q4_1, VOCABULARY, 32, 1);
    let table = builder.embedding(table.tensor()).unwrap();
    let head = builder.matrix(&[head.tensor()]).unwrap();
    let (x, last, logits) = (
        builder.buffer(32, 8),
        builder.buffer(32, 8),
        builder.buffer(VOCABULARY, 8),
    );
    let mut backend = builder.build().unwrap();
    for (token, fails) in [(0, false), (1, true), (0, false)] {
        let mut plan = StepPlan::default();
        push(&mut plan, 1, 0, &[token], &[0], greedy());
        let result = backend.run(&plan, &|ops| {
            ops.embed(table, x);
            ops.gather_rows(x, last);
            ops.logits(head, last, logits);
            ops.sample(logits);
        });
        assert_eq!(matches!(result, Err(StepError::NotFinite)), fails);
    }
}

#[test]
fn a_panic_loses_the_backend_and_hangs_nobody() {
    let mut small = small(config(Isa::detect(), 3));
    let mut plan = StepPlan::default();
    push(&mut plan, 1, 0, &[1], &[0], None);
    let (table, x) = (small.table, small.x);
    let result = small.backend.run(&plan, &|ops| {
        assert_ne!(ops.thread(), 1, "on purpose");
        ops.embed(table, x);
    });
    assert!(matches!(result, Err(StepError::Lost(_))));
    assert!(matches!(small.backend.run(&plan, &|_| {}), Err(StepError::Lost(_))));
}

#[test]
fn contradictory_configurations_are_refused() {
    let good = config(Isa::Portable, 1);
    let refused = |change: &dyn Fn(&mut CpuConfig)| {
        let mut config = good;
        change(&mut config);
        assert!(matches!(CpuBackendBuilder::new(config), Err(LoadError::Config(_))));
    };
    refused(&|config| config.threads = 0);
    refused(&|config| config.shape.heads = 5);
    refused(&|config| config.shape.rope_dim = 33);
    refused(&|config| config.shape.rope_dim = 64);
    refused(&|config| config.layout.head_dim = 64);
    refused(&|config| config.layout.heads = 3);
    refused(&|config| {
        config.shape.head_dim = 24;
        config.layout.head_dim = 24;
    });
    refused(&|config| config.max_context = (1 << 20) + 1);
    let pool = CpuConfig {
        blocks: usize::MAX / 64,
        ..good
    };
    assert!(matches!(
        CpuBackendBuilder::new(pool).unwrap().build(),
        Err(LoadError::Memory(_))
    ));
    assert!(matches!(
        "sse9".parse::<Isa>(),
        Err(crate::cpu::UnsupportedIsa::Unknown(_))
    ));
    assert!(Isa::ALL.into_iter().all(|isa| isa.to_string().parse() == Ok(isa)));
}
