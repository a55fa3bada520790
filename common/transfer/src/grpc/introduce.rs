//! The decode node's end of a meeting: whether the two fit, and how fast the way between them is.

use std::{collections::HashMap, time::Duration};

use baton_kv::Epoch;
use baton_proto::node::v1 as pb;
use tokio::time::{Instant, timeout};
use tonic::{Code, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt};

use super::pools::Pools;
use crate::{INTRODUCED_SINCE, Reject, Terms, limits};

/// Domain of the reasons of our statuses.
const DOMAIN: &str = "baton";

/// Why no pool is mapped on a node without [`Pools`].
const NO_POOLS: &str = "SHM_OFF: this node takes nothing over shared memory";

/// Answers a prefill node that says who it is; maps the pool that it offers, if it can.
pub(super) async fn welcome(
    terms: &Terms,
    hello: &pb::PeerHello,
    pools: Option<&Pools>,
) -> Result<pb::PeerWelcome, Status> {
    introduces(terms)?;
    let protocol = terms.agree(hello).map_err(|reject| {
        tracing::warn!(
            peer = hello.node_id,
            code = reject.code(),
            "a prefill node does not fit: {reject}"
        );
        refusal(reject)
    })?;
    let owner = Epoch::from_slice(&hello.epoch).ok_or_else(|| refusal(Reject::Malformed))?;
    let (shared_refused, shared_bytes_per_s) = match (&hello.shared, pools) {
        (None, _) => (String::new(), 0.0),
        (Some(_), None) => (NO_POOLS.to_owned(), 0.0),
        (Some(offer), Some(pools)) => match pools.admit(owner, offer, &terms.layout).await {
            Ok(bytes_per_s) => {
                tracing::info!(peer = hello.node_id, bytes_per_s, "a prefill node's pool is mapped");
                (String::new(), bytes_per_s)
            }
            Err(error) => {
                let code = error.code();
                tracing::info!(
                    peer = hello.node_id,
                    code,
                    "a prefill node's pool is not mapped: {error}"
                );
                (format!("{code}: {error}"), 0.0)
            }
        },
    };
    Ok(pb::PeerWelcome {
        node_id: terms.node.0.clone(),
        epoch: terms.epoch.to_bytes().to_vec(),
        protocol,
        shared_refused,
        shared_bytes_per_s,
    })
}

/// Takes a probe's bytes and throws them away.
pub(super) async fn probe(terms: &Terms, mut frames: Streaming<pb::ProbeFrame>) -> Result<pb::ProbeReport, Status> {
    introduces(terms)?;
    let started = Instant::now();
    let probe = async {
        let mut bytes = 0;
        while let Some(frame) = frames.message().await? {
            bytes += frame.data.len();
            if bytes > limits::PROBE_BYTES {
                return Err(Status::invalid_argument("a probe is shorter"));
            }
        }
        Ok(pb::ProbeReport {
            bytes: bytes as u64,
            seconds: started.elapsed().as_secs_f64(),
        })
    };
    timeout(Duration::from_millis(limits::MEET_MS), probe)
        .await
        .map_err(|_| Status::deadline_exceeded("the probe took too long"))?
}

/// A node that speaks version 1 alone does not know of introductions.
fn introduces(terms: &Terms) -> Result<(), Status> {
    if *terms.versions.end() < INTRODUCED_SINCE {
        return Err(Status::unimplemented("this node speaks version 1 of the handoff"));
    }
    Ok(())
}

fn refusal(reject: Reject) -> Status {
    let code = match reject {
        Reject::Malformed => Code::InvalidArgument,
        _ => Code::FailedPrecondition,
    };
    let details = ErrorDetails::with_error_info(reject.code(), DOMAIN, HashMap::new());
    Status::with_error_details(code, reject.to_string(), details)
}

/// What the other end's [`refusal`] means; `None`: it is none.
pub(super) fn refused(status: &Status) -> Option<Reject> {
    let info = status.get_details_error_info()?;
    Reject::from_code(&info.reason)
}
