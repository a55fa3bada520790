//! The router as a process: its two listeners, and its end.

use std::sync::Arc;

use baton_node::{Lifecycle, Phase, Tls, files, grpc, http, limits as shared, ops, tls::Clients};
use baton_proto::{node::v1::registry_server::RegistryServer, v1::generation_server::GenerationServer};
use baton_text::ModelText;
use tokio::{net::TcpListener, time::sleep};
use tonic::transport::server::TcpIncoming;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    Front, RouterConfig,
    cluster::Cluster,
    core::members::Expected,
    grpc::{GENERATION, GenerationService, edge::EdgeLayer, incoming, reflection},
    limits,
    metrics::RouterMetrics,
    openai,
    registry::RegistryService,
};

/// The router's sockets.
#[derive(Debug)]
pub struct Listeners {
    /// For gRPC: clients and nodes.
    pub grpc: TcpListener,
    /// For the OpenAI API and the ops endpoints.
    pub http: TcpListener,
}

/// Why a router ended otherwise than by draining.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// The gRPC server failed.
    #[error("the gRPC server failed: {0}")]
    Grpc(#[from] tonic::transport::Error),
    /// A server ended by itself: a defect.
    #[error("the {0} server has ended")]
    Ended(&'static str),
    /// The reflection service could not be built from our own descriptors.
    #[error("the reflection service could not be built: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves until `lifecycle` drains, or a server fails; then drains, and returns. The phase is Ready once both listeners are served: whether a request could be
/// answered is said by `/ready`, by gRPC health, and by [`Front::ready`], since nodes come and go.
///
/// The KV identity is the nodes': the first to join sets it, and those of another are refused.
pub async fn run(
    config: RouterConfig,
    text: ModelText,
    lifecycle: Lifecycle,
    listeners: Listeners,
) -> Result<(), RouterError> {
    let cluster = new_cluster(&config, &text);
    serve(config, text, cluster, lifecycle, listeners).await
}

/// Without members, for this model.
pub(crate) fn new_cluster(config: &RouterConfig, text: &ModelText) -> Cluster {
    let expected = Expected {
        model: text.name.to_owned(),
        vocabulary: text.tokenizer.vocabulary_len(),
        versions: baton_proto::PROTOCOL_MIN..=baton_proto::PROTOCOL_MAX,
    };
    Cluster::new(config.admission, expected, config.tls.as_ref().map(Tls::client))
}

/// [`run`] with the cluster given.
pub(crate) async fn serve(
    config: RouterConfig,
    text: ModelText,
    cluster: Cluster,
    lifecycle: Lifecycle,
    listeners: Listeners,
) -> Result<(), RouterError> {
    let mut registry = baton_node::metrics::registry("router", &lifecycle);
    let metrics = RouterMetrics::register(&mut registry, cluster.clone());
    let drain = config.drain;
    let (router_id, tls) = (config.router_id.clone(), config.tls.clone());
    let front = Front::new(config, text, cluster.clone(), metrics, lifecycle.clone());

    let open_files = files::raise_limit();
    let connections = files::connections(limits::HTTP_CONNECTIONS, open_files);
    let http = http_server(
        listeners.http,
        connections,
        front.clone(),
        lifecycle.clone(),
        Arc::new(registry),
    );
    let mut http = lifecycle.spawn(http);

    let (reporter, health) = tonic_health::server::health_reporter();
    lifecycle.spawn(report_health(reporter, cluster.clone(), lifecycle.clone()));
    let (reflection_v1, reflection_v1alpha) = reflection()?;
    let registry_service = RegistryServer::new(RegistryService::new(
        router_id,
        cluster,
        lifecycle.clone(),
        tls.is_some(),
    ))
    .max_decoding_message_size(limits::REPORT_BYTES);
    let edge = EdgeLayer(front.intake().clone());
    let generation = GenerationServer::new(GenerationService::new(front))
        .max_decoding_message_size(limits::GRPC_REQUEST_BYTES)
        .max_encoding_message_size(shared::GRPC_MESSAGE_BYTES);
    let stop = lifecycle.shutdown_token();
    let incoming = TcpIncoming::from(listeners.grpc).with_nodelay(Some(true));
    let incoming = incoming::bounded(incoming, files::connections(limits::GRPC_CONNECTIONS, open_files));
    let server = grpc::secure(grpc::server(), tls.as_ref(), Clients::MayShow)?
        .max_concurrent_streams(limits::GRPC_STREAMS)
        .initial_connection_window_size(limits::GRPC_CONNECTION_WINDOW_BYTES)
        .layer(edge)
        .add_service(generation)
        .add_service(registry_service)
        .add_service(health)
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha)
        .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    let mut server = lifecycle.spawn(async move {
        tokio::select! {
            served = server => served,
            // Streams have been told to end by then; a peer that does not read is left behind.
            () = async { stop.cancelled().await; sleep(shared::STOP_TIMEOUT / 2).await } => Ok(()),
        }
    });
    lifecycle.set(Phase::Ready);

    let ended = tokio::select! {
        biased;
        () = lifecycle.draining() => Ok(()),
        served = &mut server => Err(match served {
            Ok(Err(error)) => error.into(),
            _ => RouterError::Ended("gRPC"),
        }),
        _ = &mut http => Err(RouterError::Ended("HTTP")),
    };
    lifecycle.drain(drain).await;
    ended
}

async fn http_server(
    listener: TcpListener,
    connections: usize,
    front: Front,
    lifecycle: Lifecycle,
    metrics: baton_node::metrics::Metrics,
) {
    let stop = lifecycle.shutdown_token();
    let ready = front.clone();
    let ops = ops::routes_when(lifecycle, metrics, move || ready.ready());
    let served = http::Served {
        routes: openai::routes(front).merge(ops.clone()),
        probes: ops.fallback(openai::overloaded),
        connections,
        read_bound: limits::RECEIVE,
    };
    http::serve(listener, served, stop).await;
}

/// Says over gRPC health whether a request could be served.
async fn report_health(reporter: HealthReporter, cluster: Cluster, lifecycle: Lifecycle) {
    let (mut phases, mut ready, stop) = (lifecycle.watch(), cluster.watch_ready(), lifecycle.shutdown_token());
    loop {
        let serving = *phases.borrow_and_update() == Phase::Ready && *ready.borrow_and_update();
        let status = if serving {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for name in ["", GENERATION] {
            reporter.set_service_status(name, status).await;
        }
        tokio::select! {
            _ = phases.changed() => {}
            _ = ready.changed() => {}
            () = stop.cancelled() => return,
        }
    }
}
