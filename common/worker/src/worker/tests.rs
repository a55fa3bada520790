use std::sync::Arc;

use baton_engine::StepError;
use baton_kv::KvEventKind;
use baton_node::clock;
use baton_scheduler::{FinishReason, SubmitError};
use baton_transfer::{AbortReason, ReserveError};

use super::*;
use crate::{HeldBlocks, KvChange, Update, testing::*};

/// What one engine alone answers, step by step.
async fn expected(prompt: Vec<u32>, count: usize) -> Vec<u32> {
    let (worker, _) = start(Box::new(engine()), config());
    let mut stream = worker
        .submit(work(&worker, prompt, count), Role::Decode)
        .expect("taken");
    tokens(&mut stream).await.expect("runs")
}

#[tokio::test]
async fn a_sequence_runs_to_its_end_and_gives_everything_back() {
    let (worker, _) = start(Box::new(engine()), config());
    let mut stream = worker
        .submit(work(&worker, prompt(20, 1), 5), Role::Decode)
        .expect("taken");
    assert!(matches!(
        next(&mut stream).await,
        Ok(Update::Started { cached_tokens: 0, .. })
    ));
    assert_eq!(tokens(&mut stream).await.expect("runs").len(), 5);
    idle(&worker).await;

    // Again: its full blocks are found, and the answer is the same.
    let mut again = worker
        .submit(work(&worker, prompt(20, 1), 5), Role::Decode)
        .expect("taken");
    assert!(matches!(
        next(&mut again).await,
        Ok(Update::Started { cached_tokens: 16, .. })
    ));
    assert_eq!(
        tokens(&mut again).await.expect("runs"),
        expected(prompt(20, 1), 5).await
    );
    idle(&worker).await;
}

#[tokio::test]
async fn many_at_once_answer_as_each_alone() {
    let (worker, _) = start(Box::new(engine()), config());
    let mut streams = Vec::new();
    for seed in 0..4 {
        let work = work(&worker, prompt(30 + seed as usize, seed), 12);
        streams.push((seed, worker.submit(work, Role::Decode).expect("taken")));
    }
    for (seed, mut stream) in streams {
        let alone = expected(prompt(30 + seed as usize, seed), 12).await;
        assert_eq!(tokens(&mut stream).await.expect("runs"), alone, "sequence {seed}");
    }
    idle(&worker).await;
}

#[tokio::test]
async fn dropping_a_stream_cancels_wherever_the_sequence_is() {
    let (script, engine) = scripted();
    let (worker, _) = start(engine, config());
    // Running, in a step that waits for the test.
    let running = worker
        .submit(work(&worker, prompt(20, 1), 300), Role::Decode)
        .expect("taken");
    load_where(&worker, "running", |load| load.scheduler.running == 1).await;
    // Waiting behind it.
    let waiting = worker
        .submit(work(&worker, prompt(20, 2), 300), Role::Decode)
        .expect("taken");
    assert_eq!(worker.load().sequences, 2);
    drop((running, waiting));
    script.send(Script::Step).expect("the engine waits");
    idle(&worker).await;
}

#[tokio::test]
async fn a_slow_reader_loses_its_own_sequence_only() {
    let (worker, _) = start(
        Box::new(engine()),
        WorkerConfig {
            max_updates: 4,
            ..config()
        },
    );
    let mut slow = worker
        .submit(work(&worker, prompt(20, 1), 100), Role::Decode)
        .expect("taken");
    // It is cut without being read: its blocks are back.
    idle(&worker).await;
    let mut read = 0;
    let error = loop {
        match next(&mut slow).await {
            Ok(_) => read += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((read, error), (4, SequenceError::SlowReader));
    // Nobody else is harmed.
    let mut other = worker
        .submit(work(&worker, prompt(20, 2), 1), Role::Decode)
        .expect("taken");
    assert_eq!(tokens(&mut other).await.expect("runs").len(), 1);
}

#[tokio::test]
async fn a_failed_step_ends_its_sequences_and_the_node_goes_on() {
    for error in [StepError::Plan("too much".into()), StepError::NotFinite] {
        let (script, engine) = scripted();
        let (worker, _) = start(engine, config());
        let mut bad = worker
            .submit(work(&worker, prompt(20, 1), 4), Role::Decode)
            .expect("taken");
        script.send(Script::Fail(error.clone())).expect("sent");
        assert_eq!(
            tokens(&mut bad).await,
            Err(SequenceError::StepRefused(error.to_string()))
        );
        drop(script);
        let mut good = worker
            .submit(work(&worker, prompt(20, 1), 4), Role::Decode)
            .expect("taken");
        assert_eq!(tokens(&mut good).await.expect("runs"), expected(prompt(20, 1), 4).await);
        drop((bad, good));
        idle(&worker).await;
    }
}

#[tokio::test]
async fn a_lost_engine_ends_everything_with_a_typed_error() {
    for (how, last) in [
        ("lost", Script::Fail(StepError::Lost("gone".into()))),
        ("panic", Script::Panic),
    ] {
        let (script, engine) = scripted();
        let (worker, _) = start(engine, config());
        let mut running = worker
            .submit(work(&worker, prompt(20, 1), 4), Role::Decode)
            .expect("taken");
        let (_, mut reserved) = worker.reserve(work(&worker, prompt(20, 2), 4)).expect("reserved");
        script.send(last).expect("sent");
        assert_eq!(tokens(&mut running).await, Err(SequenceError::EngineLost), "{how}");
        assert_eq!(tokens(&mut reserved).await, Err(SequenceError::EngineLost), "{how}");
        soon("lost", worker.lost()).await;
        let refused = worker.submit(work(&worker, prompt(20, 1), 4), Role::Decode).err();
        assert_eq!(refused, Some(SequenceError::EngineLost), "{how}");
        assert!(worker.stop().await, "{how}");
    }
}

#[tokio::test]
async fn a_stopped_worker_ends_what_runs() {
    let (script, engine) = scripted();
    let (worker, _) = start(engine, config());
    let mut running = worker
        .submit(work(&worker, prompt(20, 1), 300), Role::Decode)
        .expect("taken");
    load_where(&worker, "running", |load| load.scheduler.running == 1).await;
    // Told to stop first, and then let go: it ends after the step that it is in.
    let (stopped, ()) = tokio::join!(worker.stop(), async { drop(script) });
    assert!(stopped);
    assert_eq!(tokens(&mut running).await, Err(SequenceError::EngineLost));
}

#[tokio::test]
async fn a_prefill_reports_its_blocks_and_they_stay_held_while_read() {
    let (worker, _) = start(Box::new(engine()), config());
    let mut stream = worker
        .submit(work(&worker, prompt(43, 1), 100), Role::Prefill)
        .expect("taken");
    let (mut holds, mut first_tokens, mut reported): (Vec<HeldBlocks>, Vec<u32>, usize) = Default::default();
    let reason = loop {
        match next(&mut stream).await.expect("runs") {
            Update::Computed {
                computed_tokens,
                table,
                hold,
            } => {
                assert!(computed_tokens > reported, "progress");
                assert!(table.len() * BLOCK_TOKENS >= computed_tokens);
                reported = computed_tokens;
                holds.push(hold);
            }
            Update::Token { token, .. } => first_tokens.push(token),
            Update::Finished { reason, .. } => break reason,
            Update::Started { .. } | Update::Layers { .. } | Update::Verified { .. } => {}
        }
    };
    assert_eq!((reported, reason), (43, FinishReason::Length));
    assert_eq!(first_tokens, expected(prompt(43, 1), 1).await);
    drop(stream);
    // The scheduler has let go; the reader has not.
    let load = load_where(&worker, "released", |load| load.sequences == 0).await;
    assert_eq!((load.held_reads, load.pool.held), (6, 6));
    drop(holds);
    idle(&worker).await;
}

#[tokio::test]
async fn a_prefill_finds_its_prefix_and_reports_it_first() {
    let (worker, _) = start(Box::new(engine()), config());
    let mut first = worker
        .submit(work(&worker, prompt(40, 1), 1), Role::Decode)
        .expect("taken");
    tokens(&mut first).await.expect("runs");
    let mut again = worker
        .submit(work(&worker, prompt(43, 1), 1), Role::Prefill)
        .expect("taken");
    assert!(matches!(
        next(&mut again).await,
        Ok(Update::Started { cached_tokens: 40, .. })
    ));
    assert!(matches!(
        next(&mut again).await,
        Ok(Update::Computed {
            computed_tokens: 40,
            ..
        })
    ));
    assert_eq!(
        tokens(&mut again).await.expect("runs"),
        expected(prompt(43, 1), 1).await
    );
    drop((first, again));
    idle(&worker).await;
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_with_its_reason() {
    let (script, engine) = scripted();
    let (worker, _) = start(engine, config());
    let refused = |prompt, count| worker.submit(work(&worker, prompt, count), Role::Decode).err();
    let too_long = SequenceError::Submit(SubmitError::TooLong {
        needed: 401,
        limit: 400,
    });
    assert_eq!(refused(prompt(100, 1), 301), Some(too_long.clone()));
    assert_eq!(worker.reserve(work(&worker, prompt(100, 1), 301)).err(), Some(too_long));
    assert_eq!(
        refused(Vec::new(), 1),
        Some(SequenceError::Submit(SubmitError::EmptyPrompt))
    );

    // One is in a step, which waits for the test: it does not wait in the queue, and nobody leaves that meanwhile.
    let first = worker
        .submit(work(&worker, prompt(20, 1), 1), Role::Decode)
        .expect("taken");
    load_where(&worker, "running", |load| load.scheduler.running == 1).await;
    let mut streams = vec![first];
    let full = SequenceError::Submit(SubmitError::QueueFull { limit: 4 });
    let error = loop {
        match worker.submit(work(&worker, prompt(20, 1), 1), Role::Decode) {
            Ok(stream) => streams.push(stream),
            Err(error) => break error,
        }
    };
    assert_eq!((streams.len(), error), (5, full.clone()));
    assert_eq!(worker.reserve(work(&worker, prompt(20, 1), 1)).err(), Some(full));
    drop((streams, script));
    idle(&worker).await;
}

#[tokio::test]
async fn a_pool_smaller_than_the_model_s_context_is_the_context() {
    let (worker, _) = start(Box::new(engine_with(6)), config());
    let limit = worker.facts().max_context;
    assert_eq!(limit, 6 * BLOCK_TOKENS);
    // Whoever asks for as much as there is gets it, and a token more is refused before anything is reserved or sent.
    let too_long = SequenceError::Submit(SubmitError::TooLong {
        needed: limit + 1,
        limit,
    });
    let more = work(&worker, prompt(20, 1), limit - 19);
    assert_eq!(worker.reserve(more.clone()).err(), Some(too_long.clone()));
    assert_eq!(worker.submit(more, Role::Decode).err(), Some(too_long));
    let (ticket, stream) = worker
        .reserve(work(&worker, prompt(20, 1), limit - 20))
        .expect("reserved");
    assert_eq!(ticket.slots.len(), 3);
    drop(stream);
    idle(&worker).await;
    let mut whole = worker
        .submit(work(&worker, prompt(20, 1), limit - 20), Role::Decode)
        .expect("taken");
    assert_eq!(tokens(&mut whole).await.expect("runs").len(), limit - 20);
}

#[tokio::test]
async fn a_full_pool_refuses_a_reservation() {
    let (worker, _) = start(Box::new(engine()), config());
    let (_, first) = worker.reserve(work(&worker, prompt(360, 1), 4)).expect("reserved");
    let refused = worker.reserve(work(&worker, prompt(360, 2), 4)).err();
    assert!(
        matches!(refused, Some(SequenceError::Reserve(ReserveError::OutOfBlocks(short))) if short.needed == 45),
        "{refused:?}"
    );
    drop(first);
    idle(&worker).await;
    worker
        .reserve(work(&worker, prompt(360, 2), 4))
        .expect("there is room again");
}

#[tokio::test]
async fn reservations_do_not_take_what_a_preempted_sequence_waits_for() {
    let (script, engine) = scripted_with(20);
    let (worker, _) = start(engine, config());
    let mut streams = [1, 2].map(|seed| {
        let work = work(&worker, prompt(30, seed), 60);
        worker.submit(work, Role::Decode).expect("taken")
    });
    // The older draws a token in each step, from its second on.
    let mut drawn = 0;
    script.send(Script::Step).expect("the engine lives");
    while worker.load().scheduler.preemptions == 0 {
        script.send(Script::Step).expect("the engine lives");
        while !matches!(next(&mut streams[0]).await.expect("runs"), Update::Token { .. }) {}
        drawn += 1;
    }
    // Blocks are free, but not as many as the preempted one needs and this one besides.
    let load = worker.load();
    assert!(
        load.pool.free + load.pool.cached > 1 && load.scheduler.waiting == 1,
        "{load:?}"
    );
    let refused = worker.reserve(work(&worker, prompt(1, 9), 4)).err();
    assert!(
        matches!(refused, Some(SequenceError::Reserve(ReserveError::OutOfBlocks(_)))),
        "{refused:?}"
    );
    drop(script);
    // Whoever keeps asking does not keep it out.
    let mut reservations = Vec::new();
    let pressed = async {
        for seed in 10.. {
            reservations.extend(worker.reserve(work(&worker, prompt(1, seed), 4)));
            tokio::task::yield_now().await;
        }
    };
    let answer = tokio::select! {
        answer = tokens(&mut streams[1]) => answer.expect("runs"),
        () = pressed => unreachable!("it never stops"),
    };
    assert_eq!(answer, expected(prompt(30, 2), 60).await);
    while matches!(next(&mut streams[0]).await.expect("runs"), Update::Token { .. }) {
        drawn += 1;
    }
    assert_eq!(drawn, 60);
    drop((streams, reservations));
    idle(&worker).await;
}

#[tokio::test]
async fn reservations_do_not_take_the_turn_of_who_waits() {
    let (script, engine) = scripted();
    let mut config = config();
    config.scheduler.max_running = 1;
    let (worker, _) = start(engine, config);
    let reserve = |seed| worker.reserve(work(&worker, prompt(20, seed), 4));
    let running = worker
        .submit(work(&worker, prompt(20, 1), 4), Role::Decode)
        .expect("taken");
    load_where(&worker, "running", |load| load.scheduler.running == 1).await;
    let reserved = reserve(2).expect("nobody waits");
    let waiting = worker
        .submit(work(&worker, prompt(20, 3), 4), Role::Decode)
        .expect("taken");
    let full = SequenceError::Submit(SubmitError::QueueFull { limit: 4 });
    assert_eq!(reserve(4).err(), Some(full));
    drop((running, reserved, waiting, script));
    idle(&worker).await;
    reserve(4).expect("nobody waits");
}

#[tokio::test]
async fn a_lease_that_nobody_renews_ends() {
    let (worker, _) = start(
        Box::new(engine()),
        WorkerConfig {
            lease_ms: 60,
            drain_ms: 50,
            ..config()
        },
    );
    let (ticket, mut stream) = worker.reserve(work(&worker, prompt(20, 1), 4)).expect("reserved");
    assert_eq!((ticket.slots.len(), worker.load().pool.granted), (3, 3));
    assert_eq!(
        tokens(&mut stream).await,
        Err(SequenceError::Handoff(AbortReason::LeaseEnded))
    );
    assert!(worker.renew(&stream).is_err(), "an ended lease is not renewed");
    idle(&worker).await;
}

#[tokio::test]
async fn a_renewed_lease_holds_until_the_deadline() {
    let (worker, _) = start(
        Box::new(engine()),
        WorkerConfig {
            lease_ms: 1_000,
            drain_ms: 50,
            ..config()
        },
    );
    let mut short = work(&worker, prompt(20, 1), 4);
    let deadline = clock::now().after_ms(2_500);
    short.deadline = deadline;
    let (_, mut stream) = worker.reserve(short).expect("reserved");
    let mut renewals = tokio::time::interval(std::time::Duration::from_millis(20));
    let error = loop {
        tokio::select! {
            ended = stream.next() => break ended.err(),
            _ = renewals.tick() => { let _ = worker.renew(&stream); }
        }
    };
    // Later than an unrenewed lease, and not later than the deadline.
    assert_eq!(error, Some(SequenceError::Handoff(AbortReason::Deadline)));
    assert!(clock::now() >= deadline);
    idle(&worker).await;
}

#[tokio::test]
async fn kv_events_start_with_a_snapshot_and_resume_with_one() {
    let (worker, _) = start(Box::new(engine()), config());
    let run = async |seed| {
        let mut stream = worker
            .submit(work(&worker, prompt(20, seed), 1), Role::Decode)
            .expect("taken");
        tokens(&mut stream).await.expect("runs");
    };
    run(1).await;
    let mut kv = worker.kv_events();
    let KvChange::Snapshot { sequence, blocks } = soon("a snapshot", kv.next()).await else {
        panic!("events first")
    };
    assert_eq!(blocks.len(), 2);

    run(2).await;
    let mut stored = 0;
    let mut last = sequence;
    while stored < 2 {
        let KvChange::Events(events) = soon("events", kv.next()).await else {
            panic!("a second snapshot")
        };
        for event in events {
            assert_eq!(event.sequence, last + 1, "no gap");
            last = event.sequence;
            stored += usize::from(matches!(event.kind, KvEventKind::Stored { .. }));
        }
    }
    kv.want_snapshot();
    let KvChange::Snapshot { sequence, blocks } = soon("a snapshot", kv.next()).await else {
        panic!("no snapshot")
    };
    assert_eq!((sequence, blocks.len()), (last, 4));
}

#[tokio::test]
async fn guards_outlive_their_worker() {
    let (worker, lifecycle) = start(Box::new(engine()), config());
    let stream = worker
        .submit(work(&worker, prompt(20, 1), 4), Role::Decode)
        .expect("taken");
    lifecycle.drain(std::time::Duration::ZERO).await;
    assert!(worker.stop().await);
    let port = Arc::downgrade(&worker.receiver_port());
    drop(worker);
    drop(stream);
    assert_eq!(port.strong_count(), 0, "nothing keeps the pool alive");
}

#[tokio::test]
async fn a_pool_too_small_for_all_preempts_and_the_answers_stay_the_same() {
    // 64 blocks of 8 tokens; four answers of 190 tokens do not fit at once.
    let (worker, _) = start(Box::new(engine()), config());
    let mut streams = Vec::new();
    for seed in 0..4 {
        let work = work(&worker, prompt(30, seed), 160);
        streams.push(worker.submit(work, Role::Decode).expect("taken"));
    }
    let mut preemptions = 0;
    for (seed, stream) in streams.iter_mut().enumerate() {
        let mut answer = Vec::new();
        let timings = loop {
            match next(stream).await.expect("runs") {
                Update::Token { index, token, .. } => {
                    assert_eq!(index as usize, answer.len(), "no gap, no repeat");
                    answer.push(token);
                }
                Update::Finished { timings, .. } => break timings,
                _ => {}
            }
        };
        assert_eq!(answer, expected(prompt(30, seed as u32), 160).await, "sequence {seed}");
        preemptions += timings.preemptions;
    }
    assert!(preemptions > 0, "or this test shows nothing");
    drop(streams);
    idle(&worker).await;
}

#[tokio::test]
async fn a_reader_of_kv_events_that_falls_behind_gets_a_snapshot() {
    let (worker, _) = start(Box::new(engine()), config());
    let mut kv = worker.kv_events();
    assert!(matches!(soon("a snapshot", kv.next()).await, KvChange::Snapshot { .. }));
    // Each run names two blocks in two steps, and evicts others once the pool is full.
    for seed in 0..crate::limits::KV_EVENT_BATCHES as u32 {
        let mut stream = worker
            .submit(work(&worker, prompt(20, seed), 1), Role::Decode)
            .expect("taken");
        tokens(&mut stream).await.expect("runs");
    }
    let KvChange::Snapshot { blocks, .. } = soon("a snapshot", kv.next()).await else {
        panic!("events were lost")
    };
    assert!(!blocks.is_empty() && blocks.len() <= BLOCKS, "{}", blocks.len());
}
