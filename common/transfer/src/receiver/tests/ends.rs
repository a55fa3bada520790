//! How handoffs end that come to nothing.

use super::*;

#[test]
fn an_aborted_handoff_keeps_its_blocks_until_it_has_drained() {
    let (mut node, ticket) = Node::filling();
    let permit = node.begin(&run(&ticket, 0)).unwrap().unwrap();
    node.abort(&ticket);
    node.abort(&ticket);
    assert_eq!(node.reasons(), [AbortReason::Cancelled]);
    assert!(node.actions.contains(&ReceiverAction::Fence {
        stream: STREAM,
        reject: Reject::Aborted
    }));
    assert_eq!(node.begin(&run(&ticket, 1)), Err(Reject::Aborted));
    assert_eq!(node.receiver.heartbeat(STREAM, node.now), Err(Reject::Aborted));
    assert_eq!(node.receiver.renew(ticket.handoff, node.now), Err(Reject::Aborted));
    node.close();
    assert_eq!(
        (node.receiver.state(ticket.handoff), node.pool.counts().quarantined),
        (Some(HandoffState::Aborting), 3)
    );
    assert_eq!(node.land(permit), None);
    node.assert_idle();
    assert_eq!(
        node.actions.last(),
        Some(&ReceiverAction::Released {
            handoff: ticket.handoff
        })
    );
}

#[test]
fn a_failed_copy_aborts() {
    for sums in [None, Some([].as_slice())] {
        let (mut node, ticket) = Node::filling();
        let permit = node.begin(&run(&ticket, 0)).unwrap().unwrap();
        let landed = node
            .receiver
            .landed(permit, sums, node.now, &mut node.pool, &mut node.actions);
        assert_eq!(landed, None);
        node.close();
        assert_eq!(node.reasons(), [AbortReason::Node]);
        node.assert_idle();
    }
}

#[test]
fn every_state_ends_at_its_deadline() {
    // Reserved: the lease, as long as the router renews it.
    let mut node = Node::new();
    let ticket = node.reserve(1, 1).unwrap();
    node.now = Time(0).after_ms(LEASE_MS - 1);
    assert_eq!(node.receiver.renew(ticket.handoff, node.now), Ok(LEASE_MS));
    let ends = node.now.after_ms(LEASE_MS);
    assert_eq!(node.receiver.next_deadline(), Some(ends));
    assert_eq!(node.receiver.renew(ticket.handoff, ends), Err(Reject::LeaseEnded));
    assert_eq!(
        node.receiver.opened(STREAM, &claims(&ticket), ends),
        Err(Reject::LeaseEnded)
    );
    node.tick(ends);
    assert_eq!(node.reasons(), [AbortReason::LeaseEnded]);
    node.assert_idle();

    // Filling: the lease, then the drain deadline, which takes the stream for closed but waits for the copy under way.
    let (mut node, ticket) = Node::filling();
    let permit = node.begin(&run(&ticket, 0)).unwrap().unwrap();
    let ends = Time(0).after_ms(LEASE_MS);
    node.now = ends;
    assert_eq!(node.begin(&run(&ticket, 1)), Err(Reject::LeaseEnded));
    node.tick(ends);
    assert!(node.actions.contains(&ReceiverAction::Fence {
        stream: STREAM,
        reject: Reject::LeaseEnded
    }));
    let drained = ends.after_ms(DRAIN_MS);
    assert_eq!(node.receiver.next_deadline(), Some(drained));
    node.tick(drained);
    assert_eq!(
        node.actions.last(),
        Some(&ReceiverAction::DrainOverdue {
            handoff: ticket.handoff,
            in_flight: 1
        })
    );
    assert_eq!(node.begin(&run(&ticket, 1)), Err(Reject::UnknownHandoff));
    assert_eq!(node.pool.counts().quarantined, 3);
    assert_eq!(node.land(permit), None);
    node.assert_idle();

    // Filling, heartbeats and all: the request's deadline.
    let (mut node, _) = Node::filling();
    while node.now < DEADLINE {
        assert_eq!(node.receiver.heartbeat(STREAM, node.now).map(|ms| ms > 0), Ok(true));
        node.tick(node.now.after_ms(LEASE_MS / 3).min(DEADLINE));
    }
    node.close();
    assert_eq!(node.reasons(), [AbortReason::Deadline]);
    node.assert_idle();

    // Verified, and Decoding: the request's deadline.
    for decoding in [false, true] {
        let (mut node, ticket) = Node::filling();
        node.send_all(&ticket);
        assert_eq!(node.finish(&last(&ticket)), Ok(Some(Verdict::Verified)));
        assert_eq!(node.receiver.next_deadline(), Some(DEADLINE));
        if decoding {
            assert!(node.receiver.decoding(ticket.handoff));
        }
        node.tick(DEADLINE);
        assert_eq!(node.reasons(), [AbortReason::Deadline]);
        assert!(!node.receiver.decoding(ticket.handoff));
        assert_eq!(node.receiver.handoffs(), 0);
        if decoding {
            // The sequence owns them; the driver cancels it.
            assert_eq!(node.pool.counts().held, 3);
            node.pool
                .release(&ticket.slots.iter().map(|slot| slot.block).collect::<Vec<_>>());
        }
        node.assert_idle();
    }
}
