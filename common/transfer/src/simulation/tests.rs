use proptest::prelude::*;

use super::*;

/// Runs two pushes over a network that reorders (and duplicates or corrupts one frame), without loss, until both are verified.
fn lossless(choices: &[u16], duplicate: bool, mut corrupt: Option<u16>) {
    let mut world = World::new(false);
    world.reserve(1, 1, PROMPTS[0], 2);
    world.reserve(2, 1, PROMPTS[2], 1);
    for step in 0..20_000 {
        let choice = mix(choices[step % choices.len()], step);
        let push = usize::from(choice) % 2;
        world.compute(push, step / 4);
        world.compute_layers(push, step / 4 + 3, step % 4);
        world.pump(push);
        if let Some(at) = pick(&world.frames, choice / 5) {
            if let (Some(how), true) = (corrupt, matches!(world.frames[at].1, Frame::Pieces(..))) {
                // Bytes only: what is wrong with a header is refused, and would be missing for good.
                world.corrupt(at, how / 16 * 16 + 10 + how % 6);
                corrupt = None;
            }
            let frame = world.frames.swap_remove(at);
            if duplicate && choice.is_multiple_of(4) {
                world.frames.push(frame.clone());
            }
            world.deliver(frame);
        }
        if let Some(at) = pick(&world.permits, choice / 7).filter(|_| choice % 3 != 1) {
            world.land(at);
        }
        if let Some(at) = pick(&world.replies, choice / 3) {
            let reply = world.replies.swap_remove(at);
            world.answer(reply);
        }
        world.check();
        if world
            .pushes
            .iter()
            .all(|push| push.sender.state() == SenderState::Verified)
        {
            break;
        }
    }
    assert_eq!(corrupt, None);
    for push in &world.pushes {
        assert_eq!(push.sender.state(), SenderState::Verified);
        assert_eq!(world.receiver.state(push.handoff), Some(HandoffState::Decoding));
    }
    world.finish(0);
    world.finish(0);
    world.settle();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// No block is reused while a write may land; what is verified is right; every handoff ends once, and everything comes back.
    #[test]
    fn any_interleaving_of_frames_faults_and_deadlines(
        queue_full: bool,
        steps in prop::collection::vec((0_u8..45, any::<u16>(), any::<u16>()), 0..400),
    ) {
        let mut world = World::new(queue_full);
        for (op, a, b) in steps {
            world.step(op, a, b);
            world.check();
        }
        world.settle();
    }

    #[test]
    fn reordering_and_duplication_lose_nothing(choices in prop::collection::vec(any::<u16>(), 1..64)) {
        lossless(&choices, true, None);
    }

    #[test]
    fn one_corrupt_piece_is_healed(choices in prop::collection::vec(any::<u16>(), 1..64), how: u16) {
        lossless(&choices, false, Some(how));
    }
}

#[test]
fn an_older_attempt_and_its_late_frames_do_not_disturb_the_newer() {
    let mut world = World::new(false);
    world.reserve(1, 1, PROMPTS[0], 1);
    world.pump(0);
    let open = world.frames.pop().unwrap();
    world.deliver(open.clone());
    world.answer((0, Reply::Accepted(1_000)));
    world.compute(0, 9);
    world.pump(0);
    let late = world.frames.pop().unwrap();
    world.reserve(1, 2, PROMPTS[0], 2);
    world.check();
    // Its stream is not closed yet: its blocks wait, the new attempt has others.
    assert_eq!((world.pool.counts().quarantined, world.pool.counts().granted), (3, 3));
    world.deliver(late);
    world.deliver(open);
    assert!(world.permits.is_empty());
    world.close(0);
    world.check();
    assert_eq!(world.pool.counts().quarantined, 0);
    assert_eq!(
        world.receiver.state(world.pushes[1].handoff),
        Some(HandoffState::Reserved)
    );
    world.settle();
}
