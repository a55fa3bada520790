//! Everything over TLS: the same tokens, and nobody in who has no certificate.

mod reference;

use std::process::{Command, Stdio};

use baton_proto::node::v1::{PeerHello, handoff_client::HandoffClient, registry_client::RegistryClient};
use baton_proto::v1::generation_client::GenerationClient;
use baton_tests::{Certificates, Cluster, ClusterOptions, Role, baton, client};
use reference::Reference;
use tonic::Code;
use tonic::transport::Channel;

fn start(certificates: &Certificates) -> Cluster {
    Cluster::start(ClusterOptions {
        router_args: certificates.flags(),
        // What is shared in memory is not spoken, in TLS or otherwise.
        prefill_args: [certificates.flags(), vec!["--transport".to_owned(), "grpc".to_owned()]].concat(),
        decode_args: certificates.flags(),
        ..ClusterOptions::default()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_over_tls_answers_the_same_tokens() {
    let certificates = Certificates::sign();
    let cluster = start(&certificates);
    let mut reference = Reference::open();
    let prompt = reference.prompt("The quick brown fox jumps over the lazy dog, and then it rests. ", 10);
    let expected = reference.run(&prompt, 12, Some(3));
    let channel = Channel::from_shared(format!("https://{}", cluster.router.grpc))
        .expect("an address")
        .tls_config(certificates.client())
        .expect("TLS");
    let mut api = GenerationClient::new(channel.connect().await.expect("a client needs no certificate"));
    let answer = client::run(&mut api, client::sampled(&prompt, 12, 3))
        .await
        .expect("an answer");
    assert_eq!((&answer.ids, &answer.logprobs), (&expected.ids, &expected.logprobs));
    let served = answer.finished.served.expect("served");
    assert!(served.kv_bytes > 0, "the KV crossed: {served:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_shows_no_certificate_is_no_node_and_who_speaks_no_tls_is_told() {
    let certificates = Certificates::sign();
    let mut cluster = start(&certificates);
    cluster.allow("it showed no certificate");
    let connect = |address: std::net::SocketAddr| {
        let channel = Channel::from_shared(format!("https://{address}")).expect("an address");
        channel.tls_config(certificates.client()).expect("TLS").connect_lazy()
    };
    let mut registry = RegistryClient::new(connect(cluster.router.grpc));
    let refused = registry.announce(tokio_stream::empty()).await.expect_err("refused");
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
    assert!(refused.message().contains("certificate"), "{refused:?}");
    // A node takes no connection without one at all.
    let decode = cluster.node(Role::Decode, 0).grpc;
    let refused = HandoffClient::new(connect(decode))
        .introduce(PeerHello::default())
        .await;
    let refused = format!("{:?}", refused.expect_err("refused"));
    assert!(refused.contains("CertificateRequired"), "{refused}");

    let generate = |url: String, ca: Option<&str>| {
        let mut command = Command::new(baton());
        command.args(["generate", "--max-tokens", "2", "--grpc", &url]);
        if let Some(ca) = ca {
            command.arg("--tls-ca").arg(certificates.path(ca));
        }
        let output = command
            .arg("Hello")
            .stdin(Stdio::null())
            .output()
            .expect("baton starts");
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let router = cluster.router.grpc;
    let (answered, text) = generate(format!("https://{router}"), Some("ca.pem"));
    assert!(answered, "{text}");
    for (url, ca, expected) in [
        (format!("http://{router}"), None, "https:// where it serves TLS"),
        (format!("https://{router}"), None, "pass --tls-ca FILE"),
        (format!("https://{router}"), Some("node.key"), "holds no certificate"),
    ] {
        let (answered, text) = generate(url, ca);
        assert!(!answered && text.contains(expected), "{text}");
    }
}
