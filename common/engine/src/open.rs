//! From options to an engine that is ready to run.

use std::path::{Path, PathBuf};

use baton_gguf::{GgufError, Tensor, TensorType};
use baton_kv::KvLayout;

use crate::{
    Engine, LlamaEngine, ModelConfig, ModelSpec, available,
    checkpoint::Checkpoint,
    config::ConfigError,
    cpu::{Isa, LoadError, Loading},
    identity,
    llama::LlamaLimits,
    panel_cache::{Facts, PanelCache},
    progress::{LoadProgress, Report},
    simulated::{SimulatedConfig, SimulatedEngine},
};

/// Tokens of a block.
pub const BLOCK_TOKENS: usize = 32;
/// The smallest pool that is of any use: a prompt of some dozen tokens and its answer.
const MIN_BLOCKS: usize = 4;
/// Threads at most; more than any machine's cores is a mistake, and each costs a stack.
const MAX_THREADS: usize = 1024;

/// Where a model comes from.
#[derive(Clone, PartialEq, Debug)]
pub enum Source {
    /// A GGUF file, or a directory as Hugging Face lays it out.
    File(PathBuf),
    /// None: the simulated engine.
    Simulated(SimulatedConfig),
}

/// What engine to open.
#[derive(Clone, PartialEq, Debug)]
pub struct EngineOptions {
    /// The model.
    pub source: Source,
    /// Threads that compute.
    pub threads: usize,
    /// Instruction set; `None`: the fastest that the CPU has. All give the same bits.
    pub isa: Option<Isa>,
    /// Bytes of the KV pool, rounded down to whole blocks.
    pub kv_bytes: u64,
    /// Whether the pool is to lie in a file of memory that other processes of this host may map, so that they can copy from it. Where the system cannot, it
    /// lies in memory of its own, and the log says so.
    pub shared_pool: bool,
    /// Rows of a step at most.
    pub max_rows: usize,
    /// Sequences of a step at most.
    pub max_sequences: usize,
    /// Directory that keeps repacked weights for the next start; safe to delete. `None`: nothing is kept.
    pub panel_cache: Option<PathBuf>,
}

/// Why an engine cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file is not there or cannot be read.
    #[error("cannot open the model file {}: {reason}", path.display())]
    NotFound {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: std::io::Error,
    },
    /// The file is damaged, cut off, or contradicts itself. Fetch it again.
    #[error("the model file is corrupt: {0}")]
    Corrupt(String),
    /// A tensor is not in the file.
    #[error("the model file has no tensor '{0}'")]
    MissingTensor(String),
    /// The file is sound, and needs something that is not built, or not on this CPU.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// Weights, buffers and KV do not fit into memory. A smaller KV pool or model helps.
    #[error(
        "the model needs {needed_bytes} bytes of memory ({kv_bytes} of them for KV) and {available_bytes} are available"
    )]
    TooLarge {
        /// Weights, buffers and KV.
        needed_bytes: u64,
        /// The KV pool's part.
        kv_bytes: u64,
        /// What the machine and the process's cgroups leave.
        available_bytes: u64,
    },
    /// The pool would hold too few blocks to serve anything.
    #[error("a KV pool of {kv_bytes} bytes is too small: at least {needed_bytes} are needed")]
    KvTooSmall {
        /// What was asked for.
        kv_bytes: u64,
        /// The least that is accepted.
        needed_bytes: u64,
    },
    /// Threads, rows or sequences outside their bounds.
    #[error("{what} must be in 1..={limit}, not {value}")]
    Threads {
        /// Which option.
        what: &'static str,
        /// What was asked for.
        value: usize,
        /// The most that is accepted.
        limit: usize,
    },
}

impl OpenError {
    /// A stable code for logs and scripts. A retry helps only with `model_too_large`, once memory is free.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "model_not_found",
            Self::Corrupt(_) => "model_corrupt",
            Self::MissingTensor(_) => "model_missing_tensor",
            Self::Unsupported(_) => "model_unsupported",
            Self::TooLarge { .. } => "model_too_large",
            Self::KvTooSmall { .. } => "kv_too_small",
            Self::Threads { .. } => "engine_bad_option",
        }
    }

    pub(crate) fn from_gguf(path: &Path, error: GgufError) -> Self {
        match error {
            GgufError::Io(reason) => Self::NotFound {
                path: path.to_owned(),
                reason,
            },
            error => error.into(),
        }
    }
}

impl From<GgufError> for OpenError {
    fn from(error: GgufError) -> Self {
        match error {
            GgufError::Version(_) | GgufError::ValueType { .. } => Self::Unsupported(error.to_string()),
            error => Self::Corrupt(error.to_string()),
        }
    }
}

impl From<ConfigError> for OpenError {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::Metadata(error) => error.into(),
            ConfigError::MissingTensor(name) => Self::MissingTensor(name),
            ConfigError::Unsupported(_) => Self::Unsupported(error.to_string()),
            ConfigError::Inconsistent(_) | ConfigError::Shape { .. } => Self::Corrupt(error.to_string()),
        }
    }
}

impl From<LoadError> for OpenError {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Memory(error) => Self::TooLarge {
                needed_bytes: error.bytes as u64,
                kv_bytes: 0,
                available_bytes: available::memory_bytes().unwrap_or(0),
            },
            error => Self::Unsupported(error.to_string()),
        }
    }
}

/// Opens an engine: checks the file, reads all its weights for the identity, repacks them (or takes what an earlier start has kept), takes the pool's
/// memory and starts the threads. `progress` is called often, on any thread that loads, with `done` rising from 0 to `total` in each stage.
pub fn open(options: &EngineOptions, progress: &(dyn Fn(LoadProgress) + Sync)) -> Result<Box<dyn Engine>, OpenError> {
    check_options(options)?;
    match &options.source {
        Source::File(path) => Ok(Box::new(open_file(path, options, progress)?)),
        Source::Simulated(config) => {
            let blocks = blocks(&config.layout(BLOCK_TOKENS), options.kv_bytes)?;
            check_memory(0, options.kv_bytes)?;
            Ok(Box::new(SimulatedEngine::new(
                config.clone(),
                BLOCK_TOKENS,
                blocks,
                options.max_rows,
                options.max_sequences,
            )))
        }
    }
}

/// As [`open`], for a file, with what only the computing engine has. `options.source` is not looked at.
pub fn open_file(
    path: &Path,
    options: &EngineOptions,
    progress: &(dyn Fn(LoadProgress) + Sync),
) -> Result<LlamaEngine, OpenError> {
    check_options(options)?;
    let checkpoint = Checkpoint::open(path)?;
    let config = ModelConfig::of(&checkpoint)?;
    let layout = config.layout(BLOCK_TOKENS);
    let blocks = blocks(&layout, options.kv_bytes)?;
    let tensors = checkpoint.tensors();
    let weights = tensors.iter().map(panel_bytes).fold(0, u64::saturating_add);
    check_memory(
        weights.saturating_add(config.arena_bytes(options.max_rows, options.max_sequences, options.threads)),
        options.kv_bytes,
    )?;

    let cache = options.panel_cache.as_deref().map(PanelCache::new);
    let weights = weights_digest(&checkpoint, path, cache.as_ref(), options.threads, progress);
    let identity = identity::of_model(&config, &tensors, &weights);
    let limits = LlamaLimits {
        threads: options.threads,
        isa: options.isa,
        layout,
        blocks,
        shared_pool: options.shared_pool,
        max_rows: options.max_rows,
        max_sequences: options.max_sequences,
    };
    let model = ModelSpec {
        name: checkpoint.model_name(path),
        vocabulary: config.vocabulary,
        context_length: config.context_length,
        parameters: checkpoint.parameters(),
        weight_bytes: 0,
    };
    let loading = Loading {
        cache: cache.as_ref().map(|cache| (cache, weights)),
        threads: options.threads,
        report: progress,
    };
    LlamaEngine::load(&checkpoint, &config, limits, model, identity, loading)
}

/// The digest of all weights: remembered of files that have not changed, else computed.
fn weights_digest(
    checkpoint: &Checkpoint,
    path: &Path,
    cache: Option<&PanelCache>,
    threads: usize,
    progress: Report<'_>,
) -> blake3::Hash {
    let compute = || identity::weights(checkpoint, threads, progress);
    let files = checkpoint.weight_files(path);
    let outline = identity::outline(checkpoint);
    let facts = || Facts::of(&files, &outline).ok();
    let (Some(cache), Some(before)) = (cache, facts()) else {
        return compute();
    };
    cache.digest(&before).unwrap_or_else(|| {
        let digest = compute();
        // What was changed meanwhile has another digest by now.
        if facts().is_some_and(|after| after.same_files(&before)) {
            cache.remember(&before, &digest);
        }
        digest
    })
}

/// About what the CPU backend holds for a tensor.
fn panel_bytes(tensor: &Tensor<'_>) -> u64 {
    let bytes = tensor.bytes.len() as u64;
    match tensor.dtype {
        // Held as f32.
        TensorType::F16 => bytes.saturating_mul(2),
        // Scales lie on cache lines.
        _ => bytes.saturating_add(bytes / 8),
    }
}

fn check_options(options: &EngineOptions) -> Result<(), OpenError> {
    for (what, value, limit) in [
        ("threads", options.threads, MAX_THREADS),
        ("max_rows", options.max_rows, 1 << 20),
        ("max_sequences", options.max_sequences, options.max_rows),
    ] {
        if !(1..=limit).contains(&value) {
            return Err(OpenError::Threads { what, value, limit });
        }
    }
    Ok(())
}

/// Whole blocks in a pool of `kv_bytes`.
fn blocks(layout: &KvLayout, kv_bytes: u64) -> Result<usize, OpenError> {
    let block_bytes = layout.block_bytes() as u64;
    let blocks = kv_bytes / block_bytes.max(1);
    if blocks < MIN_BLOCKS as u64 {
        return Err(OpenError::KvTooSmall {
            kv_bytes,
            needed_bytes: block_bytes * MIN_BLOCKS as u64,
        });
    }
    Ok(usize::try_from(blocks).unwrap_or(usize::MAX).min(u32::MAX as usize))
}

/// Before anything is taken: `bytes` beside the pool.
fn check_memory(bytes: u64, kv_bytes: u64) -> Result<(), OpenError> {
    let needed_bytes = bytes.saturating_add(kv_bytes);
    match available::memory_bytes() {
        Some(available_bytes) if needed_bytes > available_bytes => Err(OpenError::TooLarge {
            needed_bytes,
            kv_bytes,
            available_bytes,
        }),
        _ => Ok(()),
    }
}
