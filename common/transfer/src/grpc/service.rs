//! The decode node's end of a push.

use std::{sync::Arc, time::Duration};

use baton_proto::node::v1::{self as pb, handoff_server, push_frame::Frame, push_reply::Reply};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinHandle,
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
use crate::{Claims, FinalClaims, PieceHeader, Reject, StreamId, Verdict, limits, sender::heartbeat_ms};

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
        match reject {
            // A client went away, or the time was up: the node's own doing.
            Reject::Aborted | Reject::LeaseEnded => {
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
    let (lease_ms, mut renewed_at) = call(&**port, |receiver, _, now, _| {
        receiver.opened(stream, &claims, now).map(|lease_ms| (lease_ms, now))
    })?;
    tracing::debug!(stream = stream.0, handoff = claims.handoff.0, sender = %claims.sender_node, "push opened");
    reply(replies, Reply::Accepted(pb::Accepted { lease_ms })).await;
    let answer_ms = heartbeat_ms(lease_ms) / limits::ANSWERS_PER_HEARTBEAT;

    // OPEN was the first.
    let (mut count, mut listening, mut verifying) = (1, true, Verifying(None));
    // A broken stream is the sender's end as well: the guard aborts the handoff. Every wait here ends with the lease, through the fence.
    loop {
        let message = tokio::select! {
            verdict = verifying.verdict(), if verifying.0.is_some() => {
                match verdict? {
                    Verdict::Verified => {
                        reply(replies, Reply::Verified(pb::PushVerified {})).await;
                        return Ok(());
                    }
                    Verdict::Resend { slots } => {
                        let slots = slots.into_iter().map(|slot| slot as u32).collect();
                        reply(replies, Reply::Resend(pb::Resend { slots })).await;
                    }
                }
                continue;
            }
            message = frames.message(), if listening => message,
            else => return Ok(()),
        };
        let message = match message {
            Ok(Some(message)) => message,
            // Nothing more will come, but the verdict may still be heard.
            Ok(None) => {
                listening = false;
                continue;
            }
            Err(_) => return Ok(()),
        };
        count += 1;
        let answered = match message.frame {
            Some(Frame::Piece(piece)) => {
                match header(&piece).and_then(|header| write_piece(port, stream, &header, &piece.data)) {
                    Ok(Some(verify)) => {
                        verifying.start(verify);
                        Ok(None)
                    }
                    Ok(None) => call(&**port, |receiver, _, now, _| {
                        if now < renewed_at.after_ms(answer_ms) {
                            return Ok(None);
                        }
                        renewed_at = now;
                        receiver.heartbeat(stream, now).map(Some)
                    }),
                    Err(reject) => Err(reject),
                }
            }
            Some(Frame::Final(message)) => FinalClaims::from_proto(&message)
                .map_err(|_| Reject::Malformed)
                .and_then(|claims| call(&**port, |receiver, _, now, _| receiver.finished(stream, &claims, now)))
                .map(|verify| {
                    if let Some(verify) = verify {
                        verifying.start(PendingVerify::new(port.clone(), verify));
                    }
                    None
                }),
            Some(Frame::Heartbeat(_)) => call(&**port, |receiver, _, now, _| {
                renewed_at = now;
                receiver.heartbeat(stream, now).map(Some)
            }),
            Some(Frame::Open(_)) | None => Err(Reject::Malformed),
        };
        match answered {
            Ok(None) => {}
            Ok(Some(lease_ms)) => {
                let renewed = pb::Renewed {
                    lease_ms,
                    frames: count,
                };
                reply(replies, Reply::Renewed(renewed)).await;
            }
            // All may have been verified just now: then there is nothing left to refuse.
            Err(reject) if verifying.0.is_some() => match verifying.verdict().await {
                Ok(Verdict::Verified) => {
                    reply(replies, Reply::Verified(pb::PushVerified {})).await;
                    return Ok(());
                }
                _ => return Err(reject),
            },
            Err(reject) => return Err(reject),
        }
    }
}

/// The sums that are being taken on a thread for blocking work, while the stream's frames are still read.
struct Verifying(Option<JoinHandle<Result<Verdict, Reject>>>);

impl Verifying {
    fn start<P: ReceiverPort>(&mut self, verify: PendingVerify<P>) {
        self.0 = Some(tokio::task::spawn_blocking(move || verify.run()));
    }

    /// Pending as long as nothing is being summed. Cancel-safe.
    async fn verdict(&mut self) -> Result<Verdict, Reject> {
        let Some(task) = &mut self.0 else {
            return std::future::pending().await;
        };
        let verdict = task.await.unwrap_or(Err(Reject::Aborted));
        self.0 = None;
        verdict
    }
}

/// A reply to a sender that has gone is dropped; its frames end next. So is one to a sender that does not read for long; its lease ends next.
async fn reply(replies: &Replies, reply: Reply) {
    let reply = Ok(pb::PushReply { reply: Some(reply) });
    let _ = replies
        .send_timeout(reply, Duration::from_millis(limits::REPLY_MS))
        .await;
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
