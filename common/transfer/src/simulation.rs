//! Sender and receiver over a network that drops, duplicates, reorders, delays, corrupts and cuts, with a real pool and real bytes.

mod tests;

use std::{collections::BTreeMap, sync::Arc};

use baton_kv::{BlockId, Checksum, ChecksumState, Generation, HandoffId, NodeId, Owner, Pool, Time, TokenId};

use bytes::Bytes;

use crate::{
    AbortReason, Capability, Chain, Claims, FinalClaims, FrameBytes, HandoffState, PieceSource, PiecesHeader, Receiver,
    ReceiverAction, Reject, RunHeader, RunToSend, Sender, SenderAction, SenderConfig, SenderState, StreamId, Transport,
    Verdict, WritePermit,
    testing::{EPOCH, IDENTITY, LAYOUT, ROOT, TestMemory, config, first_token, kv_of, reserve},
};

const POOL_BLOCKS: usize = 9;
const SOURCE_BLOCKS: usize = 4;
/// Some share a prefix.
const PROMPTS: [&[TokenId]; 4] = [
    &[1, 2, 3, 4, 5, 6, 7, 8, 9],
    &[1, 2, 3, 4, 5, 6, 7, 8],
    &[1, 2, 3, 4, 9, 9],
    &[5],
];

#[derive(Clone)]
enum Frame {
    Open(Claims),
    Pieces(PiecesHeader, Vec<u8>),
    /// Its number in the stream.
    Heartbeat(u64),
    Final(FinalClaims),
}

#[derive(Clone)]
enum Reply {
    Accepted(u64),
    /// And the number of the frame that it answers.
    Renewed(u64, u64),
    Resend(Vec<usize>),
    Verified,
    Rejected(Reject),
}

struct Push {
    handoff: HandoffId,
    prompt: &'static [TokenId],
    source: Arc<TestMemory>,
    sender: Sender,
    /// Frames so far.
    sent: u64,
}

impl Push {
    /// One more frame goes into the network; its number.
    fn hand_over(&mut self, now: Time) -> u64 {
        self.sender.handed_over(now);
        self.sent += 1;
        self.sent
    }
}

/// How often each happened to a handoff.
#[derive(Default, Debug)]
struct Ends {
    verified: usize,
    aborted: usize,
    finished: usize,
    released: usize,
}

struct World {
    now: Time,
    receiver: Receiver,
    pool: Pool,
    memory: Arc<TestMemory>,
    actions: Vec<ReceiverAction>,
    /// The index of a push is its stream's id.
    pushes: Vec<Push>,
    /// Every third handoff cannot be decoded (the node's queue is full), where set.
    queue_full: bool,
    frames: Vec<(usize, Frame)>,
    replies: Vec<(usize, Reply)>,
    permits: Vec<(usize, WritePermit, Vec<u8>)>,
    sequences: Vec<(HandoffId, Vec<BlockId>)>,
    ends: BTreeMap<HandoffId, Ends>,
}

/// Another choice at each step.
fn mix(choice: u16, step: usize) -> u16 {
    ((u64::from(choice) + 1)
        .wrapping_mul(step as u64 + 1)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        >> 40) as u16
}

/// One of `items`, whatever `at` is.
fn pick<T>(items: &[T], at: u16) -> Option<usize> {
    (!items.is_empty()).then(|| usize::from(at) % items.len())
}

impl World {
    fn new(queue_full: bool) -> Self {
        Self {
            now: Time(0),
            receiver: Receiver::new(config()),
            pool: Pool::new(POOL_BLOCKS, LAYOUT.block_tokens),
            memory: TestMemory::new(LAYOUT, POOL_BLOCKS),
            actions: Vec::new(),
            pushes: Vec::new(),
            queue_full,
            frames: Vec::new(),
            replies: Vec::new(),
            permits: Vec::new(),
            sequences: Vec::new(),
            ends: BTreeMap::new(),
        }
    }

    /// Reserves, and starts a push of it from a node that speaks `protocol`.
    fn reserve(&mut self, request: u128, attempt: u32, prompt: &'static [TokenId], protocol: u32) {
        let wanted = reserve(request, attempt, prompt);
        let deadline = wanted.deadline;
        let Ok(ticket) = self
            .receiver
            .reserve(wanted, self.now, &mut self.pool, &mut self.actions)
        else {
            return;
        };
        let config = SenderConfig {
            node: NodeId("prefill-0".into()),
            epoch: EPOCH,
            identity: IDENTITY,
            layout: LAYOUT,
            protocol_max: protocol,
            transport: Transport::Grpc,
            root: ROOT,
            prompt,
            deadline,
        };
        let source = TestMemory::new(LAYOUT, SOURCE_BLOCKS);
        let table: Vec<BlockId> = (0..LAYOUT.blocks_for(prompt.len()) as u32).map(BlockId).collect();
        source.compute(prompt, &table);
        let handoff = ticket.handoff;
        assert!(
            self.ends.insert(handoff, Ends::default()).is_none(),
            "ids are not reused"
        );
        self.pushes.push(Push {
            handoff,
            prompt,
            source,
            sender: Sender::new(ticket, config, self.now).unwrap(),
            sent: 0,
        });
    }

    fn compute(&mut self, push: usize, tokens: usize) {
        let push = &mut self.pushes[push];
        let tokens = tokens.min(push.prompt.len());
        let table: Vec<BlockId> = (0..LAYOUT.blocks_for(tokens) as u32).map(BlockId).collect();
        push.sender.computed(tokens, &table);
        if tokens == push.prompt.len() {
            push.sender.first_token(first_token());
        }
    }

    /// The first layers of some tokens.
    fn compute_layers(&mut self, push: usize, tokens: usize, layers: usize) {
        let push = &mut self.pushes[push];
        let tokens = tokens.min(push.prompt.len());
        let table: Vec<BlockId> = (0..LAYOUT.blocks_for(tokens) as u32).map(BlockId).collect();
        push.sender.computed_layers(tokens, layers, &table);
    }

    /// What one sender wants to send goes into the network.
    fn pump(&mut self, at: usize) {
        let push = &mut self.pushes[at];
        match push.sender.next(self.now, true) {
            None => {}
            Some(SenderAction::Open(claims)) => {
                push.hand_over(self.now);
                self.frames.push((at, Frame::Open(claims)));
            }
            Some(SenderAction::Heartbeat) => {
                let frame = Frame::Heartbeat(push.hand_over(self.now));
                self.frames.push((at, frame));
            }
            Some(SenderAction::Final(claims)) => {
                push.hand_over(self.now);
                self.frames.push((at, Frame::Final(claims)));
            }
            Some(SenderAction::Pieces(runs)) => {
                let mut data = Vec::new();
                for run in &runs {
                    let bytes = push.source.layers(run.block, run.layers.clone(), run.valid_tokens);
                    let mut sum = ChecksumState::default();
                    sum.update(&bytes);
                    push.sender.sent(run, sum.finish());
                    data.extend(bytes);
                }
                let header = |run: RunToSend| RunHeader {
                    slot: run.slot,
                    generation: run.generation,
                    layers: run.layers,
                    valid_tokens: run.valid_tokens,
                    source_block: run.block,
                };
                let header = PiecesHeader {
                    protocol: push.sender.protocol(),
                    runs: runs.into_iter().map(header).collect(),
                    bytes: data.len(),
                };
                push.hand_over(self.now);
                self.frames.push((at, Frame::Pieces(header, data)));
            }
        }
    }

    /// A frame arrives. What is refused changes nothing, and here the stream goes on.
    fn deliver(&mut self, (at, frame): (usize, Frame)) {
        let stream = StreamId(at as u64);
        match frame {
            Frame::Open(claims) => {
                if let Ok(lease_ms) = self.receiver.opened(stream, &claims, self.now) {
                    self.replies.push((at, Reply::Accepted(lease_ms)));
                }
            }
            Frame::Heartbeat(frame) => {
                if let Ok(lease_ms) = self.receiver.heartbeat(stream, self.now) {
                    self.replies.push((at, Reply::Renewed(lease_ms, frame)));
                }
            }
            Frame::Pieces(header, data) => {
                if let Ok(Some(permit)) = self.receiver.begin_write(stream, &header, self.now) {
                    self.permits.push((at, permit, data));
                }
            }
            Frame::Final(claims) => {
                let verdict = self
                    .receiver
                    .finished(stream, &claims, self.now, &mut self.pool, &mut self.actions);
                self.judged(at, verdict.unwrap_or(None).map(Ok));
            }
        }
    }

    fn corrupt(&mut self, at: usize, how: u16) {
        let which = usize::from(how / 16);
        match &mut self.frames[at].1 {
            Frame::Pieces(header, data) => {
                let runs = header.runs.len();
                // Truncated so often that no run is left: it stays so.
                if runs == 0 {
                    return;
                }
                let run = &mut header.runs[which % runs];
                match how % 16 {
                    0 => run.slot ^= 1,
                    1 => run.generation = Generation(run.generation.0 ^ 1),
                    2 => run.valid_tokens ^= 1,
                    3 => run.layers.end += 1,
                    4 => run.layers.start += 1,
                    5 => header.protocol ^= 3,
                    // Truncated, the header's count included or not.
                    6 => header.bytes = 0,
                    7 => header.bytes = data.len() - 1,
                    8 => {
                        header.runs.pop();
                    }
                    9 => header.runs.push(header.runs[which % runs].clone()),
                    _ => {
                        let byte = which % data.len();
                        data[byte] ^= 1 << (how % 7);
                    }
                }
            }
            // Forged.
            Frame::Open(claims) => match how % 6 {
                0 => claims.capability = Capability::new([0xFF; 32]),
                1 => claims.handoff.0 ^= 1,
                2 => claims.attempt.0 ^= 1,
                3 => claims.epoch.0 ^= 1,
                4 => claims.protocol ^= 3,
                _ => claims.request.0 ^= 1,
            },
            Frame::Final(claims) => {
                // Forged so often that nothing is left of it: it stays so.
                let slots = claims.manifest.len().max(1);
                if let Some(entry) = claims.manifest.get_mut(which % slots) {
                    match how % 4 {
                        0 => entry.checksum.0 ^= 1,
                        1 => entry.valid_tokens ^= 1,
                        2 => entry.name = None,
                        _ => {
                            claims.manifest.pop();
                        }
                    }
                }
            }
            Frame::Heartbeat(frame) => *frame += 1,
        }
    }

    /// The copies of one frame end.
    fn land(&mut self, at: usize) {
        let (push, permit, data) = self.permits.swap_remove(at);
        let mut scratch = Vec::new();
        let mut source = FrameBytes::new(Chain::from(Bytes::from(data)));
        let mut sum = |write: &crate::PieceWrite| {
            for layer in write.layers() {
                source.copy(write, layer, &*self.memory).unwrap();
            }
            Checksum::of_layers(
                &*self.memory,
                write.layers(),
                write.block(),
                write.valid_tokens(),
                &mut scratch,
            )
            .unwrap()
        };
        let sums: Vec<Checksum> = permit.writes().iter().map(&mut sum).collect();
        let verdict = self
            .receiver
            .landed(permit, Some(&sums), self.now, &mut self.pool, &mut self.actions);
        self.judged(push, verdict);
    }

    fn judged(&mut self, push: usize, verdict: Option<Result<Verdict, Reject>>) {
        let reply = verdict.map(|verdict| match verdict {
            Ok(Verdict::Verified) => Reply::Verified,
            Ok(Verdict::Resend { slots }) => Reply::Resend(slots),
            Err(reject) => Reply::Rejected(reject),
        });
        self.replies.extend(reply.map(|reply| (push, reply)));
    }

    fn answer(&mut self, (at, reply): (usize, Reply)) {
        let sender = &mut self.pushes[at].sender;
        match reply {
            Reply::Accepted(lease_ms) => sender.accepted(lease_ms),
            Reply::Renewed(lease_ms, frame) => sender.renewed(lease_ms, frame),
            Reply::Resend(slots) => sender.resend(&slots),
            Reply::Verified => sender.verified(),
            Reply::Rejected(reject) => sender.rejected(reject),
        }
    }

    fn close(&mut self, at: usize) {
        let stream = StreamId(at as u64);
        self.receiver
            .stream_closed(stream, None, self.now, &mut self.pool, &mut self.actions);
    }

    fn abort(&mut self, handoff: HandoffId, reason: AbortReason) {
        self.receiver
            .abort(handoff, reason, self.now, &mut self.pool, &mut self.actions);
    }

    fn tick(&mut self) {
        self.receiver.tick(self.now, &mut self.pool, &mut self.actions);
        assert!(
            self.receiver.next_deadline().is_none_or(|next| next > self.now),
            "a state outlived its deadline"
        );
    }

    fn finish(&mut self, at: usize) {
        let (handoff, table) = self.sequences.swap_remove(at);
        self.pool.release(&table);
        self.receiver.released(handoff, &mut self.actions);
        self.ends.get_mut(&handoff).unwrap().finished += 1;
    }

    /// Does the actions, as a node would.
    fn act(&mut self) {
        while !self.actions.is_empty() {
            for action in std::mem::take(&mut self.actions) {
                match action {
                    ReceiverAction::Verified {
                        handoff, table, first, ..
                    } => self.verified(handoff, table, first.token),
                    ReceiverAction::Aborted { handoff, .. } => {
                        self.ends.get_mut(&handoff).unwrap().aborted += 1;
                        if let Some(at) = self.sequences.iter().position(|(owner, _)| *owner == handoff) {
                            let (_, table) = self.sequences.swap_remove(at);
                            self.pool.release(&table);
                        }
                    }
                    ReceiverAction::Released { handoff } => self.ends.get_mut(&handoff).unwrap().released += 1,
                    // The edge may be slow to close a stream: here only a cut or the drain deadline does.
                    ReceiverAction::Fence { .. } | ReceiverAction::DrainOverdue { .. } => {}
                }
            }
        }
    }

    fn verified(&mut self, handoff: HandoffId, table: Vec<BlockId>, first_token: TokenId) {
        let push = self.pushes.iter().find(|push| push.handoff == handoff).unwrap();
        assert_eq!((first_token, table.len()), (42, LAYOUT.blocks_for(push.prompt.len())));
        for (index, block) in table.iter().enumerate() {
            let tokens = (push.prompt.len() - index * LAYOUT.block_tokens).min(LAYOUT.block_tokens);
            assert!(
                self.memory.block(*block, tokens) == kv_of(&LAYOUT, push.prompt, index),
                "decoded from wrong KV"
            );
        }
        self.ends.get_mut(&handoff).unwrap().verified += 1;
        if self.queue_full && handoff.0.is_multiple_of(3) {
            self.abort(handoff, AbortReason::Node);
        } else {
            assert!(self.receiver.decoding(handoff));
            self.sequences.push((handoff, table));
        }
    }

    /// After every step.
    fn check(&mut self) {
        self.act();
        self.pool.check().unwrap();
        let writes = self
            .permits
            .iter()
            .flat_map(|(_, permit, _)| permit.writes().iter().map(|write| (permit.handoff(), write.block())));
        // (Not the push's own: whoever shows a ticket may push, on any stream.)
        for (handoff, block) in writes {
            let owner = self.pool.owner(block);
            assert!(
                owner == Owner::Granted(handoff) || owner == Owner::Quarantined(handoff),
                "{block:?} is {owner:?} while a write of {handoff:?} may touch it"
            );
        }
        for ends in self.ends.values() {
            assert!(
                ends.verified <= 1 && ends.aborted <= 1 && ends.released <= 1,
                "{ends:?}"
            );
        }
    }

    /// Nobody helps any more: what is under way on the node ends, then deadlines pass. Afterwards late frames change nothing.
    fn settle(&mut self) {
        self.check();
        while !self.permits.is_empty() {
            self.land(0);
            self.check();
        }
        for _ in 0..3 * self.receiver.handoffs() {
            let Some(next) = self.receiver.next_deadline() else {
                break;
            };
            self.now = self.now.max(next);
            self.tick();
            self.check();
        }
        let counts = self.pool.counts();
        assert_eq!(
            (self.receiver.handoffs(), counts.free + counts.cached),
            (0, counts.total)
        );
        for ends in self.ends.values() {
            assert_eq!((ends.aborted + ends.finished, ends.released), (1, 1), "{ends:?}");
        }
        for frame in std::mem::take(&mut self.frames) {
            self.deliver(frame);
        }
        assert!(self.permits.is_empty() && self.actions.is_empty());
        assert_eq!(self.pool.counts(), counts);
    }

    /// A good moment for one push: all that waits is delivered, landed and answered.
    fn progress(&mut self, push: usize, order: u16) {
        self.compute(push, usize::from(order % 16));
        for _ in 0..8 {
            self.pump(push);
        }
        while let Some(at) = self.frames.iter().position(|(at, _)| *at == push) {
            let frame = self.frames.remove(at);
            self.deliver(frame);
            if let Some(at) = pick(&self.permits, order) {
                self.land(at);
            }
        }
        while let Some(at) = self.permits.iter().position(|(at, ..)| *at == push) {
            self.land(at);
            self.check();
        }
        while let Some(at) = self.replies.iter().position(|(at, _)| *at == push) {
            let reply = self.replies.remove(at);
            self.answer(reply);
        }
    }

    fn step(&mut self, op: u8, a: u16, b: u16) {
        // Mostly the latest pushes; sometimes one long gone.
        let recent = self
            .pushes
            .len()
            .saturating_sub(if b.is_multiple_of(16) { usize::MAX } else { 3 });
        let push = pick(&self.pushes[recent..], a).map(|at| recent + at);
        match op {
            0 => {
                let prompt = PROMPTS[usize::from(a) % PROMPTS.len()];
                let protocol = 1 + u32::from(b / 64 % 2);
                self.reserve(u128::from(b % 3), 1 + u32::from(b / 3 % 4), prompt, protocol);
            }
            1..4 => {
                if let Some(push) = push {
                    self.compute(push, usize::from(b % 16));
                }
            }
            4 => {
                if let Some(push) = push {
                    self.compute_layers(push, usize::from(b % 16), usize::from(b / 16 % 4));
                }
            }
            5..13 => {
                for _ in 0..=b % 4 {
                    if let Some(push) = push {
                        self.pump(push);
                    }
                }
            }
            13..21 => {
                for _ in 0..=b % 4 {
                    if let Some(at) = pick(&self.frames, a) {
                        let frame = self.frames.swap_remove(at);
                        self.deliver(frame);
                        self.check();
                    }
                }
            }
            21 => {
                if let Some(at) = pick(&self.frames, a) {
                    let copy = self.frames[at].clone();
                    self.frames.push(copy);
                }
            }
            22 => {
                if let Some(at) = pick(&self.frames, a) {
                    self.frames.swap_remove(at);
                }
            }
            23 => {
                if let Some(at) = pick(&self.frames, a) {
                    self.corrupt(at, b);
                }
            }
            24..28 => {
                if let Some(at) = pick(&self.permits, a) {
                    self.land(at);
                }
            }
            28..30 => {
                // On another stream than its own.
                if let (Some(at), Some(push)) = (pick(&self.frames, b), push) {
                    let (_, frame) = self.frames[at].clone();
                    self.deliver((push, frame));
                }
            }
            30..35 => {
                if let Some(at) = pick(&self.replies, a) {
                    let reply = self.replies.swap_remove(at);
                    match b % 8 {
                        0 => {}
                        1 => {
                            self.replies.push(reply.clone());
                            self.answer(reply);
                        }
                        _ => self.answer(reply),
                    }
                }
            }
            35 => {
                if let Some(push) = push {
                    self.close(push);
                }
            }
            36 => {
                if let Some(push) = push {
                    self.abort(self.pushes[push].handoff, AbortReason::Cancelled);
                }
            }
            37..39 => {
                self.now = self.now.after_ms(u64::from(b % 300));
                self.tick();
            }
            39 => {
                if let Some(at) = pick(&self.sequences, a) {
                    self.finish(at);
                }
            }
            40..44 => {
                if let Some(push) = push {
                    self.progress(push, b);
                }
            }
            _ => {
                if let Some(push) = push {
                    let _ = self.receiver.renew(self.pushes[push].handoff, self.now);
                }
            }
        }
    }
}
