mod ends;

use baton_kv::{Attempt, BlockId, Checksum, Epoch, Generation, HandoffId, KvIdentity, RequestId, TokenId, name_blocks};
use baton_proto::PROTOCOL_MAX;

use super::*;
use crate::{
    Capability, FirstToken, ManifestEntry,
    testing::{DEADLINE, DRAIN_MS, EPOCH, IDENTITY, LAYOUT, LEASE_MS, ROOT, VOCABULARY, config, first_token, reserve},
};

const STREAM: StreamId = StreamId(1);
/// Two full blocks and a tail of one token.
const PROMPT: [TokenId; 9] = [1, 2, 3, 4, 5, 6, 7, 8, 9];

/// A receiver with its pool; bytes are left out: a sum is right when it equals the slot's index.
struct Node {
    receiver: Receiver,
    pool: Pool,
    actions: Vec<ReceiverAction>,
    now: Time,
}

impl Node {
    fn new() -> Self {
        Self {
            receiver: Receiver::new(config()),
            pool: Pool::new(6, LAYOUT.block_tokens),
            actions: vec![],
            now: Time(0),
        }
    }

    fn reserve(&mut self, request: u128, attempt: u32) -> Result<Ticket, ReserveError> {
        self.receiver.reserve(
            reserve(request, attempt, &PROMPT),
            self.now,
            &mut self.pool,
            &mut self.actions,
        )
    }

    /// Reserved and opened.
    fn filling() -> (Self, Ticket) {
        let mut node = Self::new();
        let ticket = node.reserve(1, 1).unwrap();
        assert_eq!(node.receiver.opened(STREAM, &claims(&ticket), node.now), Ok(LEASE_MS));
        (node, ticket)
    }

    fn begin_frame(&mut self, frame: &PiecesHeader) -> Result<Option<WritePermit>, Reject> {
        self.receiver.begin_write(STREAM, frame, self.now)
    }

    fn begin(&mut self, run: &RunHeader) -> Result<Option<WritePermit>, Reject> {
        self.begin_frame(&frame(std::slice::from_ref(run)))
    }

    /// As if these were the bytes' sums.
    fn land_as(&mut self, permit: WritePermit, sums: &[u64]) -> Option<Result<Verdict, Reject>> {
        let sums: Vec<Checksum> = sums.iter().map(|sum| Checksum(*sum)).collect();
        self.receiver
            .landed(permit, Some(&sums), self.now, &mut self.pool, &mut self.actions)
    }

    fn land(&mut self, permit: WritePermit) -> Option<Result<Verdict, Reject>> {
        let sums: Vec<u64> = permit.writes().iter().map(|write| write.slot as u64).collect();
        self.land_as(permit, &sums)
    }

    fn send_as(&mut self, run: &RunHeader, sum: u64) -> Option<Result<Verdict, Reject>> {
        let permit = self.begin(run).unwrap().unwrap();
        self.land_as(permit, &[sum])
    }

    fn send(&mut self, run: &RunHeader) -> Option<Result<Verdict, Reject>> {
        self.send_as(run, run.slot as u64)
    }

    fn send_all(&mut self, ticket: &Ticket) {
        for slot in 0..ticket.slots.len() {
            assert_eq!(self.send(&run(ticket, slot)), None);
        }
    }

    fn finish(&mut self, claims: &FinalClaims) -> Result<Option<Verdict>, Reject> {
        self.receiver
            .finished(STREAM, claims, self.now, &mut self.pool, &mut self.actions)
    }

    fn abort(&mut self, ticket: &Ticket) {
        self.receiver.abort(
            ticket.handoff,
            AbortReason::Cancelled,
            self.now,
            &mut self.pool,
            &mut self.actions,
        );
    }

    fn close(&mut self) {
        self.receiver
            .stream_closed(STREAM, None, self.now, &mut self.pool, &mut self.actions);
    }

    fn tick(&mut self, now: Time) {
        self.now = now;
        self.receiver.tick(now, &mut self.pool, &mut self.actions);
    }

    fn reasons(&self) -> Vec<AbortReason> {
        let reason = |action: &ReceiverAction| match action {
            ReceiverAction::Aborted { reason, .. } => Some(*reason),
            _ => None,
        };
        self.actions.iter().filter_map(reason).collect()
    }

    fn assert_idle(&self) {
        let counts = self.pool.counts();
        assert_eq!(
            (self.receiver.handoffs(), counts.free + counts.cached),
            (0, counts.total)
        );
        assert_eq!(self.receiver.next_deadline(), None);
        self.pool.check().unwrap();
    }
}

fn claims(ticket: &Ticket) -> Claims {
    Claims {
        protocol: PROTOCOL_MAX,
        sender_epoch: Epoch(5),
        sender_node: baton_kv::NodeId("prefill-0".into()),
        request: ticket.request,
        attempt: ticket.attempt,
        epoch: EPOCH,
        handoff: ticket.handoff,
        capability: ticket.capability.clone(),
        identity: IDENTITY,
        layout: LAYOUT,
        transport: Transport::Grpc,
    }
}

/// All layers of one slot.
fn run(ticket: &Ticket, slot: usize) -> RunHeader {
    RunHeader {
        slot,
        generation: ticket.slots[slot].generation,
        layers: 0..LAYOUT.layers,
        valid_tokens: ticket.valid_tokens(slot, PROMPT.len()),
        source_block: BlockId(0),
    }
}

/// A frame of these runs.
fn frame(runs: &[RunHeader]) -> PiecesHeader {
    let bytes = |run: &RunHeader| run.layers.len() * LAYOUT.valid_bytes(run.valid_tokens.min(4)) / LAYOUT.layers;
    PiecesHeader {
        protocol: PROTOCOL_MAX,
        runs: runs.to_vec(),
        bytes: runs.iter().map(bytes).sum(),
    }
}

fn last(ticket: &Ticket) -> FinalClaims {
    let names = name_blocks(ROOT, &PROMPT, LAYOUT.block_tokens);
    let entry = |slot| ManifestEntry {
        name: names.get(ticket.held_blocks + slot).copied(),
        valid_tokens: ticket.valid_tokens(slot, PROMPT.len()),
        checksum: Checksum(slot as u64),
    };
    FinalClaims {
        manifest: (0..ticket.slots.len()).map(entry).collect(),
        first: first_token(),
    }
}

#[test]
fn a_push_becomes_a_sequence_and_its_prefix_is_found_next_time() {
    let (mut node, ticket) = Node::filling();
    assert_eq!((ticket.held_blocks, ticket.slots.len()), (0, 3));
    node.send_all(&ticket);
    assert_eq!(node.finish(&last(&ticket)), Ok(Some(Verdict::Verified)));
    let blocks: Vec<_> = ticket.slots.iter().map(|slot| slot.block).collect();
    assert_eq!(
        node.actions,
        [ReceiverAction::Verified {
            handoff: ticket.handoff,
            request: ticket.request,
            attempt: ticket.attempt,
            table: blocks.clone(),
            first: first_token(),
            kv_bytes: LAYOUT.valid_bytes(PROMPT.len()) as u64,
            kv_blocks: 3,
            final_at: node.now,
        }]
    );
    assert!(node.receiver.decoding(ticket.handoff));
    node.close();
    assert_eq!(node.receiver.state(ticket.handoff), Some(HandoffState::Decoding));

    // While it decodes, another request with the same prompt finds all blocks but the tail.
    let second = node.reserve(2, 1).unwrap();
    assert_eq!((second.held_blocks, second.slots.len()), (2, 1));
    assert_eq!(
        node.receiver.opened(StreamId(2), &claims(&second), node.now),
        Ok(LEASE_MS)
    );
    let tail = run(&second, 0);
    assert_eq!(tail.valid_tokens, 1);
    let permit = node
        .receiver
        .begin_write(StreamId(2), &frame(&[tail]), node.now)
        .unwrap()
        .unwrap();
    assert_eq!(node.land(permit), None);
    let verdict = node
        .receiver
        .finished(StreamId(2), &last(&second), node.now, &mut node.pool, &mut node.actions);
    assert_eq!(verdict, Ok(Some(Verdict::Verified)));
    let Some(ReceiverAction::Verified { table, .. }) = node.actions.last() else {
        panic!("{:?}", node.actions)
    };
    assert_eq!(*table, [blocks[0], blocks[1], second.slots[0].block]);
    let table = table.clone();

    node.pool.release(&blocks);
    node.receiver.released(ticket.handoff, &mut node.actions);
    assert!(node.receiver.decoding(second.handoff));
    node.pool.release(&table);
    node.receiver.released(second.handoff, &mut node.actions);
    node.assert_idle();
    assert_eq!(node.pool.counts().cached, 2);
}

#[test]
fn frames_may_come_in_any_order_and_more_than_once() {
    let (mut node, ticket) = Node::filling();
    let layer = LAYOUT.valid_bytes(4) / LAYOUT.layers;
    let mut claims = last(&ticket);
    claims.manifest[1].checksum = Checksum(7).then(Checksum(8), layer).then(Checksum(9), layer);
    assert_eq!(node.finish(&claims), Ok(None));
    assert_eq!(node.finish(&claims), Ok(None));
    assert_eq!(node.send(&run(&ticket, 2)), None);
    // In flight, then landed: the copy of it is dropped both times.
    let first = node.begin(&run(&ticket, 0)).unwrap().unwrap();
    assert_eq!(node.begin(&run(&ticket, 0)), Ok(None));
    assert_eq!(node.land(first), None);
    assert_eq!(node.begin(&run(&ticket, 0)), Ok(None));
    // Runs of layers.
    let layers = |layers| RunHeader {
        layers,
        ..run(&ticket, 1)
    };
    assert_eq!(node.send_as(&layers(2..3), 9), None);
    assert_eq!(node.begin(&layers(0..3)), Err(Reject::Malformed));
    assert_eq!(node.begin(&layers(1..3)), Err(Reject::Malformed));
    assert_eq!(node.send_as(&layers(0..1), 7), None);
    assert_eq!(node.send_as(&layers(1..2), 8), Some(Ok(Verdict::Verified)));
    assert_eq!(node.begin(&layers(0..1)), Err(Reject::UnknownHandoff));
}

#[test]
fn a_frame_brings_several_runs_and_what_is_here_is_left_out() {
    let (mut node, ticket) = Node::filling();
    assert_eq!(node.send(&run(&ticket, 1)), None);
    let all = [run(&ticket, 0), run(&ticket, 1), run(&ticket, 2), run(&ticket, 0)];
    let permit = node.begin_frame(&frame(&all)).unwrap().unwrap();
    let block = LAYOUT.block_bytes();
    let writes = permit.writes().iter().map(|write| (write.block(), write.bytes()));
    let (first, tail) = (0..block, 2 * block..2 * block + LAYOUT.valid_bytes(1));
    assert_eq!(
        writes.collect::<Vec<_>>(),
        [(ticket.slots[0].block, first), (ticket.slots[2].block, tail)]
    );
    assert_eq!(node.finish(&last(&ticket)), Ok(None));
    assert_eq!(node.land(permit), Some(Ok(Verdict::Verified)));
}

#[test]
fn a_frame_is_taken_whole_or_not_at_all() {
    fn check(change: impl FnOnce(&mut PiecesHeader), expected: Reject) {
        let (mut node, ticket) = Node::filling();
        let right = frame(&[run(&ticket, 0), run(&ticket, 1), run(&ticket, 2)]);
        let mut wrong = right.clone();
        change(&mut wrong);
        assert_eq!(node.begin_frame(&wrong), Err(expected), "{wrong:?}");
        let permit = node.begin_frame(&right).unwrap().unwrap();
        assert_eq!(permit.writes().len(), 3);
        assert_eq!(node.land(permit), None);
    }
    check(|frame| frame.runs[2].slot = 3, Reject::Malformed);
    check(|frame| frame.runs[2].generation.0 += 1, Reject::StaleGeneration);
    check(|frame| frame.runs[2].valid_tokens = 2, Reject::Malformed);
    check(
        |frame| {
            frame.runs.push(RunHeader {
                layers: 0..2,
                ..frame.runs[0].clone()
            })
        },
        Reject::Malformed,
    );
    check(|frame| frame.bytes -= 1, Reject::Malformed);
    check(|frame| frame.bytes = 0, Reject::Malformed);
    check(|frame| frame.runs.clear(), Reject::Malformed);
    check(
        |frame| frame.runs = vec![frame.runs[0].clone(); crate::limits::FRAME_RUNS + 1],
        Reject::Malformed,
    );
    // A frame of another version than the stream's.
    check(|frame| frame.protocol = 1, Reject::Malformed);
    check(|frame| frame.protocol = 3, Reject::Malformed);
}

#[test]
fn over_shared_memory_frames_name_blocks_and_carry_no_bytes() {
    let mut node = Node::new();
    let ticket = node.reserve(1, 1).unwrap();
    let claims = Claims {
        transport: Transport::Shm,
        ..claims(&ticket)
    };
    assert_eq!(node.receiver.opened(STREAM, &claims, node.now), Ok(LEASE_MS));
    let run = RunHeader {
        source_block: BlockId(77),
        ..run(&ticket, 2)
    };
    assert_eq!(node.begin(&run), Err(Reject::Malformed));
    let mut frame = frame(&[run]);
    frame.bytes = 0;
    let permit = node.begin_frame(&frame).unwrap().unwrap();
    assert_eq!(permit.writes()[0].source_block(), BlockId(77));
    assert_eq!(node.land(permit), None);
}

#[test]
fn a_corrupt_block_is_asked_for_once() {
    fn check(second: u64, expected: Result<Verdict, Reject>) {
        let (mut node, ticket) = Node::filling();
        assert_eq!(node.send(&run(&ticket, 0)), None);
        assert_eq!(node.send_as(&run(&ticket, 1), 9), None);
        assert_eq!(node.send(&run(&ticket, 2)), None);
        let resend = Verdict::Resend { slots: vec![1] };
        assert_eq!(node.finish(&last(&ticket)), Ok(Some(resend)));
        assert_eq!(node.begin(&run(&ticket, 0)), Ok(None));
        assert_eq!(node.finish(&last(&ticket)), Ok(None));
        assert_eq!(node.send_as(&run(&ticket, 1), second), Some(expected.clone()));
        if expected.is_err() {
            assert_eq!(node.reasons(), [AbortReason::Rejected(Reject::ChecksumMismatch)]);
            // Whatever comes behind it is refused for the same reason.
            assert_eq!(node.begin(&run(&ticket, 1)), Err(Reject::ChecksumMismatch));
            assert_eq!(node.receiver.heartbeat(STREAM, node.now), Err(Reject::ChecksumMismatch));
            assert_eq!(node.finish(&last(&ticket)), Err(Reject::ChecksumMismatch));
            node.close();
            node.assert_idle();
        }
    }
    check(1, Ok(Verdict::Verified));
    check(8, Err(Reject::ChecksumMismatch));
}

#[test]
fn each_wrong_open_is_refused_with_its_code_and_changes_nothing() {
    fn check(change: impl FnOnce(&mut Claims), expected: Reject) {
        let mut node = Node::new();
        let ticket = node.reserve(1, 1).unwrap();
        let mut wrong = claims(&ticket);
        change(&mut wrong);
        assert_eq!(
            node.receiver.opened(STREAM, &wrong, node.now),
            Err(expected),
            "{wrong:?}"
        );
        node.close();
        assert_eq!(node.receiver.state(ticket.handoff), Some(HandoffState::Reserved));
        assert_eq!(node.receiver.opened(STREAM, &claims(&ticket), node.now), Ok(LEASE_MS));
    }
    check(|claims| claims.protocol += 1, Reject::ProtocolMismatch);
    check(|claims| claims.protocol = 0, Reject::ProtocolMismatch);
    check(
        |claims| (claims.protocol, claims.transport) = (1, Transport::Shm),
        Reject::ProtocolMismatch,
    );
    check(|claims| claims.epoch = Epoch(12), Reject::StaleEpoch);
    check(|claims| claims.handoff = HandoffId(9), Reject::UnknownHandoff);
    check(|claims| claims.request = RequestId(9), Reject::UnknownHandoff);
    check(|claims| claims.attempt = Attempt(9), Reject::UnknownHandoff);
    check(
        |claims| claims.capability = Capability::new([9; 32]),
        Reject::BadCapability,
    );
    check(|claims| claims.identity = KvIdentity([9; 32]), Reject::IdentityMismatch);
    check(|claims| claims.layout.layers += 1, Reject::LayoutMismatch);
}

#[test]
fn only_one_stream_fills_a_handoff() {
    let (mut node, ticket) = Node::filling();
    let other = StreamId(2);
    assert_eq!(
        node.receiver.opened(other, &claims(&ticket), node.now),
        Err(Reject::StreamActive)
    );
    assert_eq!(
        node.receiver.begin_write(other, &frame(&[run(&ticket, 0)]), node.now),
        Err(Reject::UnknownHandoff)
    );
    assert_eq!(node.receiver.heartbeat(other, node.now), Err(Reject::UnknownHandoff));
    let finished = node
        .receiver
        .finished(other, &last(&ticket), node.now, &mut node.pool, &mut node.actions);
    assert_eq!(finished, Err(Reject::UnknownHandoff));
    node.receiver
        .stream_closed(other, None, node.now, &mut node.pool, &mut node.actions);
    assert_eq!(node.receiver.state(ticket.handoff), Some(HandoffState::Filling));

    let second = node.reserve(2, 1).unwrap();
    assert_eq!(
        node.receiver.opened(STREAM, &claims(&second), node.now),
        Err(Reject::Malformed)
    );
}

#[test]
fn each_wrong_run_is_refused_with_its_code_and_changes_nothing() {
    fn check(change: impl FnOnce(&mut RunHeader), expected: Reject) {
        let (mut node, ticket) = Node::filling();
        let mut wrong = run(&ticket, 2);
        change(&mut wrong);
        assert_eq!(node.begin(&wrong), Err(expected), "{wrong:?}");
        assert_eq!(node.send(&run(&ticket, 2)), None);
    }
    check(
        |run| run.generation = Generation(run.generation.0 + 1),
        Reject::StaleGeneration,
    );
    check(
        |run| run.generation = Generation(run.generation.0 - 1),
        Reject::StaleGeneration,
    );
    check(|run| run.slot = 3, Reject::Malformed);
    check(|run| run.layers = 0..0, Reject::Malformed);
    check(|run| run.layers = 0..4, Reject::Malformed);
    check(|run| run.valid_tokens = 4, Reject::Malformed);
    check(|run| run.valid_tokens = 0, Reject::Malformed);
}

#[test]
fn each_wrong_manifest_is_refused_and_changes_nothing() {
    fn check(change: impl FnOnce(&mut Vec<ManifestEntry>)) {
        let (mut node, ticket) = Node::filling();
        node.send_all(&ticket);
        let mut wrong = last(&ticket);
        change(&mut wrong.manifest);
        assert_eq!(node.finish(&wrong), Err(Reject::ManifestMismatch));
        assert_eq!(node.finish(&last(&ticket)), Ok(Some(Verdict::Verified)));
    }
    check(|manifest| manifest.truncate(2));
    check(|manifest| manifest.push(manifest[2]));
    check(|manifest| manifest[0].name = None);
    check(|manifest| manifest[0].name = manifest[1].name);
    check(|manifest| manifest[2].name = manifest[1].name);
    check(|manifest| manifest[2].valid_tokens = 2);
}

#[test]
fn a_first_token_or_an_alternative_beyond_the_vocabulary_is_refused() {
    let (mut node, ticket) = Node::filling();
    node.send_all(&ticket);
    let with = |token, alternative| FinalClaims {
        first: FirstToken {
            token,
            alternatives: vec![(0, -0.25), (alternative, -2.0)],
            ..first_token()
        },
        ..last(&ticket)
    };
    let (highest, beyond) = (VOCABULARY as TokenId - 1, VOCABULARY as TokenId);
    for (token, alternative) in [(beyond, highest), (highest, beyond)] {
        let finished = node.finish(&with(token, alternative));
        assert_eq!(finished, Err(Reject::Malformed));
    }
    let highest = with(highest, highest);
    assert_eq!(node.finish(&highest), Ok(Some(Verdict::Verified)));
}

#[test]
fn a_newer_attempt_ends_the_older() {
    let (mut node, ticket) = Node::filling();
    assert_eq!(
        node.reserve(1, 1),
        Err(ReserveError::StaleAttempt { current: Attempt(1) })
    );
    node.close();
    node.actions.clear();
    let older = node.reserve(1, 2).unwrap();
    let newer = node.reserve(1, 3).unwrap();
    assert_ne!(older.handoff, ticket.handoff);
    assert_eq!(node.reasons(), [AbortReason::Superseded]);
    assert_eq!(node.receiver.state(older.handoff), None);
    assert_eq!(
        node.receiver.opened(STREAM, &claims(&older), node.now),
        Err(Reject::UnknownHandoff)
    );
    assert_eq!(node.receiver.opened(STREAM, &claims(&newer), node.now), Ok(LEASE_MS));
}

#[test]
fn nothing_is_reserved_that_does_not_fit() {
    fn check(change: impl FnOnce(&mut Node, &mut Reserve), expected: ReserveError) {
        let mut node = Node::new();
        let mut wanted = reserve(99, 1, &PROMPT);
        change(&mut node, &mut wanted);
        let before = node.pool.counts();
        let answer = node
            .receiver
            .reserve(wanted, node.now, &mut node.pool, &mut node.actions);
        assert_eq!((answer, node.pool.counts()), (Err(expected), before));
    }
    check(|_, wanted| wanted.prompt.clear(), ReserveError::EmptyPrompt);
    check(
        |_, wanted| wanted.identity = KvIdentity([9; 32]),
        ReserveError::IdentityMismatch,
    );
    check(|node, _| node.now = DEADLINE, ReserveError::DeadlinePassed);
    check(
        |_, wanted| wanted.prompt = vec![1; 29],
        ReserveError::OutOfBlocks(baton_kv::OutOfBlocks {
            needed: 8,
            available: 6,
        }),
    );
    check(
        |node, wanted| {
            for request in 1..=4 {
                let small = reserve(request, 1, &[1]);
                node.receiver
                    .reserve(small, node.now, &mut node.pool, &mut node.actions)
                    .unwrap();
            }
            wanted.prompt.truncate(1);
        },
        ReserveError::TooManyHandoffs { limit: 4 },
    );
}
