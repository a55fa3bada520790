//! Both ends of the product's handoff.

use std::path::Path;

use super::{Role, end::End, payload::Payload, pushing, receiving, runs::Run};

/// How the KV travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Way {
    /// gRPC, in the clear.
    Grpc,
}

/// Two processes with real pools, connected; the payload lies in the sender's.
pub struct Ours {
    payload: Payload,
    receiver: End,
    sender: End,
    requests: u64,
}

impl Ours {
    /// Starts both ends from `program`, and pushes once: every byte is compared where it then lies.
    pub fn start(program: &Path, payload: Payload, way: Way) -> anyhow::Result<Self> {
        let (receiver, ()) = End::start(program, &Role::Receive(payload))?;
        let (sender, ()) = End::start(program, &Role::Push(payload, way))?;
        let mut ours = Self {
            payload,
            receiver,
            sender,
            requests: 0,
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
