//! A node's membership: one `Registry.Announce` stream to each router, kept open for as long as the node lives.

use std::time::Duration;

use baton_kv::{KvEventKind, NamedBlock};
use baton_node::{Lifecycle, Phase, Tls, grpc, limits, random, status, telemetry};
use baton_proto::{
    PROTOCOL_MIN,
    node::v1::{self as pb, node_report::Report, registry_client::RegistryClient, router_notice::Notice},
};
use baton_transfer::layout_to_proto;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Endpoint};

use crate::{
    KvChange, Load, Worker,
    limits::{LOAD_COALESCE, REPORTS},
};

/// Whom to announce to, and as what.
#[derive(Clone, Debug)]
pub struct AnnounceConfig {
    /// The routers' addresses, `http://host:port`, or `https://` where there is `tls`.
    pub routers: Vec<String>,
    /// The node's role.
    pub role: pb::Role,
    /// What the node shows, and whom it believes.
    pub tls: Option<Tls>,
}

/// Starts announcing `worker` to every router, on `lifecycle`'s tasks, until its shutdown token is cancelled.
pub fn announce(config: &AnnounceConfig, worker: &Worker, lifecycle: &Lifecycle) -> Result<(), grpc::AddressError> {
    let tls = config.tls.as_ref().map(Tls::client);
    for router in &config.routers {
        let announcer = Announcer {
            router: router.clone(),
            endpoint: grpc::endpoint(router, tls.as_ref())?,
            role: config.role,
            worker: worker.clone(),
            lifecycle: lifecycle.clone(),
        };
        lifecycle.spawn(announcer.run());
    }
    Ok(())
}

/// One router.
struct Announcer {
    router: String,
    endpoint: Endpoint,
    role: pb::Role,
    worker: Worker,
    lifecycle: Lifecycle,
}

/// Why a stream to a router ended.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("it cannot be reached: {0}")]
    Connect(#[from] tonic::transport::Error),
    #[error("it did not answer")]
    Silent,
    #[error("it refused: {0}")]
    Refused(#[from] Status),
    #[error("it closed the stream")]
    Closed,
}

impl Lost {
    /// Whether the router says that another process has taken this node's id.
    fn is_replaced(&self) -> bool {
        matches!(self, Self::Refused(status) if status::reason(status).as_deref() == Some("REPLACED"))
    }
}

impl Announcer {
    /// Announces, and again whenever the stream breaks, until shutdown.
    async fn run(self) {
        let stop = self.lifecycle.shutdown_token();
        let mut pause = limits::RECONNECT_MIN;
        let mut refused = String::new();
        while !stop.is_cancelled() {
            let mut welcomed = false;
            let lost = match self.stream(&mut welcomed).await {
                Ok(()) => return,
                Err(lost) => lost,
            };
            if lost.is_replaced() {
                // Coming back at once would only push the other one out again.
                tracing::warn!(
                    router = self.router,
                    "another process announces itself with this node id: each needs its own"
                );
            } else if welcomed {
                pause = limits::RECONNECT_MIN;
                tracing::warn!(router = self.router, %lost, "a router was lost");
            } else if let Lost::Refused(status) = &lost
                && refused != status.message()
            {
                status.message().clone_into(&mut refused);
                tracing::warn!(router = self.router, %lost, "a router does not take this node");
            } else {
                tracing::debug!(router = self.router, %lost, "no router yet");
            }
            tokio::select! {
                () = sleep(jittered(pause)) => pause = (pause * 2).min(limits::RECONNECT_MAX),
                () = stop.cancelled() => {}
            }
        }
    }

    /// One stream, from hello to its end. Ok when the node shuts down.
    async fn stream(&self, welcomed: &mut bool) -> Result<(), Lost> {
        let stop = self.lifecycle.shutdown_token();
        let (reports, receiver) = mpsc::channel(REPORTS);
        let opened = async {
            let channel = self.endpoint.connect().await?;
            // The first report is there before the call, since a router may answer only to it.
            let _ = reports.try_send(report(Report::Hello(self.hello())));
            let mut client = RegistryClient::new(channel)
                .max_encoding_message_size(limits::GRPC_MESSAGE_BYTES)
                .max_decoding_message_size(limits::GRPC_MESSAGE_BYTES);
            let call = client.announce(telemetry::request(ReceiverStream::new(receiver)));
            let response = timeout(limits::CALL_TIMEOUT, call).await.map_err(|_| Lost::Silent)??;
            Ok::<_, Lost>(response.into_inner())
        };
        let notices = tokio::select! {
            opened = opened => opened?,
            () = stop.cancelled() => return Ok(()),
        };
        let told = tokio::select! {
            lost = self.report(&reports, notices, welcomed) => Err(lost),
            () = stop.cancelled() => Ok(()),
        };
        if told.is_ok() {
            // A farewell; the end of the stream says the same.
            let _ = reports.try_send(report(Report::Load(load(&self.worker.load(), Phase::Stopped))));
        }
        told
    }

    /// Reports until the stream breaks.
    async fn report(
        &self,
        reports: &mpsc::Sender<pb::NodeReport>,
        mut notices: Streaming<pb::RouterNotice>,
        welcomed: &mut bool,
    ) -> Lost {
        let mut kv = self.worker.kv_events();
        let (mut loads, mut phases) = (self.worker.watch_load(), self.lifecycle.watch());
        let (mut due, mut changed) = (Instant::now(), true);
        loop {
            let sent = tokio::select! {
                notice = notices.message() => match notice {
                    Ok(Some(pb::RouterNotice { notice })) => {
                        match notice {
                            Some(Notice::Welcome(welcome)) => {
                                *welcomed = true;
                                tracing::info!(router = self.router, id = welcome.router_id, "known to a router");
                            }
                            Some(Notice::SnapshotWanted(_)) => kv.want_snapshot(),
                            None => {}
                        }
                        continue;
                    }
                    Ok(None) => return Lost::Closed,
                    Err(status) => return Lost::Refused(status),
                },
                _ = loads.changed(), if !changed => {
                    (changed, due) = (true, due.min(Instant::now() + LOAD_COALESCE));
                    continue;
                }
                _ = phases.changed() => {
                    (changed, due) = (true, Instant::now());
                    continue;
                }
                () = sleep_until(due) => {
                    (changed, due) = (false, Instant::now() + limits::LOAD_INTERVAL);
                    let now = *loads.borrow_and_update();
                    reports.send(report(Report::Load(load(&now, self.lifecycle.phase())))).await.is_ok()
                }
                change = kv.next() => self.report_kv(reports, change).await,
            };
            if !sent {
                // The reason, if the router gave one, is in the other direction.
                return match notices.message().await {
                    Err(status) => Lost::Refused(status),
                    Ok(_) => Lost::Closed,
                };
            }
        }
    }

    async fn report_kv(&self, reports: &mpsc::Sender<pb::NodeReport>, change: KvChange) -> bool {
        let epoch = self.worker.facts().epoch.to_bytes().to_vec();
        match change {
            KvChange::Events(events) => {
                let Some(first) = events.first() else { return true };
                let events = pb::KvEvents {
                    epoch,
                    first_sequence: first.sequence,
                    events: events.iter().map(|event| kv_event(&event.kind)).collect(),
                };
                reports.send(report(Report::Events(events))).await.is_ok()
            }
            KvChange::Snapshot { sequence, blocks } => {
                let parts = blocks.len().div_ceil(limits::SNAPSHOT_PART_BLOCKS).max(1);
                for part in 0..parts {
                    let from = part * limits::SNAPSHOT_PART_BLOCKS;
                    let to = (from + limits::SNAPSHOT_PART_BLOCKS).min(blocks.len());
                    let snapshot = pb::KvSnapshot {
                        epoch: epoch.clone(),
                        sequence,
                        blocks: blocks[from..to].iter().map(named_block).collect(),
                        first: part == 0,
                        last: part + 1 == parts,
                    };
                    if reports.send(report(Report::Snapshot(snapshot))).await.is_err() {
                        return false;
                    }
                }
                true
            }
        }
    }

    fn hello(&self) -> pb::Hello {
        let facts = self.worker.facts();
        pb::Hello {
            node_id: facts.node.0.clone(),
            role: self.role.into(),
            epoch: facts.epoch.to_bytes().to_vec(),
            address: facts.address.clone(),
            model: facts.model.name.clone(),
            kv_identity: facts.identity.0.to_vec(),
            layout: Some(layout_to_proto(&facts.layout)),
            blocks: facts.blocks as u64,
            context_length: facts.max_context as u32,
            protocol_min: PROTOCOL_MIN,
            protocol_max: facts.protocol_max,
            vocabulary: facts.model.vocabulary as u32,
        }
    }
}

fn report(report: Report) -> pb::NodeReport {
    pb::NodeReport { report: Some(report) }
}

fn load(load: &Load, phase: Phase) -> pb::Load {
    let phase = match phase {
        Phase::Starting => pb::Phase::Starting,
        Phase::Ready => pb::Phase::Ready,
        Phase::Draining => pb::Phase::Draining,
        Phase::Stopped => pb::Phase::Stopped,
    };
    pb::Load {
        phase: phase.into(),
        waiting: load.scheduler.waiting as u32,
        running: load.scheduler.running as u32,
        queued_prefill_tokens: load.scheduler.queued_prefill_tokens as u64,
        free_blocks: load.pool.free as u64,
        cached_blocks: load.pool.cached as u64,
        held_blocks: load.pool.held as u64,
        granted_blocks: load.pool.granted as u64,
        quarantined_blocks: load.pool.quarantined as u64,
        prefill_tokens_per_s: load.prefill_tokens_per_s,
        decode_step_ms: load.decode_step_ms,
    }
}

fn named_block(block: &NamedBlock) -> pb::NamedBlock {
    pb::NamedBlock {
        name: block.name.0.to_vec(),
        parent: block.parent.0.to_vec(),
    }
}

fn kv_event(kind: &KvEventKind) -> pb::KvEvent {
    use pb::kv_event::Kind;
    let kind = match kind {
        KvEventKind::Stored { name, parent } => Kind::Stored(named_block(&NamedBlock {
            name: *name,
            parent: *parent,
        })),
        KvEventKind::Removed { name } => Kind::Removed(name.0.to_vec()),
        KvEventKind::Cleared => Kind::Cleared(pb::Cleared {}),
    };
    pb::KvEvent { kind: Some(kind) }
}

/// Half to all of `pause`, so that nodes do not return to a restarted router all at once.
fn jittered(pause: Duration) -> Duration {
    let share = (random::seed() >> 11) as f64 / (1u64 << 53) as f64;
    pause.mul_f64(0.5 + share / 2.0)
}
