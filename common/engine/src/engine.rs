//! The engine as a node sees it.

use std::sync::Arc;

use baton_kv::{KvIdentity, KvMemory};
use baton_scheduler::{StepOutput, StepPlan};

/// What is known of a loaded model.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelSpec {
    /// Name as clients use it, e.g. `SmolLM2-135M-Instruct`.
    pub name: String,
    /// Tokens in the vocabulary; ids are below it.
    pub vocabulary: usize,
    /// Longest context that the model was made for, tokens.
    pub context_length: usize,
    /// Parameters.
    pub parameters: u64,
    /// Bytes of weights as held by the engine.
    pub weight_bytes: u64,
}

/// Why a step failed. The sequences of the step get a typed error, and the node reports itself unhealthy if it is `Lost`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StepError {
    /// The plan breaks a bound (rows, context, token id, table). A defect of the caller; the engine is unharmed.
    #[error("step plan refused: {0}")]
    Plan(String),
    /// A sequence's logits are not finite numbers: its KV or the weights that it met are damaged. The engine is unharmed.
    #[error("the logits are not finite numbers")]
    NotFinite,
    /// The device is gone or cannot be trusted any more.
    #[error("the engine's device is lost: {0}")]
    Lost(String),
}

/// Is told within a step, by the thread that called [`Engine::step`], of how many layers the KV of all the step's rows is in the pool: 1, 2, … up to all, each
/// once and in this order. Whoever the watch tells may read these layers. Short: the step waits for it.
pub type LayerWatch = Box<dyn Fn(usize) + Send + Sync>;

/// Runs steps. Driven by one thread; its KV memory is shared with the transports.
pub trait Engine: Send {
    /// The model.
    fn model(&self) -> &ModelSpec;

    /// What KV bytes of this engine mean.
    fn identity(&self) -> KvIdentity;

    /// The pool's bytes.
    fn memory(&self) -> Arc<dyn KvMemory>;

    /// Tells `watch` how far each further step is. An engine that cannot say tells nothing.
    fn watch_layers(&mut self, _watch: LayerWatch) {}

    /// Computes `plan`: appends the KV of every row, and draws one token per sampling span into `output` (cleared first).
    /// A row's result depends only on its sequence's tokens, never on what else is in the plan.
    fn step(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), StepError>;
}
