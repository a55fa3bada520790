use super::*;

fn model() -> ModelSpec {
    ModelSpec {
        name: "m".into(),
        vocabulary: 100,
        context_length: 50,
        parameters: 0,
        weight_bytes: 0,
    }
}

fn good() -> pb::Work {
    pb::Work {
        request_id: vec![1; 16],
        attempt: 1,
        prompt: vec![1, 2, 99],
        output: vec![],
        max_new_tokens: 47,
        stop_ids: vec![2],
        sampling: Some(pb::Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 7,
            choice: 0,
            repetition_penalty: 1.1,
            presence_penalty: -2.0,
            frequency_penalty: 2.0,
            logit_bias: [(99, -100.0), (0, 100.0)].into(),
            top_logprobs: 20,
        }),
        root: vec![3; 32],
        kv_identity: vec![9; 32],
        deadline_ms: 1_000,
    }
}

fn check(change: impl FnOnce(&mut pb::Work), code: Code, reason: &str, field: Option<&str>) {
    let mut work = good();
    change(&mut work);
    let status = Work::from_proto(work, &model(), KvIdentity([9; 32]), Time(5)).expect_err("refused");
    assert_eq!(
        (status.code(), status::reason(&status).as_deref()),
        (code, Some(reason)),
        "{status:?}"
    );
    assert_eq!(status::field(&status).as_deref(), field, "{status:?}");
}

#[test]
fn good_work_is_taken_as_it_is() {
    let work = Work::from_proto(good(), &model(), KvIdentity([9; 32]), Time(5)).expect("good");
    assert_eq!((work.prompt.len(), work.max_new_tokens, work.sampling.seed), (3, 47, 7));
    assert_eq!(work.deadline, Time(1_000_005));
    assert_eq!(work.sampling.logit_bias, [(0, 100.0), (99, -100.0)]);
}

#[test]
fn bad_work_names_its_field() {
    let invalid = Code::InvalidArgument;
    let field = |change: fn(&mut pb::Work), field: &str| check(change, invalid, "INVALID_FIELD", Some(field));
    field(|work| work.request_id = vec![1; 15], "work.request_id");
    field(|work| work.root = vec![1; 31], "work.root");
    field(|work| work.kv_identity = vec![9; 33], "work.kv_identity");
    field(|work| work.prompt = vec![], "work.prompt");
    field(|work| work.prompt = vec![100], "work.prompt");
    field(|work| work.output = vec![100], "work.output");
    field(|work| work.stop_ids = vec![100], "work.stop_ids");
    field(|work| work.stop_ids = vec![1; 1_000], "work.stop_ids");
    field(|work| work.max_new_tokens = 0, "work.max_new_tokens");
    field(
        |work| (work.max_new_tokens, work.output) = (2, vec![1, 1]),
        "work.max_new_tokens",
    );
    field(|work| work.sampling = None, "work.sampling");
    field(
        |work| work.sampling.as_mut().unwrap().temperature = -1.0,
        "work.sampling.temperature",
    );
    field(
        |work| work.sampling.as_mut().unwrap().temperature = f32::NAN,
        "work.sampling.temperature",
    );
    field(
        |work| work.sampling.as_mut().unwrap().top_p = 0.0,
        "work.sampling.top_p",
    );
    field(
        |work| work.sampling.as_mut().unwrap().min_p = 1.5,
        "work.sampling.min_p",
    );
    type Change = fn(&mut pb::Sampling);
    let sampling: [(Change, &str); 11] = [
        (|sampling| sampling.repetition_penalty = 0.0, "repetition_penalty"),
        (|sampling| sampling.repetition_penalty = f32::NAN, "repetition_penalty"),
        (
            |sampling| sampling.repetition_penalty = f32::INFINITY,
            "repetition_penalty",
        ),
        (|sampling| sampling.presence_penalty = 2.1, "presence_penalty"),
        (|sampling| sampling.presence_penalty = f32::NAN, "presence_penalty"),
        (|sampling| sampling.frequency_penalty = -2.1, "frequency_penalty"),
        (|sampling| sampling.logit_bias = [(100, 1.0)].into(), "logit_bias"),
        (|sampling| sampling.logit_bias = [(1, 100.5)].into(), "logit_bias"),
        (|sampling| sampling.logit_bias = [(1, f32::NAN)].into(), "logit_bias"),
        (
            |sampling| sampling.logit_bias = (0..1_025).map(|id| (id, 0.0)).collect(),
            "logit_bias",
        ),
        (|sampling| sampling.top_logprobs = 21, "top_logprobs"),
    ];
    for (change, field) in sampling {
        check(
            |work| change(work.sampling.as_mut().unwrap()),
            invalid,
            "INVALID_FIELD",
            Some(&format!("work.sampling.{field}")),
        );
    }
}

#[test]
fn foreign_long_or_late_work_has_its_own_reason() {
    check(
        |work| work.kv_identity = vec![8; 32],
        Code::FailedPrecondition,
        "IDENTITY_MISMATCH",
        None,
    );
    check(
        |work| work.max_new_tokens = 48,
        Code::InvalidArgument,
        "CONTEXT_LENGTH",
        Some("work.prompt"),
    );
    check(
        |work| work.max_new_tokens = u32::MAX,
        Code::InvalidArgument,
        "CONTEXT_LENGTH",
        Some("work.prompt"),
    );
    check(|work| work.deadline_ms = 0, Code::DeadlineExceeded, "DEADLINE", None);
}
