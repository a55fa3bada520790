//! A router on loopback sockets, and fake nodes.

use std::{net::SocketAddr, path::PathBuf, sync::OnceLock, time::Duration};

use baton_node::{Lifecycle, listen};
use baton_proto::{
    node::v1::{
        self as pb,
        decode_server::{Decode, DecodeServer},
        prefill_server::{Prefill, PrefillServer},
        registry_client::RegistryClient,
    },
    v1::{self as api, generation_client::GenerationClient},
};
use baton_text::ModelText;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::{Builder, Runtime},
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Server, server::TcpIncoming},
};

use crate::{
    Listeners, RouterConfig,
    cluster::Cluster,
    core::{
        admission::{Admission, AdmissionConfig},
        member::Role,
        placement::PlacementConfig,
    },
    server,
};

pub(super) const IDENTITY: [u8; 32] = [7; 32];
pub(super) const BLOCK_TOKENS: u32 = 32;

/// The default model's text side.
pub(super) fn text() -> ModelText {
    static TEXT: OnceLock<ModelText> = OnceLock::new();
    let open = || {
        let default = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.models/SmolLM2-135M-Instruct.Q4_1.gguf");
        let path = std::env::var_os("BATON_MODEL").map_or_else(default, PathBuf::from);
        ModelText::open(&path).expect("the default model file is there: run `make model`, or set BATON_MODEL")
    };
    TEXT.get_or_init(open).clone()
}

pub(super) fn ids(plain: &str) -> Vec<u32> {
    text().tokenizer.encode(plain, false).expect("tokenises")
}

/// Waits for what must come; a test that waits longer than this has failed.
pub(super) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future)
        .await
        .unwrap_or_else(|_| panic!("{what} did not come"))
}

/// A router.
pub(super) struct Router {
    pub(super) lifecycle: Lifecycle,
    pub(super) cluster: Cluster,
    pub(super) grpc: SocketAddr,
    pub(super) http: SocketAddr,
    pub(super) channel: Channel,
}

pub(super) async fn router() -> Router {
    router_with(|_| {}).await
}

pub(super) async fn router_with(change: impl FnOnce(&mut RouterConfig)) -> Router {
    let local = SocketAddr::from(([127, 0, 0, 1], 0));
    let listeners = Listeners {
        grpc: listen::bind(local, "--grpc").await.expect("a port"),
        http: listen::bind(local, "--http").await.expect("a port"),
    };
    let grpc = listeners.grpc.local_addr().expect("bound");
    let http = listeners.http.local_addr().expect("bound");
    let mut config = config(grpc, http);
    change(&mut config);
    let (text, lifecycle) = (text(), Lifecycle::new());
    let cluster = server::new_cluster(&config, &text);
    let serve = server::serve(config, text, cluster.clone(), lifecycle.clone(), listeners);
    // A tracker of its own: a router must not wait for itself.
    tokio_util::task::TaskTracker::new().spawn(serve);
    let channel = baton_node::grpc::endpoint(&grpc.to_string(), None)
        .expect("an address")
        .connect()
        .await
        .expect("the router listens");
    Router {
        lifecycle,
        cluster,
        grpc,
        http,
        channel,
    }
}

pub(super) fn config(grpc: SocketAddr, http: SocketAddr) -> RouterConfig {
    RouterConfig {
        grpc,
        http,
        router_id: "router-test".to_owned(),
        admission: AdmissionConfig {
            max_queue: 8,
            prefix_index_bytes: 1 << 20,
            placement: PlacementConfig {
                local_prefill_tokens: 0,
            },
        },
        queue_timeout: Duration::from_secs(30),
        secret: [1; 32],
        drain: Duration::from_secs(5),
        tls: None,
    }
}

impl Router {
    pub(super) fn client(&self) -> GenerationClient<Channel> {
        GenerationClient::new(self.channel.clone())
    }

    /// What it says of itself.
    pub(super) async fn metrics(&self) -> String {
        let mut stream = TcpStream::connect(self.http).await.expect("HTTP listens");
        let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.expect("written");
        let mut answer = String::new();
        let read = soon("the metrics", stream.read_to_string(&mut answer)).await;
        read.expect("in order");
        answer
    }

    pub(super) async fn generate(&self, request: api::GenerateRequest) -> Result<Answer, Status> {
        let events = self.client().generate(request).await?.into_inner();
        Ok(Answer { events, sequence: 0 })
    }

    /// Waits until what the router knows satisfies `holds`.
    pub(super) async fn knows(&self, what: &str, holds: impl Fn(&Admission) -> bool) {
        let seen = async {
            while !self.cluster.look(&holds) {
                sleep(Duration::from_millis(1)).await;
            }
        };
        soon(what, seen).await;
    }

    /// Nobody waits, nobody runs, and every credit is back.
    pub(super) async fn is_idle(&self) {
        let idle = |admission: &Admission| {
            admission.requests() == 0 && admission.members().iter().all(|member| member.settled())
        };
        self.knows("an idle router", idle).await;
    }

    pub(super) async fn prefill_node(&self, name: &str) -> Node<PrefillCall> {
        let (calls, receiver) = mpsc::channel(16);
        let service = PrefillServer::new(FakePrefill(calls));
        let serve = move |incoming| Server::builder().add_service(service).serve_with_incoming(incoming);
        self.node(name, pb::Role::Prefill, receiver, serve).await
    }

    pub(super) async fn decode_node(&self, name: &str) -> Node<DecodeCall> {
        let (calls, receiver) = mpsc::channel(16);
        let service = DecodeServer::new(FakeDecode(calls));
        let serve = move |incoming| Server::builder().add_service(service).serve_with_incoming(incoming);
        self.node(name, pb::Role::Decode, receiver, serve).await
    }

    async fn node<C, F>(
        &self,
        name: &str,
        role: pb::Role,
        calls: mpsc::Receiver<C>,
        serve: impl FnOnce(TcpIncoming) -> F + Send + 'static,
    ) -> Node<C>
    where
        F: Future<Output = Result<(), tonic::transport::Error>> + Send + 'static,
    {
        // A runtime of its own: to shut it down is to kill the node, connections and all.
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = std::net::TcpListener::bind(local).expect("a port");
        listener.set_nonblocking(true).expect("it can");
        let address = listener.local_addr().expect("bound");
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            serve(TcpIncoming::from(listener)).await
        });
        let (reports, receiver) = mpsc::channel(16);
        let router = self.grpc.to_string();
        let (hello, load) = (hello(name, role, &address.to_string()), load(pb::Phase::Ready, 1_000));
        for first in [hello, load, snapshot(0)] {
            reports.try_send(first).expect("there is room");
        }
        runtime.spawn(async move {
            let channel = baton_node::grpc::endpoint(&router, None)
                .expect("an address")
                .connect()
                .await;
            let mut client = RegistryClient::new(channel.expect("the router listens"));
            let notices = client.announce(ReceiverStream::new(receiver)).await;
            let mut notices = notices.expect("the router takes the node").into_inner();
            while let Ok(Some(_)) = notices.message().await {}
        });
        let known = name.to_owned();
        self.knows("a node", move |admission| {
            let role = match role {
                pb::Role::Prefill => Role::Prefill,
                _ => Role::Decode,
            };
            admission
                .members()
                .ready(role)
                .any(|member| member.hello().node.0 == known)
        })
        .await;
        Node {
            name: name.to_owned(),
            address,
            calls,
            reports,
            runtime: Some(runtime),
        }
    }
}

pub(super) fn report(report: pb::node_report::Report) -> pb::NodeReport {
    pb::NodeReport { report: Some(report) }
}

pub(super) fn hello(name: &str, role: pb::Role, address: &str) -> pb::NodeReport {
    report(pb::node_report::Report::Hello(pb::Hello {
        node_id: name.to_owned(),
        role: role.into(),
        epoch: vec![3; 16],
        address: address.to_owned(),
        model: text().name,
        kv_identity: IDENTITY.to_vec(),
        layout: Some(layout()),
        blocks: 1_000,
        context_length: 2_048,
        protocol_min: 1,
        protocol_max: 1,
        vocabulary: text().tokenizer.vocabulary_len() as u32,
    }))
}

pub(super) fn layout() -> pb::KvLayout {
    pb::KvLayout {
        layers: 30,
        heads: 3,
        head_dim: 64,
        block_tokens: BLOCK_TOKENS,
        dtype: "bf16".to_owned(),
    }
}

pub(super) fn load(phase: pb::Phase, free_blocks: u64) -> pb::NodeReport {
    report(pb::node_report::Report::Load(pb::Load {
        phase: phase.into(),
        free_blocks,
        ..pb::Load::default()
    }))
}

fn snapshot(sequence: u64) -> pb::NodeReport {
    report(pb::node_report::Report::Snapshot(pb::KvSnapshot {
        epoch: vec![3; 16],
        sequence,
        blocks: Vec::new(),
        first: true,
        last: true,
    }))
}

/// A fake node: calls come to the test, which answers them.
pub(super) struct Node<C> {
    pub(super) name: String,
    pub(super) address: SocketAddr,
    calls: mpsc::Receiver<C>,
    reports: mpsc::Sender<pb::NodeReport>,
    runtime: Option<Runtime>,
}

impl<C> Node<C> {
    pub(super) async fn call(&mut self) -> C {
        soon("a call", self.calls.recv()).await.expect("the node lives")
    }

    pub(super) async fn report(&self, report: pb::NodeReport) {
        self.reports.send(report).await.expect("the router listens");
    }

    /// Kills it: its sockets close without a word.
    pub(super) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl<C> Drop for Node<C> {
    fn drop(&mut self) {
        self.kill();
    }
}

/// `Decode.Open`.
pub(super) struct DecodeCall {
    pub(super) first: pb::decode_request::Request,
    pub(super) requests: Streaming<pb::DecodeRequest>,
    reply: mpsc::Sender<Result<pb::DecodeEvent, Status>>,
}

impl DecodeCall {
    /// The work, and whether it is to be reserved for.
    pub(super) fn work(&self) -> (&pb::Work, bool) {
        match &self.first {
            pb::decode_request::Request::Reserve(work) => (work, true),
            pb::decode_request::Request::Run(work) => (work, false),
            pb::decode_request::Request::Renew(_) => panic!("a renewal comes after"),
        }
    }

    pub(super) async fn say(&self, event: pb::decode_event::Event) {
        let event = pb::DecodeEvent { event: Some(event) };
        self.reply.send(Ok(event)).await.expect("the router listens");
    }

    pub(super) async fn ticket(&self, address: &SocketAddr) {
        self.ticket_of(address, 10_000).await;
    }

    pub(super) async fn ticket_of(&self, address: &SocketAddr, lease_ms: u64) {
        let (work, _) = self.work();
        let ticket = pb::Ticket {
            request_id: work.request_id.clone(),
            attempt: work.attempt,
            decode_node: "decode-0".to_owned(),
            address: address.to_string(),
            epoch: vec![3; 16],
            handoff_id: 1,
            held_blocks: 0,
            slots: vec![pb::Slot {
                block: 0,
                generation: 1,
            }],
            lease_ms,
            kv_identity: IDENTITY.to_vec(),
            layout: Some(layout()),
            capability: vec![9; 32],
            protocol: 1,
        };
        self.say(pb::decode_event::Event::Ticket(ticket)).await;
    }

    pub(super) async fn verified(&self) {
        let verified = pb::Verified {
            kv_bytes: 4_096,
            kv_blocks: 1,
            verify_ms: 0.1,
        };
        self.say(pb::decode_event::Event::Verified(verified)).await;
    }

    pub(super) async fn admitted(&self) {
        let admitted = pb::Admitted {
            cached_tokens: 0,
            queue_ms: 1.0,
        };
        self.say(pb::decode_event::Event::Admitted(admitted)).await;
    }

    pub(super) async fn tokens(&self, index: u32, ids: &[u32]) {
        let tokens = pb::Tokens {
            attempt: self.work().0.attempt,
            index,
            ids: ids.to_vec(),
            logprobs: vec![-0.25; ids.len()],
            alternatives: self.alternatives(ids),
        };
        self.say(pb::decode_event::Event::Tokens(tokens)).await;
    }

    /// As many as were asked for: each token, and the ids after it.
    fn alternatives(&self, ids: &[u32]) -> Vec<pb::Alternatives> {
        let asked = self
            .work()
            .0
            .sampling
            .as_ref()
            .map_or(0, |sampling| sampling.top_logprobs);
        let ids = ids.iter().filter(|_| asked > 0);
        ids.map(|&id| pb::Alternatives {
            tokens: following(id, asked),
        })
        .collect()
    }

    pub(super) async fn ended(&self, reason: pb::EndReason) {
        let ended = pb::Ended {
            reason: reason.into(),
            prefill_ms: 12.0,
            first_step_ms: 3.0,
            preemptions: 0,
        };
        self.say(pb::decode_event::Event::Ended(ended)).await;
    }

    pub(super) async fn fail(&self, status: Status) {
        self.reply.send(Err(status)).await.expect("the router listens");
    }

    /// Resolves when the router has closed the stream.
    pub(super) async fn closed(&self) {
        soon("the end of the decode leg", self.reply.closed()).await;
    }
}

/// A token and those after it, each half as likely as the one before.
fn following(id: u32, count: u32) -> Vec<pb::Alternative> {
    let alternative = |next| pb::Alternative {
        id: id + next,
        logprob: -0.25 - 0.75 * next as f32,
    };
    (0..count).map(alternative).collect()
}

/// `Prefill.Run`.
pub(super) struct PrefillCall {
    pub(super) request: pb::PrefillRequest,
    reply: mpsc::Sender<Result<pb::PrefillEvent, Status>>,
}

impl PrefillCall {
    /// Alternatives of each token.
    fn asked(&self) -> u32 {
        let work = self.request.work.as_ref().expect("work");
        work.sampling.as_ref().map_or(0, |sampling| sampling.top_logprobs)
    }

    async fn say(&self, event: pb::prefill_event::Event) {
        let event = pb::PrefillEvent { event: Some(event) };
        self.reply.send(Ok(event)).await.expect("the router listens");
    }

    pub(super) async fn started(&self) {
        let started = pb::PrefillStarted {
            queue_ms: 2.0,
            cached_tokens: 1,
        };
        self.say(pb::prefill_event::Event::Started(started)).await;
    }

    pub(super) async fn done(&self, first_token: u32, ended: pb::EndReason) {
        let done = pb::PrefillDone {
            first_token,
            logprob: -0.25,
            ended: ended.into(),
            prefill_ms: 20.0,
            transfer_ms: 5.0,
            kv_bytes: 4_096,
            kv_blocks: 1,
            bytes_per_s: 1e9,
            alternatives: following(first_token, self.asked()),
            transport: "shm".to_owned(),
            predicted_bytes_per_s: 2e9,
        };
        self.say(pb::prefill_event::Event::Done(done)).await;
    }

    /// Resolves when the router has closed the stream.
    pub(super) async fn closed(&self) {
        soon("the end of the prefill leg", self.reply.closed()).await;
    }
}

struct FakeDecode(mpsc::Sender<DecodeCall>);

#[tonic::async_trait]
impl Decode for FakeDecode {
    type OpenStream = ReceiverStream<Result<pb::DecodeEvent, Status>>;

    async fn open(&self, request: Request<Streaming<pb::DecodeRequest>>) -> Result<Response<Self::OpenStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|message| message.request);
        let (reply, receiver) = mpsc::channel(16);
        let call = DecodeCall {
            first: first.expect("work comes first"),
            requests,
            reply,
        };
        self.0
            .send(call)
            .await
            .map_err(|_| Status::internal("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

struct FakePrefill(mpsc::Sender<PrefillCall>);

#[tonic::async_trait]
impl Prefill for FakePrefill {
    type RunStream = ReceiverStream<Result<pb::PrefillEvent, Status>>;

    async fn run(&self, request: Request<pb::PrefillRequest>) -> Result<Response<Self::RunStream>, Status> {
        let (reply, receiver) = mpsc::channel(16);
        let call = PrefillCall {
            request: request.into_inner(),
            reply,
        };
        self.0
            .send(call)
            .await
            .map_err(|_| Status::internal("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// An answer under way, as a client sees it: sequence numbers are checked as it is read.
pub(super) struct Answer {
    events: Streaming<api::GenerateEvent>,
    sequence: u64,
}

/// The whole of an answer.
#[derive(Debug)]
pub(super) struct Whole {
    pub(super) ids: Vec<u32>,
    pub(super) text: String,
    pub(super) logprobs: Vec<f32>,
    pub(super) top_logprobs: Vec<Vec<(u32, f32)>>,
    pub(super) finished: api::Finished,
}

impl Answer {
    pub(super) async fn next(&mut self) -> Result<Option<api::generate_event::Event>, Status> {
        let event = soon("an event", self.events.message()).await?;
        Ok(event.map(|event| {
            assert_eq!(event.sequence, self.sequence);
            self.sequence += 1;
            event.event.expect("an event says something")
        }))
    }

    pub(super) async fn started(&mut self) -> api::Started {
        match self.next().await {
            Ok(Some(api::generate_event::Event::Started(started))) => started,
            other => panic!("the first event is Started, not {other:?}"),
        }
    }

    pub(super) async fn delta(&mut self) -> api::TokenDelta {
        match self.next().await {
            Ok(Some(api::generate_event::Event::Delta(delta))) => delta,
            other => panic!("a delta was due, not {other:?}"),
        }
    }

    /// Reads on to the end, which must be good.
    pub(super) async fn finish(&mut self) -> Whole {
        let (mut ids, mut text, mut logprobs, mut top_logprobs) = (Vec::new(), String::new(), Vec::new(), Vec::new());
        loop {
            match self.next().await {
                Ok(Some(api::generate_event::Event::Delta(delta))) => {
                    assert_eq!(delta.index as usize, ids.len());
                    ids.extend(delta.ids);
                    text.push_str(&delta.text);
                    logprobs.extend(delta.logprobs);
                    let pairs =
                        |top: api::TopLogprobs| top.tokens.iter().map(|token| (token.id, token.logprob)).collect();
                    top_logprobs.extend(delta.top_logprobs.into_iter().map(pairs));
                }
                Ok(Some(api::generate_event::Event::Finished(finished))) => {
                    assert!(matches!(self.next().await, Ok(None)), "nothing follows Finished");
                    return Whole {
                        ids,
                        text,
                        logprobs,
                        top_logprobs,
                        finished,
                    };
                }
                other => panic!("an answer was due, not {other:?}"),
            }
        }
    }

    /// Reads on to the end, which must be an error; nothing follows it.
    pub(super) async fn failure(&mut self) -> Status {
        loop {
            match self.next().await {
                Ok(Some(api::generate_event::Event::Finished(finished))) => panic!("it must fail: {finished:?}"),
                Ok(Some(_)) => {}
                Ok(None) => panic!("it must fail"),
                Err(status) => {
                    assert!(matches!(self.next().await, Ok(None)), "nothing follows an error");
                    return status;
                }
            }
        }
    }
}

pub(super) fn prompt(plain: &str) -> api::GenerateRequest {
    api::GenerateRequest {
        input: Some(api::generate_request::Input::Text(plain.to_owned())),
        ..api::GenerateRequest::default()
    }
}

pub(super) fn stopping(request: api::GenerateRequest, stopping: api::Stopping) -> api::GenerateRequest {
    api::GenerateRequest {
        stopping: Some(stopping),
        ..request
    }
}
