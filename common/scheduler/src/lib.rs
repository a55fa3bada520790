//! Which sequences run in the next step: continuous batching and chunked prefill under a token budget.
//!
//! Pure: no I/O, no clock, no task. The driver calls [`Scheduler::plan`], lets an engine run the [`StepPlan`], and hands the result to
//! [`Scheduler::complete`]. Between the two calls (while the engine computes) it may submit, cancel and release; blocks in use by
//! the running step are given back only at `complete`.
//!
//! Deliberately absent: tensors, text, networking, placement.

mod event;
mod plan;
mod sampling;
mod scheduler;
mod sequence;

pub use event::{FinishReason, SequenceEvent};
pub use plan::{SequenceId, Span, StepOutput, StepPlan};
pub use sampling::{Alternatives, Sample, Sampled, SamplingParams, TOP_LOGPROBS_MAX};
pub use scheduler::{Scheduler, SchedulerConfig, SchedulerLoad};
pub use sequence::{NewSequence, Role, Start, SubmitError};
