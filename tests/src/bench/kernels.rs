//! How much of a step is kernels.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use baton_engine::{
    LlamaEngine,
    cpu::CpuOps,
    ops::{Buffer, Ops, QkvPost, Vector, Weight},
};
use baton_scheduler::{StepOutput, StepPlan};

use super::{median, seconds};

/// The operations, by what is told of each.
const NAMES: [&str; 10] = [
    "embed",
    "rms_norm",
    "add_rms_norm",
    "linear",
    "qkv_post",
    "attention",
    "gated",
    "gather_rows",
    "logits",
    "sample",
];
const SAMPLE: usize = 9;

/// Where a step's time goes; medians over steps.
pub struct Breakdown {
    /// Microseconds of the step, as the caller of `Engine::step` sees it, without what measuring costs.
    pub step_us: f64,
    /// Percent of it that is not kernels.
    pub outside_percent: f64,
    /// Of that, what the barriers cost, percent of the step.
    pub barriers_percent: f64,
    /// Microseconds of a barrier at which all threads arrive together.
    pub barrier_us: f64,
    /// Operation → percent of the step, in the order of their first use.
    pub by_operation: Vec<(&'static str, f64)>,
}

/// Runs the steps and takes the caller's thread's time of each operation.
///
/// **Kernels** are all operations but `sample`, from one operation's end to the next one's on the caller's thread: that includes waiting for the others' shares. **Outside** is
/// the rest of the step: checking the plan, waking and joining the threads, RoPE angles, the sampler, the results; and the bare cost of each barrier that the
/// kernels meet at, which is measured apart and taken off their time.
pub fn breakdown(engine: &mut LlamaEngine, steps: &[StepPlan]) -> Breakdown {
    let clock = clock_s();
    let barrier = barrier_s(engine, &steps[0]);
    let (mut step_s, mut outside, mut barriers) = (Vec::new(), Vec::new(), Vec::new());
    let mut spent: [Vec<f64>; NAMES.len()] = Default::default();
    let mut output = StepOutput::default();
    for plan in steps {
        let told = Mutex::new(None);
        let wall = seconds(|| {
            engine
                .step_with(plan, &mut output, &|decoder, ops| {
                    if ops.thread() > 0 {
                        return decoder.run(ops);
                    }
                    let mut clocked = Clocked {
                        ops,
                        last: Instant::now(),
                        spent_s: [0.0; NAMES.len()],
                        calls: [0; NAMES.len()],
                        met: [0; NAMES.len()],
                    };
                    decoder.run(&mut clocked);
                    let told_of = (clocked.spent_s, clocked.calls, clocked.met);
                    *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(told_of);
                })
                .expect("a step");
        });
        let (mut spent_s, calls, met) = told.into_inner().expect("a lock").expect("the caller's thread ran");
        let called: usize = calls.iter().sum();
        for (spent_s, &calls) in spent_s.iter_mut().zip(&calls) {
            *spent_s -= calls as f64 * clock;
        }
        let step = wall - (called + 1) as f64 * clock;
        let barriers_s = met[..SAMPLE].iter().sum::<usize>() as f64 * barrier;
        let kernels = spent_s.iter().sum::<f64>() - spent_s[SAMPLE] - barriers_s;
        barriers.push(100.0 * barriers_s / step);
        step_s.push(step);
        outside.push(100.0 * (step - kernels) / step);
        for (spent, spent_s) in spent.iter_mut().zip(spent_s) {
            spent.push(100.0 * spent_s / step);
        }
    }
    Breakdown {
        step_us: median(step_s) * 1e6,
        outside_percent: median(outside),
        barriers_percent: median(barriers),
        barrier_us: barrier * 1e6,
        by_operation: NAMES.into_iter().zip(spent.map(median)).collect(),
    }
}

/// Seconds of a look at the clock.
fn clock_s() -> f64 {
    const LOOKS: usize = 10_000;
    let look = || {
        std::hint::black_box(Instant::now());
    };
    median((0..9).map(|_| seconds(|| (0..LOOKS).for_each(|_| look()))).collect()) / LOOKS as f64
}

/// Seconds of a barrier, of steps that all threads run.
fn barrier_s(engine: &mut LlamaEngine, plan: &StepPlan) -> f64 {
    const STEPS: usize = 21;
    const BARRIERS: usize = 1_000;
    let mut plan = plan.clone();
    plan.spans.iter_mut().for_each(|span| span.sample = None);
    let mut output = StepOutput::default();
    let told = Mutex::new(Vec::new());
    for _ in 0..STEPS {
        engine
            .step_with(&plan, &mut output, &|_, ops| {
                let barriers = seconds(|| (0..BARRIERS).for_each(|_| ops.meet()));
                if ops.thread() == 0 {
                    let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                    told.push((ops.threads(), barriers / BARRIERS as f64));
                }
            })
            .expect("a step");
    }
    let told = told.into_inner().expect("a lock");
    let all = told.iter().map(|&(threads, _)| threads).max();
    let barriers = told.iter().filter(|&&(threads, _)| Some(threads) == all);
    median(barriers.map(|&(_, seconds)| seconds).collect())
}

/// Operations, and how long each took.
struct Clocked<'a, 'o> {
    ops: &'a mut CpuOps<'o>,
    last: Instant,
    spent_s: [f64; NAMES.len()],
    calls: [usize; NAMES.len()],
    met: [usize; NAMES.len()],
}

impl<'o> Clocked<'_, 'o> {
    fn timed(&mut self, operation: usize, run: impl FnOnce(&mut CpuOps<'o>)) {
        let met = self.ops.met();
        run(self.ops);
        self.met[operation] += self.ops.met() - met;
        let now = Instant::now();
        self.spent_s[operation] += (now - self.last).as_secs_f64();
        self.calls[operation] += 1;
        self.last = now;
    }
}

impl Ops for Clocked<'_, '_> {
    fn embed(&mut self, table: Weight, out: Buffer) {
        self.timed(0, |ops| ops.embed(table, out));
    }

    fn rms_norm(&mut self, x: Buffer, weight: Vector, epsilon: f32, out: Buffer) {
        self.timed(1, |ops| ops.rms_norm(x, weight, epsilon, out));
    }

    fn add_rms_norm(&mut self, x: Buffer, delta: Buffer, weight: Vector, epsilon: f32, out: Buffer) {
        self.timed(2, |ops| ops.add_rms_norm(x, delta, weight, epsilon, out));
    }

    fn linear(&mut self, weight: Weight, x: Buffer, out: Buffer) {
        self.timed(3, |ops| ops.linear(weight, x, out));
    }

    fn qkv_post(&mut self, layer: usize, post: &QkvPost, qkv: Buffer) {
        self.timed(4, |ops| ops.qkv_post(layer, post, qkv));
    }

    fn attention(&mut self, layer: usize, qkv: Buffer, out: Buffer) {
        self.timed(5, |ops| ops.attention(layer, qkv, out));
    }

    fn gated(&mut self, gate_up: Weight, x: Buffer, out: Buffer) {
        self.timed(6, |ops| ops.gated(gate_up, x, out));
    }

    fn gather_rows(&mut self, x: Buffer, out: Buffer) {
        self.timed(7, |ops| ops.gather_rows(x, out));
    }

    fn logits(&mut self, weight: Weight, x: Buffer, out: Buffer) {
        self.timed(8, |ops| ops.logits(weight, x, out));
    }

    fn sample(&mut self, logits: Buffer) {
        self.timed(SAMPLE, |ops| ops.sample(logits));
    }
}
