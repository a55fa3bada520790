//! Requests for several answers.

use baton_node::status;
use baton_proto::{
    node::v1 as pb,
    v1::{self as api, finished::Matched, generate_event::Event},
};
use tonic::Code;

use super::harness::{Answer, DecodeCall, Node, Router, Whole, ids, prompt, router, router_with, stopping};

fn several(n: u32, request: api::GenerateRequest) -> api::GenerateRequest {
    api::GenerateRequest {
        sampling: Some(api::Sampling {
            n: Some(n),
            seed: Some(11),
            temperature: Some(1.0),
            ..api::Sampling::default()
        }),
        ..request
    }
}

/// Reads on to the end, which must be good: the choices by index.
async fn finish(answer: &mut Answer, n: usize) -> Vec<Whole> {
    let mut parts = vec![(Vec::new(), String::new(), None); n];
    loop {
        match answer.next().await.expect("it ends well") {
            Some(Event::Delta(delta)) => {
                let (ids, text, finished) = &mut parts[delta.choice as usize];
                assert!(finished.is_none() && delta.index as usize == ids.len());
                ids.extend(delta.ids);
                text.push_str(&delta.text);
            }
            Some(Event::Finished(finished)) => {
                let (_, _, slot) = &mut parts[finished.choice as usize];
                assert!(slot.replace(finished).is_none(), "a choice finishes once");
            }
            Some(Event::Started(_)) => panic!("it has started"),
            None => break,
        }
    }
    let whole = parts.into_iter().map(|(ids, text, finished)| Whole {
        ids,
        text,
        logprobs: Vec::new(),
        top_logprobs: Vec::new(),
        finished: finished.expect("every choice finishes"),
    });
    whole.collect()
}

/// The other choices, on the decode node that has drawn the first token, by choice.
async fn others(decode: &mut Node<DecodeCall>, first: &pb::Work, count: usize) -> Vec<DecodeCall> {
    let mut calls = Vec::new();
    for _ in 0..count {
        let call = decode.call().await;
        let (work, reserve) = call.work();
        assert!(!reserve, "it runs where the prompt's blocks lie");
        assert_eq!(work.prompt, first.prompt);
        assert_ne!(work.request_id, first.request_id);
        call.admitted().await;
        calls.push(call);
    }
    let choice = |call: &DecodeCall| call.work().0.sampling.as_ref().expect("sampling").choice;
    calls.sort_by_key(choice);
    for (call, expected) in calls.iter().zip(1..) {
        assert_eq!(choice(call), expected);
        assert_eq!(call.work().0.sampling.as_ref().map(|sampling| sampling.seed), Some(11));
    }
    calls
}

/// A request of three choices: the first has drawn a token, the others are under way.
struct Three {
    router: Router,
    decode: Node<DecodeCall>,
    answer: Answer,
    calls: Vec<DecodeCall>,
}

async fn three(request: api::GenerateRequest) -> Three {
    let router = router().await;
    let mut prefill = router.prefill_node("prefill-0").await;
    let mut decode = router.decode_node("decode-0").await;
    let mut answer = router.generate(several(3, request)).await.expect("admitted");
    let started = answer.started().await;
    let open = decode.call().await;
    let (work, reserve) = open.work();
    let work = work.clone();
    assert!(reserve);
    assert_eq!(work.sampling.as_ref().map(|sampling| sampling.choice), Some(0));
    let hex: String = work.request_id.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, started.request_id);
    open.ticket(&decode.address).await;
    let run = prefill.call().await;
    run.started().await;
    open.verified().await;
    let held = |admission: &crate::core::admission::Admission| admission.requests() == 3 && admission.waiting() == 0;
    router.knows("two that are held", held).await;
    open.tokens(0, &ids("!")[..1]).await;
    run.done(ids("!")[0], pb::EndReason::Unspecified).await;
    let mut calls = others(&mut decode, &work, 2).await;
    calls.insert(0, open);
    Three {
        router,
        decode,
        answer,
        calls,
    }
}

#[tokio::test]
async fn the_prompt_is_handed_over_once_and_each_choice_ends_for_itself() {
    let stop = api::Stopping {
        stop: vec!["three".to_owned()],
        ..api::Stopping::default()
    };
    let mut run = three(stopping(prompt("Count"), stop)).await;
    let [first, second, third] = &run.calls[..] else {
        panic!("three calls");
    };
    let counted = ids("One two three");
    third.tokens(0, &counted[..2]).await;
    first.tokens(1, &ids(" yes")).await;
    third.tokens(2, &counted[2..]).await;
    third.closed().await;
    let eos = super::harness::text().eos_ids[0];
    second.tokens(0, &ids("no")).await;
    second.tokens(1, &[eos]).await;
    second.ended(pb::EndReason::Stop).await;
    first.ended(pb::EndReason::Length).await;

    let whole = finish(&mut run.answer, 3).await;
    let texts: Vec<&str> = whole.iter().map(|whole| whole.text.as_str()).collect();
    assert_eq!(texts, ["! yes", "no", "One two "]);
    let matched = |whole: &Whole| (whole.finished.reason(), whole.finished.matched.clone());
    assert_eq!(matched(&whole[0]), (api::FinishReason::Length, None));
    assert_eq!(
        matched(&whole[1]),
        (api::FinishReason::Stop, Some(Matched::StopTokenId(eos)))
    );
    let stop = Matched::Stop("three".to_owned());
    assert_eq!(matched(&whole[2]), (api::FinishReason::Stop, Some(stop)));
    let usage = whole.iter().map(|whole| {
        let usage = whole.finished.usage.expect("usage");
        (
            usage.prompt_tokens as usize,
            usage.completion_tokens,
            usage.cached_tokens,
        )
    });
    assert_eq!(
        usage.collect::<Vec<_>>(),
        [(ids("Count").len(), 2, 1), (0, 2, 0), (0, 3, 0)]
    );
    let served = whole.iter().map(|whole| {
        let served = whole.finished.served.clone().expect("served");
        (served.prefill_node, served.decode_node, served.kv_blocks)
    });
    let decode = || run.decode.name.clone();
    let local = || (String::new(), decode(), 0);
    assert_eq!(
        served.collect::<Vec<_>>(),
        [("prefill-0".to_owned(), decode(), 1), local(), local()]
    );
    run.router.is_idle().await;
    let metrics = run.router.metrics().await;
    for line in [
        r#"baton_requests_total{outcome="ok"} 1"#,
        "baton_requests_in_flight 0",
        r#"baton_tokens_total{kind="completion"} 7"#,
        &format!(r#"baton_tokens_total{{kind="prompt"}} {}"#, ids("Count").len()),
        "baton_ttft_seconds_count 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} in {metrics}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_cancels_every_choice() {
    let run = three(prompt("Count")).await;
    drop(run.answer);
    for call in &run.calls {
        call.closed().await;
    }
    run.router.is_idle().await;
}

#[tokio::test]
async fn a_choice_that_fails_ends_the_request() {
    let mut run = three(prompt("Count")).await;
    run.calls[0].ended(pb::EndReason::Length).await;
    run.calls[2]
        .fail(status::error(Code::Internal, "DEFECT", "it broke").build())
        .await;
    let mut complete = 0;
    let status = loop {
        match run.answer.next().await {
            Ok(Some(Event::Finished(finished))) => complete += u32::from(finished.choice == 0),
            Ok(Some(_)) => {}
            Ok(None) => panic!("it must fail"),
            Err(status) => break status,
        }
    };
    assert!(complete <= 1 && matches!(run.answer.next().await, Ok(None)));
    assert_eq!(status::reason(&status).as_deref(), Some("NODE_FAILED"));
    run.calls[1].closed().await;
    run.router.is_idle().await;
    let metrics = run.router.metrics().await;
    let requests: Vec<&str> = metrics
        .lines()
        .filter(|line| line.starts_with("baton_requests_total{"))
        .collect();
    assert_eq!(requests, [r#"baton_requests_total{outcome="NODE_FAILED"} 1"#]);
}

#[tokio::test]
async fn a_first_choice_that_fails_takes_those_with_it_that_are_held() {
    let router = router().await;
    let mut decode = router.decode_node("decode-0").await;
    let mut answer = router.generate(several(4, prompt("Count"))).await.expect("admitted");
    let open = decode.call().await;
    open.admitted().await;
    open.fail(status::error(Code::Internal, "DEFECT", "it broke").build())
        .await;
    let status = answer.failure().await;
    assert_eq!(status::reason(&status).as_deref(), Some("NODE_FAILED"));
    router.is_idle().await;
}

#[tokio::test]
async fn first_tokens_that_end_every_choice_need_no_decode_node() {
    let router = router().await;
    let mut prefill = router.prefill_node("prefill-0").await;
    let mut decode = router.decode_node("decode-0").await;
    let stop = api::Stopping {
        max_tokens: Some(1),
        ..api::Stopping::default()
    };
    let request = several(2, stopping(prompt("Hello"), stop));
    let mut answer = router.generate(request).await.expect("admitted");
    answer.started().await;
    for choice in 0..2 {
        let open = decode.call().await;
        let (work, reserve) = open.work();
        assert_eq!(
            (reserve, work.sampling.as_ref().map(|sampling| sampling.choice)),
            (true, Some(choice))
        );
        open.ticket(&decode.address).await;
        let run = prefill.call().await;
        run.started().await;
        run.done(ids(" there")[0], pb::EndReason::Length).await;
        open.closed().await;
    }
    let whole = finish(&mut answer, 2).await;
    assert!(whole.iter().all(|whole| whole.text == " there"));
    router.is_idle().await;
}

#[tokio::test]
async fn more_choices_than_may_ever_wait_are_refused() {
    for (max_queue, n) in [(8, 0), (8, 9), (64, 17), (64, u32::MAX)] {
        let router = router_with(|config| config.admission.max_queue = max_queue).await;
        let _decode = router.decode_node("decode-0").await;
        let status = router.generate(several(n, prompt("Hello"))).await.map(|_| ());
        let status = status.expect_err("refused");
        let found = (status.code(), status::field(&status));
        assert_eq!(
            found,
            (Code::InvalidArgument, Some("sampling.n".to_owned())),
            "{status:?}"
        );
    }
}
