//! Speed of the CPU backend's operations on SmolLM2-135M's shapes. Of a whole model: the example `speed`; beside llama.cpp: `make bench BENCH=cpu-engine`.
//!
//! `cargo run --release -p baton-engine --example kernels -- [THREADS] [ISA]`

use std::{
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Instant,
};

use baton_engine::{
    cpu::{CpuBackend, CpuBackendBuilder, CpuConfig, CpuOps, Isa},
    ops::{AttentionShape, Ops, QkvPost},
};
use baton_gguf::{Tensor, TensorType};
use baton_kv::{BlockId, KvDtype, KvLayout};
use baton_scheduler::{SequenceId, Span, StepPlan};

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const CONTEXT: usize = 2048;
const ROWS: usize = 512;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(2, |threads| threads.parse().expect("THREADS"));
    let isa = arguments.next().map(|isa| isa.parse::<Isa>().expect("ISA"));
    println!("{threads} threads, {}", isa.unwrap_or_else(Isa::detect));
    let config = CpuConfig {
        threads,
        isa,
        layout: KvLayout {
            layers: 1,
            heads: KV_HEADS,
            head_dim: HEAD_DIM,
            block_tokens: 32,
            dtype: KvDtype::Bf16,
        },
        blocks: CONTEXT / 32,
        shared_pool: false,
        shape: AttentionShape {
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            rope_dim: HEAD_DIM,
            rope_base: 10_000.0,
            rope_interleaved: true,
            window: None,
        },
        max_rows: ROWS,
        max_sampling_rows: 8,
        max_context: CONTEXT,
    };
    for dtype in [TensorType::Q4_1, TensorType::Q4_0, TensorType::Q8_0, TensorType::F32] {
        for (n, k, gated) in [
            (960, 576, false),
            (576, 576, false),
            (3072, 576, true),
            (576, 1536, false),
        ] {
            linear(config, dtype, n, k, gated);
        }
    }
    linear(config, TensorType::Q8_0, 49152, 576, false);
    small_operations(config);
    attention(config);
}

/// Shortest of `times` runs of `program` in each of several steps, seconds: short enough to fall between the machine's other work.
///
/// A run lasts from the moment the first thread left the run before it (the earliest at which any thread can have begun) until the first
/// thread leaves it. A single thread's clock would not do: it may come late to work that the others have done already.
fn seconds(backend: &mut CpuBackend, plan: &StepPlan, times: usize, program: &(dyn Fn(&mut CpuOps<'_>) + Sync)) -> f64 {
    let start = Instant::now();
    let mut best = u64::MAX;
    for _ in 0..5 {
        let left: Vec<AtomicU64> = (0..=times).map(|_| AtomicU64::new(u64::MAX)).collect();
        let leave = |run: usize| left[run].fetch_min(start.elapsed().as_nanos() as u64, Relaxed);
        let step = |ops: &mut CpuOps<'_>| {
            leave(0);
            for run in 1..=times {
                program(ops);
                leave(run);
            }
        };
        backend.run(plan, &step).expect("the step");
        let left: Vec<u64> = left.into_iter().map(AtomicU64::into_inner).collect();
        best = left.windows(2).map(|pair| pair[1] - pair[0]).fold(best, u64::min);
    }
    best as f64 * 1e-9
}

/// One span of `rows` rows at `context`.
fn plan(rows: usize, context: usize) -> StepPlan {
    let mut plan = StepPlan::default();
    plan.tokens.resize(rows, 0);
    plan.tables.extend((0..CONTEXT as u32 / 32).map(BlockId));
    plan.spans.push(Span {
        sequence: SequenceId(1),
        rows: 0..rows,
        context,
        table: 0..CONTEXT / 32,
        sample: None,
    });
    plan
}

/// Bytes of a matrix of small numbers.
fn random(dtype: TensorType, rows: usize, columns: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut bytes = vec![0; dtype.row_bytes(columns).expect("whole blocks") * rows];
    for (i, byte) in bytes.iter_mut().enumerate() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Floats and scales: exponents below 1.
        *byte = if dtype == TensorType::F32 && i % 4 == 3 {
            0x3c
        } else {
            (state >> 24) as u8 & 0x3f
        };
    }
    bytes
}

/// As [`Ops::linear`], or where it is gate and up as [`Ops::gated`].
fn linear(config: CpuConfig, dtype: TensorType, n: usize, k: usize, gated: bool) {
    let mut builder = CpuBackendBuilder::new(config).expect("the configuration");
    let bytes = random(dtype, n, k);
    let copies = if n > 10_000 { 1 } else { 16 };
    let weights: Vec<_> = (0..copies)
        .map(|_| {
            builder
                .matrix(&[Tensor {
                    name: "weight",
                    rows: n,
                    columns: k,
                    dtype,
                    bytes: &bytes,
                }])
                .expect("weight")
        })
        .collect();
    let weight_bytes = builder.weight_bytes() as f64 / copies as f64;
    let rows = if n > 10_000 { 8 } else { ROWS };
    let (x, out) = (
        builder.buffer(k, rows),
        builder.buffer(if gated { n / 2 } else { n }, rows),
    );
    let mut backend = builder.build().expect("the backend");
    print!("{dtype:>5} {n:>6} x {k:<5}");
    for rows in [1, 8, ROWS].into_iter().filter(|&r| r <= rows) {
        let times = (20_000_000 / (n * k * rows)).clamp(1, 40);
        let seconds = seconds(&mut backend, &plan(rows, 0), times, &|ops| {
            for &weight in &weights {
                if gated {
                    ops.gated(weight, x, out);
                } else {
                    ops.linear(weight, x, out);
                }
            }
        }) / copies as f64;
        let gops = 2.0 * (n * k * rows) as f64 / seconds / 1e9;
        print!(
            "  {rows:>3} rows {:>8.1} us {gops:>7.1} GOP/s {:>6.1} GB/s",
            seconds * 1e6,
            weight_bytes / seconds / 1e9
        );
    }
    black_box(backend.row(out, 0));
    println!();
}

fn small_operations(config: CpuConfig) {
    let mut builder = CpuBackendBuilder::new(config).expect("the configuration");
    let norm: Vec<u8> = (0..576).flat_map(|_| 1f32.to_le_bytes()).collect();
    let norm = builder
        .vector(Tensor {
            name: "norm",
            rows: 1,
            columns: 576,
            dtype: TensorType::F32,
            bytes: &norm,
        })
        .expect("the norm");
    let [x, delta, normed] = [(); 3].map(|()| builder.buffer(576, ROWS));
    let qkv = builder.buffer((HEADS + 2 * KV_HEADS) * HEAD_DIM, ROWS);
    let mut backend = builder.build().expect("the backend");
    for rows in [1, 8, ROWS] {
        let times = 2000 / rows + 10;
        let plan = plan(rows, 0);
        let norm = seconds(&mut backend, &plan, times, &|ops| {
            ops.add_rms_norm(x, delta, norm, 1e-5, normed)
        });
        let qkv_post = seconds(&mut backend, &plan, times, &|ops| {
            ops.qkv_post(0, &QkvPost::default(), qkv)
        });
        let start = Instant::now();
        backend.run(&plan, &|_| ()).expect("the step");
        let step = start.elapsed().as_secs_f64();
        println!(
            "{rows:>3} rows: add_rms_norm {:.1} us, qkv_post {:.1} us, empty step {:.1} us",
            norm * 1e6,
            qkv_post * 1e6,
            step * 1e6
        );
    }
}

fn attention(config: CpuConfig) {
    let mut builder = CpuBackendBuilder::new(config).expect("the configuration");
    let qkv = builder.buffer((HEADS + 2 * KV_HEADS) * HEAD_DIM, ROWS);
    let out = builder.buffer(HEADS * HEAD_DIM, ROWS);
    let mut backend = builder.build().expect("the backend");
    for (rows, context) in [(1, 0), (1, 512), (1, 2047), (ROWS, 0), (ROWS, 1536)] {
        let times = (4000 / (rows * 2)).max(2);
        let seconds = seconds(&mut backend, &plan(rows, context), times, &|ops| {
            ops.attention(0, qkv, out)
        });
        let pairs: usize = (0..rows).map(|row| context + row + 1).sum();
        let flops = 4.0 * (pairs * HEADS * HEAD_DIM) as f64;
        println!(
            "attention, {rows:>3} rows at {context:>4}: {:>8.1} us {:>6.1} GFLOP/s",
            seconds * 1e6,
            flops / seconds / 1e9
        );
    }
}
