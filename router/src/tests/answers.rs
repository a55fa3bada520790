//! Requests that are answered.

use baton_kv::{BlockName, KvIdentity, Salt};
use baton_proto::{
    node::v1 as pb,
    v1::{self as api, finished::Matched},
};

use super::harness::{IDENTITY, ids, prompt, router, soon, stopping, text};

#[tokio::test]
async fn a_handoff_from_end_to_end() {
    let router = router().await;
    let mut prefill = router.prefill_node("prefill-0").await;
    let mut decode = router.decode_node("decode-0").await;
    let request = api::GenerateRequest {
        sampling: Some(api::Sampling {
            temperature: Some(0.5),
            top_k: Some(40),
            seed: Some(11),
            repetition_penalty: Some(1.5),
            presence_penalty: Some(0.5),
            frequency_penalty: Some(-0.5),
            logit_bias: [(3, -100.0), (4, 2.0)].into(),
            ..api::Sampling::default()
        }),
        output: Some(api::Output {
            logprobs: Some(true),
            top_logprobs: Some(2),
        }),
        ..stopping(
            prompt("The capital of France is"),
            api::Stopping {
                max_tokens: Some(3),
                stop_token_ids: vec![5],
                ..api::Stopping::default()
            },
        )
    };
    let mut answer = router.generate(request).await.expect("admitted");
    let started = answer.started().await;
    let prompt_ids = ids("The capital of France is");
    assert_eq!((started.model, started.seed), (text().name, 11));
    assert_eq!(started.prompt_tokens as usize, prompt_ids.len());

    let open = decode.call().await;
    let (work, reserve) = open.work();
    let work = work.clone();
    assert!(reserve);
    assert_eq!((&work.prompt, work.attempt, work.max_new_tokens), (&prompt_ids, 1, 3));
    let hex: String = work.request_id.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, started.request_id);
    assert!(work.stop_ids.contains(&5) && text().eos_ids.iter().all(|id| work.stop_ids.contains(id)));
    let root = BlockName::root(&KvIdentity(IDENTITY), &Salt::derive(&[1; 32], "default"));
    assert_eq!(work.root, root.0);
    let sampling = pb::Sampling {
        temperature: 0.5,
        top_k: 40,
        top_p: 1.0,
        min_p: 0.0,
        seed: 11,
        choice: 0,
        repetition_penalty: 1.5,
        presence_penalty: 0.5,
        frequency_penalty: -0.5,
        logit_bias: [(3, -100.0), (4, 2.0)].into(),
        top_logprobs: 2,
    };
    assert_eq!(work.sampling, Some(sampling));
    open.ticket(&decode.address).await;

    let run = prefill.call().await;
    let theirs = run.request.work.clone().expect("work");
    assert_eq!(
        pb::Work {
            deadline_ms: work.deadline_ms,
            ..theirs.clone()
        },
        work
    );
    assert!(theirs.deadline_ms <= work.deadline_ms);
    assert_eq!(run.request.ticket.as_ref().map(|ticket| ticket.handoff_id), Some(1));
    run.started().await;
    open.verified().await;
    let paris = ids(" Paris, France");
    open.tokens(0, &paris[..1]).await;
    run.done(paris[0], pb::EndReason::Unspecified).await;
    open.tokens(1, &paris[1..3]).await;
    open.ended(pb::EndReason::Length).await;

    let whole = answer.finish().await;
    assert_eq!(
        (whole.ids.as_slice(), whole.text.as_str()),
        (&paris[..3], " Paris, France")
    );
    assert_eq!(whole.logprobs, [-0.25; 3]);
    let alternatives = |&id: &u32| vec![(id, -0.25), (id + 1, -1.0)];
    assert_eq!(
        whole.top_logprobs,
        paris[..3].iter().map(alternatives).collect::<Vec<_>>()
    );
    let finished = whole.finished;
    assert_eq!((finished.reason(), finished.matched), (api::FinishReason::Length, None));
    let usage = api::Usage {
        prompt_tokens: prompt_ids.len() as u32,
        completion_tokens: 3,
        cached_tokens: 1,
    };
    assert_eq!(finished.usage, Some(usage));
    let served = api::Served {
        router: "router-test".to_owned(),
        prefill_node: prefill.name.clone(),
        decode_node: decode.name.clone(),
        kv_bytes: 4_096,
        kv_blocks: 1,
        attempts: 1,
        transport: "shm".to_owned(),
    };
    assert_eq!(finished.served, Some(served));
    let metrics = router.metrics().await;
    for (kind, rate) in [("achieved", "1000000000.0"), ("predicted", "2000000000.0")] {
        let sample = format!("baton_handoff_bytes_per_second{{transport=\"shm\",kind=\"{kind}\"}} {rate}");
        assert!(metrics.contains(&sample), "{sample} in {metrics}");
    }
    let timings = finished.timings.expect("timings");
    assert_eq!(
        (timings.prefill_ms, timings.transfer_ms, timings.first_step_ms),
        (20.0, 5.0, 3.0)
    );
    assert!(
        timings.queue_ms >= 2.0 && timings.ttft_ms > 0.0 && timings.total_ms >= timings.ttft_ms,
        "{timings:?}"
    );
    router.is_idle().await;
}

#[tokio::test]
async fn without_prefill_nodes_the_decode_node_runs_the_prompt() {
    let router = router().await;
    let mut decode = router.decode_node("decode-0").await;
    let mut answer = router.generate(prompt("Hello")).await.expect("admitted");
    let open = decode.call().await;
    let (work, reserve) = open.work();
    assert!(!reserve);
    assert_eq!(work.max_new_tokens as usize, 2_048 - work.prompt.len());
    open.admitted().await;
    let eos = text().eos_ids[0];
    open.tokens(0, &ids("!")).await;
    open.tokens(1, &[eos]).await;
    open.ended(pb::EndReason::Stop).await;
    answer.started().await;
    let whole = answer.finish().await;
    assert_eq!(whole.text, "!");
    assert!(whole.logprobs.is_empty() && whole.top_logprobs.is_empty());
    assert_eq!(whole.finished.matched, Some(Matched::StopTokenId(eos)));
    let served = whole.finished.served.expect("served");
    assert_eq!(
        (served.prefill_node.as_str(), served.transport.as_str(), served.kv_bytes),
        ("", "local", 0)
    );
    assert_eq!(whole.finished.timings.expect("timings").prefill_ms, 12.0);
}

#[tokio::test]
async fn a_first_token_that_ends_the_answer_needs_no_decode_node() {
    let router = router().await;
    let mut prefill = router.prefill_node("prefill-0").await;
    let mut decode = router.decode_node("decode-0").await;
    let stop = api::Stopping {
        max_tokens: Some(1),
        ..api::Stopping::default()
    };
    let mut answer = router
        .generate(stopping(prompt("Hello"), stop))
        .await
        .expect("admitted");
    let open = decode.call().await;
    open.ticket(&decode.address).await;
    let run = prefill.call().await;
    run.started().await;
    let token = ids(" there")[0];
    run.done(token, pb::EndReason::Length).await;
    open.closed().await;
    answer.started().await;
    let whole = answer.finish().await;
    assert_eq!((whole.ids, whole.text.as_str()), (vec![token], " there"));
    let served = whole.finished.served.expect("served");
    assert_eq!(
        (served.prefill_node.as_str(), served.decode_node.as_str()),
        ("prefill-0", "")
    );
    router.is_idle().await;
}

#[tokio::test]
async fn a_stop_string_across_tokens_ends_the_answer_before_it() {
    let router = router().await;
    let mut decode = router.decode_node("decode-0").await;
    let stop = api::Stopping {
        stop: vec!["zzz".to_owned(), "wo th".to_owned()],
        ..api::Stopping::default()
    };
    let mut answer = router
        .generate(stopping(prompt("Count"), stop))
        .await
        .expect("admitted");
    answer.started().await;
    let open = decode.call().await;
    open.admitted().await;
    let all = ids("One two three");
    assert_eq!(all.len(), 3, "one token per word");
    open.tokens(0, &all[..1]).await;
    open.tokens(1, &all[1..2]).await;
    // Held back: it may begin the stop string.
    assert_eq!(answer.delta().await.text, "One");
    let held = answer.delta().await;
    assert_eq!((held.text.as_str(), held.ids.as_slice()), (" t", &all[1..2]));
    open.tokens(2, &all[2..]).await;
    open.closed().await;
    let last = answer.delta().await;
    assert_eq!(
        (last.index, last.text.as_str(), last.ids.as_slice()),
        (2, "", &all[2..])
    );
    let Ok(Some(api::generate_event::Event::Finished(finished))) = answer.next().await else {
        panic!("an end was due");
    };
    assert_eq!(finished.reason(), api::FinishReason::Stop);
    assert_eq!(finished.matched, Some(Matched::Stop("wo th".to_owned())));
    assert_eq!(finished.usage.expect("usage").completion_tokens, 3);
    router.is_idle().await;
}

#[tokio::test]
async fn what_was_held_back_is_released_at_the_end() {
    let router = router().await;
    let mut decode = router.decode_node("decode-0").await;
    let stop = api::Stopping {
        stop: vec!["two four".to_owned()],
        ..api::Stopping::default()
    };
    let mut answer = router
        .generate(stopping(prompt("Count"), stop))
        .await
        .expect("admitted");
    let open = decode.call().await;
    open.admitted().await;
    open.tokens(0, &ids("One two")).await;
    open.ended(pb::EndReason::Length).await;
    answer.started().await;
    let whole = answer.finish().await;
    assert_eq!(
        (whole.text.as_str(), whole.finished.reason()),
        ("One two", api::FinishReason::Length)
    );
}

#[tokio::test]
async fn a_drawn_seed_is_reported_and_used() {
    let router = router().await;
    let mut decode = router.decode_node("decode-0").await;
    let mut seeds = Vec::new();
    for _ in 0..2 {
        let mut answer = router.generate(prompt("Hello")).await.expect("admitted");
        let started = answer.started().await;
        let open = decode.call().await;
        assert_eq!(open.work().0.sampling.as_ref().expect("sampling").seed, started.seed);
        seeds.push(started.seed);
        drop(answer);
        open.closed().await;
    }
    assert_ne!(seeds[0], seeds[1]);
}

#[tokio::test]
async fn a_node_without_room_sends_the_request_to_another() {
    let router = router().await;
    let mut first = router.decode_node("decode-0").await;
    let mut answer = router.generate(prompt("Hello")).await.expect("admitted");
    let open = first.call().await;
    let mut second = router.decode_node("decode-1").await;
    open.fail(baton_node::status::shed("full", std::time::Duration::from_secs(1)))
        .await;
    let open = second.call().await;
    assert_eq!(open.work().0.attempt, 2);
    open.admitted().await;
    open.tokens(0, &ids("!")).await;
    open.ended(pb::EndReason::Length).await;
    answer.started().await;
    let served = answer.finish().await.finished.served.expect("served");
    assert_eq!((served.decode_node.as_str(), served.attempts), ("decode-1", 2));
    router.is_idle().await;
}

#[tokio::test]
async fn the_router_renews_the_lease_until_the_prefill_node_starts() {
    let router = router().await;
    let mut prefill = router.prefill_node("prefill-0").await;
    let mut decode = router.decode_node("decode-0").await;
    let mut answer = router.generate(prompt("Hello")).await.expect("admitted");
    let mut open = decode.call().await;
    open.ticket_of(&decode.address, 60).await;
    for _ in 0..3 {
        let message = soon("a renewal", open.requests.message()).await.expect("open");
        let request = message.and_then(|message| message.request);
        assert!(
            matches!(request, Some(pb::decode_request::Request::Renew(_))),
            "{request:?}"
        );
    }
    let run = prefill.call().await;
    run.started().await;
    open.verified().await;
    let token = ids("!")[0];
    open.tokens(0, &[token]).await;
    open.ended(pb::EndReason::Length).await;
    run.done(token, pb::EndReason::Unspecified).await;
    answer.started().await;
    assert_eq!(answer.finish().await.text, "!");
}
