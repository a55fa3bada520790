//! What a role sees of its sequence: updates in order, and a guard that cancels.

use std::{
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use baton_kv::{BlockId, TokenId};
use baton_scheduler::{FinishReason, SequenceId};
use tokio::sync::mpsc;

use crate::{
    SequenceError,
    mailbox::{Mailbox, Posted},
};

/// Blocks held once more while they are being read. Dropping posts their release.
pub struct HeldBlocks {
    blocks: Vec<BlockId>,
    mailbox: Arc<Mailbox>,
}

impl HeldBlocks {
    /// The caller has just retained `blocks`.
    pub(crate) fn new(blocks: Vec<BlockId>, mailbox: Arc<Mailbox>) -> Self {
        Self { blocks, mailbox }
    }
}

impl Drop for HeldBlocks {
    fn drop(&mut self) {
        self.mailbox.post(Posted::Release(std::mem::take(&mut self.blocks)));
    }
}

/// What happened to a sequence.
pub enum Update {
    /// It left the queue for the first time. Not sent for a handed sequence.
    Started {
        /// Prompt tokens found in the pool.
        cached_tokens: usize,
        /// Time since it was submitted.
        queued: Duration,
    },
    /// Prefill only: further blocks of the prompt are complete (the last may be the incomplete tail): their bytes do not change any more.
    Computed {
        /// Prompt tokens in the pool.
        computed_tokens: usize,
        /// The sequence's table so far.
        table: Vec<BlockId>,
        /// Keeps the blocks that became complete readable.
        hold: HeldBlocks,
    },
    /// Prefill only, within the step that ends the prompt: the first layers of all of it are in the pool, and do not change any more.
    Layers {
        /// Prompt tokens: all.
        computed_tokens: usize,
        /// How many layers.
        layers: usize,
        /// The sequence's table.
        table: Arc<[BlockId]>,
        /// With the first such update: keeps the blocks readable that the step completes.
        hold: Option<HeldBlocks>,
    },
    /// Handed over only: the prompt's KV has arrived and is what its sender computed.
    Verified {
        /// Bytes that crossed.
        kv_bytes: u64,
        /// Blocks that crossed.
        kv_blocks: usize,
        /// From FINAL's arrival to the verdict.
        verify: Duration,
    },
    /// A token was drawn, here or (index 0 of a handed sequence) by the sender.
    Token {
        /// Output index.
        index: u32,
        /// The token.
        token: TokenId,
        /// Its log-probability.
        logprob: f32,
        /// The most probable tokens and their log-probabilities, best first, as many as were asked for.
        alternatives: Vec<(TokenId, f32)>,
    },
    /// The last update.
    Finished {
        /// Why: never `Cancelled`, which is an error.
        reason: FinishReason,
        /// Where its time went.
        timings: SequenceTimings,
    },
}

/// Where a sequence's time went on this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SequenceTimings {
    /// From leaving the queue to the first token; zero if that was handed over.
    pub prefill: Duration,
    /// From the first token to the second; zero if there was none.
    pub first_step: Duration,
    /// How often it lost its blocks to others.
    pub preemptions: u32,
}

/// The updates of one sequence. Dropping it cancels the sequence or the reservation, and gives everything back.
pub struct SequenceStream {
    id: SequenceId,
    updates: mpsc::Receiver<Update>,
    failure: Arc<OnceLock<SequenceError>>,
    mailbox: Arc<Mailbox>,
}

/// The core's end of a [`SequenceStream`].
pub(crate) struct UpdateSender {
    updates: mpsc::Sender<Update>,
    failure: Arc<OnceLock<SequenceError>>,
}

/// The two ends; `capacity` updates are kept for a slow reader before its sequence is cut.
pub(crate) fn stream(id: SequenceId, capacity: usize, mailbox: Arc<Mailbox>) -> (UpdateSender, SequenceStream) {
    let (sender, receiver) = mpsc::channel(capacity);
    let failure = Arc::new(OnceLock::new());
    let sender = UpdateSender {
        updates: sender,
        failure: failure.clone(),
    };
    let stream = SequenceStream {
        id,
        updates: receiver,
        failure,
        mailbox,
    };
    (sender, stream)
}

impl UpdateSender {
    /// False when the reader is gone or too slow: the caller cancels the sequence.
    pub(crate) fn send(&self, update: Update) -> bool {
        match self.updates.try_send(update) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                let _ = self.failure.set(SequenceError::SlowReader);
                false
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }

    /// For those who may send while the sequence lives.
    pub(crate) fn downgrade(&self) -> mpsc::WeakSender<Update> {
        self.updates.downgrade()
    }

    /// Ends the stream with `error`, after what was sent before.
    pub(crate) fn fail(self, error: SequenceError) {
        let _ = self.failure.set(error);
    }
}

impl SequenceStream {
    /// Whose updates these are.
    pub fn id(&self) -> SequenceId {
        self.id
    }

    /// The next update; cancel-safe. After [`Update::Finished`] or an error there is none: not to be called again.
    pub async fn next(&mut self) -> Result<Update, SequenceError> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// An update that is already there.
    pub fn try_next(&mut self) -> Option<Update> {
        self.updates.try_recv().ok()
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Update, SequenceError>> {
        Poll::Ready(match ready!(self.updates.poll_recv(context)) {
            Some(update) => Ok(update),
            None => Err(self.failure.get().cloned().unwrap_or(SequenceError::EngineLost)),
        })
    }
}

impl Drop for SequenceStream {
    fn drop(&mut self) {
        self.mailbox.post(Posted::Closed(self.id));
    }
}
