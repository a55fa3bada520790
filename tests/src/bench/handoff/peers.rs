//! What others move between two processes of this machine.

use std::path::Path;

use super::{
    libraries::{self, Outcome, Over, Setting},
    plain_grpc::PlainGrpc,
    runs::Runs,
};

const TONIC: &str = "tonic as it comes";
/// Block sizes of the libraries.
const BLOCKS_KIB: [usize; 2] = [64, 256];

/// NIXL and Mooncake: as they come, and as they were found fastest on two cores.
const SETTINGS: [Setting; 6] = [
    Setting {
        name: "NIXL TCP",
        over: Over::Tcp,
        library: "nixl",
        env: &[("UCX_TLS", "tcp,self"), ("UCX_NET_DEVICES", "lo")],
    },
    Setting {
        name: "NIXL TCP, no progress thread",
        over: Over::Tcp,
        library: "nixl",
        env: &[("UCX_TLS", "tcp,self"), ("UCX_NET_DEVICES", "lo"), ("PROGRESS", "0")],
    },
    Setting {
        name: "Mooncake TCP",
        over: Over::Tcp,
        library: "mooncake",
        env: &[("MC_LOG_LEVEL", "ERROR")],
    },
    Setting {
        name: "Mooncake TCP, long queue",
        over: Over::Tcp,
        library: "mooncake",
        env: &[
            ("MC_LOG_LEVEL", "ERROR"),
            ("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", "65535"),
            ("MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER", "65535"),
            ("MC_TCP_ADMISSION_TIMEOUT_MS", "60000"),
        ],
    },
    Setting {
        name: "NIXL shm, no progress thread",
        over: Over::Shm,
        library: "nixl",
        env: &[("UCX_TLS", "posix,cma,self"), ("ERRORS", "none"), ("PROGRESS", "0")],
    },
    Setting {
        name: "NIXL shm, no progress thread, huge pages",
        over: Over::Shm,
        library: "nixl",
        env: &[
            ("UCX_TLS", "posix,cma,self"),
            ("ERRORS", "none"),
            ("PROGRESS", "0"),
            ("HUGE", "1"),
        ],
    },
];

/// One peer's runs.
#[derive(Debug)]
struct Ran {
    who: &'static str,
    over: Over,
    block_kib: usize,
    runs: Runs,
}

/// What others reach.
#[derive(Debug, Default)]
pub struct Peers {
    all: Vec<Ran>,
}

impl Peers {
    /// Measures them with runs of `mib`, and prints them. Whoever does not run is left out, with a line that says so.
    pub async fn measure(python: Option<&Path>, mib: usize, repeats: usize, iperf_s: usize) -> anyhow::Result<Self> {
        for streams in [1, 2] {
            match libraries::iperf3(streams, iperf_s).await {
                Ok(gbps) => println!("  {gbps:>7.3} GB/s  iperf3, {streams} streams, unchecked"),
                Err(error) => println!("  iperf3 does not run and is left out: {error:#}"),
            }
        }
        let mut peers = Self::default();
        let mut plain = PlainGrpc::start()?;
        let runs = Runs::measure(repeats, || plain.run(mib << 20))?;
        drop(plain);
        for block_kib in BLOCKS_KIB {
            peers.add(TONIC, Over::Tcp, block_kib, runs.clone());
        }
        let Some(python) = python else {
            println!("  no Python with NIXL and Mooncake was given: they are left out");
            return Ok(peers);
        };
        for setting in &SETTINGS {
            match libraries::run(python, setting, mib, repeats, &BLOCKS_KIB).await {
                Ok(outcomes) => peers.take(setting, outcomes),
                Err(error) => println!("  {} does not run and is left out: {error:#}", setting.name),
            }
        }
        Ok(peers)
    }

    fn take(&mut self, setting: &Setting, outcomes: Vec<Outcome>) {
        for Outcome { block_kib, runs } in outcomes {
            match runs {
                Ok(runs) => self.add(setting.name, setting.over, block_kib, runs),
                Err(error) => println!("  {}, {block_kib} KiB: fails: {error}", setting.name),
            }
        }
    }

    fn add(&mut self, who: &'static str, over: Over, block_kib: usize, runs: Runs) {
        runs.show(&format!("{who}, {block_kib} KiB, unchecked"));
        self.all.push(Ran {
            who,
            over,
            block_kib,
            runs,
        });
    }

    /// The fastest over such a path in blocks of this size, GB/s.
    pub fn best(&self, over: Over, block_kib: usize) -> Option<(f64, &'static str)> {
        let of_this = self
            .all
            .iter()
            .filter(|ran| (ran.over, ran.block_kib) == (over, block_kib));
        of_this
            .map(|ran| (ran.runs.rate(), ran.who))
            .max_by(|one, other| one.0.total_cmp(&other.0))
    }

    /// CPU seconds per GB of gRPC as it comes.
    pub fn plain_cpu(&self) -> Option<(f64, &'static str)> {
        let plain = self.all.iter().find(|ran| ran.who == TONIC)?;
        Some((plain.runs.cpu()?, TONIC))
    }
}
