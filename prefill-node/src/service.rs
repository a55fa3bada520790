//! `baton.node.v1.Prefill`, and the process around it.

use std::{path::Path, sync::Arc};

use baton_engine::Engine;
use baton_node::{Lifecycle, Tls, clock, limits, random, status, telemetry};
use baton_proto::node::v1::{self as pb, prefill_server};
use baton_scheduler::Role;
use baton_transfer::{
    Capability, Ticket,
    grpc::{PathConfig, Pusher, PusherConfig},
    shm::{Directory, Offer, OfferError},
};
use baton_worker::{Listeners, Node, NodeError, Respond, Responses, Work, Worker};
use tonic::{Request, Response, Status, service::Routes};
use tracing::{Instrument, info_span};

use crate::{PrefillConfig, leg::Leg};

/// Runs a prefill node until `lifecycle` drains, or its engine is lost. It sets [`baton_node::Phase::Ready`] once it serves.
pub async fn run(
    config: PrefillConfig,
    engine: Box<dyn Engine>,
    lifecycle: Lifecycle,
    listeners: Listeners,
) -> Result<(), NodeError> {
    let tls = config.node.tls.as_ref().map(Tls::client);
    let (shares, shm_dir) = (config.shares_pool(), config.node.shm_dir.clone());
    let node = Node::start(pb::Role::Prefill, config.node, engine, lifecycle, listeners)?;
    let worker = node.worker().clone();
    let facts = worker.facts();
    let metrics = worker.metrics().clone();
    let shared = if shares {
        offer(&worker, node.lifecycle(), shm_dir.as_deref())
    } else {
        None
    };
    let paths = PathConfig {
        preference: config.preference,
        slow: config.slow,
        tls,
        shared,
        observer: Arc::new(move |event| metrics.path(event)),
    };
    let pusher = PusherConfig {
        node: facts.node.clone(),
        epoch: facts.epoch,
        identity: facts.identity,
        protocol_max: facts.protocol_max,
        paths,
    };
    let service = PrefillService {
        pusher: Arc::new(Pusher::new(pusher, worker.memory().clone())),
        respond: Respond::new(node.lifecycle().clone()),
        worker,
    };
    let service = prefill_server::PrefillServer::new(service)
        .max_decoding_message_size(limits::GRPC_MESSAGE_BYTES)
        .max_encoding_message_size(limits::GRPC_MESSAGE_BYTES);
    node.serve(Routes::new(service)).await
}

/// Offers the pool to decode nodes of this host, until the node stops; `None`: KV travels over gRPC.
fn offer(worker: &Worker, lifecycle: &Lifecycle, directory: Option<&Path>) -> Option<pb::SharedPool> {
    let token = Capability::new(random::capability());
    let (tasks, stop) = (lifecycle.tasks(), lifecycle.shutdown_token());
    let offered = Directory::open(directory)
        .map_err(OfferError::from)
        .and_then(|directory| Offer::open(&directory, worker.facts().epoch, token, &**worker.memory(), tasks, stop));
    match offered {
        Ok(offer) => Some(offer.to_proto()),
        // The engine has said why.
        Err(OfferError::NotShared) => None,
        Err(error) => {
            tracing::warn!("no KV goes through shared memory (--shm-dir): {error}");
            None
        }
    }
}

/// The service.
struct PrefillService {
    worker: Worker,
    pusher: Arc<Pusher>,
    respond: Respond,
}

#[tonic::async_trait]
impl prefill_server::Prefill for PrefillService {
    type RunStream = Responses<pb::PrefillEvent>;

    async fn run(&self, request: Request<pb::PrefillRequest>) -> Result<Response<Self::RunStream>, Status> {
        let span = info_span!(
            "prefill",
            request_id = tracing::field::Empty,
            attempt = tracing::field::Empty
        );
        telemetry::set_parent(&span, request.metadata());
        async { self.open(request.into_inner()) }.instrument(span).await
    }
}

impl PrefillService {
    /// Checks the request, queues its prompt, and starts its leg.
    fn open(&self, request: pb::PrefillRequest) -> Result<Response<Responses<pb::PrefillEvent>>, Status> {
        self.respond.admit()?;
        let facts = self.worker.facts();
        let work = request
            .work
            .ok_or_else(|| status::invalid_field("work", "the work is missing"))?;
        let work = Work::from_proto(work, &facts.model, facts.identity, clock::now())?;
        let span = tracing::Span::current();
        span.record("request_id", tracing::field::display(work.request));
        span.record("attempt", work.attempt.0);
        let ticket = request
            .ticket
            .ok_or_else(|| status::invalid_field("ticket", "the ticket is missing"))?;
        let ticket = Ticket::from_proto(&ticket).map_err(|error| status::invalid_field("ticket", error.to_string()))?;
        if (ticket.request, ticket.attempt) != (work.request, work.attempt) {
            return Err(status::invalid_field(
                "ticket.request_id",
                "the ticket is for another request or attempt",
            ));
        }
        if !work.output.is_empty() {
            return Err(status::not_built("work.output"));
        }
        let stream = self.worker.submit(work.clone(), Role::Prefill)?;
        let leg = Leg {
            worker: self.worker.clone(),
            pusher: self.pusher.clone(),
            work,
            ticket,
            stream,
        };
        Ok(Response::new(
            self.respond.run(leg.work.deadline, |events| leg.run(events)),
        ))
    }
}
