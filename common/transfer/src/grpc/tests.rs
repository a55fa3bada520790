//! Both ends over loopback, with memory in vectors.

mod frames;
mod harness;
mod shared;
mod wire;

use std::{future::Future, sync::Arc, time::Duration};

use baton_kv::{Epoch, KvDtype, KvLayout, Time, TokenId};

use super::*;
use crate::{
    AbortReason, Capability, PushFailure, Reject, Ticket, Transport,
    limits::LEASE_MS,
    testing::{DEADLINE, EPOCH, IDENTITY, LAYOUT, ROOT, TestMemory, first_token, kv_of},
};
use harness::{Node, Source, within};
use read_ahead::ReadAhead;

/// Two full blocks and a tail.
const PROMPT: [TokenId; 9] = [1, 2, 3, 4, 5, 6, 7, 8, 9];

/// Each of these holds over every transport.
macro_rules! conformance {
    ($($name:ident)*) => {
        mod over_grpc {
            $(#[tokio::test] async fn $name() { super::$name(crate::Transport::Grpc).await; })*
        }
        mod over_shm {
            $(#[tokio::test] async fn $name() { super::$name(crate::Transport::Shm).await; })*
        }
    };
}

conformance! {
    a_prompt_crosses_and_the_next_one_skips_what_is_held
    layers_cross_before_the_others_are_computed
    a_block_larger_than_a_message_travels_as_runs_of_layers
    a_corrupt_piece_is_sent_again_and_a_second_one_ends_the_push
    a_sender_that_goes_midway_leaves_nothing_behind
    a_push_that_is_not_invited_is_refused
    the_decode_node_can_end_a_push_from_its_side
    heartbeats_keep_the_lease_while_the_prompt_is_computed
    a_refusal_arrives_while_much_is_under_way
    what_is_pushed_stays_held_until_the_push_has_ended
}

async fn a_prompt_crosses_and_the_next_one_skips_what_is_held(transport: Transport) {
    async fn check(transport: Transport, prompts: &[&[TokenId]], crossing: &[usize]) {
        let node = Node::start(LAYOUT, 16).await;
        let source = Source::new(LAYOUT, 8).over(&node, transport).await;
        for (request, (prompt, blocks)) in prompts.iter().zip(crossing).enumerate() {
            let ticket = node.reserve(request as u128, 1, prompt);
            assert_eq!(ticket.slots.len(), *blocks, "{prompt:?}");
            let handoff = ticket.handoff;
            let report = within(source.push_in_chunks(ticket, prompt, 3)).await.unwrap();
            let tokens = prompt.len() - (LAYOUT.blocks_for(prompt.len()) - blocks) * LAYOUT.block_tokens;
            assert_eq!(
                (report.kv_blocks, report.kv_bytes),
                (*blocks, LAYOUT.valid_bytes(tokens) as u64)
            );
            assert!(report.bytes_per_s > 0.0 && report.transfer_ms > 0.0);
            let table = node.verified(handoff).await;
            for (index, block) in table.iter().enumerate() {
                let tokens = (prompt.len() - index * LAYOUT.block_tokens).min(LAYOUT.block_tokens);
                assert_eq!(node.memory.block(*block, tokens), kv_of(&LAYOUT, prompt, index));
            }
        }
        node.finish_all();
        node.idle().await;
    }
    check(transport, &[&[1]], &[1]).await;
    check(transport, &[&PROMPT[..8]], &[2]).await;
    check(
        transport,
        &[&PROMPT, &PROMPT, &PROMPT[..8], &[1, 2, 3, 4, 5, 9]],
        &[3, 1, 1, 1],
    )
    .await;
}

async fn layers_cross_before_the_others_are_computed(transport: Transport) {
    let node = Node::start(LAYOUT, 16).await;
    let source = Source::new(LAYOUT, 8).over(&node, transport).await;
    let ticket = node.reserve(1, 1, &PROMPT);
    let handoff = ticket.handoff;
    let (feed, push) = source.start(ticket, &PROMPT);
    let table = source.table(PROMPT.len());
    let hold = Arc::new(());
    let held = hold.clone();
    let compute = async {
        feed.computed_layers(PROMPT.len(), 2, &table, Some(hold));
        // They are there while nothing is said of the third.
        node.written().await;
        feed.computed(PROMPT.len(), &table, Arc::new(()));
        feed.first_token(first_token());
    };
    let (report, ()) = within(async { tokio::join!(push, compute) }).await;
    let report = report.unwrap();
    let bytes = LAYOUT.valid_bytes(PROMPT.len()) as u64;
    assert_eq!((report.kv_bytes, report.early_bytes), (bytes, bytes * 2 / 3));
    assert_eq!(Arc::strong_count(&held), 1, "the push has given its hold up");
    let blocks = node.verified(handoff).await;
    for (index, block) in blocks.iter().enumerate() {
        let tokens = (PROMPT.len() - index * LAYOUT.block_tokens).min(LAYOUT.block_tokens);
        assert_eq!(node.memory.block(*block, tokens), kv_of(&LAYOUT, &PROMPT, index));
    }
    node.finish_all();
    node.idle().await;
}

async fn a_block_larger_than_a_message_travels_as_runs_of_layers(transport: Transport) {
    // 2 MiB a layer, 10 MiB a block.
    let layout = KvLayout {
        layers: 5,
        heads: 2,
        head_dim: 8_192,
        block_tokens: 32,
        dtype: KvDtype::Bf16,
    };
    let node = Node::start(layout, 2).await;
    let source = Source::new(layout, 2).over(&node, transport).await;
    let prompt: Vec<TokenId> = (0..33).collect();
    let ticket = node.reserve(1, 1, &prompt);
    let handoff = ticket.handoff;
    within(source.push_in_chunks(ticket, &prompt, 33)).await.unwrap();
    let table = node.verified(handoff).await;
    assert!(node.memory.block(table[0], 32) == kv_of(&layout, &prompt, 0));
    assert!(node.memory.block(table[1], 1) == kv_of(&layout, &prompt, 1));
}

#[tokio::test]
async fn an_older_peer_gets_frames_of_its_version() {
    let node = Node::start(LAYOUT, 4).await;
    let source = Source::new(LAYOUT, 4);
    let ticket = Ticket {
        protocol: 1,
        ..node.reserve(1, 1, &PROMPT)
    };
    let handoff = ticket.handoff;
    node.memory.corrupt_writes(1);
    within(source.push_in_chunks(ticket, &PROMPT, 5)).await.unwrap();
    let table = node.verified(handoff).await;
    for (index, block) in table.iter().enumerate() {
        let tokens = (PROMPT.len() - index * LAYOUT.block_tokens).min(LAYOUT.block_tokens);
        assert_eq!(node.memory.block(*block, tokens), kv_of(&LAYOUT, &PROMPT, index));
    }
}

async fn a_corrupt_piece_is_sent_again_and_a_second_one_ends_the_push(transport: Transport) {
    let node = Node::start(LAYOUT, 4).await;
    let source = Source::new(LAYOUT, 4).over(&node, transport).await;
    let ticket = node.reserve(1, 1, &PROMPT);
    let handoff = ticket.handoff;
    node.memory.corrupt_writes(1);
    let report = within(source.push_in_chunks(ticket, &PROMPT, 9)).await.unwrap();
    assert_eq!(report.kv_blocks, 3);
    let table = node.verified(handoff).await;
    assert_eq!(node.memory.block(table[0], 4), kv_of(&LAYOUT, &PROMPT, 0));
    node.finish_all();

    let other: Vec<TokenId> = PROMPT.iter().map(|token| token + 100).collect();
    let ticket = node.reserve(2, 1, &other);
    let handoff = ticket.handoff;
    node.memory.corrupt_writes(usize::MAX);
    let error = within(source.push_in_chunks(ticket, &other, 9)).await.unwrap_err();
    assert_eq!(error.code(), "CHECKSUM_MISMATCH");
    assert_eq!(
        node.aborted(handoff).await,
        AbortReason::Rejected(Reject::ChecksumMismatch)
    );
    node.idle().await;
}

async fn a_sender_that_goes_midway_leaves_nothing_behind(transport: Transport) {
    let node = Node::start(LAYOUT, 4).await;
    let source = Source::new(LAYOUT, 4).over(&node, transport).await;

    // The future is dropped while a block has arrived and others have not been computed.
    let ticket = node.reserve(1, 1, &PROMPT);
    let handoff = ticket.handoff;
    let (feed, push) = source.start(ticket, &PROMPT);
    feed.computed(4, &source.table(4), Arc::new(()));
    tokio::select! {
        result = push => panic!("{result:?}"),
        () = within(node.written()) => {}
    }
    assert_eq!(node.aborted(handoff).await, AbortReason::StreamClosed);
    node.idle().await;
}

async fn a_push_that_is_not_invited_is_refused(transport: Transport) {
    async fn check(transport: Transport, change: impl FnOnce(&mut Ticket), expected: Reject) {
        let node = Node::start(LAYOUT, 4).await;
        let source = Source::new(LAYOUT, 4).over(&node, transport).await;
        let mut ticket = node.reserve(1, 1, &PROMPT);
        let good = ticket.clone();
        change(&mut ticket);
        let error = within(source.push_in_chunks(ticket, &PROMPT, 9)).await.unwrap_err();
        assert!(
            matches!(error, PushError::Failed(PushFailure::Rejected(reject)) if reject == expected),
            "{error:?} instead of {expected:?}"
        );
        if expected == Reject::StaleGeneration {
            // The stream was the right one: it ended with the handoff.
            assert_eq!(node.aborted(good.handoff).await, AbortReason::Rejected(expected));
            node.idle().await;
        } else {
            within(source.push_in_chunks(good, &PROMPT, 9)).await.unwrap();
        }
    }
    check(
        transport,
        |ticket| ticket.capability = Capability::new([9; 32]),
        Reject::BadCapability,
    )
    .await;
    check(
        transport,
        |ticket| ticket.epoch = Epoch(EPOCH.0 + 1),
        Reject::StaleEpoch,
    )
    .await;
    check(transport, |ticket| ticket.handoff.0 += 1, Reject::UnknownHandoff).await;
    check(transport, |ticket| ticket.attempt.0 += 1, Reject::UnknownHandoff).await;
    check(
        transport,
        |ticket| ticket.slots[0].generation.0 += 1,
        Reject::StaleGeneration,
    )
    .await;
}

async fn the_decode_node_can_end_a_push_from_its_side(transport: Transport) {
    async fn check(transport: Transport, end: impl FnOnce(&Node), expected: AbortReason, code: &str) {
        let node = Node::start(LAYOUT, 4).await;
        let source = Source::new(LAYOUT, 4).over(&node, transport).await;
        let ticket = node.reserve(1, 1, &PROMPT);
        let handoff = ticket.handoff;
        let (feed, push) = source.start(ticket, &PROMPT);
        feed.computed(4, &source.table(4), Arc::new(()));
        let (result, ()) = within(async {
            tokio::join!(push, async {
                node.written().await;
                end(&node);
            })
        })
        .await;
        assert_eq!(result.unwrap_err().code(), code);
        assert_eq!(node.aborted(handoff).await, expected);
        node.idle().await;
    }
    check(transport, |node| node.abort_all(), AbortReason::Cancelled, "ABORTED").await;
    check(
        transport,
        |node| node.pass_ms(LEASE_MS),
        AbortReason::LeaseEnded,
        "LEASE_ENDED",
    )
    .await;
    check(
        transport,
        |node| node.pass_ms(DEADLINE.0 / 1_000),
        AbortReason::Deadline,
        "LEASE_ENDED",
    )
    .await;
    check(
        transport,
        |node| node.shutdown.cancel(),
        AbortReason::Rejected(Reject::Aborted),
        "ABORTED",
    )
    .await;
}

async fn heartbeats_keep_the_lease_while_the_prompt_is_computed(transport: Transport) {
    let node = Node::start(LAYOUT, 4).await;
    let source = Source::new(LAYOUT, 4).over(&node, transport).await;
    // Little of the lease was left when the ticket arrived, so that the first heartbeat comes soon.
    let ticket = Ticket {
        lease_ms: 3_000,
        ..node.reserve(1, 1, &PROMPT)
    };
    let handoff = ticket.handoff;
    let (feed, push) = source.start(ticket, &PROMPT);
    let (result, ()) = within(async {
        tokio::join!(push, async {
            // By the open, and then by a heartbeat.
            node.until_renewed(handoff).await;
            node.until_renewed(handoff).await;
            feed.computed(9, &source.table(9), Arc::new(()));
            feed.first_token(first_token());
        })
    })
    .await;
    result.unwrap();
    node.verified(handoff).await;
}

async fn a_refusal_arrives_while_much_is_under_way(transport: Transport) {
    let layout = KvLayout {
        layers: 4,
        heads: 2,
        head_dim: 2_048,
        block_tokens: 32,
        dtype: KvDtype::Bf16,
    };
    let node = Node::start(layout, 24).await;
    let source = Source::new(layout, 24).over(&node, transport).await;
    let prompt: Vec<TokenId> = (0..32 * 24).collect();
    let mut ticket = node.reserve(1, 1, &prompt);
    ticket.slots[1].generation.0 += 1;
    let error = within(source.push_in_chunks(ticket, &prompt, prompt.len()))
        .await
        .unwrap_err();
    assert_eq!(error.code(), "STALE_GENERATION");
    node.idle().await;
}

#[tokio::test]
async fn pushes_share_what_they_may_read_ahead() {
    // Less than one block: each takes its turn, and the turn comes back.
    let read_ahead = ReadAhead::new(LAYOUT.block_bytes() - 1);
    let node = Node::start(LAYOUT, 16).await;
    let source = Source::new(LAYOUT, 4).with_read_ahead(read_ahead.clone());
    let prompts = [1, 2, 3].map(|request: u32| PROMPT.map(|token| token + 100 * request));
    // The source computes into the same blocks: one prompt at a time is there, and pushed three times.
    for prompt in prompts {
        let push = |request| source.push_in_chunks(node.reserve(request, prompt[0], &prompt), &prompt, 9);
        let (first, second, third) = within(async { tokio::join!(push(1), push(2), push(3)) }).await;
        for report in [first, second, third] {
            assert_eq!(report.unwrap().kv_blocks, 3);
        }
        node.finish_all();
    }
    within(async {
        while read_ahead.left() < LAYOUT.block_bytes() - 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    node.idle().await;
}

#[tokio::test]
async fn a_lease_that_ends_while_the_stream_opens_is_named() {
    let node = Node::start(LAYOUT, 4).await;
    let source = Source::new(LAYOUT, 4);
    // It takes connections, and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ticket = Ticket {
        address: silent.local_addr().unwrap().to_string(),
        lease_ms: 50,
        ..node.reserve(1, 1, &PROMPT)
    };
    let error = within(source.push_in_chunks(ticket, &PROMPT, 9)).await.unwrap_err();
    assert_eq!(error.code(), "LEASE_ENDED", "{error}");
}

async fn what_is_pushed_stays_held_until_the_push_has_ended(transport: Transport) {
    let node = Node::start(LAYOUT, 4).await;
    let source = Source::new(LAYOUT, 4).over(&node, transport).await;
    let hold = Arc::new(());
    let (feed, push) = source.start(node.reserve(1, 1, &PROMPT), &PROMPT);
    feed.computed(4, &source.table(4), hold.clone());
    feed.computed(9, &source.table(9), hold.clone());
    feed.first_token(first_token());
    drop(feed);
    assert_eq!(Arc::strong_count(&hold), 3);
    within(push).await.unwrap();
    assert_eq!(Arc::strong_count(&hold), 1);

    // One that has failed keeps nothing, whatever is still fed.
    let ticket = Ticket {
        epoch: Epoch(9),
        ..node.reserve(2, 1, &PROMPT)
    };
    let (feed, push) = source.start(ticket, &PROMPT);
    feed.computed(4, &source.table(4), hold.clone());
    within(push).await.unwrap_err();
    feed.computed(9, &source.table(9), hold.clone());
    assert_eq!(Arc::strong_count(&hold), 1);
}

#[tokio::test]
async fn a_peer_that_is_not_there_is_named() {
    let node = Node::start(LAYOUT, 4).await;
    let source = Source::new(LAYOUT, 4);
    let free = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    for address in [free.to_string(), "not an address".to_owned()] {
        let ticket = Ticket {
            address: address.clone(),
            ..node.reserve(1, 1, &PROMPT)
        };
        let error = within(source.push_in_chunks(ticket, &PROMPT, 9)).await.unwrap_err();
        assert!(
            error.code() == "PEER_UNREACHABLE" && error.to_string().contains(&address),
            "{error}"
        );
        node.abort_all();
    }
    node.idle().await;
}
