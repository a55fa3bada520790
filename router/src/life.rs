//! One choice of a request as a task: drives [`crate::core::request::Life`], holds its two streams, and turns its tokens into text.

use std::sync::Arc;

use baton_kv::{Attempt, Epoch, NodeId, RequestId, Time, TokenId};
use baton_node::{clock, limits as shared, telemetry};
use baton_proto::node::v1::{self as pb, decode_client::DecodeClient, decode_request, prefill_client::PrefillClient};
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tracing::Span;

use crate::{
    choices::Choices,
    cluster::{Admitted, Answer, Cluster},
    core::{
        admission::{Event as AdmissionEvent, Leg},
        member::MemberId,
        pairs::Transport,
        request::{Action, EndReason, Event, LegError, Life, Token},
    },
    error::GenerateError,
    nodes::{self, LegStream},
    request::{AnswerEvent, Delta, FinishReason, Finished, Matched, Served, Timings, Usage},
    text::AnswerText,
};

mod wire;

/// Messages to a decode node that wait: the opening one, and renewals.
const DECODE_REQUESTS: usize = 4;

/// What a choice is, for its driver.
pub(crate) struct Job {
    /// From 0.
    pub(crate) choice: u32,
    /// All but attempt and remaining time.
    pub(crate) work: pb::Work,
    pub(crate) logprobs: bool,
    pub(crate) router: String,
}

impl Job {
    /// Whether alternatives were asked for.
    fn alternatives(&self) -> bool {
        self.work
            .sampling
            .as_ref()
            .is_some_and(|sampling| sampling.top_logprobs > 0)
    }
}

struct DecodeLeg {
    /// Of the node's process when the leg was opened.
    epoch: Epoch,
    events: LegStream<pb::DecodeEvent>,
    requests: mpsc::Sender<pb::DecodeRequest>,
}

/// Drives one choice. Dropping it, wherever it is, cancels both legs and gives the credits back.
pub(crate) struct Driver {
    life: Life,
    cluster: Cluster,
    admitted: Admitted,
    job: Job,
    request: RequestId,
    text: Option<AnswerText>,
    choices: Arc<Choices>,
    decode: Option<DecodeLeg>,
    prefill: Option<LegStream<pb::PrefillEvent>>,
    ticket: Option<pb::Ticket>,
    matched: Option<Matched>,
    /// Tokens that were passed on.
    completion_tokens: u32,
    last_id: Option<TokenId>,
    first_token: Option<Time>,
    last_token: Option<Time>,
    /// Something could not be passed on in time: the answer has a hole, and must not end well.
    cut: bool,
}

impl Driver {
    pub(crate) fn new(
        life: Life,
        cluster: Cluster,
        admitted: Admitted,
        job: Job,
        text: AnswerText,
        choices: Arc<Choices>,
    ) -> Self {
        Self {
            life,
            cluster,
            request: admitted.request(),
            admitted,
            job,
            text: Some(text),
            choices,
            decode: None,
            prefill: None,
            ticket: None,
            matched: None,
            completion_tokens: 0,
            last_id: None,
            first_token: None,
            last_token: None,
            cut: false,
        }
    }

    /// Runs the choice to its end, which it always reaches: its deadline is one of the events.
    pub(crate) async fn run(mut self) {
        let mut actions = Vec::new();
        while !self.life.ended() {
            let event = self.next().await;
            self.life.step(event, clock::now(), &mut actions);
            let mut next = 0;
            while let Some(action) = actions.get(next).cloned() {
                next += 1;
                if let Some(event) = self.act(action).await {
                    self.life.step(event, clock::now(), &mut actions);
                }
            }
            actions.clear();
        }
    }

    async fn next(&mut self) -> Event {
        let queued = self.life.queued();
        tokio::select! {
            biased;
            () = self.choices.over() => Event::ClientGone,
            () = self.choices.router_stops() => Event::RouterStopped,
            answer = self.admitted.answers.recv(), if queued => granted(answer),
            event = next_of(self.decode.as_mut().map(|leg| &mut leg.events)) => self.decode_event(event),
            event = next_of(self.prefill.as_mut()) => wire::prefill_event(event),
            () = clock::sleep_until(self.life.wake_at()) => Event::Tick,
        }
    }

    fn decode_event(&mut self, item: Option<Result<Option<pb::DecodeEvent>, Status>>) -> Event {
        match wire::decode_event(item) {
            Ok(event) => event,
            Err(ticket) => self.ticket(ticket),
        }
    }

    fn ticket(&mut self, ticket: Box<pb::Ticket>) -> Event {
        let epoch = self.decode.as_ref().map(|leg| leg.epoch);
        let current = ticket.request_id == self.job.work.request_id && ticket.attempt == self.job.work.attempt;
        let theirs = Epoch::from_slice(&ticket.epoch);
        if current && theirs.is_some() && theirs != epoch {
            // Another process answers there by now: the one that was meant is gone.
            return Event::DecodeFailed(LegError::Lost);
        }
        if !current || theirs.is_none() || ticket.slots.is_empty() {
            return Event::DecodeFailed(wire::protocol("a ticket for something else"));
        }
        let lease_ms = ticket.lease_ms;
        self.ticket = Some(*ticket);
        Event::Ticket { lease_ms }
    }

    async fn act(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::OpenDecode {
                member,
                attempt,
                reserve,
            } => self.open_decode(member, attempt, reserve),
            Action::RunPrefill { member, .. } => self.run_prefill(member),
            Action::Renew => {
                if let Some(leg) = &self.decode {
                    // Full: the connection takes nothing, and will be found dead.
                    let _ = leg
                        .requests
                        .try_send(request(decode_request::Request::Renew(pb::Renew {})));
                }
                None
            }
            Action::Close(Leg::Decode) => {
                self.decode = None;
                None
            }
            Action::Close(Leg::Prefill) => {
                self.prefill = None;
                None
            }
            Action::Travelled {
                prefill,
                decode,
                travelled,
            } => self.tell(AdmissionEvent::Travelled {
                prefill,
                decode,
                travelled,
            }),
            Action::Acknowledged(leg) => self.tell(AdmissionEvent::Acknowledged {
                request: self.request,
                leg,
            }),
            Action::Settled(leg) => self.tell(AdmissionEvent::Settled {
                request: self.request,
                leg,
            }),
            Action::Requeue { by } => {
                self.ticket = None;
                self.tell(AdmissionEvent::Requeue {
                    request: self.request,
                    by,
                })
            }
            Action::Deliver { index, tokens } => self.deliver(index, tokens).await,
            Action::End(outcome) => {
                self.end(outcome).await;
                None
            }
        }
    }

    fn tell(&self, event: AdmissionEvent) -> Option<Event> {
        self.cluster.step(event);
        None
    }

    fn open_decode(&mut self, member: MemberId, attempt: Attempt, reserve: bool) -> Option<Event> {
        let Some(reach) = self.cluster.reach(member) else {
            return Some(Event::DecodeFailed(LegError::Lost));
        };
        let work = self.work(attempt);
        let first = if reserve {
            decode_request::Request::Reserve(work)
        } else {
            decode_request::Request::Run(work)
        };
        let (requests, receiver) = mpsc::channel(DECODE_REQUESTS);
        let _ = requests.try_send(request(first));
        let mut client = DecodeClient::new(reach.channel)
            .max_decoding_message_size(shared::GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(shared::GRPC_MESSAGE_BYTES);
        let call = telemetry::request(ReceiverStream::new(receiver));
        self.decode = Some(DecodeLeg {
            epoch: reach.epoch,
            events: nodes::leg(async move { client.open(call).await }),
            requests,
        });
        None
    }

    fn run_prefill(&mut self, member: MemberId) -> Option<Event> {
        let Some(reach) = self.cluster.reach(member) else {
            return Some(Event::PrefillFailed(LegError::Lost));
        };
        let message = pb::PrefillRequest {
            work: Some(self.work(Attempt(self.job.work.attempt))),
            ticket: self.ticket.take(),
        };
        let mut client = PrefillClient::new(reach.channel)
            .max_decoding_message_size(shared::GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(shared::GRPC_MESSAGE_BYTES);
        let call = telemetry::request(message);
        self.prefill = Some(nodes::leg(async move { client.run(call).await }));
        None
    }

    fn work(&mut self, attempt: Attempt) -> pb::Work {
        self.job.work.attempt = attempt.0;
        pb::Work {
            deadline_ms: clock::now().ms_until(self.choices.deadline).max(1),
            ..self.job.work.clone()
        }
    }

    /// Passes tokens on as text; says so if they complete a stop string.
    async fn deliver(&mut self, index: u32, tokens: Vec<Token>) -> Option<Event> {
        if self.first_token.is_none() && self.job.choice == 0 && self.choices.several() {
            self.tell(AdmissionEvent::Begun { request: self.request });
        }
        let mut delta = Delta {
            choice: self.job.choice,
            index,
            ..Delta::default()
        };
        for token in tokens {
            let id = token.id;
            delta.ids.push(id);
            self.last_id = Some(id);
            if self.job.logprobs {
                delta.logprobs.push(token.logprob);
            }
            if self.job.alternatives() {
                delta.top_logprobs.push(token.alternatives);
            }
            // The token that ends the answer is no part of its text.
            if self.job.work.stop_ids.contains(&id) {
                continue;
            }
            match self.text.as_mut().map(|text| text.push(id)) {
                Some(Ok(shown)) => {
                    delta.text.push_str(&shown.text);
                    if let Some(stop) = shown.stop {
                        self.matched = Some(Matched::Stop(stop));
                        break;
                    }
                }
                // Ids were checked against the vocabulary.
                Some(Err(error)) => tracing::error!(%error, id, "a token has no text"),
                None => {}
            }
        }
        let now = clock::now();
        self.completion_tokens += delta.ids.len() as u32;
        self.choices.drew(delta.ids.len() as u32);
        self.choices.metrics.tokens_left(delta.ids.len(), self.last_token, now);
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        self.send(AnswerEvent::Delta(delta)).await;
        let stopped = self.matched.is_some() && !self.life.ended();
        stopped.then_some(Event::StopMatched)
    }

    async fn send(&mut self, event: AnswerEvent) {
        match self.choices.place().await {
            Some(place) => {
                place.send(Ok(event));
            }
            None => self.cut = true,
        }
    }

    async fn end(&mut self, outcome: Result<EndReason, GenerateError>) {
        let now = clock::now();
        let span = Span::current();
        for (field, node) in [
            ("prefill_node", &self.life.record().prefill_node),
            ("decode_node", &self.life.record().decode_node),
        ] {
            if let Some(NodeId(node)) = node {
                span.record(field, node.as_str());
            }
        }
        let finished = match outcome {
            Ok(reason) => self.finish(reason, now).await,
            Err(error) => return self.choices.failed(error).await,
        };
        let place = if self.cut { None } else { self.choices.place().await };
        let Some(place) = place else {
            return self.choices.failed(self.choices.cut_by()).await;
        };
        self.choices.completed(&finished);
        place.send(Ok(AnswerEvent::Finished(Box::new(finished))));
    }

    async fn finish(&mut self, reason: EndReason, now: Time) -> Finished {
        if self.matched.is_none()
            && let Some(text) = self.text.take()
        {
            let rest = text.finish();
            self.matched = rest.stop.map(Matched::Stop);
            if !rest.text.is_empty() {
                let delta = Delta {
                    choice: self.job.choice,
                    index: self.completion_tokens,
                    text: rest.text,
                    ..Delta::default()
                };
                self.send(AnswerEvent::Delta(delta)).await;
            }
        }
        let record = self.life.record().clone();
        let reason = match (reason, &self.matched) {
            (EndReason::Stop, _) | (_, Some(_)) => FinishReason::Stop,
            (EndReason::Length, None) => FinishReason::Length,
        };
        if reason == FinishReason::Stop && self.matched.is_none() {
            self.matched = self.last_id.map(Matched::TokenId);
        }
        let since_arrival = |time: Option<Time>| clock::ms_between(self.choices.arrived, time.unwrap_or(now));
        let mut usage = Usage {
            completion_tokens: self.completion_tokens,
            ..Usage::default()
        };
        if self.job.choice == 0 {
            usage.prompt_tokens = self.job.work.prompt.len() as u32;
            usage.cached_tokens = record.cached_tokens;
        }
        Finished {
            choice: self.job.choice,
            reason,
            matched: self.matched.take(),
            usage,
            timings: Timings {
                queue_ms: record.router_queue_ms + record.node_queue_ms,
                prefill_ms: record.prefill_ms,
                transfer_ms: record.transfer_ms,
                first_step_ms: record.first_step_ms,
                ttft_ms: since_arrival(self.first_token),
                total_ms: since_arrival(self.last_token),
            },
            served: Served {
                router: self.job.router.clone(),
                transport: match (&record.prefill_node, &record.decode_node) {
                    // Until the prefill node has said how: it is late, or of a version that does not.
                    (Some(_), Some(_)) => record.transport.map_or("grpc", Transport::name),
                    _ => "local",
                },
                prefill_node: record.prefill_node,
                decode_node: record.decode_node,
                kv_bytes: record.kv_bytes,
                kv_blocks: record.kv_blocks,
                attempts: record.attempts,
            },
        }
    }
}

/// The next item of a leg; never, when it is not open.
async fn next_of<T>(leg: Option<&mut LegStream<T>>) -> Option<Result<Option<T>, Status>> {
    match leg {
        Some(leg) => leg.next().await,
        None => std::future::pending().await,
    }
}

fn granted(answer: Option<Answer>) -> Event {
    match answer {
        Some(Ok(placement)) => Event::Granted(placement),
        Some(Err(error)) => Event::Refused(error),
        None => Event::Refused(GenerateError::Internal("admission forgot a request".to_owned())),
    }
}

fn request(request: decode_request::Request) -> pb::DecodeRequest {
    pb::DecodeRequest { request: Some(request) }
}
