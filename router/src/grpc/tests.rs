use super::*;

fn code_and_field(status: &Status) -> (Code, Option<String>) {
    (status.code(), status::field(status))
}

#[test]
fn fields_that_are_not_built_are_refused_unless_neutral() {
    let text = || Some(generate_request::Input::Text("hi".to_owned()));
    let check = |sampling: pb::Sampling, top_logprobs: Option<u32>, expected: Option<(Code, &str)>| {
        let request = pb::GenerateRequest {
            input: text(),
            sampling: Some(sampling),
            output: Some(pb::Output {
                top_logprobs,
                ..pb::Output::default()
            }),
            ..pb::GenerateRequest::default()
        };
        let refused = generate_request(request).err().map(|status| code_and_field(&status));
        assert_eq!(refused, expected.map(|(code, field)| (code, Some(field.to_owned()))));
    };
    let not_built = |field| Some((Code::Unimplemented, field));
    let default = pb::Sampling::default;
    check(
        pb::Sampling {
            repetition_penalty: Some(1.0),
            presence_penalty: Some(0.0),
            n: Some(1),
            ..default()
        },
        Some(0),
        None,
    );
    check(
        pb::Sampling {
            repetition_penalty: Some(1.1),
            ..default()
        },
        None,
        not_built("sampling.repetition_penalty"),
    );
    check(
        pb::Sampling {
            presence_penalty: Some(0.1),
            ..default()
        },
        None,
        not_built("sampling.presence_penalty"),
    );
    check(
        pb::Sampling {
            frequency_penalty: Some(f32::NAN),
            ..default()
        },
        None,
        not_built("sampling.frequency_penalty"),
    );
    check(
        pb::Sampling {
            logit_bias: [(1, 1.0)].into(),
            ..default()
        },
        None,
        not_built("sampling.logit_bias"),
    );
    check(
        pb::Sampling {
            n: Some(2),
            ..default()
        },
        None,
        not_built("sampling.n"),
    );
    check(
        pb::Sampling {
            n: Some(0),
            ..default()
        },
        None,
        Some((Code::InvalidArgument, "sampling.n")),
    );
    check(default(), Some(1), not_built("output.top_logprobs"));
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
