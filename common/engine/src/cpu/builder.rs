//! Loads weights and plans the arena.

use baton_gguf::{Tensor, TensorType, dequantize};
use baton_kv::KvLayout;

use super::{
    alloc::OutOfMemory,
    arena::Arena,
    attention::TILE,
    backend::{CpuBackend, OWN_ROWS},
    isa::{Isa, UnsupportedIsa},
    math::LANES,
    weight::{Loading, WeightPlan},
};
use crate::ops::{AttentionShape, Buffer, Vector, Weight};

/// What a backend is made for.
#[derive(Clone, Copy, Debug)]
pub struct CpuConfig {
    /// Threads that compute, the caller's own included; at least 1.
    pub threads: usize,
    /// Instruction set; `None`: the fastest that the CPU has.
    pub isa: Option<Isa>,
    /// The pool's shape; its heads and head size are the model's.
    pub layout: KvLayout,
    /// Blocks in the pool.
    pub blocks: usize,
    /// Whether the pool is to lie where other processes of this host may map it.
    pub shared_pool: bool,
    /// Shape of attention; `head_dim` a multiple of 16.
    pub shape: AttentionShape,
    /// Most rows of a step.
    pub max_rows: usize,
    /// Most sampling spans of a step.
    pub max_sampling_rows: usize,
    /// Longest context, tokens.
    pub max_context: usize,
}

/// Why a backend cannot be built. No retry helps.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum LoadError {
    /// The instruction set that was asked for.
    #[error(transparent)]
    Isa(#[from] UnsupportedIsa),
    /// The weights, the arena or the pool do not fit.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// A storage type without a kernel.
    #[error("tensor '{name}' is stored as {dtype}, which the CPU backend does not compute with yet")]
    Type {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: TensorType,
    },
    /// A shape that the kernels or the other tensors do not allow.
    #[error("tensor '{name}': {problem}")]
    Shape {
        /// The tensor.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// The configuration contradicts itself.
    #[error("CPU backend: {0}")]
    Config(String),
}

/// Collects weights and buffers, then [`build`](Self::build)s the backend.
pub struct CpuBackendBuilder<'a> {
    pub(super) config: CpuConfig,
    pub(super) isa: Isa,
    plan: WeightPlan<'a>,
    pub(super) vectors: Vec<Vec<f32>>,
    pub(super) arena: Arena,
    /// Rows of the smallest embedding table; token ids are below it.
    pub(super) vocabulary: Option<usize>,
    /// Empty, or one per rotated pair.
    pub(super) rope_factors: Vec<f64>,
}

impl<'a> CpuBackendBuilder<'a> {
    /// Checks the configuration and the CPU.
    pub fn new(config: CpuConfig) -> Result<Self, LoadError> {
        let isa = Isa::choose(config.isa)?;
        let (shape, layout) = (&config.shape, &config.layout);
        let require = |holds: bool, problem: &str| {
            if holds {
                Ok(())
            } else {
                Err(LoadError::Config(problem.into()))
            }
        };
        require(config.threads > 0, "needs at least one thread")?;
        require(
            config.max_rows > 0 && config.max_context > 0,
            "needs at least one row and one token of context",
        )?;
        require(
            config.max_context <= 1 << 20,
            "contexts beyond 2^20 tokens are outside the range of its sine",
        )?;
        require(shape.kv_heads > 0 && shape.heads > 0, "needs at least one head")?;
        require(
            shape.heads.is_multiple_of(shape.kv_heads),
            "heads are not a multiple of KV heads",
        )?;
        require(
            shape.head_dim > 0 && shape.head_dim.is_multiple_of(LANES),
            "head size is not a multiple of 16",
        )?;
        require(
            shape.rope_dim.is_multiple_of(2) && shape.rope_dim <= shape.head_dim,
            "rotated part of a head",
        )?;
        require(
            shape.rope_base.is_normal() && shape.rope_base >= 1.0,
            "RoPE base is below 1",
        )?;
        require(shape.window != Some(0), "a window of no position")?;
        require(
            layout.heads == shape.kv_heads && layout.head_dim == shape.head_dim,
            "pool's shape is not the model's",
        )?;
        require(
            layout.block_tokens > 0 && layout.layers > 0,
            "pool without tokens or layers",
        )?;
        require(
            layout.block_tokens.is_multiple_of(TILE),
            "blocks are not whole tiles of 32 tokens",
        )?;
        Ok(Self {
            config,
            isa,
            plan: WeightPlan::default(),
            vectors: Vec::new(),
            arena: Arena::default(),
            vocabulary: None,
            rope_factors: Vec::new(),
        })
    }

    /// Adds matrices of equal columns, stacked along n (merged QKV, gate and up), to be repacked. Parts may have different storage types; the rows of all
    /// but the last part must be a multiple of 16.
    pub fn matrix(&mut self, parts: &[Tensor<'a>]) -> Result<Weight, LoadError> {
        self.plan.add(parts).map(Weight)
    }

    /// Adds an embedding table `[vocabulary, width]`: for `embed`, and for `logits` where the head is tied (one copy). Token ids of a plan must be
    /// below its rows.
    pub fn embedding(&mut self, table: Tensor<'a>) -> Result<Weight, LoadError> {
        self.vocabulary = Some(self.vocabulary.unwrap_or(usize::MAX).min(table.rows));
        self.matrix(&[table])
    }

    /// Expands a vector (any rows × columns, row by row).
    pub fn vector(&mut self, tensor: Tensor<'_>) -> Result<Vector, LoadError> {
        let mut vector = vec![0.0; tensor.rows * tensor.columns];
        for (row, out) in vector.chunks_exact_mut(tensor.columns.max(1)).enumerate() {
            dequantize(&tensor, row, out).map_err(|_| LoadError::Type {
                name: tensor.name.into(),
                dtype: tensor.dtype,
            })?;
        }
        self.vectors.push(vector);
        Ok(Vector(self.vectors.len() - 1))
    }

    /// Expands vectors, one after the other.
    pub fn stacked_vector(&mut self, parts: &[Tensor<'_>]) -> Result<Vector, LoadError> {
        let mut stacked = Vec::new();
        for part in parts {
            self.vector(*part)?;
            stacked.extend(self.vectors.pop().unwrap_or_default());
        }
        self.vectors.push(stacked);
        Ok(Vector(self.vectors.len() - 1))
    }

    /// Divides the frequency of each rotated pair by its factor (Llama 3's scaling of RoPE): `rope_dim / 2` normal numbers above zero.
    pub fn rope_factors(&mut self, factors: &[f64]) -> Result<(), LoadError> {
        if factors.len() != self.config.shape.rope_dim / 2 || !factors.iter().all(|f| f.is_normal() && *f > 0.0) {
            return Err(LoadError::Config(
                "RoPE factors are not one positive number per pair".into(),
            ));
        }
        self.rope_factors = factors.to_vec();
        Ok(())
    }

    /// Plans an arena buffer of `rows` rows (`max_rows`, or `max_sampling_rows`) of `width`.
    pub fn buffer(&mut self, width: usize, rows: usize) -> Buffer {
        self.arena.plan(width, rows, OWN_ROWS, self.config.threads)
    }

    /// Bytes of weights so far, as they will be held.
    pub fn weight_bytes(&self) -> u64 {
        let vectors: usize = self.vectors.iter().map(|vector| size_of_val(&vector[..])).sum();
        (self.plan.bytes() + vectors) as u64
    }

    /// Repacks the weights on as many threads as compute, allocates arena and pool, and starts the threads.
    pub fn build(self) -> Result<CpuBackend, LoadError> {
        let loading = Loading {
            cache: None,
            threads: self.config.threads,
            report: &|_| {},
        };
        self.build_from(loading)
    }

    /// As [`build`](Self::build), with weights that may come from a cache.
    pub(crate) fn build_from(self, loading: Loading<'_>) -> Result<CpuBackend, LoadError> {
        let matrices = self.plan.load(loading)?;
        CpuBackend::new(self, matrices)
    }
}
