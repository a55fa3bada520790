//! The handle to a node's worker.

use std::sync::Arc;

use baton_engine::{Engine, ModelSpec};
use baton_kv::{Epoch, KvIdentity, KvLayout, KvMemory, NodeId};
use baton_node::{Lifecycle, limits, random};
use baton_scheduler::{Role, SchedulerConfig};
use baton_transfer::{Capability, ReceiverConfig, Reject, Ticket, grpc::Fences};
use tokio::sync::watch;

use crate::{
    KvSubscription, Load, SequenceError, SequenceStream, Shared, Work, WorkerMetrics, core::Core, engine_thread,
    last_chunks::LastChunks, limits::LAYERS_BYTES, mailbox::Mailbox, prepare::Prepared,
};

/// What a worker needs to know.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// The node's name.
    pub node: NodeId,
    /// host:port at which routers and peers reach it.
    pub address: String,
    /// Bounds of the scheduler. `max_context` is cut to the model's and to what the pool holds, `block_tokens` is the engine's.
    pub scheduler: SchedulerConfig,
    /// Newest version of the handoff to speak.
    pub protocol_max: u32,
    /// See [`baton_transfer::limits::LEASE_MS`].
    pub lease_ms: u64,
    /// See [`baton_transfer::limits::DRAIN_MS`].
    pub drain_ms: u64,
    /// See [`baton_transfer::limits::MAX_HANDOFFS`].
    pub max_handoffs: usize,
    /// Updates that wait for the reader of a decoding sequence; one more cuts it.
    pub max_updates: usize,
    /// Of a prompt's last chunk a push is told while the step goes on, each time that layers with so many bytes of KV are complete.
    pub layers_bytes: usize,
}

impl WorkerConfig {
    /// With the usual limits of the handoff.
    pub fn new(node: NodeId, address: String, scheduler: SchedulerConfig) -> Self {
        Self {
            node,
            address,
            scheduler,
            protocol_max: baton_proto::PROTOCOL_MAX,
            lease_ms: baton_transfer::limits::LEASE_MS,
            drain_ms: baton_transfer::limits::DRAIN_MS,
            max_handoffs: baton_transfer::limits::MAX_HANDOFFS,
            max_updates: limits::SEQUENCE_EVENTS,
            layers_bytes: LAYERS_BYTES,
        }
    }
}

/// What the node says of itself.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    /// The node's name.
    pub node: NodeId,
    /// host:port at which routers and peers reach it.
    pub address: String,
    /// This life of it.
    pub epoch: Epoch,
    /// The model.
    pub model: ModelSpec,
    /// What its KV means.
    pub identity: KvIdentity,
    /// The pool's shape.
    pub layout: KvLayout,
    /// Blocks of the pool.
    pub blocks: usize,
    /// Prompt + output of one sequence at most, tokens.
    pub max_context: usize,
    /// Newest version of the handoff that it speaks.
    pub protocol_max: u32,
    /// A lease's length, ms.
    pub lease_ms: u64,
}

/// A running worker; clones are the same one.
#[derive(Clone)]
pub struct Worker {
    shared: Arc<Shared>,
    facts: Arc<NodeFacts>,
    prepared: Arc<Prepared>,
}

impl Worker {
    /// Starts the engine's thread, and the timekeeper on `lifecycle`'s tasks. Errors: the system gives no thread.
    pub fn start(
        engine: Box<dyn Engine>,
        config: WorkerConfig,
        metrics: WorkerMetrics,
        lifecycle: &Lifecycle,
    ) -> std::io::Result<Self> {
        let memory = engine.memory();
        let (layout, blocks) = (*memory.layout(), memory.blocks());
        let model = engine.model().clone();
        let scheduler = SchedulerConfig {
            // What routers are told must fit: a pool may hold less than the model's context.
            max_context: config
                .scheduler
                .max_context
                .min(model.context_length)
                .min(blocks * layout.block_tokens),
            block_tokens: layout.block_tokens,
            ..config.scheduler
        };
        let facts = NodeFacts {
            node: config.node.clone(),
            address: config.address.clone(),
            epoch: random::epoch(),
            model,
            identity: engine.identity(),
            layout,
            blocks,
            max_context: scheduler.max_context,
            protocol_max: config.protocol_max,
            lease_ms: config.lease_ms,
        };
        let receiver = ReceiverConfig {
            node: config.node,
            address: config.address,
            epoch: facts.epoch,
            identity: facts.identity,
            layout,
            vocabulary: facts.model.vocabulary,
            protocol_max: config.protocol_max,
            lease_ms: config.lease_ms,
            drain_ms: config.drain_ms,
            max_handoffs: config.max_handoffs,
        };
        let (mailbox, fences) = (Arc::new(Mailbox::default()), Fences::default());
        let core = Core::new(
            blocks,
            scheduler,
            receiver,
            config.max_updates,
            mailbox.clone(),
            fences.clone(),
            metrics.clone(),
        );
        let shared = Arc::new(Shared::new(
            core,
            mailbox,
            memory,
            metrics,
            fences,
            LastChunks::new(config.layers_bytes),
        ));
        engine_thread::spawn(engine, shared.clone())?;
        let (timed, stop) = (shared.clone(), lifecycle.shutdown_token());
        lifecycle.spawn(async move {
            tokio::select! {
                () = timed.keep_time() => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(Self {
            shared,
            facts: Arc::new(facts),
            prepared: Arc::new(Prepared::new(blocks)),
        })
    }

    /// What the node says of itself.
    pub fn facts(&self) -> &NodeFacts {
        &self.facts
    }

    /// The pool's bytes.
    pub fn memory(&self) -> &Arc<dyn KvMemory> {
        &self.shared.memory
    }

    /// The node's metrics.
    pub fn metrics(&self) -> &WorkerMetrics {
        &self.shared.metrics
    }

    /// Queues a sequence. With [`Role::Prefill`] it ends after its first token, and holds its blocks until its stream is dropped.
    pub fn submit(&self, work: Work, role: Role) -> Result<SequenceStream, SequenceError> {
        self.shared.with(|core, now| core.submit(work, role, now))
    }

    /// Reserves blocks for a prompt that a prefill node computes. The sequence starts by itself when its KV is verified. Inside a tokio runtime.
    pub fn reserve(&self, work: Work) -> Result<(Ticket, SequenceStream), SequenceError> {
        let capability = Capability::new(random::capability());
        let (ticket, stream) = self.shared.with(|core, now| core.reserve(work, capability, now))?;
        let blocks = ticket.slots.iter().map(|slot| slot.block);
        self.prepared.prepare(&self.shared.memory, blocks);
        Ok((ticket, stream))
    }

    /// Extends the lease of a reservation, for as long as it is one. Returns what remains, ms.
    pub fn renew(&self, stream: &SequenceStream) -> Result<u64, Reject> {
        self.shared.with(|core, now| match core.reservation(stream.id()) {
            Some(handoff) => core.receiver.renew(handoff, now),
            None => Err(Reject::UnknownHandoff),
        })
    }

    /// What the handoff service works on.
    pub fn receiver_port(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// The handoff service's open streams, which the worker closes where it must.
    pub fn fences(&self) -> Fences {
        self.shared.fences.clone()
    }

    /// The node's load now.
    pub fn load(&self) -> Load {
        self.shared.with(|core, _| core.load())
    }

    /// The node's load as it changes.
    pub fn watch_load(&self) -> watch::Receiver<Load> {
        self.shared.watch_load()
    }

    /// What the pool names and forgets.
    pub fn kv_events(&self) -> KvSubscription {
        KvSubscription::new(self.shared.clone())
    }

    /// Resolves when the engine is lost: every sequence has ended with a typed error, and none is taken any more. Cancel-safe.
    pub async fn lost(&self) {
        self.shared.lost.cancelled().await;
    }

    /// Ends the engine's thread, after the step that it is in; what still runs then ends with [`SequenceError::EngineLost`]. Waits up to
    /// [`limits::STOP_TIMEOUT`]; false when the thread had not ended by then.
    pub async fn stop(&self) -> bool {
        self.shared.mailbox.stop();
        tokio::time::timeout(limits::STOP_TIMEOUT, self.shared.ended.cancelled())
            .await
            .is_ok()
    }
}

#[cfg(test)]
mod tests;
