//! A router by hand: it takes announcements, and runs requests over one pair of nodes.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use baton_kv::TokenId;
use baton_proto::node::v1::{
    self as pb, decode_event, decode_request, node_report, prefill_event, registry_server, router_notice,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming, transport::server::TcpIncoming};

use super::{TestNode, soon};

/// What a node has said of itself.
#[derive(Clone, Default)]
pub struct Announced {
    pub hello: pb::Hello,
    pub load: pb::Load,
    /// Block names.
    pub names: HashSet<Vec<u8>>,
    pub connected: bool,
}

impl Announced {
    pub fn phase(&self) -> pb::Phase {
        if self.connected {
            self.load.phase()
        } else {
            pb::Phase::Unspecified
        }
    }

    /// Nothing runs, and every block is free or cached.
    pub fn is_idle(&self) -> bool {
        let load = &self.load;
        let quiet = load.waiting == 0 && load.running == 0;
        quiet && load.free_blocks + load.cached_blocks == self.hello.blocks
    }
}

type Nodes = Arc<watch::Sender<HashMap<String, Announced>>>;

pub struct Router {
    nodes: Nodes,
    address: String,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Router {
    pub async fn start() -> Self {
        Self::listen(TcpListener::bind("127.0.0.1:0").await.expect("a port")).await
    }

    pub async fn listen(listener: TcpListener) -> Self {
        let address = listener.local_addr().expect("bound").to_string();
        let (nodes, tasks, stop) = (Nodes::default(), TaskTracker::new(), CancellationToken::new());
        let registry = Registry {
            nodes: nodes.clone(),
            tasks: tasks.clone(),
            stop: stop.clone(),
        };
        let server = tonic::transport::Server::builder()
            .add_service(registry_server::RegistryServer::new(registry))
            .serve_with_incoming_shutdown(TcpIncoming::from(listener), stop.clone().cancelled_owned());
        tasks.spawn(server);
        Self {
            nodes,
            address,
            tasks,
            stop,
        }
    }

    pub fn address(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Stops, and frees its port.
    pub async fn stop(self) -> String {
        self.stop.cancel();
        self.tasks.close();
        soon("the router's end", self.tasks.wait()).await;
        self.address.clone()
    }

    /// Waits for a node to say something.
    pub async fn wait(&self, id: &str, what: &str, fits: impl Fn(&Announced) -> bool) -> Announced {
        let mut nodes = self.nodes.subscribe();
        let seen = soon(
            &format!("{id} {what}"),
            nodes.wait_for(|nodes| nodes.get(id).is_some_and(&fits)),
        )
        .await;
        seen.expect("the router lives")[id].clone()
    }

    pub async fn gone(&self, id: &str) {
        self.wait(id, "gone", |node| !node.connected).await;
    }
}

struct Registry {
    nodes: Nodes,
    tasks: TaskTracker,
    stop: CancellationToken,
}

#[tonic::async_trait]
impl registry_server::Registry for Registry {
    type AnnounceStream = ReceiverStream<Result<pb::RouterNotice, Status>>;

    async fn announce(
        &self,
        request: Request<Streaming<pb::NodeReport>>,
    ) -> Result<Response<Self::AnnounceStream>, Status> {
        let mut reports = request.into_inner();
        let Some(node_report::Report::Hello(hello)) = reports.message().await?.and_then(|report| report.report) else {
            return Err(Status::invalid_argument("hello first"));
        };
        let (notices, receiver) = mpsc::channel(4);
        let (nodes, id, stop) = (self.nodes.clone(), hello.node_id.clone(), self.stop.clone());
        nodes.send_modify(|nodes| {
            nodes.insert(
                id.clone(),
                Announced {
                    hello,
                    connected: true,
                    ..Announced::default()
                },
            );
        });
        self.tasks.spawn(async move {
            let welcome = pb::Welcome {
                router_id: "router".into(),
            };
            let notice = pb::RouterNotice {
                notice: Some(router_notice::Notice::Welcome(welcome)),
            };
            let _ = notices.send(Ok(notice)).await;
            loop {
                let report = tokio::select! {
                    report = reports.message() => report,
                    () = stop.cancelled() => break,
                };
                let Ok(Some(pb::NodeReport { report: Some(report) })) = report else {
                    break;
                };
                nodes.send_modify(|nodes| take(nodes.get_mut(&id).expect("known"), report));
            }
            nodes.send_modify(|nodes| nodes.get_mut(&id).expect("known").connected = false);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

fn take(node: &mut Announced, report: node_report::Report) {
    use pb::kv_event::Kind;
    match report {
        node_report::Report::Hello(_) => panic!("a second hello"),
        node_report::Report::Load(load) => node.load = load,
        node_report::Report::Snapshot(snapshot) => {
            if snapshot.first {
                node.names.clear();
            }
            node.names.extend(snapshot.blocks.into_iter().map(|block| block.name));
        }
        node_report::Report::Events(events) => {
            for event in events.events {
                match event.kind.expect("a kind") {
                    Kind::Stored(block) => assert!(node.names.insert(block.name), "stored twice"),
                    Kind::Removed(name) => assert!(node.names.remove(&name), "removed, and never stored"),
                    Kind::Cleared(_) => node.names.clear(),
                }
            }
        }
    }
}

/// The decode leg of one request.
pub struct DecodeLeg {
    requests: mpsc::Sender<pb::DecodeRequest>,
    events: Streaming<pb::DecodeEvent>,
}

impl DecodeLeg {
    pub async fn open(node: &TestNode, first: decode_request::Request) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(4);
        requests
            .send(pb::DecodeRequest { request: Some(first) })
            .await
            .expect("room");
        let mut client = node.decode_client().await;
        let events = soon("an answer", client.open(ReceiverStream::new(receiver)))
            .await?
            .into_inner();
        Ok(Self { requests, events })
    }

    pub async fn reserve(node: &TestNode, work: pb::Work) -> Result<(pb::Ticket, Self), Status> {
        let mut leg = Self::open(node, decode_request::Request::Reserve(work)).await?;
        match leg.next().await? {
            decode_event::Event::Ticket(ticket) => Ok((ticket, leg)),
            other => panic!("no ticket, but {other:?}"),
        }
    }

    /// Goes nowhere once the node has ended the leg.
    pub async fn send(&self, request: decode_request::Request) {
        let _ = self.requests.send(pb::DecodeRequest { request: Some(request) }).await;
    }

    pub async fn next(&mut self) -> Result<decode_event::Event, Status> {
        let event = soon("an event", self.events.message()).await?;
        Ok(event
            .expect("a stream ends with Ended or a status")
            .event
            .expect("an event"))
    }

    /// Reads to the end.
    pub async fn answer(&mut self) -> Result<Answer, Status> {
        self.answer_from(0).await
    }

    /// Reads to the end what follows `first` known tokens.
    pub async fn answer_from(&mut self, first: usize) -> Result<Answer, Status> {
        let mut answer = Answer::default();
        loop {
            match self.next().await? {
                decode_event::Event::Tokens(tokens) => {
                    assert_eq!(tokens.index as usize, first + answer.tokens.len(), "no gap, no repeat");
                    assert_eq!((tokens.ids.len(), tokens.attempt), (tokens.logprobs.len(), 1));
                    answer.tokens.extend(tokens.ids);
                    answer.logprobs.extend(tokens.logprobs);
                    answer.alternatives.extend(tokens.alternatives.into_iter().map(pairs));
                }
                decode_event::Event::Ended(ended) => {
                    answer.ended = ended;
                    let after = soon("the stream's end", self.events.message()).await?;
                    assert_eq!(after, None, "Ended is the last");
                    return Ok(answer);
                }
                decode_event::Event::Verified(verified) => answer.verified = Some(verified),
                decode_event::Event::Admitted(admitted) => answer.admitted = Some(admitted),
                decode_event::Event::Ticket(_) => panic!("a second ticket"),
            }
        }
    }
}

/// The whole answer of a decode leg.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Answer {
    pub tokens: Vec<TokenId>,
    pub logprobs: Vec<f32>,
    /// Of each token, where they were asked for.
    pub alternatives: Vec<Vec<(TokenId, f32)>>,
    pub ended: pb::Ended,
    pub verified: Option<pb::Verified>,
    pub admitted: Option<pb::Admitted>,
}

/// The prefill leg of one request.
pub struct PrefillLeg {
    events: Streaming<pb::PrefillEvent>,
}

impl PrefillLeg {
    pub async fn run(node: &TestNode, work: pb::Work, ticket: pb::Ticket) -> Result<Self, Status> {
        let request = pb::PrefillRequest {
            work: Some(work),
            ticket: Some(ticket),
        };
        let mut client = node.prefill_client().await;
        let events = soon("an answer", client.run(request)).await?.into_inner();
        Ok(Self { events })
    }

    pub async fn next(&mut self) -> Result<prefill_event::Event, Status> {
        let event = soon("an event", self.events.message()).await?;
        Ok(event
            .expect("a stream ends with Done or a status")
            .event
            .expect("an event"))
    }

    /// Reads to its first progress.
    pub async fn progress(&mut self) -> u32 {
        loop {
            match self.next().await.expect("it goes on") {
                prefill_event::Event::Progress(progress) => return progress.computed_tokens,
                prefill_event::Event::Started(_) => {}
                prefill_event::Event::Done(done) => panic!("done already: {done:?}"),
            }
        }
    }

    /// Reads to the last event.
    pub async fn last(&mut self) -> Result<pb::PrefillDone, Status> {
        loop {
            if let prefill_event::Event::Done(done) = self.next().await? {
                return Ok(done);
            }
        }
    }

    /// Reads to the end.
    pub async fn done(&mut self) -> Result<pb::PrefillDone, Status> {
        let done = self.last().await?;
        let after = soon("the stream's end", self.events.message()).await?;
        assert_eq!(after, None, "Done is the last");
        Ok(done)
    }
}

fn pairs(alternatives: pb::Alternatives) -> Vec<(TokenId, f32)> {
    alternatives
        .tokens
        .into_iter()
        .map(|other| (other.id, other.logprob))
        .collect()
}
