//! Runs programs of operations on the team.
#![allow(unsafe_code)]

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use baton_kv::TokenId;
use baton_scheduler::{Sampled, StepPlan};

use super::{
    activations::{Activations, Form, PackScratch},
    alloc::Aligned,
    arena::{Arena, Buffers},
    attention::{Partials, State},
    builder::{CpuBackendBuilder, CpuConfig, LoadError},
    draw::SharedRows,
    isa::Isa,
    math::{self, LANES},
    memory::CpuKvMemory,
    ops::CpuOps,
    plan::{self, Places},
    rows,
    team::{Broken, Member, Team},
    weight::Matrix,
};
use crate::{
    StepError,
    ops::Buffer,
    plan_check::{PlanCheck, PlanLimits},
    sampler::SamplerScratch,
};

/// Rows that every thread norms and packs for itself rather than meeting at one more barrier.
pub(super) const OWN_ROWS: usize = 2;

/// Weights, arena, pool and threads. One step at a time.
pub struct CpuBackend {
    team: Team,
    core: Core,
    check: PlanCheck,
    places: Places,
    scratch: Vec<Mutex<Scratch>>,
    weight_bytes: u64,
}

/// What all threads share during a step.
pub(super) struct Core {
    pub(super) config: CpuConfig,
    pub(super) isa: Isa,
    pub(super) matrices: Vec<Matrix>,
    pub(super) vectors: Vec<Vec<f32>>,
    pub(super) arena: Arena,
    pub(super) memory: Arc<CpuKvMemory>,
    pub(super) activations: Activations,
    pub(super) partials: Partials,
    /// Radians per position of each rotated pair.
    frequencies: Vec<f64>,
    /// `[max_rows][cosines | sines]` of the step's rows.
    angles: Aligned<f32>,
    /// `[max_sampling_rows]`, written by the threads that drew them.
    pub(super) sampled: Aligned<Sampled>,
    pub(super) shared_rows: SharedRows,
    pub(super) not_finite: AtomicBool,
    /// [`Buffers`] that the last step left in each thread's own rows.
    own: AtomicU64,
}

/// One thread's own memory.
pub(super) struct Scratch {
    pub(super) activations: Activations,
    pub(super) pack: PackScratch,
    pub(super) sampler: SamplerScratch,
    /// A piece's queries, packed `[head_dim][queries]` step by step.
    pub(super) queries: Aligned<f32>,
    /// Of one partition, and of all so far.
    pub(super) part: State,
    pub(super) total: State,
}

impl CpuBackend {
    pub(super) fn new(mut builder: CpuBackendBuilder<'_>, matrices: Vec<Matrix>) -> Result<Self, LoadError> {
        let weight_bytes = builder.weight_bytes();
        builder.arena.allocate()?;
        let CpuBackendBuilder {
            config,
            isa,
            vectors,
            arena,
            vocabulary,
            rope_factors,
            ..
        } = builder;
        let shape = config.shape;
        // Of a piece of attention: a tile's rows times heads.
        let queries = plan::QUERIES;
        let max_k = |form| {
            let taking = matrices.iter().filter(|matrix| matrix.takes(form));
            taking.map(|matrix| matrix.k).max().unwrap_or(0)
        };
        let widest = Form::ALL.map(max_k);
        let rows = config.max_rows.max(config.max_sampling_rows);
        let core = Core {
            memory: Arc::new(CpuKvMemory::new(config.layout, config.blocks, config.shared_pool)?),
            activations: Activations::new(rows, |form| widest[form as usize])?,
            partials: Partials::new(queries, shape.head_dim)?,
            frequencies: (0..shape.rope_dim / 2)
                .map(|i| {
                    let frequency = math::power(shape.rope_base, -((2 * i) as f64) / shape.rope_dim as f64);
                    rope_factors.get(i).map_or(frequency, |factor| frequency / factor)
                })
                .collect(),
            angles: Aligned::zeroed(config.max_rows.saturating_mul(shape.rope_dim))?,
            sampled: Aligned::zeroed(config.max_sampling_rows)?,
            shared_rows: SharedRows::new(config.threads, arena.widest())?,
            not_finite: AtomicBool::new(false),
            own: AtomicU64::new(0),
            config,
            isa,
            matrices,
            vectors,
            arena,
        };
        // After the pool: what has room for that many blocks has room for their numbers.
        let check = PlanCheck::new(PlanLimits {
            max_rows: core.config.max_rows,
            // Each has a row.
            max_spans: core.config.max_rows,
            max_sampling_spans: core.config.max_sampling_rows,
            vocabulary: vocabulary.unwrap_or(TokenId::MAX as usize),
            context_length: core.config.max_context,
            blocks: core.config.blocks,
            block_tokens: core.config.layout.block_tokens,
        });
        let scratch = (0..config.threads)
            .map(|_| {
                Ok(Mutex::new(Scratch {
                    activations: Activations::new(OWN_ROWS, |form| widest[form as usize])?,
                    pack: PackScratch::new(),
                    sampler: SamplerScratch::default(),
                    queries: Aligned::zeroed(queries * shape.head_dim)?,
                    part: State::new(queries, shape.head_dim)?,
                    total: State::new(queries, shape.head_dim)?,
                }))
            })
            .collect::<Result<_, LoadError>>()?;
        let team = Team::new(config.threads)
            .map_err(|error| LoadError::Config(format!("cannot start {} threads: {error}", config.threads)))?;
        Ok(Self {
            team,
            core,
            check,
            places: Places::default(),
            scratch,
            weight_bytes,
        })
    }

    /// Runs one step: every thread of the team that takes part calls `program` once with its own [`CpuOps`]; all must call the same operations in the same
    /// order. Returns when all are done.
    ///
    /// # Errors
    /// [`StepError::Plan`] before anything runs when the plan breaks a bound; [`StepError::NotFinite`] when a row's
    /// logits are not finite (the next step may run); [`StepError::Lost`] when a thread panicked (no further step runs).
    pub fn run(&mut self, plan: &StepPlan, program: &(dyn Fn(&mut CpuOps<'_>) + Sync)) -> Result<(), StepError> {
        let Self {
            team,
            core,
            check,
            places,
            scratch,
            ..
        } = self;
        check.check(plan)?;
        places.fill(plan, &core.config);
        core.not_finite.store(false, Relaxed);
        let (core, places) = (&*core, &*places);
        team.run(&|member| {
            let mut scratch = scratch[member.index()].lock().unwrap_or_else(PoisonError::into_inner);
            core.turn(member, places);
            let mut ops = CpuOps {
                core,
                plan,
                places,
                member,
                scratch: &mut scratch,
                own: Buffers::default(),
                read: Buffers::default(),
            };
            program(&mut ops);
            if member.index() == 0 {
                core.own.store(ops.own.bits(), Relaxed);
            }
        })
        .map_err(|Broken| StepError::Lost("a compute thread panicked".into()))?;
        if core.not_finite.load(Relaxed) {
            return Err(StepError::NotFinite);
        }
        Ok(())
    }

    /// What the last step's `sample` drew, one per sampling span, in order.
    pub fn sampled(&self) -> &[Sampled] {
        &self.core.sampled.as_slice()[..self.places.sampling.len()]
    }

    /// A row of a buffer as the last step left it (for tests and log-probabilities).
    ///
    /// # Panics
    /// When the buffer has no such row.
    pub fn row(&self, buffer: Buffer, row: usize) -> &[f32] {
        let core = &self.core;
        let row = if Buffers::from_bits(core.own.load(Relaxed)).contains(buffer) {
            core.arena.own_row(buffer, 0, OWN_ROWS, row)
        } else {
            row
        };
        // SAFETY: only steps write, and a step needs `&mut self`.
        unsafe { core.arena.row(buffer, row) }
    }

    /// The pool's bytes.
    pub fn memory(&self) -> Arc<CpuKvMemory> {
        self.core.memory.clone()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.core.isa
    }

    /// Bytes of weights, as held.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }
}

impl Core {
    /// Computes this thread's share of the rows' RoPE angles, and waits for the others'.
    fn turn(&self, member: &Member<'_>, places: &Places) {
        let pairs = self.frequencies.len();
        for row in member.share(places.rows.len()) {
            // SAFETY: `PlanCheck` bounded the rows by `max_rows`, and shares do not overlap.
            let angles =
                unsafe { std::slice::from_raw_parts_mut(self.angles.as_ptr().add(row * 2 * pairs), 2 * pairs) };
            let (cosines, sines) = angles.split_at_mut(pairs);
            let position = places.rows[row].position as f64;
            rows::angles(self.isa, position, &self.frequencies, cosines, sines);
        }
        member.barrier();
    }

    /// Where a tile of `rows` rows from `row` on has its 16 outputs of `panel`, and how far apart rows lie.
    pub(super) fn panel_out(&self, out: Buffer, row: usize, rows: usize, panel: usize) -> (*mut f32, usize) {
        assert!(panel * LANES < self.arena.width(out), "panel outside its buffer");
        // Bounds of the tile's last row, so that every row lies within its buffer.
        self.arena.row_ptr(out, row + rows - 1);
        // SAFETY: a row has room for whole panels: stride ≥ width rounded up to 16.
        let start = unsafe { self.arena.row_ptr(out, row).add(panel * LANES) };
        (start, self.arena.stride(out))
    }

    /// Cosines and sines of a row of the step.
    pub(super) fn angles(&self, row: usize) -> (&[f32], &[f32]) {
        let pairs = self.frequencies.len();
        assert!(row < self.config.max_rows, "row outside the step");
        // SAFETY: within `max_rows`; written before the barrier in `turn` only.
        unsafe { std::slice::from_raw_parts(self.angles.as_ptr().add(row * 2 * pairs), 2 * pairs) }.split_at(pairs)
    }
}

#[cfg(test)]
mod tests;
