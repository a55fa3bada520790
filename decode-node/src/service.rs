//! `baton.node.v1.Decode`, and the process around it.

use baton_engine::Engine;
use baton_node::{Lifecycle, clock, limits, status, telemetry};
use baton_proto::node::v1::{self as pb, decode_request, decode_server};
use baton_scheduler::Role;
use baton_transfer::{
    grpc::HandoffService,
    shm::{Directory, Mappings},
};
use baton_worker::{Listeners, Node, NodeError, Respond, Responses, Work, Worker};
use tokio::time::timeout;
use tonic::{Code, Request, Response, Status, Streaming, service::Routes};
use tracing::{Instrument, info_span};

use crate::{DecodeConfig, leg::Leg};

/// Runs a decode node until `lifecycle` drains, or its engine is lost. It sets [`baton_node::Phase::Ready`] once it serves.
pub async fn run(
    config: DecodeConfig,
    engine: Box<dyn Engine>,
    lifecycle: Lifecycle,
    listeners: Listeners,
) -> Result<(), NodeError> {
    let shm_dir = config.node.shm_dir.clone();
    let node = Node::start(pb::Role::Decode, config.node, engine, lifecycle, listeners)?;
    let worker = node.worker().clone();
    let life = node.lifecycle();
    let handoff = HandoffService::new(
        worker.receiver_port(),
        worker.fences(),
        life.tasks().clone(),
        life.shutdown_token(),
    );
    let handoff = match Directory::open(shm_dir.as_deref()) {
        Ok(directory) => handoff.with_mappings(Mappings::new(directory, life.tasks().clone(), life.shutdown_token())),
        Err(error) => {
            tracing::warn!(%error, "no KV comes through shared memory (--shm-dir)");
            handoff
        }
    };
    let service = DecodeService {
        respond: Respond::new(life.clone()),
        worker,
    };
    let service = decode_server::DecodeServer::new(service)
        .max_decoding_message_size(limits::GRPC_MESSAGE_BYTES)
        .max_encoding_message_size(limits::GRPC_MESSAGE_BYTES);
    let routes = Routes::new(service).add_service(handoff.into_server());
    node.serve(routes).await
}

/// The service.
struct DecodeService {
    worker: Worker,
    respond: Respond,
}

#[tonic::async_trait]
impl decode_server::Decode for DecodeService {
    type OpenStream = Responses<pb::DecodeEvent>;

    async fn open(&self, request: Request<Streaming<pb::DecodeRequest>>) -> Result<Response<Self::OpenStream>, Status> {
        let span = info_span!(
            "decode",
            request_id = tracing::field::Empty,
            attempt = tracing::field::Empty
        );
        telemetry::set_parent(&span, request.metadata());
        self.start(request.into_inner()).instrument(span).await
    }
}

impl DecodeService {
    /// Takes the first message, reserves or queues, and starts the leg.
    async fn start(
        &self,
        mut requests: Streaming<pb::DecodeRequest>,
    ) -> Result<Response<Responses<pb::DecodeEvent>>, Status> {
        self.respond.admit()?;
        let first = timeout(limits::CALL_TIMEOUT, requests.message()).await.map_err(|_| {
            status::error(
                Code::DeadlineExceeded,
                status::reasons::DEADLINE,
                "no first message came",
            )
            .build()
        })??;
        let (reserve, work) = match first.and_then(|first| first.request) {
            Some(decode_request::Request::Reserve(work)) => (true, work),
            Some(decode_request::Request::Run(work)) => (false, work),
            _ => {
                return Err(status::invalid_field(
                    "request",
                    "the first message must be reserve or run",
                ));
            }
        };
        let facts = self.worker.facts();
        let work = Work::from_proto(work, &facts.model, facts.identity, clock::now())?;
        let span = tracing::Span::current();
        span.record("request_id", tracing::field::display(work.request));
        span.record("attempt", work.attempt.0);
        let (attempt, deadline) = (work.attempt, work.deadline);
        let (ticket, stream) = if reserve {
            if !work.output.is_empty() {
                return Err(status::not_built("reserve.output"));
            }
            let (ticket, stream) = self.worker.reserve(work)?;
            (Some(ticket), stream)
        } else {
            (None, self.worker.submit(work, Role::Decode)?)
        };
        let leg = Leg {
            worker: self.worker.clone(),
            attempt,
            ticket,
            stream,
            requests,
        };
        Ok(Response::new(self.respond.run(deadline, |events| leg.run(events))))
    }
}
