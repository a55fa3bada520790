//! A request as it comes from a router, checked.

mod sampling;

use baton_engine::ModelSpec;
use baton_kv::{Attempt, BlockName, KvIdentity, RequestId, Time, TokenId};
use baton_node::{
    limits,
    status::{self, invalid_field},
};
use baton_proto::node::v1 as pb;
use baton_scheduler::{NewSequence, Role, SamplingParams, SequenceId, Start};
use tonic::{Code, Status};

use crate::limits::STOP_IDS;

/// A request as nodes see it. Every token is in the vocabulary, the prompt is not empty, the identity is this node's.
#[derive(Clone, PartialEq, Debug)]
pub struct Work {
    /// Whose.
    pub request: RequestId,
    /// Which dispatch of it.
    pub attempt: Attempt,
    /// Parent of the first block's name.
    pub root: BlockName,
    /// What its KV means.
    pub identity: KvIdentity,
    /// The prompt.
    pub prompt: Vec<TokenId>,
    /// Generated already.
    pub output: Vec<TokenId>,
    /// Output tokens in all, `output` included; at least one more than it holds.
    pub max_new_tokens: usize,
    /// They end the answer.
    pub stop_ids: Vec<TokenId>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// On this node's clock.
    pub deadline: Time,
}

impl Work {
    /// From the wire, received at `now`. Errors are INVALID_ARGUMENT with the field (or the model's context) at fault, and FAILED_PRECONDITION
    /// `IDENTITY_MISMATCH`.
    pub fn from_proto(work: pb::Work, model: &ModelSpec, identity: KvIdentity, now: Time) -> Result<Self, Status> {
        let request = RequestId::from_slice(&work.request_id)
            .ok_or_else(|| invalid_field("work.request_id", "a request id has 16 bytes"))?;
        let root =
            BlockName::from_slice(&work.root).ok_or_else(|| invalid_field("work.root", "a root has 32 bytes"))?;
        let theirs = KvIdentity::from_slice(&work.kv_identity)
            .ok_or_else(|| invalid_field("work.kv_identity", "an identity has 32 bytes"))?;
        if theirs != identity {
            let message = format!("this node's KV identity is {identity}, the request's is {theirs}");
            return Err(status::error(Code::FailedPrecondition, "IDENTITY_MISMATCH", message).build());
        }
        if work.prompt.is_empty() {
            return Err(invalid_field("work.prompt", "the prompt is empty"));
        }
        if work.stop_ids.len() > STOP_IDS {
            return Err(invalid_field("work.stop_ids", format!("at most {STOP_IDS} stop ids")));
        }
        for (name, tokens) in [
            ("work.prompt", &work.prompt),
            ("work.output", &work.output),
            ("work.stop_ids", &work.stop_ids),
        ] {
            if let Some(token) = tokens.iter().find(|&&token| token as usize >= model.vocabulary) {
                let message = format!("token {token} is not below the vocabulary's {}", model.vocabulary);
                return Err(invalid_field(name, message));
            }
        }
        let max_new_tokens = work.max_new_tokens as usize;
        if max_new_tokens <= work.output.len() {
            return Err(invalid_field("work.max_new_tokens", "no token is left to generate"));
        }
        let needed = work.prompt.len().saturating_add(max_new_tokens);
        if needed > model.context_length {
            let limit = model.context_length;
            let message = format!("the request needs {needed} tokens of context and the model has {limit}");
            return Err(
                status::error(Code::InvalidArgument, status::reasons::CONTEXT_LENGTH, message)
                    .field("work.prompt")
                    .build(),
            );
        }
        if work.deadline_ms == 0 {
            let message = "the request's deadline has passed";
            return Err(status::error(Code::DeadlineExceeded, status::reasons::DEADLINE, message).build());
        }
        let deadline_ms = work.deadline_ms.min(limits::REQUEST_TIMEOUT_MAX.as_millis() as u64);
        Ok(Self {
            request,
            attempt: Attempt(work.attempt),
            root,
            identity: theirs,
            prompt: work.prompt,
            output: work.output,
            max_new_tokens,
            stop_ids: work.stop_ids,
            sampling: sampling::from_proto(work.sampling, model.vocabulary)?,
            deadline: now.after_ms(deadline_ms),
        })
    }

    /// As the scheduler takes it.
    pub(crate) fn into_sequence(self, id: SequenceId, role: Role) -> NewSequence {
        // A prefill draws one token, whoever draws the others: its pool need not hold them.
        let max_new_tokens = match role {
            Role::Prefill => self.output.len() + 1,
            Role::Decode => self.max_new_tokens,
        };
        NewSequence {
            id,
            root: self.root,
            prompt: self.prompt,
            output: self.output,
            max_new_tokens,
            stop_ids: self.stop_ids,
            sampling: self.sampling,
            role,
            start: Start::Compute,
        }
    }
}

#[cfg(test)]
mod tests;
