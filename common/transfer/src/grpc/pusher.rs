//! The prefill node's end of a push.

use std::{collections::VecDeque, future::poll_fn, sync::Arc, time::Duration};

use baton_kv::{BlockName, Epoch, KvIdentity, KvMemory, NodeId, Time, TokenId};
use baton_proto::{
    PROTOCOL_MIN,
    node::v1::{self as pb, push_frame::Frame, push_reply::Reply},
};
use futures_util::future::BoxFuture;
use http::header;
use prost::Message as _;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tonic::{Code, Status, body::Body, codegen::Service, metadata::MetadataMap, transport::Channel};

use super::{
    Hold, PUSH_PATH, PathConfig, PushInput,
    messages::Messages,
    outgoing::{Outgoing, OutgoingBody},
    peers::{Peers, Way},
    read_ahead::{ReadAhead, Share},
    reading::{Kept, read_runs, run_bytes, sum_runs},
    service::GRPC,
};
use crate::{
    Chain, PushFailure, Reject, RunToSend, Sender, SenderAction, SenderConfig, SenderState, Terms, Ticket, Transport,
    WireError, limits, path::PathError,
};

/// What a pusher knows of its node.
#[derive(Clone, Debug)]
pub struct PusherConfig {
    /// This node's name.
    pub node: NodeId,
    /// This process's life.
    pub epoch: Epoch,
    /// What its KV means.
    pub identity: KvIdentity,
    /// Newest version of the handoff that it speaks.
    pub protocol_max: u32,
    /// By what ways its pushes may go.
    pub paths: PathConfig,
}

/// One push.
pub struct PushJob {
    /// The right to it, as it arrived.
    pub ticket: Ticket,
    /// Parent of the prompt's first block.
    pub root: BlockName,
    /// The prompt.
    pub prompt: Vec<TokenId>,
    /// What is left of the request's deadline, ms.
    pub deadline_ms: u64,
    /// Sent with the call (trace context).
    pub metadata: MetadataMap,
    /// What has been computed, as it goes.
    pub input: PushInput,
}

/// A push that was verified.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PushReport {
    /// Payload (a block sent twice counts once).
    pub kv_bytes: u64,
    /// Of these, what left before the step that computed it had ended.
    pub early_bytes: u64,
    /// Blocks.
    pub kv_blocks: usize,
    /// From the first token to the decode node's verdict.
    pub transfer_ms: f64,
    /// Payload over the time in which pieces were being sent, the wait for the verdict included.
    pub bytes_per_s: f64,
    /// How they travelled.
    pub transport: Transport,
    /// What was expected of the path when the push began, for as many bytes; 0 when nothing was known.
    pub predicted_bytes_per_s: f64,
}

/// Why a push did not end verified. The decode node drains by itself.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The ticket does not fit the prompt or this node. No retry helps.
    #[error("the ticket cannot be used: {0}")]
    Ticket(#[from] WireError),
    /// The decode node cannot be reached. Another decode node helps.
    #[error("decode node at {address} cannot be reached: {message}")]
    Connect {
        /// Where.
        address: String,
        /// What the transport said.
        message: String,
    },
    /// The stream broke. A new attempt helps.
    #[error("the stream to the decode node broke: {0}")]
    Stream(String),
    /// Refused, or out of time.
    #[error(transparent)]
    Failed(#[from] PushFailure),
    /// No path to the decode node may be taken. Another decode node may help.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The node's own blocks could not be read.
    #[error("the prompt's KV could not be read")]
    Memory,
}

impl PushError {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Ticket(_) => "BAD_TICKET",
            Self::Connect { .. } => "PEER_UNREACHABLE",
            Self::Stream(_) => "PEER_LOST",
            Self::Failed(PushFailure::Rejected(reject)) => reject.code(),
            Self::Failed(PushFailure::LeaseEnded) => "LEASE_ENDED",
            Self::Failed(PushFailure::Deadline) => "DEADLINE",
            Self::Failed(PushFailure::Protocol) => "PEER_PROTOCOL",
            Self::Path(PathError::Unavailable { .. }) => "TRANSPORT_UNAVAILABLE",
            Self::Path(PathError::Slow { .. }) => "PATH_SLOW",
            Self::Memory => "KV_UNREADABLE",
        }
    }
}

/// Pushes prompts' KV to decode nodes; one per process.
pub struct Pusher {
    config: PusherConfig,
    memory: Arc<dyn KvMemory>,
    peers: Peers,
    read_ahead: ReadAhead,
}

impl Pusher {
    /// Reads blocks from `memory`, whose layout it offers.
    pub fn new(config: PusherConfig, memory: Arc<dyn KvMemory>) -> Self {
        let terms = Terms {
            node: config.node.clone(),
            epoch: config.epoch,
            identity: config.identity,
            layout: *memory.layout(),
            versions: PROTOCOL_MIN..=config.protocol_max,
        };
        Self {
            peers: Peers::new(terms, config.paths.clone()),
            config,
            memory,
            read_ahead: ReadAhead::new(limits::READ_AHEAD_BYTES),
        }
    }

    /// With another bound than [`limits::READ_AHEAD_BYTES`].
    #[cfg(test)]
    pub(super) fn with_read_ahead(self, read_ahead: ReadAhead) -> Self {
        Self { read_ahead, ..self }
    }

    /// Opens the stream at once and keeps the lease while the prompt waits or is computed; sends blocks as the feed reports them; ends with the
    /// decode node's verdict, or when lease or deadline have passed.
    ///
    /// Start it as soon as the ticket has arrived. Cancel-safe: dropping the future closes the stream, which aborts the handoff.
    pub async fn push(&self, job: PushJob) -> Result<PushReport, PushError> {
        let started = Instant::now();
        let ticket = job.ticket.clone();
        let by_ms = ticket.lease_ms.min(job.deadline_ms);
        let failure = if by_ms == job.deadline_ms {
            PushFailure::Deadline
        } else {
            PushFailure::LeaseEnded
        };
        let left = || Duration::from_millis(by_ms).saturating_sub(started.elapsed());
        let mut way = bounded(&ticket, left(), failure, self.peers.way(&ticket)).await?;
        let config = SenderConfig {
            node: self.config.node.clone(),
            epoch: self.config.epoch,
            identity: self.config.identity,
            layout: *self.memory.layout(),
            protocol_max: self.config.protocol_max,
            transport: way.transport,
            root: job.root,
            prompt: &job.prompt,
            deadline: Time(0).after_ms(job.deadline_ms),
        };
        let sender = Sender::new(job.ticket, config, Time(0))?;
        let mut push = Push {
            memory: self.memory.clone(),
            read_ahead: self.read_ahead.clone(),
            input: job.input,
            sender,
            started,
            opened: started,
            frames: mpsc::channel(1).0,
            outbox: VecDeque::new(),
            reading: None,
            holds: Arc::default(),
            first_at: None,
            busy: Busy::default(),
        };
        let mut report = push.over(&way, &ticket, job.metadata.clone()).await;
        if push.sender.state() == SenderState::Unmapped {
            tracing::info!(
                peer = ticket.address,
                "a decode node has not mapped this node's pool any more"
            );
            way = bounded(&ticket, left(), failure, self.peers.way_anew(&ticket, &way)).await?;
            push.sender.reopen(way.transport);
            report = push.over(&way, &ticket, job.metadata).await;
        }
        let report = report?;
        self.peers.transferred(&way, report.kv_bytes, report.bytes_per_s);
        Ok(PushReport {
            predicted_bytes_per_s: way.predicted(report.kv_bytes),
            ..report
        })
    }
}

/// A way to the ticket's decode node, within what is left of lease and deadline, of which the one that ends first is `failure`.
async fn bounded(
    ticket: &Ticket,
    left: Duration,
    failure: PushFailure,
    way: impl Future<Output = Result<Way, PushError>>,
) -> Result<Way, PushError> {
    let open = Duration::from_millis(limits::OPEN_MS);
    timeout(open.min(left), way).await.unwrap_or_else(|_| {
        Err(if left <= open {
            failure.into()
        } else {
            PushError::Connect {
                address: ticket.address.clone(),
                message: "no answer in time".to_owned(),
            }
        })
    })
}

/// A push under way.
struct Push {
    memory: Arc<dyn KvMemory>,
    read_ahead: ReadAhead,
    input: PushInput,
    sender: Sender,
    /// Zero of the sender's clock.
    started: Instant,
    /// When the stream's opening began.
    opened: Instant,
    frames: mpsc::Sender<Outgoing>,
    /// Frames that the stream has no room for yet; at most one of KV and a few small ones.
    outbox: VecDeque<Outgoing>,
    reading: Option<Reading>,
    /// Kept to the end: any block may be asked for again.
    holds: Arc<Vec<Hold>>,
    first_at: Option<Instant>,
    busy: Busy,
}

/// What woke the push.
enum Event {
    Reply(Result<Option<Chain>, Status>),
    Read((Vec<RunToSend>, Option<Share>)),
    Other,
}

/// A frame that waits for its share of the node's memory.
struct Reading {
    runs: Vec<RunToSend>,
    share: BoxFuture<'static, Option<Share>>,
}

impl Push {
    /// A stream, from its opening to the verdict, or until it must be opened again ([`SenderState::Unmapped`]: an error).
    async fn over(&mut self, way: &Way, ticket: &Ticket, metadata: MetadataMap) -> Result<PushReport, PushError> {
        self.opened = Instant::now();
        let (frames, outgoing) = mpsc::channel(limits::FRAMES_AHEAD);
        self.frames = frames;
        self.hand_over_open();
        let open = open(way.channel.clone(), metadata, OutgoingBody::request(outgoing));
        let by = Duration::from_millis(limits::OPEN_MS).min(self.until(self.sender.wake_at()));
        let connect = |message: String| PushError::Connect {
            address: ticket.address.clone(),
            message,
        };
        match timeout(by, open).await {
            Ok(Ok(replies)) => self.run(replies).await,
            Ok(Err(status)) if status.code() == Code::Unavailable => Err(connect(status.message().to_owned())),
            Ok(Err(status)) => Err(broken(&status)),
            Err(_) => {
                // Whose time was up?
                self.sender.next(self.now(), false);
                Err(match self.sender.state() {
                    SenderState::Failed(failure) => failure.into(),
                    _ => connect("no answer in time".to_owned()),
                })
            }
        }
    }

    async fn run(&mut self, mut replies: Messages) -> Result<PushReport, PushError> {
        let open_by = self.opened + Duration::from_millis(limits::OPEN_MS);
        loop {
            self.take_progress();
            self.fill_outbox();
            match self.sender.state() {
                SenderState::Verified => return Ok(self.report()),
                SenderState::Failed(failure) => return Err(failure.into()),
                SenderState::Unmapped => return Err(PushFailure::Rejected(Reject::PoolNotMapped).into()),
                SenderState::Opening if Instant::now() >= open_by => {
                    return Err(PushError::Stream("the decode node did not answer in time".to_owned()));
                }
                SenderState::Opening | SenderState::Sending | SenderState::Awaiting => {}
            }
            self.busy
                .set(!self.outbox.is_empty() || self.reading.is_some() || self.sender.state() == SenderState::Awaiting);
            let mut wake = self.started + Duration::from_micros(self.sender.wake_at().0);
            if self.sender.state() == SenderState::Opening {
                wake = wake.min(open_by);
            }
            let event = tokio::select! {
                reply = replies.next() => Event::Reply(reply),
                permit = self.frames.reserve(), if !self.outbox.is_empty() => {
                    match permit {
                        Ok(permit) => {
                            permit.send(self.outbox.pop_front().expect("checked just now"));
                            self.sender.handed_over(now_since(self.started));
                        }
                        // The call is over: its reply says why.
                        Err(_) => self.outbox.clear(),
                    }
                    Event::Other
                }
                read = share(&mut self.reading), if self.reading.is_some() => Event::Read(read),
                () = self.input.changed() => Event::Other,
                () = sleep_until(wake) => Event::Other,
            };
            match event {
                Event::Reply(Ok(Some(reply))) => match pb::PushReply::decode(reply) {
                    Ok(reply) => self.take_reply(reply),
                    Err(_) => return Err(PushFailure::Protocol.into()),
                },
                Event::Reply(Ok(None)) => return Err(PushError::Stream("the decode node closed it".to_owned())),
                Event::Reply(Err(status)) => return Err(broken(&status)),
                Event::Read((runs, share)) => self.read(&runs, share)?,
                Event::Other => {}
            }
        }
    }

    fn now(&self) -> Time {
        now_since(self.started)
    }

    /// From now until `time`.
    fn until(&self, time: Time) -> Duration {
        Duration::from_micros(time.0.saturating_sub(self.now().0))
    }

    /// OPEN goes into the stream before the call, which starts with it.
    fn hand_over_open(&mut self) {
        let now = self.now();
        if let Some(SenderAction::Open(claims)) = self.sender.next(now, false) {
            self.frames
                .try_send(frame(Frame::Open(claims.to_proto())))
                .expect("a new channel has room for one frame");
            self.sender.handed_over(now);
        }
    }

    fn take_progress(&mut self) {
        let progress = self.input.take();
        if !progress.holds.is_empty() {
            Arc::make_mut(&mut self.holds).extend(progress.holds);
        }
        if let Some((tokens, table)) = progress.computed {
            self.sender.computed(tokens, &table);
        }
        if let Some((tokens, layers, table)) = progress.layers {
            self.sender.computed_layers(tokens, layers, &table);
        }
        if let Some(first) = progress.first {
            self.sender.first_token(first);
            self.first_at = Some(Instant::now());
        }
    }

    /// Everything that the sender wants to send and there is room for.
    fn fill_outbox(&mut self) {
        loop {
            let room = self.reading.is_none() && self.outbox.is_empty();
            match self.sender.next(self.now(), room) {
                None => return,
                Some(SenderAction::Open(_)) => unreachable!("OPEN was sent with the call"),
                // Not behind the pieces that wait here.
                Some(SenderAction::Heartbeat) => self.outbox.push_front(frame(Frame::Heartbeat(pb::Heartbeat {}))),
                Some(SenderAction::Final(claims)) => self.outbox.push_back(frame(Frame::Final(claims.to_proto()))),
                Some(SenderAction::Pieces(runs)) => {
                    // Over shared memory nothing is read ahead.
                    let bytes = match self.sender.transport() {
                        Transport::Grpc => runs.iter().map(|run| run_bytes(self.memory.layout(), run)).sum(),
                        Transport::Shm => 0,
                    };
                    let read_ahead = self.read_ahead.clone();
                    let share = Box::pin(async move { read_ahead.take(bytes).await });
                    self.reading = Some(Reading { runs, share });
                }
            }
        }
    }

    /// Reads a frame of KV, sums it, and puts it into the outbox.
    fn read(&mut self, runs: &[RunToSend], share: Option<Share>) -> Result<(), PushError> {
        let kept = Kept {
            memory: self.memory.clone(),
            _holds: self.holds.clone(),
            share: Arc::new(share.ok_or(PushError::Memory)?),
        };
        let (data, sums) = match self.sender.transport() {
            Transport::Grpc => read_runs(&kept, runs),
            Transport::Shm => sum_runs(&*self.memory, runs).map(|sums| (Vec::new(), sums)),
        }
        .map_err(|_| PushError::Memory)?;
        for (run, sum) in runs.iter().zip(sums) {
            self.sender.sent(run, sum);
        }
        self.outbox
            .push_back(Outgoing::pieces(self.sender.protocol(), runs, data));
        Ok(())
    }

    fn take_reply(&mut self, reply: pb::PushReply) {
        match reply.reply {
            Some(Reply::Accepted(accepted)) => self.sender.accepted(accepted.lease_ms),
            Some(Reply::Renewed(renewed)) => self.sender.renewed(renewed.lease_ms, renewed.frames),
            Some(Reply::Resend(resend)) => {
                let slots: Vec<usize> = resend.slots.iter().map(|slot| *slot as usize).collect();
                self.sender.resend(&slots);
            }
            Some(Reply::Verified(_)) => self.sender.verified(),
            Some(Reply::Rejected(rejected)) => {
                self.sender
                    .rejected(Reject::from_code(&rejected.code).unwrap_or(Reject::Aborted));
            }
            // Of a later version: the lease bounds what it may mean.
            None => {}
        }
    }

    fn report(&mut self) -> PushReport {
        self.busy.set(false);
        let seconds = self.busy.total.as_secs_f64();
        let kv_bytes = self.sender.bytes();
        PushReport {
            kv_bytes,
            early_bytes: self.sender.early_bytes(),
            kv_blocks: self.sender.blocks(),
            transfer_ms: self.first_at.map_or(0.0, |at| at.elapsed().as_secs_f64() * 1e3),
            bytes_per_s: if seconds > 0.0 { kv_bytes as f64 / seconds } else { 0.0 },
            transport: self.sender.transport(),
            predicted_bytes_per_s: 0.0,
        }
    }
}

/// Time spent sending.
#[derive(Default)]
struct Busy {
    since: Option<Instant>,
    total: Duration,
}

impl Busy {
    fn set(&mut self, busy: bool) {
        match (self.since, busy) {
            (None, true) => self.since = Some(Instant::now()),
            (Some(since), false) => {
                self.total += since.elapsed();
                self.since = None;
            }
            _ => {}
        }
    }
}

/// What the frame that waits is given. Cancel-safe.
async fn share(reading: &mut Option<Reading>) -> (Vec<RunToSend>, Option<Share>) {
    let share = (&mut reading.as_mut().expect("checked by the caller").share).await;
    let runs = reading.take().map(|reading| reading.runs).unwrap_or_default();
    (runs, share)
}

/// Calls `Handoff.Push`: its replies.
async fn open(mut channel: Channel, metadata: MetadataMap, frames: OutgoingBody) -> Result<Messages, Status> {
    let mut request = http::Request::post(PUSH_PATH)
        .body(Body::new(frames))
        .map_err(|error| Status::from_error(error.into()))?;
    let headers = request.headers_mut();
    *headers = metadata.into_headers();
    headers.insert(header::TE, header::HeaderValue::from_static("trailers"));
    headers.insert(header::CONTENT_TYPE, GRPC);
    let failed = |error: tonic::transport::Error| Status::from_error(error.into());
    poll_fn(|cx| channel.poll_ready(cx)).await.map_err(failed)?;
    let response = channel.call(request).await.map_err(failed)?;
    if let Some(status) = Status::from_header_map(response.headers()).filter(|status| status.code() != Code::Ok) {
        return Err(status);
    }
    if response.status() != http::StatusCode::OK {
        return Err(Status::unknown(format!("HTTP status {}", response.status())));
    }
    Ok(Messages::new(response.into_body(), limits::OPEN_BYTES))
}

/// On a sender's clock, whose zero is `started`.
fn now_since(started: Instant) -> Time {
    Time(u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX))
}

fn frame(frame: Frame) -> Outgoing {
    Outgoing::of(&pb::PushFrame { frame: Some(frame) })
}

fn broken(status: &Status) -> PushError {
    PushError::Stream(format!("{:?}: {}", status.code(), status.message()))
}
