//! Both ends of the product's handoff.

use std::path::{Path, PathBuf};

use baton_node::{Tls, TlsArgs};

use super::{Role, end::End, libraries::Over, payload::Payload, pushing, receiving, runs::Run};
use crate::certificates::Certificates;

/// How the KV travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Way {
    /// gRPC, in the clear.
    Grpc,
    /// gRPC over TLS, both ends showing certificates.
    Tls,
    /// The receiver copies from the sender's pool.
    Shm,
}

impl Way {
    /// Those that are measured at every block size.
    pub const SWEPT: [Self; 2] = [Self::Grpc, Self::Shm];

    /// As tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpc => "gRPC",
            Self::Tls => "gRPC TLS",
            Self::Shm => "shm",
        }
    }

    /// What others have to move bytes by, to be compared.
    pub fn over(self) -> Over {
        match self {
            Self::Grpc | Self::Tls => Over::Tcp,
            Self::Shm => Over::Shm,
        }
    }
}

/// What both ends are told.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Setup {
    /// What travels.
    pub payload: Payload,
    /// How.
    pub way: Way,
    /// Where they may meet, and where certificates lie.
    pub directory: PathBuf,
}

impl Setup {
    /// What an end shows, and whom it believes; none without TLS.
    pub(super) fn tls(&self) -> anyhow::Result<Option<Tls>> {
        let file = |name| (self.way == Way::Tls).then(|| self.directory.join(name));
        let files = TlsArgs {
            tls_cert: file("node.pem"),
            tls_key: file("node.key"),
            tls_ca: file("ca.pem"),
        };
        Ok(files.load()?)
    }
}

/// Two processes with real pools, connected; the payload lies in the sender's.
pub struct Ours {
    payload: Payload,
    receiver: End,
    sender: End,
    requests: u64,
    _certificates: Certificates,
}

impl Ours {
    /// Starts both ends from `program`, and pushes once: every byte is compared where it then lies.
    pub fn start(program: &Path, payload: Payload, way: Way) -> anyhow::Result<Self> {
        let certificates = Certificates::sign();
        let setup = Setup {
            payload,
            way,
            directory: certificates.path(""),
        };
        let (receiver, ()) = End::start(program, &Role::Receive(setup.clone()))?;
        let (sender, ()) = End::start(program, &Role::Push(setup))?;
        let mut ours = Self {
            payload,
            receiver,
            sender,
            requests: 0,
            _certificates: certificates,
        };
        ours.push(true)?;
        Ok(ours)
    }

    /// Pushes the payload: from when all of it is computed to the verdict on the last prompt.
    pub fn run(&mut self) -> anyhow::Result<Run> {
        self.push(false)
    }

    fn push(&mut self, check: bool) -> anyhow::Result<Run> {
        let first = self.requests;
        self.requests += self.payload.prompts as u64;
        let tickets: Vec<Vec<u8>> = self.receiver.ask(&receiving::Asked::Reserve { first })?;
        let before: f64 = self.receiver.ask(&receiving::Asked::Cpu)?;
        let pushed: pushing::Pushed = self.sender.ask(&pushing::Asked { first, tickets })?;
        let after: f64 = self.receiver.ask(&receiving::Asked::Cpu)?;
        let () = self.receiver.ask(&receiving::Asked::Finish { check })?;
        Ok(Run {
            bytes: self.payload.bytes() as f64,
            seconds: pushed.seconds,
            cpu_s: Some(after - before + pushed.cpu_s),
        })
    }
}
