//! A router and its nodes, each a process.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::process::pause;
use crate::{Process, Role, default_model, http, leak};

/// What to start.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Prefill nodes.
    pub prefill: usize,
    /// Decode nodes.
    pub decode: usize,
    /// The model of router and nodes.
    pub model: PathBuf,
    /// Engine threads of each node.
    pub threads: usize,
    /// KV pool of each node.
    pub kv_bytes: String,
    /// Further arguments of the router.
    pub router_args: Vec<String>,
    /// Further arguments of every prefill node.
    pub prefill_args: Vec<String>,
    /// Further arguments of every decode node.
    pub decode_args: Vec<String>,
    /// Environment of every process.
    pub env: Vec<(String, String)>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self {
            prefill: 1,
            decode: 1,
            model: default_model(),
            threads: 1,
            kv_bytes: "192MiB".to_owned(),
            router_args: Vec::new(),
            prefill_args: Vec::new(),
            decode_args: Vec::new(),
            env: Vec::new(),
        }
    }
}

/// A running cluster; everything is killed when it is dropped.
pub struct Cluster {
    /// The router.
    pub router: Process,
    /// Prefill nodes, then decode nodes.
    pub nodes: Vec<Process>,
    options: ClusterOptions,
}

impl Cluster {
    /// Starts it and waits until the router is ready to serve.
    pub fn start(options: ClusterOptions) -> Self {
        let mut args: Vec<String> = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--model"]
            .map(str::to_owned)
            .into();
        args.push(options.model.display().to_string());
        args.extend(options.router_args.iter().cloned());
        let router = Process::start(Role::Router, &args, &options.env);
        let mut cluster = Self {
            router,
            nodes: Vec::new(),
            options,
        };
        for index in 0..cluster.options.prefill {
            cluster.add_node(Role::Prefill, index);
        }
        for index in 0..cluster.options.decode {
            cluster.add_node(Role::Decode, index);
        }
        cluster.wait_members();
        cluster
    }

    /// Starts one more node.
    pub fn add_node(&mut self, role: Role, index: usize) {
        let extra = if role == Role::Prefill {
            &self.options.prefill_args
        } else {
            &self.options.decode_args
        };
        let mut args: Vec<String> = [
            ("--grpc", "127.0.0.1:0".to_owned()),
            ("--ops", "127.0.0.1:0".to_owned()),
            ("--router", format!("http://{}", self.router.grpc)),
            ("--model", self.options.model.display().to_string()),
            ("--node-id", format!("{}-{index}", role.command())),
            ("--threads", self.options.threads.to_string()),
            ("--kv-bytes", self.options.kv_bytes.clone()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect();
        args.extend(extra.iter().cloned());
        let mut node = Process::start(role, &args, &self.options.env);
        node.wait_event("ready", Duration::from_secs(120));
        self.nodes.push(node);
    }

    /// Waits until the router counts every node that lives.
    pub fn wait_members(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let expected = self
            .nodes
            .iter_mut()
            .map(|node| usize::from(node.alive()))
            .sum::<usize>();
        loop {
            let text = http::get(self.router.http, "/metrics").body;
            let ready: f64 = leak::samples(&text, "baton_nodes", "phase")
                .get("ready")
                .copied()
                .unwrap_or(0.0);
            if ready as usize == expected {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "the router sees {ready} ready nodes of {expected}; its log:\n{}",
                self.router.log()
            );
            pause();
        }
    }

    /// The `index`-th node of a role.
    pub fn node(&mut self, role: Role, index: usize) -> &mut Process {
        self.nodes
            .iter_mut()
            .filter(|node| node.role == role)
            .nth(index)
            .expect("there is such a node")
    }

    /// On every node that lives: nothing is held once nothing runs, within `limit`.
    pub fn assert_idle(&mut self, limit: Duration) {
        for node in &mut self.nodes {
            if node.alive() {
                leak::assert_idle(node.http, limit);
            }
        }
    }

    /// Every process lives, and none logged an ERROR.
    pub fn assert_healthy(&mut self) {
        for process in std::iter::once(&mut self.router).chain(&mut self.nodes) {
            assert!(
                process.alive(),
                "baton {} has died; its log:\n{}",
                process.role.command(),
                process.log()
            );
            let log = process.log();
            assert!(
                !log.contains("ERROR"),
                "baton {} logged an error:\n{log}",
                process.role.command()
            );
            assert!(
                !log.contains("panicked"),
                "baton {} panicked:\n{log}",
                process.role.command()
            );
        }
    }
}
