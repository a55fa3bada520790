//! A decode node's end: pool, receiver and service, without an engine.

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use baton_engine::cpu::CpuKvMemory;
use baton_kv::{Attempt, BlockId, BlockName, Epoch, HandoffId, KvMemory, NodeId, Pool, RequestId, Time};
use baton_node::{grpc::secure, tls::Clients};
use baton_transfer::{
    Capability, Receiver, ReceiverAction, ReceiverConfig, Reserve,
    grpc::{Fences, HandoffService, ReceiverPort, configure_server},
    limits,
    shm::{Directory, Mappings},
};
use prost::Message;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::Server;

use super::{
    end,
    ours::Setup,
    payload::{IDENTITY, Payload, VOCABULARY},
};

/// Parent of every prompt's first block.
pub(super) const ROOT: BlockName = BlockName([3; 32]);
/// Reservations are made before the first push starts.
const LEASE_MS: u64 = 60_000;

/// Questions.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) enum Asked {
    /// One reservation a prompt, of requests `first..`: their tickets.
    Reserve { first: u64 },
    /// CPU seconds so far.
    Cpu,
    /// Compares every byte, if asked to, and ends the sequences.
    Finish { check: bool },
}

/// Answers.
#[derive(serde::Serialize)]
#[serde(untagged)]
enum Answer {
    Tickets(Vec<Vec<u8>>),
    Cpu(f64),
    Done(()),
}

struct State {
    receiver: Receiver,
    pool: Pool,
    verified: Vec<(HandoffId, Vec<BlockId>)>,
}

struct Port {
    state: Mutex<State>,
    memory: Arc<dyn KvMemory>,
    fences: Fences,
    started: Instant,
}

impl ReceiverPort for Port {
    fn memory(&self) -> &Arc<dyn KvMemory> {
        &self.memory
    }

    fn locked<R>(&self, step: impl FnOnce(&mut Receiver, &mut Pool, Time, &mut Vec<ReceiverAction>) -> R) -> R {
        let mut state = self.state.lock().expect("nobody panics under it");
        let State {
            receiver,
            pool,
            verified,
        } = &mut *state;
        let mut actions = Vec::new();
        let now = Time(self.started.elapsed().as_micros() as u64);
        let result = step(receiver, pool, now, &mut actions);
        for action in actions {
            match action {
                ReceiverAction::Fence { stream, reject } => self.fences.fence(stream, reject),
                ReceiverAction::Verified { handoff, table, .. } => {
                    receiver.decoding(handoff);
                    verified.push((handoff, table));
                }
                _ => {}
            }
        }
        result
    }
}

/// A pool of twice the payload, of which every second block is held by somebody else: no two blocks that are granted are neighbours.
fn fragmented(payload: &Payload) -> anyhow::Result<Pool> {
    let mut pool = Pool::new(2 * payload.all_blocks(), payload.layout().block_tokens);
    let (granted, _): (Vec<BlockId>, Vec<BlockId>) = pool
        .allocate(2 * payload.all_blocks())?
        .into_iter()
        .partition(|block| block.0 % 2 == 0);
    pool.release(&granted);
    Ok(pool)
}

pub(super) fn play(setup: Setup) -> anyhow::Result<()> {
    let payload = setup.payload;
    let runtime = end::runtime()?;
    let layout = payload.layout();
    let pool = fragmented(&payload)?;
    let memory = Arc::new(CpuKvMemory::new(layout, 2 * payload.all_blocks(), false)?);
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let config = ReceiverConfig {
        node: NodeId("decode-0".to_owned()),
        address: listener.local_addr()?.to_string(),
        epoch: Epoch(1),
        identity: IDENTITY,
        layout,
        vocabulary: VOCABULARY,
        protocol_max: baton_proto::PROTOCOL_MAX,
        lease_ms: LEASE_MS,
        drain_ms: limits::DRAIN_MS,
        max_handoffs: limits::MAX_HANDOFFS,
    };
    let fences = Fences::default();
    let port = Arc::new(Port {
        state: Mutex::new(State {
            receiver: Receiver::new(config),
            pool,
            verified: Vec::new(),
        }),
        memory,
        fences: fences.clone(),
        started: Instant::now(),
    });
    let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let directory = Directory::open(Some(&setup.directory))?;
    let mappings = Mappings::new(directory, tasks.clone(), shutdown.clone());
    let service = HandoffService::new(port.clone(), fences, tasks, shutdown).with_mappings(mappings);
    let server = secure(
        configure_server(Server::builder()),
        setup.tls()?.as_ref(),
        Clients::MustShow,
    )?
    .add_service(service.into_server())
    .serve_with_incoming(TcpListenerStream::new(listener));
    let serving = std::thread::spawn(move || runtime.block_on(server));
    end::serve((), |asked| {
        anyhow::ensure!(!serving.is_finished(), "the server has ended");
        Ok(match asked {
            Asked::Cpu => Answer::Cpu(end::cpu_s()),
            Asked::Reserve { first } => Answer::Tickets(
                (first..first + payload.prompts as u64)
                    .map(|request| port.reserve(&payload, request))
                    .collect::<anyhow::Result<_>>()?,
            ),
            Asked::Finish { check } => Answer::Done(port.finish(&payload, check)?),
        })
    })
}

impl Port {
    fn reserve(&self, payload: &Payload, request: u64) -> anyhow::Result<Vec<u8>> {
        let reserve = |now: Time| Reserve {
            request: RequestId(u128::from(request)),
            attempt: Attempt(1),
            identity: IDENTITY,
            root: ROOT,
            prompt: payload.prompt(request),
            deadline: now.after_ms(LEASE_MS),
            capability: Capability::new([7; 32]),
        };
        let ticket = self.locked(|receiver, pool, now, actions| receiver.reserve(reserve(now), now, pool, actions))?;
        anyhow::ensure!(
            ticket.slots.len() == payload.blocks,
            "some of the prompt is held already"
        );
        Ok(ticket.to_proto().encode_to_vec())
    }

    fn finish(&self, payload: &Payload, check: bool) -> anyhow::Result<()> {
        let verified = std::mem::take(&mut self.state.lock().expect("nobody panics under it").verified);
        anyhow::ensure!(verified.len() == payload.prompts, "{} prompts came", verified.len());
        if check {
            // Verified in the order in which they were pushed.
            let table: Vec<BlockId> = verified.iter().flat_map(|(_, table)| table.clone()).collect();
            payload.check(&*self.memory, &table)?;
        }
        self.locked(|receiver, pool, _, actions| {
            for (handoff, table) in &verified {
                pool.release(table);
                receiver.released(*handoff, actions);
            }
            pool.check()
        })
        .map_err(|wrong| anyhow::anyhow!("the pool's table is wrong: {wrong}"))
    }
}
