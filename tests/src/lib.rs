//! Whole clusters of processes under test.
//!
//! [`Cluster`] starts the real `baton` binary several times, on loopback, with a real or simulated engine, and stops everything when dropped. Every
//! cluster that is dropped is checked: on every node that lives no block is held once nothing runs ([`leak`]), and nobody has logged what it should not.
//! What goes wrong is the test's doing: processes that are killed, stopped and restarted ([`Process`]), links that are cut ([`netns`]), and connections
//! that are slow, broken or corrupt ([`fault_proxy`]).
//!
//! Nothing depends on this crate.

pub mod bench;
pub mod certificates;
pub mod client;
pub mod cluster;
pub mod fault_proxy;
pub mod http;
pub mod leak;
pub mod legs;
pub mod netns;
pub mod process;

pub use certificates::Certificates;
pub use cluster::{Cluster, ClusterOptions};
pub use process::{Launch, Process, Role};

use std::path::PathBuf;

/// The workspace's root.
pub fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the workspace")
        .to_path_buf()
}

/// The default model's file. Panics, saying what to do, when it is missing.
pub fn default_model() -> PathBuf {
    let path = std::env::var_os("BATON_MODEL").map_or_else(
        || workspace().join(".models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    assert!(path.is_file(), "{} is missing: run `make model`", path.display());
    path
}

/// The binary under test: `$BATON_BIN`, or the one that cargo built beside this test.
pub fn baton() -> PathBuf {
    if let Some(path) = std::env::var_os("BATON_BIN") {
        return PathBuf::from(path);
    }
    let test = std::env::current_exe().expect("the test's own path");
    let path = test
        .parent()
        .and_then(|deps| deps.parent())
        .expect("target/PROFILE/deps/TEST")
        .join("baton");
    assert!(
        path.is_file(),
        "{} is missing: run `cargo build -p baton`",
        path.display()
    );
    path
}

/// The Python that has the clients of `tests/requirements.txt`.
pub fn python() -> PathBuf {
    let path = std::env::var_os("BATON_PYTHON").map_or_else(|| workspace().join(".venv/bin/python"), PathBuf::from);
    assert!(
        path.is_file(),
        "{} is missing: run `make test`, or `make .venv/stamp`",
        path.display()
    );
    path
}
