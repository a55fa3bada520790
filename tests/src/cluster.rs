//! A router and its nodes, each a process.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::netns::Namespace;
use crate::process::pause;
use crate::{Launch, Process, Role, default_model, leak};

/// Within it nothing may be held once nothing runs: one lease, the drain after it, and the look at it on a busy machine.
const IDLE: Duration = Duration::from_secs(20);

/// For a node to load its model.
const READY: Duration = Duration::from_secs(120);

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
    /// Where decode nodes run; `None`: in the test's own network.
    pub decode_within: Option<Arc<Namespace>>,
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
            decode_within: None,
        }
    }
}

/// A running cluster. When it is dropped, whoever lives is checked, unless the test has failed already: no request or block may be held any more, nobody
/// may have died unasked, and nobody may have logged a warning or an error that the test did not [allow](Cluster::allow). Then everything is killed.
pub struct Cluster {
    /// The router.
    pub router: Process,
    /// Prefill nodes, then decode nodes.
    pub nodes: Vec<Process>,
    options: ClusterOptions,
    allowed: Vec<&'static str>,
    /// Where its nodes meet to share memory.
    shm: tempfile::TempDir,
}

impl Cluster {
    /// Starts it and waits until the router is ready to serve.
    pub fn start(mut options: ClusterOptions) -> Self {
        let shm = tempfile::tempdir().expect("a directory");
        options
            .env
            .push(("BATON_SHM_DIR".to_owned(), shm.path().display().to_string()));
        let host = host(&options.decode_within);
        let mut args: Vec<String> = [
            ("--grpc", format!("{host}:0")),
            ("--http", "127.0.0.1:0".to_owned()),
            ("--model", options.model.display().to_string()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect();
        args.extend(options.router_args.iter().cloned());
        let router = Process::start(Launch {
            role: Role::Router,
            args,
            env: options.env.clone(),
            within: None,
        });
        let mut cluster = Self {
            router,
            nodes: Vec::new(),
            options,
            allowed: Vec::new(),
            shm,
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
        let tls = self.options.router_args.iter().any(|arg| arg == "--tls-cert");
        let scheme = if tls { "https" } else { "http" };
        let within = match role {
            Role::Decode => self.options.decode_within.clone(),
            _ => None,
        };
        let host = within
            .as_ref()
            .map_or("127.0.0.1".to_owned(), |namespace| namespace.inside().to_string());
        let mut args: Vec<String> = [
            ("--grpc", format!("{host}:0")),
            ("--ops", "127.0.0.1:0".to_owned()),
            ("--router", format!("{scheme}://{}", self.router.grpc)),
            ("--model", self.options.model.display().to_string()),
            ("--node-id", format!("{}-{index}", role.command())),
            ("--threads", self.options.threads.to_string()),
            ("--kv-bytes", self.options.kv_bytes.clone()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect();
        args.extend(extra.iter().cloned());
        let mut node = Process::start(Launch {
            role,
            args,
            env: self.options.env.clone(),
            within,
        });
        node.wait_event("ready", READY);
        self.nodes.push(node);
    }

    /// Sockets at which pools are offered, or were: what a killed node leaves goes when the next one starts.
    pub fn offers(&self) -> usize {
        let users = std::fs::read_dir(self.shm.path()).expect("a directory");
        users
            .flat_map(|user| std::fs::read_dir(user.expect("an entry").path()).expect("a directory"))
            .count()
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
            let text = self.router.metrics();
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

    /// The `index`-th node of a role, killed if it runs, is started again with the same arguments at the same addresses, and joins.
    pub fn restart(&mut self, role: Role, index: usize) {
        let node = self.node(role, index);
        node.restart();
        node.wait_event("ready", READY);
        self.wait_members();
    }

    /// Lines that contain `text` are no surprise, however they are levelled.
    pub fn allow(&mut self, text: &'static str) {
        self.allowed.push(text);
    }

    /// On every node that lives: nothing is held once nothing runs, within `limit`.
    pub fn assert_idle(&mut self, limit: Duration) {
        for node in &mut self.nodes {
            if node.alive() {
                leak::assert_idle(node, limit);
            }
        }
    }

    /// No process has ended but by the test's hand, and none has logged what it should not.
    fn assert_healthy(&mut self) {
        for process in std::iter::once(&mut self.router).chain(&mut self.nodes) {
            let name = process.role.command();
            assert!(
                process.alive() || process.ended(),
                "baton {name} has died; its log:\n{}",
                process.log()
            );
            let stray = process.stray();
            let unexpected = stray
                .iter()
                .find(|line| !self.allowed.iter().any(|allowed| line.contains(allowed)));
            assert_eq!(unexpected, None, "baton {name} logged it");
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        for process in std::iter::once(&mut self.router).chain(&mut self.nodes) {
            process.resume();
        }
        self.assert_idle(IDLE);
        if self.router.alive() {
            self.router.wait_metrics("without requests", IDLE, |text| {
                leak::total(text, "baton_requests_in_flight") == 0.0
            });
        }
        self.assert_healthy();
    }
}

/// Where the test's own processes listen, so that nodes in `within` reach them.
fn host(within: &Option<Arc<Namespace>>) -> String {
    within
        .as_ref()
        .map_or("127.0.0.1".to_owned(), |namespace| namespace.outside().to_string())
}
