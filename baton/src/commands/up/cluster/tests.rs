use baton_node::{ByteSize, ListenAddress};
use clap::Parser;

use super::*;
use crate::cli::{Cli, Command};

fn plan(line: &str) -> Plan {
    let cli = Cli::try_parse_from(line.split(' ')).expect("parses");
    let Command::Up(args) = cli.command else {
        panic!("not up: {line}")
    };
    Plan {
        args,
        model: "/models/m.gguf".into(),
        threads: 2,
        telemetry: cli.telemetry,
    }
}

/// What is given to children is what the children's own command lines take.
#[test]
fn children_understand_their_command_lines() {
    let plan = plan(
        "baton up --prefill 2 --decode 1 --simulated --kv-bytes 1GiB --panel-cache /panels --log debug --log-format json --otlp http://127.0.0.1:4317",
    );
    let nodes = plan.nodes();
    let names: Vec<&str> = nodes.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["prefill-0", "prefill-1", "decode-0"]);
    let router = SocketAddr::from(([127, 0, 0, 1], 7070));
    let lines = nodes
        .iter()
        .map(|(role, name)| plan.node(role, name, router))
        .chain([plan.router()]);
    for line in lines {
        let kept = line.windows(2).any(|words| words == ["--panel-cache", "/panels"]);
        assert_eq!(kept, line[0] != "router", "{line:?}");
        let cli = Cli::try_parse_from(std::iter::once("baton".into()).chain(line.iter().cloned()))
            .unwrap_or_else(|error| panic!("{line:?}: {error}"));
        assert_eq!(cli.telemetry, plan.telemetry, "{line:?}");
    }
}

#[test]
fn the_welcome_names_the_addresses_that_were_bound() {
    let line = |grpc: &str| Line {
        event: Event::Ready,
        role: "router".into(),
        node_id: "router-0".into(),
        grpc: grpc.parse::<ListenAddress>().expect("an address").0,
        http: SocketAddr::from(([127, 0, 0, 1], 8081)),
        loading: None,
    };
    let models = ["SmolLM2-135M-Instruct".to_owned()];
    let usual = welcome(&line("127.0.0.1:7070"), &models, 2, Path::new("/tmp/logs"));
    assert!(
        usual.contains("baton generate \"") && usual.contains("http://127.0.0.1:8081/v1"),
        "{usual}"
    );
    let other = welcome(&line("127.0.0.1:7071"), &models, 1, Path::new("/tmp/logs"));
    assert!(
        other.contains("baton generate --grpc http://127.0.0.1:7071 \""),
        "{other}"
    );
    assert!(other.contains("1 node and"), "{other}");
}

#[test]
fn sizes_reach_the_children_in_bytes() {
    let plan = plan("baton up --kv-bytes 64MiB");
    let line = plan.node("decode", "decode-0", SocketAddr::from(([127, 0, 0, 1], 1)));
    let size = line
        .iter()
        .position(|word| word == "--kv-bytes")
        .map(|at| line[at + 1].clone());
    assert_eq!(
        size.and_then(|size| size.to_str().map(str::to_owned)),
        Some(ByteSize(64 << 20).0.to_string())
    );
}
