//! `baton.node.v1.Registry`: a node's membership is its stream here, and lives in this process's memory.

use std::time::Duration;

use baton_kv::{BlockName, Epoch, KvDtype, KvEvent, KvEventKind, KvIdentity, KvLayout, NodeId};
use baton_node::{
    Lifecycle, limits as shared,
    status::{self, invalid_field},
};
use baton_proto::node::v1::{
    self as pb, kv_event::Kind, node_report::Report, registry_server::Registry, router_notice::Notice,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{
    cluster::{Cluster, Membership},
    core::{
        admission::Event,
        member::{Hello, Load, Phase, Role},
        members::JoinError,
        prefix_index::KvReport,
    },
    limits,
};

/// Notices that wait for a node: a welcome, and wishes for a snapshot, of which one suffices.
const NOTICES: usize = 4;

/// The service.
pub(crate) struct RegistryService {
    router_id: String,
    cluster: Cluster,
    lifecycle: Lifecycle,
    /// Whether a node must show a certificate; the listener has checked those that are shown.
    certificates: bool,
}

impl RegistryService {
    pub(crate) fn new(router_id: String, cluster: Cluster, lifecycle: Lifecycle, certificates: bool) -> Self {
        Self {
            router_id,
            cluster,
            lifecycle,
            certificates,
        }
    }
}

type Notices = mpsc::Sender<Result<pb::RouterNotice, Status>>;

#[tonic::async_trait]
impl Registry for RegistryService {
    type AnnounceStream = ReceiverStream<Result<pb::RouterNotice, Status>>;

    async fn announce(
        &self,
        request: Request<Streaming<pb::NodeReport>>,
    ) -> Result<Response<Self::AnnounceStream>, Status> {
        if self.certificates && request.peer_certs().is_none_or(|certificates| certificates.is_empty()) {
            tracing::warn!(from = ?request.remote_addr(), "a node was refused: it showed no certificate");
            let message = "a node must show a certificate that the cluster's authority has signed";
            return Err(status::error(Code::Unauthenticated, "CERTIFICATE_MISSING", message).build());
        }
        let mut reports = request.into_inner();
        let hello = match next(&mut reports, shared::CALL_TIMEOUT).await? {
            Some(Report::Hello(hello)) => hello_from_proto(hello)?,
            _ => return Err(invalid_field("hello", "a node says hello first")),
        };
        let (node, role) = (hello.node.clone(), hello.role);
        let membership = self.cluster.join(hello).map_err(|error| {
            tracing::warn!(%node, code = error.code(), "a node was refused: {error}");
            refused(&error)
        })?;
        tracing::info!(%node, ?role, "a node has joined");
        let apart = self
            .cluster
            .look(|admission| admission.members().apart(membership.member));
        if !apart.is_empty() {
            let names: Vec<String> = apart.iter().map(ToString::to_string).collect();
            tracing::warn!(%node, others = names.join(", "), "no handoffs with these: their versions of the handoff do not meet");
        }
        let (notices, receiver) = mpsc::channel(NOTICES);
        let welcome = pb::Welcome {
            router_id: self.router_id.clone(),
        };
        let _ = notices.try_send(Ok(notice(Notice::Welcome(welcome))));
        let (cluster, stop) = (self.cluster.clone(), self.lifecycle.shutdown_token());
        self.lifecycle.spawn(async move {
            let mut membership = membership;
            let ended = tokio::select! {
                ended = follow(&mut reports, &cluster, &mut membership, &notices) => ended,
                () = notices.closed() => Ok(()),
                () = stop.cancelled() => Err(status::unavailable(
                    status::reasons::DRAINING,
                    "this router is about to stop",
                    shared::SHED_RETRY,
                )),
            };
            drop(membership);
            match ended {
                Ok(()) => tracing::info!(%node, "a node has left"),
                Err(status) => {
                    tracing::warn!(%node, "a node was lost: {}", status.message());
                    let _ = notices.try_send(Err(status));
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Takes in reports until the stream ends, is replaced, or says nothing for too long.
async fn follow(
    reports: &mut Streaming<pb::NodeReport>,
    cluster: &Cluster,
    membership: &mut Membership,
    notices: &Notices,
) -> Result<(), Status> {
    let member = membership.member;
    loop {
        tokio::select! {
            report = next(reports, limits::LOAD_STALE) => match report? {
                None => return Ok(()),
                Some(Report::Load(load)) => cluster.step(Event::Load { member, load: load_from_proto(&load) }),
                Some(Report::Snapshot(snapshot)) => {
                    let report = snapshot_from_proto(snapshot)?;
                    cluster.step(Event::Kv { member, report });
                }
                Some(Report::Events(events)) => {
                    let report = events_from_proto(events)?;
                    cluster.step(Event::Kv { member, report });
                }
                Some(Report::Hello(_)) => return Err(invalid_field("hello", "a node says hello once")),
            },
            Some(()) = membership.snapshots.recv() => {
                // Full: the node does not read. The wish is said once per loss, so that without it the node's blocks would stay unknown: it must begin anew.
                if notices.try_send(Ok(notice(Notice::SnapshotWanted(pb::SnapshotWanted {})))).is_err() {
                    let message = "the node does not read its notices";
                    return Err(status::error(Code::Aborted, "NOT_READING", message).build());
                }
            }
            () = membership.replaced.cancelled() => {
                let message = "another process has announced itself under this node id";
                return Err(status::error(Code::Aborted, "REPLACED", message).build());
            }
        }
    }
}

/// The next report; `None` at the end of the stream.
async fn next(reports: &mut Streaming<pb::NodeReport>, bound: Duration) -> Result<Option<Report>, Status> {
    let silent = |_| {
        status::error(
            Code::DeadlineExceeded,
            "SILENT",
            "the node reported nothing for too long",
        )
        .build()
    };
    let report = timeout(bound, reports.message()).await.map_err(silent)??;
    match report.map(|report| report.report) {
        None => Ok(None),
        Some(Some(report)) => Ok(Some(report)),
        Some(None) => Err(invalid_field("report", "a kind that this router does not know")),
    }
}

fn notice(notice: Notice) -> pb::RouterNotice {
    pb::RouterNotice { notice: Some(notice) }
}

fn refused(error: &JoinError) -> Status {
    let code = match error {
        JoinError::Malformed(_) => Code::InvalidArgument,
        JoinError::TooMany => Code::ResourceExhausted,
        _ => Code::FailedPrecondition,
    };
    status::error(code, error.code(), error.to_string()).build()
}

fn hello_from_proto(hello: pb::Hello) -> Result<Hello, Status> {
    let role = match pb::Role::try_from(hello.role) {
        Ok(pb::Role::Prefill) => Role::Prefill,
        Ok(pb::Role::Decode) => Role::Decode,
        _ => return Err(invalid_field("hello.role", "a node is a prefill or a decode node")),
    };
    let epoch = Epoch::from_slice(&hello.epoch);
    let identity = KvIdentity::from_slice(&hello.kv_identity);
    let layout = hello
        .layout
        .ok_or_else(|| invalid_field("hello.layout", "it is missing"))?;
    if layout.dtype != "bf16" {
        return Err(invalid_field("hello.layout.dtype", "only bf16 is known"));
    }
    Ok(Hello {
        node: NodeId(hello.node_id),
        role,
        epoch: epoch.ok_or_else(|| invalid_field("hello.epoch", "an epoch has 16 bytes"))?,
        address: hello.address,
        model: hello.model,
        identity: identity.ok_or_else(|| invalid_field("hello.kv_identity", "an identity has 32 bytes"))?,
        layout: KvLayout {
            layers: layout.layers as usize,
            heads: layout.heads as usize,
            head_dim: layout.head_dim as usize,
            block_tokens: layout.block_tokens as usize,
            dtype: KvDtype::Bf16,
        },
        blocks: hello.blocks,
        context_length: hello.context_length as usize,
        vocabulary: hello.vocabulary as usize,
        protocol_min: hello.protocol_min,
        protocol_max: hello.protocol_max,
    })
}

fn load_from_proto(load: &pb::Load) -> Load {
    let phase = match load.phase() {
        pb::Phase::Ready => Phase::Ready,
        pb::Phase::Draining => Phase::Draining,
        pb::Phase::Stopped => Phase::Stopped,
        pb::Phase::Starting | pb::Phase::Unspecified => Phase::Starting,
    };
    Load {
        phase,
        waiting: load.waiting.into(),
        running: load.running.into(),
        queued_prefill_tokens: load.queued_prefill_tokens,
        available_blocks: load.free_blocks.saturating_add(load.cached_blocks),
        prefill_tokens_per_s: load.prefill_tokens_per_s,
    }
}

fn epoch(bytes: &[u8]) -> Result<Epoch, Status> {
    Epoch::from_slice(bytes).ok_or_else(|| invalid_field("epoch", "an epoch has 16 bytes"))
}

fn name(bytes: &[u8]) -> Result<BlockName, Status> {
    BlockName::from_slice(bytes).ok_or_else(|| invalid_field("name", "a block's name has 32 bytes"))
}

fn snapshot_from_proto(snapshot: pb::KvSnapshot) -> Result<KvReport, Status> {
    let names = snapshot
        .blocks
        .iter()
        .map(|block| name(&block.name))
        .collect::<Result<_, _>>()?;
    Ok(KvReport::Snapshot {
        epoch: epoch(&snapshot.epoch)?,
        sequence: snapshot.sequence,
        names,
        first: snapshot.first,
        last: snapshot.last,
    })
}

fn events_from_proto(events: pb::KvEvents) -> Result<KvReport, Status> {
    let event = |(i, event): (usize, pb::KvEvent)| {
        let kind = match event.kind {
            Some(Kind::Stored(block)) => KvEventKind::Stored {
                name: name(&block.name)?,
                parent: name(&block.parent)?,
            },
            Some(Kind::Removed(removed)) => KvEventKind::Removed { name: name(&removed)? },
            Some(Kind::Cleared(_)) => KvEventKind::Cleared,
            None => return Err(invalid_field("events.kind", "a kind that this router does not know")),
        };
        let sequence = events.first_sequence.saturating_add(i as u64);
        Ok(KvEvent { sequence, kind })
    };
    Ok(KvReport::Events {
        epoch: epoch(&events.epoch)?,
        events: events
            .events
            .into_iter()
            .enumerate()
            .map(event)
            .collect::<Result<_, _>>()?,
    })
}
