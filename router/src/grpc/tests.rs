use super::*;

fn code_and_field(status: &Status) -> (Code, Option<String>) {
    (status.code(), status::field(status))
}

fn generate(sampling: pb::Sampling) -> Result<GenerateRequest, Status> {
    generate_request(pb::GenerateRequest {
        input: Some(generate_request::Input::Text("hi".to_owned())),
        sampling: Some(sampling),
        output: Some(pb::Output {
            logprobs: Some(true),
            top_logprobs: Some(3),
        }),
        ..pb::GenerateRequest::default()
    })
}

#[test]
fn sampling_fields_arrive() {
    let request = generate(pb::Sampling {
        repetition_penalty: Some(1.1),
        presence_penalty: Some(0.1),
        frequency_penalty: Some(-0.2),
        logit_bias: [(1, -100.0)].into(),
        n: Some(2),
        ..pb::Sampling::default()
    })
    .expect("valid");
    let expected = SamplingRequest {
        repetition_penalty: Some(1.1),
        presence_penalty: Some(0.1),
        frequency_penalty: Some(-0.2),
        logit_bias: vec![(1, -100.0)],
        ..SamplingRequest::default()
    };
    assert_eq!(request.sampling, expected);
    assert_eq!((request.n, request.logprobs, request.top_logprobs), (2, true, 3));
}

#[test]
fn a_request_without_input_is_refused() {
    let nothing = generate_request(pb::GenerateRequest::default()).expect_err("no input");
    assert_eq!(
        code_and_field(&nothing),
        (Code::InvalidArgument, Some("input".to_owned()))
    );
}

#[test]
fn timeouts_are_read() {
    for (value, expected) in [
        ("1500m", Some(Duration::from_millis(1_500))),
        ("2S", Some(Duration::from_secs(2))),
        ("99999999H", Some(Duration::from_secs(99_999_999 * 3_600))),
        ("0n", Some(Duration::ZERO)),
        ("S", None),
        ("", None),
        ("1", None),
        ("1x", None),
        ("-1S", None),
        ("123456789S", None),
    ] {
        let mut headers = HeaderMap::new();
        headers.insert(TIMEOUT, value.parse().expect("ASCII"));
        assert_eq!(timeout(&headers), expected, "{value:?}");
    }
    assert_eq!(timeout(&HeaderMap::new()), None);
}

#[test]
fn errors_become_statuses() {
    let invalid = |field| GenerateError::InvalidField {
        field,
        problem: "bad".to_owned(),
    };
    for (error, code, reason, field) in [
        (
            invalid(Field::Temperature),
            Code::InvalidArgument,
            "INVALID_FIELD",
            Some("sampling.temperature"),
        ),
        (
            GenerateError::EmptyPrompt,
            Code::InvalidArgument,
            "EMPTY_PROMPT",
            Some("chat"),
        ),
        (GenerateError::NoNodes, Code::Unavailable, "NO_NODES", None),
        (GenerateError::Draining, Code::Unavailable, "DRAINING", None),
        (
            GenerateError::NodesFull { attempts: 2 },
            Code::ResourceExhausted,
            "NODES_FULL",
            None,
        ),
        (GenerateError::Cancelled, Code::Cancelled, "CANCELLED", None),
    ] {
        let status = Spelling("chat").status(&error);
        assert_eq!(
            (
                status.code(),
                status::reason(&status).as_deref(),
                status::field(&status).as_deref()
            ),
            (code, Some(reason), field)
        );
        assert_eq!(status::retry_after(&status), error.retry_after());
    }
    let lost = Spelling("text").status(&GenerateError::NodeLost {
        node: baton_kv::NodeId("decode-0".to_owned()),
    });
    assert_eq!(status::metadata(&lost, "node").as_deref(), Some("decode-0"));
}
