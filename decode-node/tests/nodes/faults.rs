//! What goes wrong on a pair of nodes: everything ends with a typed status, and every block comes back.

use std::time::{Duration, Instant};

use crate::support::{
    Router, TestNode, gated, local, prompt,
    router::{DecodeLeg, PrefillLeg},
    simulated, soon, work,
};
use baton_engine::StepError;
use baton_node::status;
use baton_proto::node::v1::{self as pb, decode_event::Event, decode_request::Request};
use baton_worker::NodeError;
use tokio::net::TcpListener;
use tonic::{Code, Status};

fn check(status: &Status, code: Code, reason: &str) {
    assert_eq!(
        (status.code(), status::reason(status).as_deref()),
        (code, Some(reason)),
        "{status:?}"
    );
}

async fn opened(node: &TestNode, request: Request) -> Status {
    DecodeLeg::open(node, request).await.err().expect("refused")
}

/// A reservation on `decode`, and a prefill of it whose engine stands after its first chunk, of which some was reported.
async fn mid_push(
    prefill: &TestNode,
    decode: &TestNode,
    steps: &std::sync::mpsc::SyncSender<Result<(), StepError>>,
) -> (DecodeLeg, PrefillLeg) {
    let work = work(prompt(100, 1), 20);
    let (ticket, decoding) = DecodeLeg::reserve(decode, work.clone()).await.expect("reserved");
    let mut running = PrefillLeg::run(prefill, work, ticket).await.expect("taken");
    steps.send(Ok(())).expect("the engine lives");
    assert_eq!(running.progress().await, 16);
    (decoding, running)
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_with_their_reason() {
    let router = Router::start().await;
    let (prefill, decode) = (
        TestNode::prefill("p", &router).await,
        TestNode::decode("d", &router).await,
    );
    let good = || work(prompt(20, 1), 5);
    let with = |change: fn(&mut pb::Work)| {
        let mut work = good();
        change(&mut work);
        work
    };
    let invalid = Code::InvalidArgument;
    let empty = with(|work| work.prompt.clear());
    check(
        &opened(&decode, Request::Run(empty.clone())).await,
        invalid,
        "INVALID_FIELD",
    );
    check(
        &opened(&decode, Request::Reserve(empty)).await,
        invalid,
        "INVALID_FIELD",
    );
    check(
        &opened(&decode, Request::Renew(pb::Renew {})).await,
        invalid,
        "INVALID_FIELD",
    );
    let foreign = with(|work| work.kv_identity = vec![7; 32]);
    check(
        &opened(&decode, Request::Run(foreign.clone())).await,
        Code::FailedPrecondition,
        "IDENTITY_MISMATCH",
    );
    let long = with(|work| work.max_new_tokens = 390);
    check(&opened(&decode, Request::Run(long)).await, invalid, "CONTEXT_LENGTH");
    let replay = with(|work| work.output = vec![1]);
    check(
        &opened(&decode, Request::Reserve(replay.clone())).await,
        Code::Unimplemented,
        "NOT_BUILT",
    );

    let (ticket, leg) = DecodeLeg::reserve(&decode, good()).await.expect("reserved");
    let refused = async |work, ticket| PrefillLeg::run(&prefill, work, ticket).await.err().expect("refused");
    check(
        &refused(foreign, ticket.clone()).await,
        Code::FailedPrecondition,
        "IDENTITY_MISMATCH",
    );
    // Another request's.
    check(&refused(good(), ticket.clone()).await, invalid, "INVALID_FIELD");
    check(
        &refused(with(|work| work.prompt = vec![5_000]), ticket.clone()).await,
        invalid,
        "INVALID_FIELD",
    );
    let mut cut = ticket.clone();
    cut.capability.pop();
    check(&refused(good(), cut).await, invalid, "INVALID_FIELD");

    // A second message that makes no sense ends the leg.
    let mut second = DecodeLeg::reserve(&decode, good()).await.expect("reserved").1;
    second.send(Request::Run(good())).await;
    check(&second.answer().await.expect_err("refused"), invalid, "INVALID_FIELD");

    drop(leg);
    prefill.idle().await;
    decode.idle().await;
    // Both live.
    let mut leg = DecodeLeg::open(&decode, Request::Run(good())).await.expect("taken");
    assert_eq!(leg.answer().await.expect("answered").tokens, local(&prompt(20, 1), 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_that_lies_is_rejected_by_the_decode_node() {
    let router = Router::start().await;
    let (prefill, decode) = (
        TestNode::prefill("p", &router).await,
        TestNode::decode("d", &router).await,
    );
    for (lie, reject) in [
        (
            Box::new(|ticket: &mut pb::Ticket| ticket.capability = vec![0; 32]) as Box<dyn Fn(&mut pb::Ticket)>,
            "BAD_CAPABILITY",
        ),
        (Box::new(|ticket| ticket.epoch = vec![0; 16]), "STALE_EPOCH"),
        (Box::new(|ticket| ticket.handoff_id += 99), "UNKNOWN_HANDOFF"),
        (Box::new(|ticket| ticket.slots[0].generation += 1), "STALE_GENERATION"),
    ] {
        let work = work(prompt(20, 1), 5);
        let (mut ticket, leg) = DecodeLeg::reserve(&decode, work.clone()).await.expect("reserved");
        lie(&mut ticket);
        let mut running = PrefillLeg::run(&prefill, work, ticket).await.expect("taken");
        let status = running.done().await.expect_err("rejected");
        check(&status, Code::Aborted, "HANDOFF_REJECTED");
        assert_eq!(status::metadata(&status, "reject").as_deref(), Some(reject));
        drop(leg);
        prefill.idle().await;
        decode.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_that_the_router_drops_comes_back() {
    let router = Router::start().await;
    let decode = TestNode::decode("d", &router).await;
    let (_, leg) = DecodeLeg::reserve(&decode, work(prompt(100, 1), 20))
        .await
        .expect("reserved");
    router.wait("d", "granted", |node| node.load.granted_blocks == 13).await;
    drop(leg);
    decode.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_drops_the_prefill_mid_push_ends_both_legs() {
    let router = Router::start().await;
    let (steps, engine) = gated();
    let prefill = TestNode::prefill_with("p", &router, engine).await;
    let decode = TestNode::decode("d", &router).await;
    let (mut decoding, running) = mid_push(&prefill, &decode, &steps).await;
    // Before the push has opened its stream, the lease would be all that ends the reservation.
    decode.pushed_to().await;
    drop(running);
    // The engine still stands: the push cannot end before the node hears that its router has gone.
    let status = decoding.answer().await.expect_err("the sender is gone");
    check(&status, Code::Unavailable, "PEER_LOST");
    drop(steps);
    prefill.idle().await;
    decode.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_drops_the_decode_leg_mid_push_ends_the_prefill() {
    let router = Router::start().await;
    let (steps, engine) = gated();
    let prefill = TestNode::prefill_with("p", &router, engine).await;
    let decode = TestNode::decode("d", &router).await;
    let (decoding, mut running) = mid_push(&prefill, &decode, &steps).await;
    drop(decoding);
    // The engine still stands: the prefill is ended by the refusal, and not by its own end.
    let status = running.done().await.expect_err("refused");
    check(&status, Code::Aborted, "HANDOFF_REJECTED");
    decode.idle().await;
    drop(steps);
    prefill.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_leg_dropped_while_it_decodes_comes_back() {
    let router = Router::start().await;
    let (steps, engine) = gated();
    let prefill = TestNode::prefill("p", &router).await;
    let decode = TestNode::decode_with("d", &router, engine, |_| {}).await;
    let work = work(prompt(50, 1), 300);
    let (ticket, mut decoding) = DecodeLeg::reserve(&decode, work.clone()).await.expect("reserved");
    PrefillLeg::run(&prefill, work, ticket)
        .await
        .expect("taken")
        .done()
        .await
        .expect("pushed");
    assert!(matches!(decoding.next().await, Ok(Event::Verified(_))));
    let Ok(Event::Tokens(first)) = decoding.next().await else {
        panic!("no first token")
    };
    assert_eq!((first.index, first.ids), (0, local(&prompt(50, 1), 1)));
    drop(decoding);
    drop(steps);
    decode.idle().await;
    prefill.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_node_that_dies_mid_push_costs_the_prefill_nothing_but_the_request() {
    let router = Router::start().await;
    let (steps, engine) = gated();
    let prefill = TestNode::prefill_with("p", &router, engine).await;
    let decode = TestNode::decode("d", &router).await;
    let (decoding, mut running) = mid_push(&prefill, &decode, &steps).await;
    decode.kill();
    router.gone("d").await;
    drop(decoding);
    // The engine still stands in its second chunk.
    let status = running.done().await.expect_err("the peer is dead");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(
        ["PEER_LOST", "PEER_UNREACHABLE"].contains(&status::reason(&status).expect("a reason").as_str()),
        "{status:?}"
    );
    assert!(status::retry_after(&status).is_some(), "another decode node helps");
    drop(steps);
    prefill.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_node_that_dies_mid_push_costs_the_decode_node_nothing_but_the_request() {
    let router = Router::start().await;
    let (steps, engine) = gated();
    let prefill = TestNode::prefill_with("p", &router, engine).await;
    let decode = TestNode::decode_with("d", &router, Box::new(simulated()), |config| config.lease_ms = 1_000).await;
    let (mut decoding, running) = mid_push(&prefill, &decode, &steps).await;
    prefill.kill();
    drop(running);
    let status = decoding.answer().await.expect_err("the peer is dead");
    assert!(
        ["PEER_LOST", "LEASE_ENDED"].contains(&status::reason(&status).expect("a reason").as_str()),
        "{status:?}"
    );
    decode.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_nobody_renews_ends() {
    let router = Router::start().await;
    let decode = TestNode::decode_with("d", &router, Box::new(simulated()), |config| config.lease_ms = 100).await;
    let (_, mut leg) = DecodeLeg::reserve(&decode, work(prompt(100, 1), 20))
        .await
        .expect("reserved");
    let status = leg.answer().await.expect_err("ended");
    check(&status, Code::DeadlineExceeded, "LEASE_ENDED");
    decode.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_the_router_renews_lasts_until_the_deadline() {
    let router = Router::start().await;
    let decode = TestNode::decode_with("d", &router, Box::new(simulated()), |config| config.lease_ms = 1_000).await;
    let mut short = work(prompt(100, 1), 20);
    short.deadline_ms = 2_500;
    let started = Instant::now();
    let (_, mut leg) = DecodeLeg::reserve(&decode, short).await.expect("reserved");
    let mut every = tokio::time::interval(Duration::from_millis(50));
    let status = loop {
        tokio::select! {
            event = leg.next() => break event.expect_err("ended"),
            _ = every.tick() => leg.send(Request::Renew(pb::Renew {})).await,
        }
    };
    check(&status, Code::DeadlineExceeded, "DEADLINE");
    let lasted = started.elapsed();
    assert!(
        lasted >= Duration::from_millis(2_000),
        "longer than one lease: {lasted:?}"
    );
    decode.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_what_runs() {
    let router = Router::start().await;
    let (steps, engine) = gated();
    let decode = TestNode::decode_with("d", &router, engine, |_| {}).await;
    let mut short = work(prompt(50, 1), 20);
    short.deadline_ms = 100;
    let mut leg = DecodeLeg::open(&decode, Request::Run(short)).await.expect("taken");
    check(
        &leg.answer().await.expect_err("ended"),
        Code::DeadlineExceeded,
        "DEADLINE",
    );
    drop(steps);
    decode.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pool_is_told_with_a_time_to_retry() {
    let router = Router::start().await;
    let decode = TestNode::decode("d", &router).await;
    let (_, leg) = DecodeLeg::reserve(&decode, work(prompt(380, 1), 20))
        .await
        .expect("reserved");
    let status = opened(&decode, Request::Reserve(work(prompt(380, 2), 20))).await;
    check(&status, Code::ResourceExhausted, "KV_EXHAUSTED");
    assert!(status::retry_after(&status).is_some());
    drop(leg);
    decode.idle().await;
    DecodeLeg::reserve(&decode, work(prompt(380, 2), 20))
        .await
        .expect("there is room again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_node_finishes_what_it_has_and_takes_no_more() {
    let router = Router::start().await;
    let (steps, engine) = gated();
    let mut decode = TestNode::decode_with("d", &router, engine, |_| {}).await;
    assert_eq!(decode.health().await as i32, 1, "serving");
    let mut leg = DecodeLeg::open(&decode, Request::Run(work(prompt(20, 1), 10)))
        .await
        .expect("taken");
    decode.drain();
    router
        .wait("d", "draining", |node| node.phase() == pb::Phase::Draining)
        .await;
    check(
        &opened(&decode, Request::Run(work(prompt(20, 1), 10))).await,
        Code::Unavailable,
        "DRAINING",
    );
    drop(steps);
    assert_eq!(leg.answer().await.expect("answered").tokens, local(&prompt(20, 1), 10));
    decode.ended().await.expect("a clean end");
    router.gone("d").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_engine_ends_its_requests_and_its_node() {
    let router = Router::start().await;
    let (steps, engine) = gated();
    let mut decode = TestNode::decode_with("d", &router, engine, |_| {}).await;
    let mut running = DecodeLeg::open(&decode, Request::Run(work(prompt(20, 1), 10)))
        .await
        .expect("taken");
    let (_, mut reserved) = DecodeLeg::reserve(&decode, work(prompt(20, 2), 10))
        .await
        .expect("reserved");
    steps
        .send(Err(StepError::Lost("the device fell off".into())))
        .expect("the engine lives");
    check(
        &running.answer().await.expect_err("lost"),
        Code::Unavailable,
        "ENGINE_LOST",
    );
    check(
        &reserved.answer().await.expect_err("lost"),
        Code::Unavailable,
        "ENGINE_LOST",
    );
    let ended = decode.ended().await;
    assert!(matches!(ended, Err(NodeError::EngineLost)), "{ended:?}");
    router.gone("d").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_step_ends_its_request_and_the_node_goes_on() {
    let router = Router::start().await;
    let (steps, engine) = gated();
    let decode = TestNode::decode_with("d", &router, engine, |_| {}).await;
    let mut leg = DecodeLeg::open(&decode, Request::Run(work(prompt(20, 1), 10)))
        .await
        .expect("taken");
    steps.send(Err(StepError::Plan("no".into()))).expect("the engine lives");
    check(
        &leg.answer().await.expect_err("refused"),
        Code::Internal,
        "STEP_REFUSED",
    );
    drop(steps);
    let mut leg = DecodeLeg::open(&decode, Request::Run(work(prompt(20, 1), 10)))
        .await
        .expect("taken");
    assert_eq!(leg.answer().await.expect("answered").tokens, local(&prompt(20, 1), 10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_comes_back_is_joined_again() {
    let router = Router::start().await;
    let decode = TestNode::decode("d", &router).await;
    let mut leg = DecodeLeg::open(&decode, Request::Run(work(prompt(40, 1), 2)))
        .await
        .expect("taken");
    leg.answer().await.expect("answered");
    let before = router.wait("d", "named", |node| node.names.len() == 5).await;
    let address = router.stop().await;
    let listener = soon("the port", async {
        loop {
            match TcpListener::bind(&address).await {
                Ok(listener) => return listener,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    })
    .await;
    let router = Router::listen(listener).await;
    // It learns everything from the snapshot.
    let after = router.wait("d", "back", |node| node.names.len() == 5).await;
    assert_eq!((after.names, after.hello.epoch), (before.names, before.hello.epoch));
}
