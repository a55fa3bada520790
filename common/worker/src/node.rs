//! A node's process, whatever its role: sockets, services, phases.

use std::{io, net::SocketAddr};

use baton_engine::Engine;
use baton_node::{Lifecycle, ListenError, Phase, grpc, limits, listen, metrics, ops, tls::Clients};
use baton_proto::node::v1 as pb;
use tokio::{net::TcpListener, time::sleep};
use tonic::{service::Routes, transport::server::TcpIncoming};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{AnnounceConfig, NodeConfig, Worker, WorkerConfig, WorkerMetrics, announce};

/// Why a node stopped, or never ran.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A port is taken, or an address is not ours.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A socket could not be asked for its address, or the system gives no thread.
    #[error("the system refused: {0}")]
    System(#[from] io::Error),
    /// A router's address.
    #[error(transparent)]
    Address(#[from] grpc::AddressError),
    /// Nobody would believe that this node is the one that is meant.
    #[error(
        "--tls-cert is not for {host:?}, where others reach this node: --advertise another name, or have it signed for this one"
    )]
    Certificate {
        /// Without its port.
        host: String,
    },
    /// The engine's pool is too small to hold anything.
    #[error("the KV pool holds no block: give it more memory")]
    EmptyPool,
    /// The engine's device is gone: every request has ended with a typed error.
    #[error("the engine is lost")]
    EngineLost,
    /// The gRPC server broke.
    #[error("the gRPC server failed: {0}")]
    Server(#[from] tonic::transport::Error),
}

/// A node's sockets, open.
#[derive(Debug)]
pub struct Listeners {
    /// For routers and peers.
    pub grpc: TcpListener,
    /// For probes and metrics.
    pub ops: TcpListener,
}

impl Listeners {
    /// Opens both.
    pub async fn bind(config: &NodeConfig) -> Result<Self, ListenError> {
        Ok(Self {
            grpc: listen::bind(config.grpc, "--grpc").await?,
            ops: listen::bind(config.ops, "--ops").await?,
        })
    }

    /// Where they are: gRPC, ops.
    pub fn addresses(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.grpc.local_addr()?, self.ops.local_addr()?))
    }
}

/// A node whose worker runs, before it serves.
pub struct Node {
    role: pb::Role,
    config: NodeConfig,
    lifecycle: Lifecycle,
    listeners: Listeners,
    worker: Worker,
    metrics: metrics::Metrics,
}

impl Node {
    /// Starts the worker. Inside a tokio runtime.
    pub fn start(
        role: pb::Role,
        config: NodeConfig,
        engine: Box<dyn Engine>,
        lifecycle: Lifecycle,
        listeners: Listeners,
    ) -> Result<Self, NodeError> {
        if engine.memory().blocks() == 0 {
            return Err(NodeError::EmptyPool);
        }
        let mut registry = metrics::registry(role_name(role), &lifecycle);
        let worker_metrics = WorkerMetrics::register(&mut registry);
        let address = match &config.advertise {
            Some(address) => address.clone(),
            None => listeners.grpc.local_addr()?.to_string(),
        };
        let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if config.tls.as_ref().is_some_and(|tls| !tls.covers(host)) {
            return Err(NodeError::Certificate { host: host.to_owned() });
        }
        let worker_config = WorkerConfig {
            protocol_max: config.protocol_max,
            lease_ms: config.lease_ms,
            drain_ms: config.handoff_drain_ms,
            max_updates: config.max_updates,
            ..WorkerConfig::new(config.node.clone(), address, config.scheduler)
        };
        let worker = Worker::start(engine, worker_config, worker_metrics, &lifecycle)?;
        Ok(Self {
            role,
            config,
            lifecycle,
            listeners,
            worker,
            metrics: registry.into(),
        })
    }

    /// The worker.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// The life of this process.
    pub fn lifecycle(&self) -> &Lifecycle {
        &self.lifecycle
    }

    /// Serves `routes` (the role's services; health is added), joins the routers, and is Ready, until the lifecycle drains or the engine is lost. Then
    /// it drains, stops everything, and returns.
    pub async fn serve(self, routes: Routes) -> Result<(), NodeError> {
        let Self {
            role,
            config,
            lifecycle,
            listeners,
            worker,
            metrics,
        } = self;
        lifecycle.spawn(ops::serve(listeners.ops, lifecycle.clone(), metrics));
        let (reporter, health) = tonic_health::server::health_reporter();
        lifecycle.spawn(report_health(reporter, role, lifecycle.clone()));
        let incoming = TcpIncoming::from(listeners.grpc).with_nodelay(Some(true));
        let stop = lifecycle.shutdown_token();
        let server = baton_transfer::grpc::configure_server(grpc::server());
        let server = grpc::secure(server, config.tls.as_ref(), Clients::MustShow)?
            .add_routes(routes)
            .add_service(health)
            .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
        let server = lifecycle.spawn(async move {
            tokio::select! {
                served = server => served,
                // Streams have been told to end by then; a peer that does not read is left behind.
                () = async { stop.cancelled().await; sleep(limits::STOP_TIMEOUT / 2).await } => Ok(()),
            }
        });
        let announced = AnnounceConfig {
            routers: config.routers.clone(),
            role,
            tls: config.tls.clone(),
        };
        announce(&announced, &worker, &lifecycle)?;
        lifecycle.set(Phase::Ready);

        let mut server = std::pin::pin!(server);
        let ended = tokio::select! {
            () = lifecycle.draining() => Ok(()),
            () = worker.lost() => Err(NodeError::EngineLost),
            served = &mut server => match served {
                Ok(Err(error)) => Err(error.into()),
                _ => Ok(()),
            },
        };
        lifecycle.drain(config.drain).await;
        if !worker.stop().await {
            tracing::error!("the engine's thread did not end in time");
        }
        ended
    }
}

/// The role's name in logs, metrics and stdout lines.
fn role_name(role: pb::Role) -> &'static str {
    match role {
        pb::Role::Prefill => "prefill",
        pb::Role::Decode => "decode",
        pb::Role::Unspecified => "node",
    }
}

/// Says over gRPC health what the phase says, for the node as a whole ("") and for its role's service.
async fn report_health(reporter: HealthReporter, role: pb::Role, lifecycle: Lifecycle) {
    let service = match role {
        pb::Role::Prefill => "baton.node.v1.Prefill",
        _ => "baton.node.v1.Decode",
    };
    let (mut phases, stop) = (lifecycle.watch(), lifecycle.shutdown_token());
    loop {
        let serving = match *phases.borrow_and_update() {
            Phase::Ready => ServingStatus::Serving,
            _ => ServingStatus::NotServing,
        };
        for name in ["", service] {
            reporter.set_service_status(name, serving).await;
        }
        tokio::select! {
            _ = phases.changed() => {}
            () = stop.cancelled() => return,
        }
    }
}
