//! The decode node's end of a push.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use baton_kv::Time;
use baton_proto::node::v1::{self as pb, handoff_server, push_reply::Reply};
use futures_util::{future::BoxFuture, stream::Empty};
use http::header::{self, HeaderValue};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Request, Response, Status, Streaming, body::Body, codegen::Service, server::NamedService};
use tracing::Instrument;

use super::{
    Fences, PUSH_PATH,
    incoming::Incoming,
    introduce,
    messages::Messages,
    outgoing::{Outgoing, OutgoingBody},
    pools::Pools,
    port::{ReceiverPort, write_pieces},
};
use crate::{
    Chain, Claims, FinalClaims, FrameBytes, PiecesHeader, Reject, StreamId, Terms, Transport, Verdict, limits,
    sender::heartbeat_ms,
    shm::{MappedPool, Mapping, Mappings},
};

/// What gRPC is called in a header.
pub(super) const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

type Replies = mpsc::Sender<Outgoing>;

/// Serves `baton.node.v1.Handoff` over a node's [`ReceiverPort`].
pub struct HandoffService<P> {
    port: Arc<P>,
    fences: Fences,
    tasks: TaskTracker,
    shutdown: CancellationToken,
    streams: Arc<Semaphore>,
    pools: Option<Pools>,
}

impl<P: ReceiverPort> HandoffService<P> {
    /// Streams run on `tasks` and are closed when `shutdown` is cancelled. `fences` are those that carry out the port's `Fence` actions.
    pub fn new(port: Arc<P>, fences: Fences, tasks: TaskTracker, shutdown: CancellationToken) -> Self {
        Self {
            port,
            fences,
            tasks,
            shutdown,
            streams: Arc::new(Semaphore::new(limits::MAX_STREAMS)),
            pools: None,
        }
    }

    /// Takes pushes over shared memory, too, from senders whose pools are in `mappings`: what they offer when they introduce themselves goes there.
    pub fn with_mappings(mut self, mappings: Mappings) -> Self {
        self.pools = Some(Pools::new(mappings));
        self
    }

    fn terms(&self) -> Terms {
        self.port.locked(|receiver, _, _, _| receiver.terms())
    }

    /// The tower service, with its message limits; serve it on a [`super::configure_server`] server.
    pub fn into_server(self) -> HandoffServer<P> {
        let service = Arc::new(self);
        HandoffServer {
            calls: handoff_server::HandoffServer::from_arc(service.clone()),
            service,
        }
    }

    /// Starts a stream.
    fn push(&self, body: Body) -> Result<http::Response<Body>, Status> {
        if self.shutdown.is_cancelled() {
            return Err(Status::unavailable("the node is shutting down"));
        }
        let Ok(permit) = self.streams.clone().try_acquire_owned() else {
            return Err(Status::resource_exhausted("too many pushes are open"));
        };
        let (replies, outgoing) = mpsc::channel(limits::REPLIES_AHEAD);
        let (stream, fenced) = self.fences.register();
        let guard = StreamGuard {
            port: self.port.clone(),
            fences: self.fences.clone(),
            stream,
            refused: None,
        };
        let (pools, shutdown) = (self.pools.clone(), self.shutdown.clone());
        // Nobody has shown a capability yet.
        let frames = Messages::new(body, limits::OPEN_BYTES);
        let run = async move {
            run(guard, frames, replies, pools, fenced, shutdown).await;
            drop(permit);
        };
        self.tasks.spawn(run.instrument(tracing::Span::current()));
        let mut response = http::Response::new(Body::new(OutgoingBody::response(outgoing)));
        response.headers_mut().insert(header::CONTENT_TYPE, GRPC);
        Ok(response)
    }
}

/// Serves [`HandoffService`]'s calls: pushes by hand, whose KV must not be copied on its way into blocks, the others as they are generated.
pub struct HandoffServer<P> {
    service: Arc<HandoffService<P>>,
    calls: handoff_server::HandoffServer<HandoffService<P>>,
}

impl<P> Clone for HandoffServer<P> {
    fn clone(&self) -> Self {
        Self {
            service: self.service.clone(),
            calls: self.calls.clone(),
        }
    }
}

impl<P> NamedService for HandoffServer<P> {
    const NAME: &'static str = handoff_server::SERVICE_NAME;
}

impl<P: ReceiverPort> Service<http::Request<Body>> for HandoffServer<P> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != PUSH_PATH {
            return self.calls.call(request);
        }
        let response = self.service.push(request.into_body());
        Box::pin(async { Ok(response.unwrap_or_else(Status::into_http)) })
    }
}

#[tonic::async_trait]
impl<P: ReceiverPort> handoff_server::Handoff for HandoffService<P> {
    type PushStream = Empty<Result<pb::PushReply, Status>>;

    /// Never called: [`HandoffServer`] takes pushes itself.
    async fn push(&self, _: Request<Streaming<pb::PushFrame>>) -> Result<Response<Self::PushStream>, Status> {
        Err(Status::unimplemented("pushes are taken by hand"))
    }

    async fn introduce(&self, request: Request<pb::PeerHello>) -> Result<Response<pb::PeerWelcome>, Status> {
        introduce::welcome(&self.terms(), request.get_ref(), self.pools.as_ref())
            .await
            .map(Response::new)
    }

    async fn probe(&self, request: Request<Streaming<pb::ProbeFrame>>) -> Result<Response<pb::ProbeReport>, Status> {
        let Ok(_permit) = self.streams.try_acquire() else {
            return Err(Status::resource_exhausted("too many pushes are open"));
        };
        introduce::probe(&self.terms(), request.into_inner())
            .await
            .map(Response::new)
    }
}

/// Tells the receiver that the stream is closed, however it came to that.
struct StreamGuard<P: ReceiverPort> {
    port: Arc<P>,
    fences: Fences,
    stream: StreamId,
    refused: Option<Reject>,
}

impl<P: ReceiverPort> Drop for StreamGuard<P> {
    fn drop(&mut self) {
        self.fences.forget(self.stream);
        self.port.locked(|receiver, pool, now, actions| {
            receiver.stream_closed(self.stream, self.refused, now, pool, actions);
        });
    }
}

/// One stream, to its end.
async fn run<P: ReceiverPort>(
    mut guard: StreamGuard<P>,
    frames: Messages,
    replies: Replies,
    pools: Option<Pools>,
    fenced: oneshot::Receiver<Reject>,
    shutdown: CancellationToken,
) {
    let (port, stream) = (guard.port.clone(), guard.stream);
    let end = tokio::select! {
        biased;
        fenced = fenced => Err(fenced.unwrap_or(Reject::Aborted)),
        () = shutdown.cancelled() => Err(Reject::Aborted),
        end = serve(&port, stream, frames, &replies, pools) => end,
    };
    if let Err(reject) = end {
        match reject {
            // A client went away, the time was up, or the answer ended with its first token before the push had begun: nothing is amiss.
            Reject::Aborted | Reject::LeaseEnded | Reject::UnknownHandoff => {
                tracing::debug!(stream = stream.0, code = reject.code(), "push ended")
            }
            _ => tracing::warn!(stream = stream.0, code = reject.code(), "push refused"),
        }
        guard.refused = Some(reject);
        let rejected = pb::Rejected {
            code: reject.code().to_owned(),
            message: reject.to_string(),
        };
        // A sender that does not read its replies learns it from the stream's end.
        let _ = replies.try_send(outgoing(Reply::Rejected(rejected)));
    }
}

/// Frames in, replies out, until the verdict (`Ok`), the sender's end (`Ok`), or a refusal. Dropped when the stream is fenced.
async fn serve<P: ReceiverPort>(
    port: &Arc<P>,
    stream: StreamId,
    mut frames: Messages,
    replies: &Replies,
    pools: Option<Pools>,
) -> Result<(), Reject> {
    let first = timeout(Duration::from_millis(limits::OPEN_MS), frames.next()).await;
    let claims = match first {
        Ok(Ok(Some(message))) => match Incoming::parse(message)? {
            Incoming::Open(open) => Claims::from_proto(&open).map_err(|_| Reject::Malformed)?,
            _ => return Err(Reject::Malformed),
        },
        Err(_) => return Err(Reject::Malformed),
        Ok(Err(status)) if too_long(&status) => return Err(Reject::Malformed),
        Ok(Ok(None)) | Ok(Err(_)) => return Ok(()),
    };
    let mapped = match claims.transport {
        Transport::Grpc => None,
        Transport::Shm => {
            let pools = pools.ok_or(Reject::PoolNotMapped)?;
            let mapping = pools.mappings.get(claims.sender_epoch).ok_or(Reject::PoolNotMapped)?;
            Some(Mapped {
                mapping,
                copiers: pools.copiers,
            })
        }
    };
    let (lease_ms, opened_at) = port.locked(|receiver, _, now, _| {
        let lease_ms = receiver.opened(stream, &claims, now)?;
        Ok((lease_ms, now))
    })?;
    tracing::debug!(stream = stream.0, handoff = claims.handoff.0, sender = %claims.sender_node, "push opened");
    reply(replies, Reply::Accepted(pb::Accepted { lease_ms })).await;
    let mut push = Push {
        port,
        stream,
        protocol: claims.protocol,
        frames: 1,
        answer_ms: heartbeat_ms(lease_ms) / limits::ANSWERS_PER_HEARTBEAT,
        answered_at: opened_at,
        mapped,
        copies: JoinSet::new(),
    };

    // A broken stream is the sender's end as well: the guard aborts the handoff. Every wait here ends with the lease, through the fence.
    frames.limit = limits::MESSAGE_BYTES;
    loop {
        let taken = tokio::select! {
            Some(copied) = push.copies.join_next() => push.landed(copied.unwrap_or(Err(Reject::Aborted))?),
            message = frames.next(), if push.copies.len() < limits::SHM_COPIES => match message {
                Ok(Some(message)) => push.take(Incoming::parse(message)?),
                Err(status) if too_long(&status) => Err(Reject::Malformed),
                _ => break,
            },
        };
        let Some(answer) = taken? else { continue };
        let last = matches!(answer, Reply::Verified(_));
        reply(replies, answer).await;
        if last {
            break;
        }
    }
    Ok(())
}

/// Whether a message was refused by its length, rather than that the stream broke.
fn too_long(status: &Status) -> bool {
    status.code() == Code::OutOfRange
}

/// An accepted stream.
struct Push<'a, P: ReceiverPort> {
    port: &'a Arc<P>,
    stream: StreamId,
    /// That the sender speaks.
    protocol: u32,
    /// That have arrived, OPEN included.
    frames: u64,
    /// Between answers to pieces.
    answer_ms: u64,
    answered_at: Time,
    mapped: Option<Mapped>,
    /// Over shared memory: frames that are being copied, while others are read.
    copies: JoinSet<Result<Option<Verdict>, Reject>>,
}

/// Where a push over shared memory copies from.
#[derive(Clone)]
struct Mapped {
    mapping: Arc<Mapping>,
    copiers: Arc<Semaphore>,
}

impl<P: ReceiverPort> Push<'_, P> {
    /// Takes a frame in; returns what to answer now.
    fn take(&mut self, frame: Incoming) -> Result<Option<Reply>, Reject> {
        self.frames += 1;
        match frame {
            Incoming::Pieces(header, data) => self.pieces(header, data),
            Incoming::Final(message) => self.finished(&message),
            Incoming::Heartbeat => self.renewed(0),
            Incoming::Open(_) => Err(Reject::Malformed),
        }
    }

    fn pieces(&mut self, header: PiecesHeader, data: Chain) -> Result<Option<Reply>, Reject> {
        if let Some(mapped) = &self.mapped {
            self.copies
                .spawn(mapped.clone().copy(self.port.clone(), self.stream, header));
            return Ok(None);
        }
        let written = write_pieces(self.port, self.stream, &header, &mut FrameBytes::new(data))?;
        self.landed(written)
    }

    fn landed(&mut self, written: Option<Verdict>) -> Result<Option<Reply>, Reject> {
        match written {
            Some(verdict) => Ok(Some(said(verdict))),
            None => self.renewed(self.answer_ms),
        }
    }

    fn finished(&mut self, message: &pb::Final) -> Result<Option<Reply>, Reject> {
        let claims = FinalClaims::from_proto(message, self.protocol).map_err(|_| Reject::Malformed)?;
        let verdict = self
            .port
            .locked(|receiver, pool, now, actions| receiver.finished(self.stream, &claims, now, pool, actions))?;
        Ok(verdict.map(said))
    }

    /// Renews the lease, if the last answer is at least `after_ms` old.
    fn renewed(&mut self, after_ms: u64) -> Result<Option<Reply>, Reject> {
        let (stream, answered_at, frames) = (self.stream, &mut self.answered_at, self.frames);
        self.port.locked(|receiver, _, now, _| {
            if now < answered_at.after_ms(after_ms) {
                return Ok(None);
            }
            *answered_at = now;
            let lease_ms = receiver.heartbeat(stream, now)?;
            Ok(Some(Reply::Renewed(pb::Renewed { lease_ms, frames })))
        })
    }
}

impl Mapped {
    /// Copies what a frame names, on a thread for blocking work. A copy that has begun ends even when this is dropped.
    async fn copy<P: ReceiverPort>(
        self,
        port: Arc<P>,
        stream: StreamId,
        header: PiecesHeader,
    ) -> Result<Option<Verdict>, Reject> {
        if !header.runs.iter().all(|run| self.mapping.holds(run.source_block)) {
            return Err(Reject::Malformed);
        }
        let turn = self.copiers.acquire_owned().await.map_err(|_| Reject::Aborted)?;
        let copy = move || {
            let written = write_pieces(&port, stream, &header, &mut MappedPool(&self.mapping));
            drop(turn);
            written
        };
        tokio::task::spawn_blocking(copy).await.unwrap_or(Err(Reject::Aborted))
    }
}

fn said(verdict: Verdict) -> Reply {
    match verdict {
        Verdict::Verified => Reply::Verified(pb::PushVerified {}),
        Verdict::Resend { slots } => Reply::Resend(pb::Resend {
            slots: slots.into_iter().map(|slot| slot as u32).collect(),
        }),
    }
}

/// A reply to a sender that has gone is dropped; its frames end next. So is one to a sender that does not read for long; its lease ends next.
async fn reply(replies: &Replies, reply: Reply) {
    let by = Duration::from_millis(limits::REPLY_MS);
    let _ = replies.send_timeout(outgoing(reply), by).await;
}

fn outgoing(reply: Reply) -> Outgoing {
    Outgoing::of(&pb::PushReply { reply: Some(reply) })
}
