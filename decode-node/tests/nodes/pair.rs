//! A prefill node and a decode node, a real gRPC between them, and a router's end written by hand.

use crate::support::{
    BLOCK_TOKENS, BLOCKS, Router, TestNode, VOCABULARY, local, local_with, prompt,
    router::{Announced, Answer, DecodeLeg, PrefillLeg},
    work,
};
use baton_proto::node::v1::{EndReason, Sampling, Work, decode_event::Event, decode_request::Request, prefill_event};
use baton_scheduler::{Sampled, SamplingParams};

#[tokio::test(flavor = "multi_thread")]
async fn a_handed_prompt_is_answered_as_by_one_engine_alone() {
    let router = Router::start().await;
    let (prefill, decode) = (
        TestNode::prefill("p", &router).await,
        TestNode::decode("d", &router).await,
    );
    for (seed, (length, count)) in [(1, 2), (7, 9), (8, 9), (9, 3), (43, 40), (100, 20), (359, 41)]
        .into_iter()
        .enumerate()
    {
        let prompt = prompt(length, seed as u32);
        let work = work(prompt.clone(), count);
        let (ticket, mut decoding) = DecodeLeg::reserve(&decode, work.clone()).await.expect("reserved");
        assert_eq!(ticket.slots.len(), length.div_ceil(BLOCK_TOKENS), "nothing is held yet");
        let mut running = PrefillLeg::run(&prefill, work, ticket).await.expect("taken");
        let (done, answer) = tokio::join!(running.done(), decoding.answer());
        let (done, answer) = (done.expect("pushed"), answer.expect("answered"));
        assert_eq!(answer.tokens, local(&prompt, count as usize), "a prompt of {length}");
        assert_eq!(
            (done.first_token, done.ended()),
            (answer.tokens[0], EndReason::Unspecified)
        );
        let verified = answer.verified.expect("verified");
        assert_eq!((verified.kv_bytes, verified.kv_blocks), (done.kv_bytes, done.kv_blocks));
        assert_eq!(done.kv_blocks as usize, length.div_ceil(BLOCK_TOKENS));
        assert_eq!(answer.ended.reason(), EndReason::Length);
        assert!(answer.admitted.is_none());
    }
    prefill.idle().await;
    decode.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_that_the_decode_node_holds_do_not_travel_again() {
    let router = Router::start().await;
    let (prefill, decode) = (
        TestNode::prefill("p", &router).await,
        TestNode::decode("d", &router).await,
    );
    let mut sent = Vec::new();
    for length in [40, 60] {
        let work = work(prompt(length, 3), 10);
        let (ticket, mut decoding) = DecodeLeg::reserve(&decode, work.clone()).await.expect("reserved");
        sent.push((ticket.held_blocks, ticket.slots.len()));
        let mut running = PrefillLeg::run(&prefill, work, ticket).await.expect("taken");
        let (done, answer) = tokio::join!(running.done(), decoding.answer());
        assert_eq!(done.expect("pushed").kv_blocks as usize, sent[sent.len() - 1].1);
        assert_eq!(answer.expect("answered").tokens, local(&prompt(length, 3), 10));
    }
    assert_eq!(sent, [(0, 5), (5, 3)]);
    decode.idle().await;
    // Seven full blocks of the longer prompt, and, of each request, the one that its answer filled.
    router.wait("d", "named", |node| node.names.len() == 9).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_pairs_at_once_do_not_mix() {
    let router = Router::start().await;
    let (prefill, decode) = (
        TestNode::prefill("p", &router).await,
        TestNode::decode("d", &router).await,
    );
    let one = async |seed: u32| {
        let prompt = prompt(20 + seed as usize * 7, seed);
        let work = work(prompt.clone(), 12);
        let (ticket, mut decoding) = DecodeLeg::reserve(&decode, work.clone()).await.expect("reserved");
        let mut running = PrefillLeg::run(&prefill, work, ticket).await.expect("taken");
        let (done, answer) = tokio::join!(running.done(), decoding.answer());
        done.expect("pushed");
        assert_eq!(answer.expect("answered").tokens, local(&prompt, 12), "request {seed}");
    };
    tokio::join!(one(1), one(2), one(3), one(4), one(5), one(6));
    prefill.idle().await;
    decode.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_decode_node_runs_a_prompt_itself() {
    let router = Router::start().await;
    let decode = TestNode::decode("d", &router).await;
    for cached in [0, 40] {
        let mut leg = DecodeLeg::open(&decode, Request::Run(work(prompt(43, 1), 20)))
            .await
            .expect("taken");
        let answer = leg.answer().await.expect("answered");
        assert_eq!(answer.tokens, local(&prompt(43, 1), 20));
        assert_eq!(answer.admitted.expect("admitted").cached_tokens, cached);
        assert_eq!((answer.ended.reason(), answer.verified), (EndReason::Length, None));
        decode.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_goes_on_where_it_was() {
    let router = Router::start().await;
    let decode = TestNode::decode("d", &router).await;
    let whole = local(&prompt(43, 1), 20);
    let mut replay = work(prompt(43, 1), 20);
    replay.output = whole[..7].to_vec();
    let mut leg = DecodeLeg::open(&decode, Request::Run(replay)).await.expect("taken");
    assert!(matches!(leg.next().await, Ok(Event::Admitted(_))));
    let mut tokens = Vec::new();
    loop {
        match leg.next().await.expect("answered") {
            Event::Tokens(more) => {
                assert_eq!(more.index as usize, 7 + tokens.len());
                tokens.extend(more.ids);
            }
            Event::Ended(_) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(tokens, whole[7..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_ids_end_the_answer_wherever_they_are_drawn() {
    let router = Router::start().await;
    let (prefill, decode) = (
        TestNode::prefill("p", &router).await,
        TestNode::decode("d", &router).await,
    );
    let whole = local(&prompt(43, 1), 6);

    // Later than the first: on the decode node.
    let mut work_ = work(prompt(43, 1), 20);
    work_.stop_ids = vec![whole[4]];
    let (ticket, mut decoding) = DecodeLeg::reserve(&decode, work_.clone()).await.expect("reserved");
    let mut running = PrefillLeg::run(&prefill, work_, ticket).await.expect("taken");
    let (done, answer) = tokio::join!(running.done(), decoding.answer());
    done.expect("pushed");
    let answer = answer.expect("answered");
    assert_eq!(
        (answer.tokens.as_slice(), answer.ended.reason()),
        (&whole[..5], EndReason::Stop)
    );

    // The first, or the only one: on the prefill node, and nothing is handed over.
    for (max_new_tokens, stop, ended) in [(20, whole[0], EndReason::Stop), (1, 0, EndReason::Length)] {
        let mut work_ = work(prompt(43, 1), max_new_tokens);
        work_.stop_ids = vec![stop];
        let (ticket, decoding) = DecodeLeg::reserve(&decode, work_.clone()).await.expect("reserved");
        let mut running = PrefillLeg::run(&prefill, work_, ticket).await.expect("taken");
        let done = running.last().await.expect("ended");
        assert_eq!((done.first_token, done.ended(), done.kv_blocks), (whole[0], ended, 0));
        // The router closes the decode stream, and the reservation is given back.
        drop(decoding);
        decode.idle().await;
        drop(running);
        prefill.idle().await;
    }
    // Each was cancelled: the push outlived it, so that no peer was lost.
    assert_eq!(
        (decode.aborts("CANCELLED").await, decode.aborts("PEER_LOST").await),
        (2.0, 0.0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_is_told_as_it_is_made() {
    let router = Router::start().await;
    let (prefill, decode) = (
        TestNode::prefill("p", &router).await,
        TestNode::decode("d", &router).await,
    );
    let work = work(prompt(100, 1), 2);
    let (ticket, mut decoding) = DecodeLeg::reserve(&decode, work.clone()).await.expect("reserved");
    let mut running = PrefillLeg::run(&prefill, work, ticket).await.expect("taken");
    assert!(matches!(running.next().await, Ok(prefill_event::Event::Started(_))));
    let mut last = 0;
    while last < 100 {
        let computed = running.progress().await;
        assert!(computed > last);
        last = computed;
    }
    running.done().await.expect("pushed");
    decoding.answer().await.expect("answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_say_who_they_are() {
    let router = Router::start().await;
    let decode = TestNode::decode("d", &router).await;
    decode.idle().await;
    let known = router.wait("d", "idle", Announced::is_idle).await;
    assert_eq!((known.hello.node_id.as_str(), known.hello.blocks), ("d", BLOCKS as u64));
    assert_eq!(known.hello.role(), baton_proto::node::v1::Role::Decode);
    assert_eq!((known.hello.epoch.len(), known.hello.kv_identity.len()), (16, 32));
    assert_eq!((known.hello.context_length, known.hello.vocabulary), (400, VOCABULARY));
}

/// Everything that sampling has. The bias brings a few tokens forward again and again, so that penalties count.
fn penalised(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 0.8,
        top_p: 0.95,
        seed,
        repetition_penalty: 1.2,
        presence_penalty: 0.5,
        frequency_penalty: 1.0,
        logit_bias: (10..18).map(|id| (id, 13.0)).collect(),
        top_logprobs: 20,
        ..SamplingParams::greedy()
    }
}

fn penalised_work(prompt: Vec<u32>, count: u32, params: &SamplingParams) -> Work {
    let mut work = work(prompt, count);
    let sampling = work.sampling.as_mut().expect("sampling");
    *sampling = Sampling {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        seed: params.seed,
        choice: params.choice,
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        logit_bias: params.logit_bias.iter().copied().collect(),
        top_logprobs: params.top_logprobs,
    };
    work
}

/// `answer` is what one engine alone draws.
fn assert_drawn(answer: &Answer, expected: &[Sampled], what: &str) {
    assert_eq!(answer.tokens.len(), expected.len(), "{what}");
    for (at, expected) in expected.iter().enumerate() {
        assert_eq!(answer.tokens[at], expected.token, "{what}, token {at}");
        assert_eq!(answer.logprobs[at], expected.logprob, "{what}, token {at}");
        assert_eq!(answer.alternatives[at], *expected.alternatives, "{what}, token {at}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn penalties_and_alternatives_are_those_of_one_engine_alone_handed_over_local_and_replayed() {
    let router = Router::start().await;
    let (prefill, decode) = (
        TestNode::prefill("p", &router).await,
        TestNode::decode("d", &router).await,
    );
    for (seed, length) in [(1, 3), (2, 43), (3, 100)] {
        let (prompt, params) = (prompt(length, seed), penalised(seed.into()));
        let expected = local_with(&prompt, 30, params.clone());
        let neutral = SamplingParams {
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            ..params.clone()
        };
        let neutral = local_with(&prompt, 30, neutral);
        assert!(
            expected
                .iter()
                .zip(&neutral)
                .any(|(one, other)| one.token != other.token),
            "penalties count"
        );

        let work = penalised_work(prompt.clone(), 30, &params);
        let (ticket, mut decoding) = DecodeLeg::reserve(&decode, work.clone()).await.expect("reserved");
        let mut running = PrefillLeg::run(&prefill, work.clone(), ticket).await.expect("taken");
        let (done, answer) = tokio::join!(running.done(), decoding.answer());
        let alternatives = done.expect("pushed").alternatives;
        let alternatives: Vec<_> = alternatives.iter().map(|other| (other.id, other.logprob)).collect();
        assert_eq!(alternatives, *expected[0].alternatives, "the prefill node's own report");
        assert_drawn(&answer.expect("answered"), &expected, "handed over");

        for index in [0, 1, 2, 7, 29] {
            let mut replay = work.clone();
            replay.output = expected[..index].iter().map(|sampled| sampled.token).collect();
            let mut leg = DecodeLeg::open(&decode, Request::Run(replay)).await.expect("taken");
            let answer = leg.answer_from(index).await.expect("answered");
            assert_drawn(&answer, &expected[index..], &format!("from {index}"));
        }
    }
    prefill.idle().await;
    decode.idle().await;
}
