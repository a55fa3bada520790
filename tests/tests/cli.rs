//! The command line, as a person uses it.

use std::io::{BufRead, BufReader, Lines, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use baton_tests::{Cluster, ClusterOptions, Process, Role, baton, default_model};

fn run(args: &[&str]) -> Output {
    Command::new(baton())
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("baton starts")
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn generate_streams_and_says_what_went_where() {
    let cluster = Cluster::start(ClusterOptions::default());
    let url = format!("http://{}", cluster.router.grpc);
    let output = run(&["generate", "--grpc", &url, "--max-tokens", "12", "Say hello."]);
    let text = text(&output);
    assert!(output.status.success(), "{text}");
    for part in ["queue", "prefill", "transfer", "prefill-0", "decode-0", "KV"] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
    let json = run(&["generate", "--grpc", &url, "--max-tokens", "4", "--json", "Say hello."]);
    let value: serde_json::Value = serde_json::from_slice(&json.stdout).expect("one JSON object");
    assert_eq!(value["usage"]["completion_tokens"], 4, "{value}");
}

#[test]
fn chat_remembers() {
    let cluster = Cluster::start(ClusterOptions::default());
    let mut chat = Command::new(baton())
        .args([
            "chat",
            "--max-tokens",
            "6",
            "--grpc",
            &format!("http://{}", cluster.router.grpc),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("baton starts");
    let mut input = chat.stdin.take().expect("piped");
    writeln!(input, "Hello!")
        .and_then(|()| writeln!(input, "And again."))
        .expect("chat reads");
    drop(input);
    let output = chat.wait_with_output().expect("chat ends at the end of its input");
    assert!(output.status.success(), "{}", text(&output));
    let metrics = baton_tests::http::get(cluster.router.http, "/metrics").body;
    assert_eq!(baton_tests::leak::total(&metrics, "baton_requests_total"), 2.0);
}

#[test]
fn mistakes_are_told_plainly() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("address").to_string();
    let free = "127.0.0.1:0";
    let model = default_model().display().to_string();
    let cut = tempfile::NamedTempFile::new().expect("a file");
    let bytes = std::fs::read(default_model()).expect("the model");
    std::fs::write(cut.path(), &bytes[..bytes.len() / 2]).expect("half a model");
    let cut = cut.path().display().to_string();
    let node = |model: &'static str| {
        [
            "decode",
            "--grpc",
            "127.0.0.1:0",
            "--ops",
            "127.0.0.1:0",
            "--router",
            "http://127.0.0.1:9",
            "--node-id",
            "d",
            "--model",
            model,
        ]
    };
    let cases: Vec<(&str, Vec<&str>, &str)> = vec![
        (
            "nobody to ask",
            vec!["generate", "--grpc", "http://127.0.0.1:9", "x"],
            "baton up",
        ),
        (
            "port in use",
            vec!["router", "--grpc", &address, "--http", free, "--model", &model],
            "in use",
        ),
        (
            "no such model",
            node("/nowhere/model.gguf").to_vec(),
            "/nowhere/model.gguf",
        ),
        (
            "half a model",
            vec![
                "decode",
                "--grpc",
                free,
                "--ops",
                free,
                "--router",
                "http://127.0.0.1:9",
                "--node-id",
                "d",
                "--model",
                &cut,
            ],
            "truncated",
        ),
        ("half a model", vec!["model", "info", &cut], "truncated"),
        (
            "more KV than memory",
            [&node("MODEL")[..9], &["--model", &model, "--kv-bytes", "4TiB"][..]].concat(),
            "memory",
        ),
        (
            "hardly any KV",
            [&node("MODEL")[..9], &["--model", &model, "--kv-bytes", "1KiB"][..]].concat(),
            "KV",
        ),
        (
            "no threads",
            [&node("MODEL")[..9], &["--model", &model, "--threads", "0"][..]].concat(),
            "threads",
        ),
        (
            "a size that is none",
            [&node("MODEL")[..9], &["--model", &model, "--kv-bytes", "much"][..]].concat(),
            "kv-bytes",
        ),
    ];
    for (what, args, expected) in cases {
        let output = run(&args);
        let text = text(&output);
        assert!(!output.status.success(), "{what}: it did not fail");
        assert!(output.status.code().is_some(), "{what}: it ended by a signal");
        assert!(text.contains(expected), "{what}: {expected:?} is not in:\n{text}");
        assert!(!text.contains("panicked"), "{what}:\n{text}");
    }
}

#[test]
fn model_info_describes_the_file() {
    let output = run(&["model", "info", &default_model().display().to_string()]);
    let text = text(&output);
    assert!(output.status.success(), "{text}");
    for part in ["SmolLM2-135M-Instruct", "llama", "Q4_1", "30", "8192"] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/tiny/mistral");
    let output = run(&["model", "info", &directory.display().to_string()]);
    let text = self::text(&output);
    assert!(output.status.success(), "{text}");
    for part in ["mistral", "BF16 × 21", "24 tokens", "272"] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

/// `baton up`, killed when dropped.
struct Up(Child);

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `baton up` with some nodes of each role, waits until it is ready, and asks it for a few tokens. Its further lines come with it.
fn up(nodes: usize, model: &Path, panel_cache: &Path) -> (Up, Lines<BufReader<ChildStdout>>) {
    let free = || {
        TcpListener::bind("127.0.0.1:0")
            .expect("a port")
            .local_addr()
            .expect("address")
            .to_string()
    };
    let (grpc, http, nodes) = (free(), free(), nodes.to_string());
    let args = [
        "up",
        "--prefill",
        &nodes,
        "--decode",
        &nodes,
        "--threads",
        "1",
        "--kv-bytes",
        "128MiB",
    ];
    let mut up = Up(Command::new(baton())
        .args(args)
        .args(["--grpc", &grpc, "--http", &http, "--model"])
        .arg(model)
        .arg("--panel-cache")
        .arg(panel_cache)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("baton starts"));
    // Nobody reads what it says on the side; that decides nothing.
    drop(up.0.stderr.take());
    let mut lines = BufReader::new(up.0.stdout.take().expect("piped")).lines();
    let ready = lines.by_ref().map_while(Result::ok).find(|line| line.contains("ready"));
    assert!(ready.is_some(), "it says when it is ready");
    let url = format!("http://{grpc}");
    let output = run(&["generate", "--grpc", &url, "--max-tokens", "3", "Hi"]);
    assert!(output.status.success(), "{}", text(&output));
    (up, lines)
}

#[test]
fn up_serves_a_directory() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/tiny/llama");
    up(1, &model, Path::new("off"));
}

#[test]
fn up_is_a_whole_cluster_and_ctrl_c_drains_it() {
    let panels = tempfile::tempdir().expect("a directory");
    let (mut up, lines) = up(2, &default_model(), panels.path());
    let kept = std::fs::read_dir(&panels).expect("it is there").count();
    assert_eq!(kept, 2, "the panels of one model, and its digest");
    let children = children_of(up.0.id());
    assert_eq!(children.len(), 5, "a router and four nodes");
    let status = Command::new("kill")
        .args(["-INT", &up.0.id().to_string()])
        .status()
        .expect("kill");
    assert!(status.success());
    let _ = lines.map_while(Result::ok).count();
    assert!(up.0.wait().expect("it ends").success());
    assert!(
        children
            .iter()
            .all(|child| !std::path::Path::new(&format!("/proc/{child}")).exists()),
        "no child is left"
    );
}

/// Process ids of the direct children, by /proc.
fn children_of(parent: u32) -> Vec<u32> {
    let stat = |id: u32| std::fs::read_to_string(format!("/proc/{id}/stat")).ok();
    let ids = std::fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.filter(|&id| {
        let parent_of =
            stat(id).and_then(|text| text.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<u32>().ok());
        parent_of == Some(parent)
    })
    .collect()
}

#[test]
fn a_second_start_reads_what_the_first_has_packed() {
    let panels = tempfile::tempdir().expect("a directory");
    let log = || {
        let cluster = Cluster::start(ClusterOptions {
            prefill: 0,
            env: vec![("BATON_PANEL_CACHE".into(), panels.path().display().to_string())],
            ..ClusterOptions::default()
        });
        let url = format!("http://{}", cluster.router.grpc);
        let output = run(&["generate", "--grpc", &url, "--max-tokens", "3", "Hi"]);
        assert!(output.status.success(), "{}", text(&output));
        cluster.nodes[0].log()
    };
    let stages = |log: &str| {
        [
            "hashing the weights",
            "reading the packed weights",
            "packing the weights",
            "keeping the packed weights",
        ]
        .map(|stage| log.contains(stage))
    };
    let (first, second) = (log(), log());
    assert_eq!(stages(&first), [true, false, true, true], "{first}");
    assert_eq!(stages(&second), [false, true, false, false], "{second}");
}

#[test]
fn a_node_drains_on_sigterm() {
    let mut cluster = Cluster::start(ClusterOptions {
        prefill: 1,
        decode: 1,
        ..ClusterOptions::default()
    });
    for role in [Role::Prefill, Role::Decode] {
        let node: &mut Process = cluster.node(role, 0);
        node.signal("TERM");
        let status = node.wait_exit(Duration::from_secs(30));
        assert!(status.success(), "{status:?}; its log:\n{}", node.log());
    }
    cluster.router.signal("TERM");
    assert!(cluster.router.wait_exit(Duration::from_secs(30)).success());
}
