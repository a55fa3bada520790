//! The decode node's end of a push.

use std::{sync::Arc, time::Duration};

use baton_proto::node::v1::{self as pb, handoff_server, push_frame::Frame, push_reply::Reply};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

use super::{
    Fences,
    port::{PendingVerify, ReceiverPort, call, write_piece},
};
use crate::{Claims, FinalClaims, PieceHeader, Reject, StreamId, Verdict, limits};

type Replies = mpsc::Sender<Result<pb::PushReply, Status>>;

/// Serves `baton.node.v1.Handoff` over a node's [`ReceiverPort`].
pub struct HandoffService<P> {
    port: Arc<P>,
    fences: Fences,
    tasks: TaskTracker,
    shutdown: CancellationToken,
    streams: Arc<Semaphore>,
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
        }
    }

    /// The tonic service, with its message limits; serve it on a [`super::configure_server`] server.
    pub fn into_server(self) -> handoff_server::HandoffServer<Self> {
        handoff_server::HandoffServer::new(self).max_decoding_message_size(limits::MESSAGE_BYTES)
    }
}

#[tonic::async_trait]
impl<P: ReceiverPort> handoff_server::Handoff for HandoffService<P> {
    type PushStream = ReceiverStream<Result<pb::PushReply, Status>>;

    async fn push(&self, request: Request<Streaming<pb::PushFrame>>) -> Result<Response<Self::PushStream>, Status> {
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
        let shutdown = self.shutdown.clone();
        let run = async move {
            run(guard, request.into_inner(), replies, fenced, shutdown).await;
            drop(permit);
        };
        self.tasks.spawn(run.instrument(tracing::Span::current()));
        Ok(Response::new(ReceiverStream::new(outgoing)))
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
        call(&*self.port, |receiver, pool, now, actions| {
            receiver.stream_closed(self.stream, self.refused, now, pool, actions);
        });
    }
}

/// One stream, to its end.
async fn run<P: ReceiverPort>(
    mut guard: StreamGuard<P>,
    frames: Streaming<pb::PushFrame>,
    replies: Replies,
    fenced: oneshot::Receiver<Reject>,
    shutdown: CancellationToken,
) {
    let (port, stream) = (guard.port.clone(), guard.stream);
    let end = tokio::select! {
        biased;
        fenced = fenced => Err(fenced.unwrap_or(Reject::Aborted)),
        () = shutdown.cancelled() => Err(Reject::Aborted),
        end = serve(&port, stream, frames, &replies) => end,
    };
    if let Err(reject) = end {
        tracing::warn!(stream = stream.0, code = reject.code(), "push refused");
        guard.refused = Some(reject);
        let rejected = pb::Rejected {
            code: reject.code().to_owned(),
            message: reject.to_string(),
        };
        // A sender that does not read its replies learns it from the stream's end.
        let _ = replies.try_send(Ok(pb::PushReply {
            reply: Some(Reply::Rejected(rejected)),
        }));
    }
}

/// Frames in, replies out, until the verdict (`Ok`), the sender's end (`Ok`), or a refusal. Dropped when the stream is fenced: what is being
/// summed then ends by itself.
async fn serve<P: ReceiverPort>(
    port: &Arc<P>,
    stream: StreamId,
    mut frames: Streaming<pb::PushFrame>,
    replies: &Replies,
) -> Result<(), Reject> {
    let first = timeout(Duration::from_millis(limits::OPEN_MS), frames.message()).await;
    let claims = match first {
        Ok(Ok(Some(pb::PushFrame {
            frame: Some(Frame::Open(open)),
        }))) => Claims::from_proto(&open).map_err(|_| Reject::Malformed)?,
        Ok(Ok(Some(_))) | Err(_) => return Err(Reject::Malformed),
        Ok(Ok(None)) | Ok(Err(_)) => return Ok(()),
    };
    let lease_ms = call(&**port, |receiver, _, now, _| receiver.opened(stream, &claims, now))?;
    tracing::debug!(stream = stream.0, handoff = claims.handoff.0, sender = %claims.sender_node, "push opened");
    reply(replies, Reply::Accepted(pb::Accepted { lease_ms })).await;

    // A broken stream is the sender's end as well: the guard aborts the handoff. Every wait here ends with the lease, through the fence.
    while let Ok(Some(message)) = frames.message().await {
        let verify = match message.frame {
            Some(Frame::Piece(piece)) => write_piece(port, stream, &header(&piece)?, &piece.data)?,
            Some(Frame::Final(message)) => {
                let claims = FinalClaims::from_proto(&message).map_err(|_| Reject::Malformed)?;
                let verify = call(&**port, |receiver, _, now, _| receiver.finished(stream, &claims, now))?;
                verify.map(|verify| PendingVerify::new(port.clone(), verify))
            }
            Some(Frame::Heartbeat(_)) => {
                let lease_ms = call(&**port, |receiver, _, now, _| receiver.heartbeat(stream, now))?;
                reply(replies, Reply::Renewed(pb::Renewed { lease_ms })).await;
                None
            }
            Some(Frame::Open(_)) | None => return Err(Reject::Malformed),
        };
        let Some(verify) = verify else { continue };
        match tokio::task::spawn_blocking(move || verify.run())
            .await
            .unwrap_or(Err(Reject::Aborted))?
        {
            Verdict::Verified => {
                reply(replies, Reply::Verified(pb::PushVerified {})).await;
                return Ok(());
            }
            Verdict::Resend { slots } => {
                let slots = slots.into_iter().map(|slot| slot as u32).collect();
                reply(replies, Reply::Resend(pb::Resend { slots })).await;
            }
        }
    }
    Ok(())
}

/// A reply to a sender that has gone is dropped; its frames end next.
async fn reply(replies: &Replies, reply: Reply) {
    let _ = replies.send(Ok(pb::PushReply { reply: Some(reply) })).await;
}

fn header(piece: &pb::Piece) -> Result<PieceHeader, Reject> {
    let end = piece.first_layer.checked_add(piece.layers).ok_or(Reject::Malformed)?;
    Ok(PieceHeader {
        slot: piece.slot as usize,
        generation: baton_kv::Generation(piece.generation),
        layers: piece.first_layer as usize..end as usize,
        valid_tokens: piece.valid_tokens as usize,
        bytes: piece.data.len(),
    })
}
