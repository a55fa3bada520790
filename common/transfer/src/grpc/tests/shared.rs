//! What only pushes over shared memory can meet.

use baton_kv::BlockId;
use baton_proto::node::v1::{push_frame::Frame, push_reply::Reply};

use super::{
    frames::{Live, pieces},
    *,
};

#[tokio::test]
async fn a_pool_that_is_not_mapped_is_named_and_can_be_offered_again() {
    let node = Node::start(LAYOUT, 4).await;
    let source = Source::new(LAYOUT, 4).over(&node, Transport::Shm).await;
    within(source.push_in_chunks(node.reserve(1, 1, &PROMPT), &PROMPT, 9))
        .await
        .unwrap();
    node.finish_all();
    // As far as the decode node knows the sender has died.
    source.gone.cancel();
    within(async {
        while !node.mappings.is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let other = PROMPT.map(|token| token + 100);
    let error = within(source.push_in_chunks(node.reserve(2, 1, &other), &other, 9))
        .await
        .unwrap_err();
    assert_eq!(error.code(), "POOL_NOT_MAPPED");
    let again = Source::new(LAYOUT, 4).over(&node, Transport::Shm).await;
    within(again.push_in_chunks(node.reserve(2, 2, &other), &other, 9))
        .await
        .unwrap();
    node.finish_all();
    node.idle().await;
}

#[tokio::test]
async fn a_sender_that_dies_after_its_frames_is_copied_from_all_the_same() {
    let node = Node::start(LAYOUT, 4).await;
    let source = Source::new(LAYOUT, 4).over(&node, Transport::Shm).await;
    let ticket = node.reserve(1, 1, &PROMPT);
    let handoff = ticket.handoff;
    let (feed, push) = source.start(ticket, &PROMPT);
    feed.computed(4, &source.table(4), Arc::new(()));
    let (result, ()) = within(async {
        tokio::join!(push, async {
            node.written().await;
            // The offer goes; the mapping of the push under way stays.
            source.gone.cancel();
            while !node.mappings.is_empty() {
                tokio::task::yield_now().await;
            }
            feed.computed(9, &source.table(9), Arc::new(()));
            feed.first_token(first_token());
        })
    })
    .await;
    result.unwrap();
    let table = node.verified(handoff).await;
    for (index, block) in table.iter().enumerate() {
        let tokens = (PROMPT.len() - index * LAYOUT.block_tokens).min(LAYOUT.block_tokens);
        assert_eq!(node.memory.block(*block, tokens), kv_of(&LAYOUT, &PROMPT, index));
    }
}

#[tokio::test]
async fn frames_that_name_no_block_or_carry_bytes_are_refused() {
    async fn check(change: impl FnOnce(&mut baton_proto::node::v1::Pieces)) {
        let node = Node::start(LAYOUT, 4).await;
        let _source = Source::new(LAYOUT, 4).over(&node, Transport::Shm).await;
        let ticket = node.reserve(1, 1, &PROMPT);
        let mut live = Live::open_over(&node, &ticket, Transport::Shm).await;
        let mut frame = pieces(&ticket, 0..2);
        frame.data = Vec::new().into();
        change(&mut frame);
        live.send(Frame::Pieces(frame)).await;
        match live.next().await {
            Reply::Rejected(rejected) => assert_eq!(rejected.code, "MALFORMED"),
            other => panic!("{other:?}"),
        }
        // Nothing was written.
        for block in 0..4 {
            assert!(node.memory.block(BlockId(block), 4).iter().all(|byte| *byte == 0xEE));
        }
        node.idle().await;
    }
    check(|frame| frame.runs[1].source_block = 4).await;
    check(|frame| frame.runs[0].source_block = u32::MAX).await;
    check(|frame| frame.data = vec![0].into()).await;
    check(|frame| frame.data = kv_of(&LAYOUT, &PROMPT, 0).into()).await;
    check(|frame| frame.runs[1].layers = 4).await;
    check(|frame| frame.runs.clear()).await;
}
