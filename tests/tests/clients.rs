//! Clients that we did not write: OpenAI's own, and a Python gRPC client that finds the service by reflection.

use std::process::Command;

use baton_tests::{Cluster, ClusterOptions, python, workspace};

fn run(script: &str, cluster: &Cluster) {
    let output = Command::new(python())
        .arg(workspace().join("tests/python").join(script))
        .arg(cluster.router.http.to_string())
        .arg(cluster.router.grpc.to_string())
        .output()
        .expect("python starts");
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{script} failed:\n{text}");
    assert!(
        text.contains("all checks passed"),
        "{script} did not reach its end:\n{text}"
    );
}

#[test]
fn openai_python() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    run("openai_client.py", &cluster);
    cluster.assert_idle(std::time::Duration::from_secs(15));
}

#[test]
fn grpc_reflection_python() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    run("grpc_client.py", &cluster);
    cluster.assert_idle(std::time::Duration::from_secs(15));
}
