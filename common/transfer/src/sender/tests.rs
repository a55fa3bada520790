use baton_kv::{Attempt, Generation, GrantedSlot, HandoffId, KvDtype, RequestId};
use baton_proto::PROTOCOL_MAX;

use super::*;
use crate::{
    Capability,
    testing::{EPOCH, IDENTITY, LAYOUT, ROOT, first_token},
};
use std::ops::Range;

const PROMPT: [TokenId; 9] = [1, 2, 3, 4, 5, 6, 7, 8, 9];
const TABLE: [BlockId; 3] = [BlockId(10), BlockId(11), BlockId(12)];

fn ticket(held_blocks: usize, slots: usize) -> Ticket {
    Ticket {
        request: RequestId(1),
        attempt: Attempt(1),
        decode_node: NodeId("decode-0".into()),
        address: "127.0.0.1:1".into(),
        epoch: EPOCH,
        handoff: HandoffId(1),
        held_blocks,
        slots: (0..slots as u32)
            .map(|at| GrantedSlot {
                block: BlockId(at),
                generation: Generation(4),
            })
            .collect(),
        lease_ms: 900,
        identity: IDENTITY,
        layout: LAYOUT,
        capability: Capability::new([1; 32]),
        protocol: PROTOCOL_MAX,
    }
}

fn config() -> SenderConfig<'static> {
    SenderConfig {
        node: NodeId("prefill-0".into()),
        epoch: Epoch(5),
        identity: IDENTITY,
        layout: LAYOUT,
        protocol_max: PROTOCOL_MAX,
        transport: Transport::Grpc,
        root: ROOT,
        prompt: &PROMPT,
        deadline: Time(0).after_ms(10_000),
    }
}

fn new(ticket: Ticket) -> Result<Sender, WireError> {
    Sender::new(ticket, config(), Time(0))
}

fn opened(ticket: Ticket) -> Sender {
    let mut sender = new(ticket).unwrap();
    assert!(matches!(sender.next(Time(0), true), Some(SenderAction::Open(_))));
    sender.handed_over(Time(0));
    assert_eq!(sender.next(Time(0), true), None);
    sender.accepted(900);
    sender
}

/// The slots, blocks, layers and tokens to send next, which are sent. The sum of a run is its slot's index.
fn pieces(sender: &mut Sender) -> Vec<(usize, BlockId, Range<usize>, usize)> {
    match sender.next(Time(1), true) {
        Some(SenderAction::Pieces(runs)) => {
            for run in &runs {
                sender.sent(run, Checksum(run.slot as u64));
            }
            let run = |run: RunToSend| (run.slot, run.block, run.layers, run.valid_tokens);
            runs.into_iter().map(run).collect()
        }
        None => Vec::new(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn blocks_go_as_they_are_computed_and_the_tail_at_the_end() {
    let mut sender = opened(ticket(1, 2));
    assert_eq!(pieces(&mut sender), []);
    sender.computed(7, &TABLE[..2]);
    assert_eq!(pieces(&mut sender), []);
    sender.computed(8, &TABLE[..2]);
    assert_eq!(sender.next(Time(1), false), None);
    assert_eq!(pieces(&mut sender), [(0, TABLE[1], 0..3, 4)]);
    sender.computed(4, &TABLE[..1]);
    assert_eq!(pieces(&mut sender), []);
    sender.computed(9, &TABLE);
    assert_eq!(pieces(&mut sender), [(1, TABLE[2], 0..3, 1)]);
    assert_eq!(sender.next(Time(1), true), None);
    sender.first_token(first_token());
    let Some(SenderAction::Final(claims)) = sender.next(Time(1), true) else {
        panic!()
    };
    let names = name_blocks(ROOT, &PROMPT, 4);
    assert_eq!(
        claims.manifest,
        [
            ManifestEntry {
                name: Some(names[1]),
                valid_tokens: 4,
                checksum: Checksum(0)
            },
            ManifestEntry {
                name: None,
                valid_tokens: 1,
                checksum: Checksum(1)
            },
        ]
    );
    assert_eq!((claims.first.token, sender.bytes()), (42, LAYOUT.valid_bytes(5) as u64));

    sender.resend(&[1]);
    assert_eq!(pieces(&mut sender), [(1, TABLE[2], 0..3, 1)]);
    assert!(matches!(sender.next(Time(1), true), Some(SenderAction::Final(_))));
    sender.resend(&[0]);
    assert_eq!(sender.state(), SenderState::Awaiting);
    sender.verified();
    assert_eq!(sender.state(), SenderState::Verified);
    sender.rejected(Reject::Aborted);
    assert_eq!(
        (sender.state(), sender.next(Time(2), true)),
        (SenderState::Verified, None)
    );
}

#[test]
fn the_lease_counts_from_when_it_was_asked_for() {
    let ms = |ms| Time(0).after_ms(ms);
    let mut sender = opened(ticket(0, 3));
    assert_eq!(sender.wake_at(), ms(300));
    assert_eq!(sender.next(ms(299), true), None);
    for (at, frame) in [(300, 2), (600, 3)] {
        assert_eq!(
            sender.next(ms(at), true),
            Some(SenderAction::Heartbeat),
            "frame {frame}"
        );
        sender.handed_over(ms(at));
    }
    // The answer to the first, however late, says nothing of the second.
    sender.renewed(900, 2);
    assert_eq!(sender.next(ms(900), true), Some(SenderAction::Heartbeat));
    assert_eq!(sender.next(ms(1_199), true), None);
    assert_eq!(sender.wake_at(), ms(1_200));
    assert_eq!(sender.next(ms(1_200), true), None);
    assert_eq!(sender.state(), SenderState::Failed(PushFailure::LeaseEnded));
}

#[test]
fn pieces_that_are_answered_keep_the_lease() {
    let ms = |ms| Time(0).after_ms(ms);
    let mut sender = opened(ticket(0, 3));
    // Pieces behind which a heartbeat would have to wait for longer than the lease.
    for frame in 2..=30 {
        sender.handed_over(ms(frame * 100));
        assert_ne!(sender.state(), SenderState::Failed(PushFailure::LeaseEnded));
        if frame > 8 {
            // Answered 600 ms after it was handed over.
            sender.renewed(900, frame - 6);
        }
        sender.next(ms(frame * 100), false);
    }
    // The last answer was to the frame of 2,400 ms.
    sender.next(ms(3_299), false);
    assert_eq!(sender.state(), SenderState::Sending);
    sender.next(ms(3_300), false);
    assert_eq!(sender.state(), SenderState::Failed(PushFailure::LeaseEnded));
}

#[test]
fn it_ends_with_the_deadline_however_often_renewed() {
    let mut sender = opened(ticket(0, 3));
    let (mut now, mut frames) = (Time(0), 1);
    while sender.state() == SenderState::Sending {
        now = sender.wake_at();
        if sender.next(now, true) == Some(SenderAction::Heartbeat) {
            frames += 1;
            sender.handed_over(now);
            sender.renewed(900, frames);
        }
    }
    assert_eq!(
        (sender.state(), now),
        (SenderState::Failed(PushFailure::Deadline), Time(0).after_ms(10_000))
    );
}

#[test]
fn a_ticket_that_does_not_fit_is_refused() {
    fn check(change: impl FnOnce(&mut Ticket), field: &'static str) {
        let mut wrong = ticket(1, 2);
        change(&mut wrong);
        assert_eq!(new(wrong).err(), Some(WireError(field)));
    }
    check(|ticket| ticket.held_blocks = 2, "ticket.slots");
    check(|ticket| ticket.held_blocks = usize::MAX, "ticket.slots");
    check(|ticket| ticket.slots.clear(), "ticket.slots");
    check(|ticket| ticket.identity = KvIdentity([1; 32]), "ticket.kv_identity");
    check(|ticket| ticket.layout.heads = 3, "ticket.layout");
    check(|ticket| ticket.protocol = 0, "ticket.protocol");
}

#[test]
fn nonsense_from_the_decode_node_ends_the_push() {
    for nonsense in [
        |sender: &mut Sender| sender.resend(&[0]),
        |sender: &mut Sender| sender.verified(),
        // Wanted once more, and right before it was sent.
        |sender: &mut Sender| {
            sender.computed(9, &TABLE);
            sender.first_token(first_token());
            assert_eq!(pieces(sender).len(), 3);
            assert!(matches!(sender.next(Time(1), true), Some(SenderAction::Final(_))));
            sender.resend(&[1]);
            sender.verified();
        },
    ] {
        let mut sender = opened(ticket(0, 3));
        nonsense(&mut sender);
        assert_eq!(sender.state(), SenderState::Failed(PushFailure::Protocol));
    }
}

/// A prompt of whole blocks, whose `computed` blocks are in the pool.
fn plan(protocol: u32, layout: KvLayout, blocks: usize) -> Slots {
    let prompt_tokens = blocks * layout.block_tokens;
    let mut slots = Slots::new(
        &Ticket {
            layout,
            ..ticket(0, blocks)
        },
        prompt_tokens,
        protocol,
    );
    slots.computed(prompt_tokens, &(0..blocks as u32).map(BlockId).collect::<Vec<_>>());
    slots
}

fn layout(layers: usize, head_dim: usize) -> KvLayout {
    KvLayout {
        layers,
        heads: 4,
        head_dim,
        block_tokens: 32,
        dtype: KvDtype::Bf16,
    }
}

#[test]
fn frames_hold_many_blocks_and_large_blocks_take_many_frames() {
    /// Runs and KiB of each frame.
    fn check(protocol: u32, layout: KvLayout, blocks: usize, expected: &[(usize, usize)]) {
        let mut slots = plan(protocol, layout, blocks);
        let mut frames = Vec::new();
        let mut next = vec![0; blocks];
        loop {
            let runs = slots.plan();
            if runs.is_empty() {
                break;
            }
            for run in &runs {
                assert_eq!(run.layers.start, std::mem::replace(&mut next[run.slot], run.layers.end));
            }
            let layers: usize = runs.iter().map(|run| run.layers.len()).sum();
            frames.push((runs.len(), layers * layout.layer_block_bytes() / 1024));
        }
        assert_eq!(next, vec![layout.layers; blocks]);
        assert!(slots.planned());
        assert_eq!(frames, expected);
    }
    // 16 KiB a layer, 480 KiB a block.
    check(1, layout(30, 32), 2, &[(1, 480), (1, 480)]);
    check(2, layout(30, 32), 2, &[(2, 960)]);
    check(2, layout(30, 32), 9, &[(3, 1024), (3, 1024), (3, 1024), (3, 1248)]);
    // 2 MiB and 8 MiB a layer.
    check(1, layout(5, 4_096), 1, &[(1, 4096), (1, 4096), (1, 2048)]);
    check(2, layout(3, 4_096), 1, &[(1, 2048), (1, 2048), (1, 2048)]);
    check(2, layout(2, 16_384), 1, &[(1, 8192), (1, 8192)]);
    // 1 KiB blocks: as many runs as a frame may have.
    check(2, layout(1, 2), 2_000, &[(1024, 1024), (976, 976)]);
}

#[test]
fn layers_leave_before_the_others_are_computed() {
    let mut sender = opened(ticket(1, 2));
    sender.computed_layers(8, 2, &TABLE[..2]);
    assert_eq!(pieces(&mut sender), [(0, TABLE[1], 0..2, 4)]);
    // Not further, or not as far.
    sender.computed_layers(8, 1, &TABLE[..2]);
    sender.computed_layers(4, 3, &TABLE[..1]);
    assert_eq!(pieces(&mut sender), []);
    sender.computed(8, &TABLE[..2]);
    sender.computed_layers(9, 1, &TABLE);
    assert_eq!(pieces(&mut sender), [(0, TABLE[1], 2..3, 4), (1, TABLE[2], 0..1, 1)]);
    sender.first_token(first_token());
    assert_eq!(pieces(&mut sender), []);
    sender.computed(9, &TABLE);
    assert_eq!(pieces(&mut sender), [(1, TABLE[2], 1..3, 1)]);
    let Some(SenderAction::Final(claims)) = sender.next(Time(1), true) else {
        panic!()
    };
    let layer = LAYOUT.valid_bytes(1) / LAYOUT.layers;
    assert_eq!(claims.manifest[1].checksum, Checksum(1).then(Checksum(1), 2 * layer));
    // Two layers of the block's four tokens, and one of the tail's one.
    assert_eq!(sender.early_bytes(), (2 * 4 + 1) * layer as u64);
}

#[test]
fn both_ends_speak_the_older_version() {
    fn check(ours: u32, theirs: u32, expected: Result<u32, WireError>) {
        let ticket = Ticket {
            protocol: theirs,
            ..ticket(0, 3)
        };
        let config = SenderConfig {
            protocol_max: ours,
            ..config()
        };
        assert_eq!(
            Sender::new(ticket, config, Time(0)).map(|sender| sender.protocol()),
            expected
        );
    }
    check(2, 2, Ok(2));
    check(1, 2, Ok(1));
    check(2, 1, Ok(1));
    check(2, 9, Ok(2));
    check(2, 0, Err(WireError("ticket.protocol")));
}
