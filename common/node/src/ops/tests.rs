use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;
use crate::{listen, metrics};

/// Sends one GET over a real socket; returns status, headers and body.
async fn get(address: SocketAddr, path: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).await.expect("connects");
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sends");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).expect("a status").parse().expect("a number");
    (status, head.to_lowercase(), body.to_owned())
}

#[tokio::test]
async fn probes_and_metrics_follow_the_phase() {
    let life = Lifecycle::new();
    let metrics = Arc::new(metrics::registry("decode", &life));
    let listener = listen::bind(SocketAddr::from(([127, 0, 0, 1], 0)), "--ops")
        .await
        .expect("a free port");
    let address = listener.local_addr().expect("bound");
    let server = life.spawn(serve(listener, life.clone(), metrics));

    for (phase, ready) in [(Phase::Starting, 503), (Phase::Ready, 200), (Phase::Draining, 503)] {
        life.set(phase);
        assert_eq!(get(address, "/health").await.0, 200, "alive while {phase}");
        let (status, _, body) = get(address, "/ready").await;
        assert_eq!((status, body.trim()), (ready, phase.as_str()));
        let (status, head, body) = get(address, "/metrics").await;
        assert_eq!(status, 200);
        assert!(head.contains("content-type: application/openmetrics-text"), "{head}");
        assert!(
            body.contains(&format!("\nbaton_phase{{phase=\"{phase}\"}} 1\n")),
            "{body}"
        );
        assert_eq!(body.matches("\nbaton_phase{").count(), 4, "{body}");
        assert!(
            body.contains("\nbaton_build_info{version=\"0.1.0\",role=\"decode\"} 1\n"),
            "{body}"
        );
        assert!(body.ends_with("# EOF\n"), "{body}");
    }
    assert_eq!(get(address, "/other").await.0, 404);

    life.set(Phase::Stopped);
    server.await.expect("no panic");
    assert!(TcpStream::connect(address).await.is_err(), "the socket is closed");
}

#[tokio::test]
async fn readiness_may_need_more_than_the_phase() {
    let life = Lifecycle::new();
    life.set(Phase::Ready);
    let metrics = Arc::new(metrics::registry("router", &life));
    let nodes = Arc::new(AtomicBool::new(false));
    let also = nodes.clone();
    let app = routes_when(life.clone(), metrics, move || also.load(Ordering::Relaxed));
    let listener = listen::bind(SocketAddr::from(([127, 0, 0, 1], 0)), "--http")
        .await
        .expect("a free port");
    let address = listener.local_addr().expect("bound");
    let server = life.spawn(async { axum::serve(listener, app).await });
    for (there, expected) in [(false, 503), (true, 200), (false, 503)] {
        nodes.store(there, Ordering::Relaxed);
        assert_eq!(get(address, "/ready").await.0, expected);
        assert_eq!(get(address, "/health").await.0, 200);
    }
    server.abort();
}
