//! Whether all nodes have joined the router, from its metrics.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{interval, timeout},
};

/// How often the router is asked.
const INTERVAL: Duration = Duration::from_millis(50);
/// How long one answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of one answer at most; metrics are a few dozen KiB.
const ANSWER_BYTES: u64 = 4 << 20;

/// Resolves when the router whose HTTP socket is `router` counts `nodes` ready nodes. The caller bounds it.
pub(super) async fn joined(router: SocketAddr, nodes: usize) -> anyhow::Result<()> {
    let mut tick = interval(INTERVAL);
    loop {
        tick.tick().await;
        if ready_nodes(&timeout(ANSWER_TIMEOUT, metrics(router)).await??) >= nodes as u64 {
            return Ok(());
        }
    }
}

async fn metrics(router: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(router).await?;
    let request = format!("GET /metrics HTTP/1.1\r\nhost: {router}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES).read_to_string(&mut answer).await?;
    Ok(answer)
}

/// The sum of `baton_nodes{…phase="ready"…}`.
fn ready_nodes(metrics: &str) -> u64 {
    let samples = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("baton_nodes{")?.split_once("} "));
    samples
        .filter(|(labels, _)| labels.contains(r#"phase="ready""#))
        .filter_map(|(_, count)| count.trim().parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_nodes_of_all_roles_are_counted() {
        let metrics = "# TYPE baton_nodes gauge\nbaton_nodes{role=\"prefill\",phase=\"ready\"} 2\nbaton_nodes{role=\"prefill\",phase=\"draining\"} 4\nbaton_nodes{role=\"decode\",phase=\"ready\"} 1\nbaton_nodes_other{phase=\"ready\"} 9\n";
        assert_eq!(ready_nodes(metrics), 3);
        assert_eq!(ready_nodes(""), 0);
    }
}
