//! How fast the gRPC path to a peer is.

use baton_proto::node::v1::{self as pb, handoff_client::HandoffClient};
use bytes::Bytes;
use tokio::time::Instant;
use tonic::{Status, transport::Channel};

use crate::{limits, path::Measured};

/// Sends bytes and waits until they have arrived; more of them as long as that takes too short a time to tell. So a slow path, whose queues are long, is not filled
/// with what the first push would then have to wait for.
pub(super) async fn probe(channel: &Channel) -> Result<Measured, Status> {
    let mut client = HandoffClient::new(channel.clone());
    let asked = Instant::now();
    client.probe(tokio_stream::empty()).await?;
    let latency = asked.elapsed();

    let data = Bytes::from(vec![0x5A; limits::PROBE_FRAME_BYTES]);
    let mut frames = 1;
    loop {
        let sent = std::iter::repeat_n(pb::ProbeFrame { data: data.clone() }, frames);
        let asked = Instant::now();
        let report = client.probe(tokio_stream::iter(sent)).await?.into_inner();
        let seconds = asked
            .elapsed()
            .saturating_sub(latency)
            .as_secs_f64()
            .max(report.seconds);
        if seconds >= limits::PROBE_TELLING_S || frames * limits::PROBE_FRAME_BYTES >= limits::PROBE_BYTES {
            return Ok(Measured {
                bytes_per_s: report.bytes as f64 / seconds.max(f64::EPSILON),
                latency,
            });
        }
        frames *= limits::PROBE_GROWTH;
    }
}
