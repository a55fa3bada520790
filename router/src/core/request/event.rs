//! What happens to a request, and what its driver must do about it.

use baton_kv::{Attempt, NodeId, TokenId};

use crate::{
    core::{
        admission::Leg,
        member::MemberId,
        pairs::{Transport, Travelled},
    },
    error::GenerateError,
};

/// A node as a leg of the request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// The member.
    pub member: MemberId,
    /// Its name, for errors and reports.
    pub node: NodeId,
}

/// Where it was granted to run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    /// `None`: the decode node runs the prompt itself.
    pub prefill: Option<Place>,
    /// The decode node.
    pub decode: Place,
}

/// Why a leg broke.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LegError {
    /// The node has no room, or takes nothing new: nothing was begun, and it may be tried elsewhere.
    Refused,
    /// The node died, or cannot be reached.
    Lost,
    /// By the node's clock the request's deadline has passed.
    Deadline,
    /// The answer was not read in time.
    SlowReader,
    /// The request does not fit the node's context.
    TooLong(String),
    /// The node gave up.
    Failed {
        /// Its stable code.
        code: String,
        /// Its message.
        message: String,
        /// Whether a retry may help.
        retryable: bool,
    },
}

/// Why a node ended an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EndReason {
    /// The last token is a stop token.
    Stop,
    /// `max_new_tokens`.
    Length,
}

/// A drawn token.
#[derive(Clone, PartialEq, Debug)]
pub struct Token {
    /// The token.
    pub id: TokenId,
    /// Its log-probability.
    pub logprob: f32,
    /// The most probable tokens and their log-probabilities, best first, as many as were asked for.
    pub alternatives: Vec<(TokenId, f32)>,
}

/// What happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// Admission found a place.
    Granted(Placement),
    /// Admission gave up on it.
    Refused(GenerateError),
    /// The leg's node has the dispatch.
    Opened(Leg),
    /// The decode node reserved blocks.
    Ticket {
        /// Remaining time of the lease.
        lease_ms: u64,
    },
    /// The decode node started on the prompt.
    Admitted {
        /// Prompt tokens found in its pool.
        cached_tokens: u32,
        /// Waited there.
        queue_ms: f64,
    },
    /// The decode node verified the KV.
    Verified {
        /// That crossed.
        kv_bytes: u64,
        /// That crossed.
        kv_blocks: u32,
    },
    /// The decode node drew tokens.
    Tokens {
        /// Of which attempt.
        attempt: Attempt,
        /// Output index of the first.
        index: u32,
        /// The tokens.
        tokens: Vec<Token>,
    },
    /// The decode node is done.
    DecodeEnded {
        /// Why.
        reason: EndReason,
        /// Of the prompt, if it ran there.
        prefill_ms: f64,
        /// Of the first decode step.
        first_step_ms: f64,
    },
    /// The decode leg broke.
    DecodeFailed(LegError),
    /// The prefill node started on the prompt.
    PrefillStarted {
        /// Waited there.
        queue_ms: f64,
        /// Prompt tokens found in its pool.
        cached_tokens: u32,
    },
    /// The prefill node is done.
    PrefillDone {
        /// The first token.
        first: Token,
        /// Set when it ended the answer: nothing was handed over.
        ended: Option<EndReason>,
        /// Of the prompt.
        prefill_ms: f64,
        /// Of the handoff.
        transfer_ms: f64,
        /// That crossed.
        kv_bytes: u64,
        /// That crossed.
        kv_blocks: u32,
        /// How it crossed; `None` when nothing did, or by a way that this router does not know.
        travelled: Option<Travelled>,
    },
    /// The prefill leg broke.
    PrefillFailed(LegError),
    /// The text edge found a stop string: what was delivered is all.
    StopMatched,
    /// The client went away.
    ClientGone,
    /// The router stops.
    RouterStopped,
    /// [`super::Life::wake_at`] has come.
    Tick,
}

/// What the driver must do, in this order.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// KV has travelled: the cluster remembers how fast.
    Travelled {
        /// From there.
        prefill: MemberId,
        /// To there.
        decode: MemberId,
        /// How.
        travelled: Travelled,
    },
    /// Open the request on the decode node: reserve for a handoff, or run it there.
    OpenDecode {
        /// The node.
        member: MemberId,
        /// Of this dispatch.
        attempt: Attempt,
        /// Reserve, not run.
        reserve: bool,
    },
    /// Renew the lease.
    Renew,
    /// Send prompt and ticket to the prefill node.
    RunPrefill {
        /// The node.
        member: MemberId,
        /// Of this dispatch.
        attempt: Attempt,
    },
    /// Drop the leg's stream: its node gives everything back.
    Close(Leg),
    /// Tell admission that the leg's node has the dispatch.
    Acknowledged(Leg),
    /// Tell admission that the leg is over.
    Settled(Leg),
    /// Give the credits back and wait again: `by` had no room.
    Requeue {
        /// Which node.
        by: MemberId,
    },
    /// Pass tokens on.
    Deliver {
        /// Output index of the first.
        index: u32,
        /// The tokens.
        tokens: Vec<Token>,
    },
    /// The end, said once; both legs are closed.
    End(Result<EndReason, GenerateError>),
}

/// What is known of how it went.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Record {
    /// Waited at the router.
    pub router_queue_ms: f64,
    /// Waited on the node that computed the prompt.
    pub node_queue_ms: f64,
    /// Computing the prompt.
    pub prefill_ms: f64,
    /// Handing it over.
    pub transfer_ms: f64,
    /// The first decode step.
    pub first_step_ms: f64,
    /// Prompt tokens that were not computed.
    pub cached_tokens: u32,
    /// That crossed.
    pub kv_bytes: u64,
    /// That crossed.
    pub kv_blocks: u32,
    /// How it crossed.
    pub transport: Option<Transport>,
    /// Dispatches.
    pub attempts: u32,
    /// The node that computed the prompt for the decode node.
    pub prefill_node: Option<NodeId>,
    /// The node that decoded.
    pub decode_node: Option<NodeId>,
}
