//! What only pushes over shared memory can meet.

use baton_kv::BlockId;
use baton_proto::node::v1::{self as pb, push_frame::Frame, push_reply::Reply};

use super::{
    frames::{Live, pieces},
    *,
};

#[tokio::test]
async fn a_pool_that_is_not_mapped_any_more_is_offered_again_and_the_push_goes_on() {
    let node = Node::start(LAYOUT, 8).await;
    let source = Source::new(LAYOUT, 4).over(&node, Transport::Shm).await;
    let pushed = async |request: u128| {
        let prompt = PROMPT.map(|token| token + 100 * request as u32);
        let ticket = node.reserve(request, 1, &prompt);
        let handoff = ticket.handoff;
        let report = within(source.push_in_chunks(ticket, &prompt, 9)).await?;
        let table = node.verified(handoff).await;
        for (index, block) in table.iter().enumerate() {
            let tokens = (prompt.len() - index * LAYOUT.block_tokens).min(LAYOUT.block_tokens);
            assert_eq!(node.memory.block(*block, tokens), kv_of(&LAYOUT, &prompt, index));
        }
        node.finish_all();
        Ok::<_, PushError>(report)
    };
    for request in 1..4 {
        assert_eq!(pushed(request).await.unwrap().transport, Transport::Shm);
        assert_eq!(node.mappings.len(), 1);
        node.mappings.clear();
    }
    // It has left, as far as its pool is concerned: nobody can map it again.
    source.gone.cancel();
    node.mappings.clear();
    let error = within(async {
        loop {
            // Until its socket is gone.
            if let Err(error) = pushed(4).await {
                return error;
            }
            node.mappings.clear();
        }
    })
    .await;
    assert_eq!(error.code(), "TRANSPORT_UNAVAILABLE", "{error}");
    assert!(error.to_string().contains("SHM_"), "{error}");
}

#[tokio::test]
async fn an_offer_that_cannot_be_used_is_refused_by_its_code() {
    let node = Node::start(LAYOUT, 4).await;
    let good = Source::new(LAYOUT, 4).over(&node, Transport::Shm).await;
    let offer = good.offer.clone().expect("offered");
    let check = async |change: fn(&mut pb::SharedPool), code: &str| {
        let mut changed = offer.clone();
        change(&mut changed);
        let welcome = harness::introduced(&node, changed).await;
        assert!(
            welcome.shared_refused.starts_with(&format!("{code}: ")) && welcome.shared_bytes_per_s == 0.0,
            "{welcome:?}"
        );
    };
    check(
        |offer| offer.socket = "/tmp/somebody-else/1.sock".to_owned(),
        "SHM_ELSEWHERE",
    )
    .await;
    check(
        |offer| offer.socket.insert(offer.socket.len() - 5, '0'),
        "SHM_UNREACHABLE",
    )
    .await;
    check(|offer| offer.token[0] ^= 1, "SHM_REFUSED").await;
    check(|offer| offer.blocks += 1, "SHM_SIZE").await;
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
