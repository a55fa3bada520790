//! gRPC as tonic comes: one client-streaming call of 1 MiB messages, every setting at its default. Each message is copied from the sender's memory, and into the
//! receiver's.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use baton_proto::node::v1::{self as pb, handoff_client::HandoffClient, handoff_server};
use tokio::{net::TcpListener, sync::Mutex};
use tokio_stream::{Stream, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::{Role, end, end::End, runs::Run};

const MESSAGE_BYTES: usize = 1 << 20;
/// More than caches hold.
const LANDING_BYTES: usize = 512 << 20;

/// Both ends.
pub struct PlainGrpc {
    sink: End,
    source: End,
}

impl PlainGrpc {
    /// Starts them.
    pub fn start() -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        let (sink, address): (_, SocketAddr) = End::start(&program, &Role::GrpcSink)?;
        let (mut source, ()) = End::start(&program, &Role::GrpcSource)?;
        let (_, _): (f64, f64) = source.ask(&(address, 0_usize))?;
        Ok(Self { sink, source })
    }

    /// Sends `bytes`.
    pub fn run(&mut self, bytes: usize) -> anyhow::Result<Run> {
        let nowhere = SocketAddr::from(([0; 4], 0));
        let before: f64 = self.sink.ask(&())?;
        let (seconds, source_s): (f64, f64) = self.source.ask(&(nowhere, bytes))?;
        let after: f64 = self.sink.ask(&())?;
        Ok(Run {
            bytes: bytes as f64,
            seconds,
            cpu_s: Some(after - before + source_s),
        })
    }
}

struct Sink {
    landing: Mutex<Vec<u8>>,
}

#[tonic::async_trait]
impl handoff_server::Handoff for Sink {
    type PushStream = tokio_stream::Empty<Result<pb::PushReply, Status>>;

    async fn push(&self, _: Request<Streaming<pb::PushFrame>>) -> Result<Response<Self::PushStream>, Status> {
        Err(Status::unimplemented("a peer of the benchmark"))
    }

    async fn introduce(&self, _: Request<pb::PeerHello>) -> Result<Response<pb::PeerWelcome>, Status> {
        Err(Status::unimplemented("a peer of the benchmark"))
    }

    async fn probe(&self, request: Request<Streaming<pb::ProbeFrame>>) -> Result<Response<pb::ProbeReport>, Status> {
        let mut frames = request.into_inner();
        let mut landing = self.landing.lock().await;
        let mut bytes = 0;
        while let Some(frame) = frames.message().await? {
            let at = bytes % LANDING_BYTES;
            landing[at..at + frame.data.len()].copy_from_slice(&frame.data);
            bytes += frame.data.len();
        }
        let bytes = bytes as u64;
        Ok(Response::new(pb::ProbeReport { bytes, seconds: 0.0 }))
    }
}

/// Answers everything with its CPU seconds so far.
pub(super) fn sink() -> anyhow::Result<()> {
    let runtime = end::runtime()?;
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let address = listener.local_addr()?;
    let sink = Sink {
        landing: Mutex::new(vec![1; LANDING_BYTES]),
    };
    let server = Server::builder()
        .add_service(handoff_server::HandoffServer::new(sink))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let serving = std::thread::spawn(move || runtime.block_on(server));
    end::serve(address, |()| {
        anyhow::ensure!(!serving.is_finished(), "the server has ended");
        Ok(end::cpu_s())
    })
}

/// Answers (address, bytes) with seconds, and its CPU seconds; connects first.
pub(super) fn source() -> anyhow::Result<()> {
    let runtime = end::runtime()?;
    let mut client = None;
    let mut memory = Arc::new(Vec::new());
    end::serve((), |(address, bytes): (SocketAddr, usize)| {
        let Some(client) = &mut client else {
            client = Some(runtime.block_on(HandoffClient::connect(format!("http://{address}")))?);
            return Ok((0.0, 0.0));
        };
        if memory.len() < bytes {
            memory = Arc::new(vec![1; bytes]);
        }
        let (cpu_s, started) = (end::cpu_s(), Instant::now());
        let taken = runtime
            .block_on(client.probe(messages(memory.clone(), bytes)))?
            .into_inner()
            .bytes;
        anyhow::ensure!(taken == bytes as u64, "{taken} bytes arrived");
        Ok((started.elapsed().as_secs_f64(), end::cpu_s() - cpu_s))
    })
}

/// Read from memory one after the other, as a node would.
fn messages(memory: Arc<Vec<u8>>, bytes: usize) -> impl Stream<Item = pb::ProbeFrame> + Send + 'static {
    tokio_stream::iter((0..bytes).step_by(MESSAGE_BYTES).map(move |at| pb::ProbeFrame {
        data: memory[at..bytes.min(at + MESSAGE_BYTES)].to_vec().into(),
    }))
}
