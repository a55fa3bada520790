//! What requests mean, and what is refused. (Answers are tested against whole clusters in `tests/`, with OpenAI's own client.)

use serde_json::{Value, json};

use super::{chat, completions, error::ApiError, fields::Fields};
use crate::request::{GenerateRequest, Input};

fn fields(value: Value) -> Fields {
    let Value::Object(map) = value else { panic!("an object") };
    Fields::new(map)
}

fn parse_chat(extra: Value) -> Result<GenerateRequest, ApiError> {
    let mut value = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    value
        .as_object_mut()
        .expect("object")
        .extend(extra.as_object().expect("object").clone());
    chat::parse(fields(value)).map(|(request, _)| request)
}

/// Code and field of the refusal.
fn refused(error: ApiError) -> (String, Option<String>) {
    let json = error.json();
    let text = |key: &str| json["error"][key].as_str().map(str::to_owned);
    (text("code").expect("every error has a code"), text("param"))
}

#[test]
fn chat_fields_arrive() {
    let request = parse_chat(json!({
        "model": "m", "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -1, "max_completion_tokens": 5, "stop": "x",
        "stop_token_ids": [3], "ignore_eos": true, "logprobs": true, "user": "u", "n": 3, "best_of": 3, "presence_penalty": 0.5, "tools": [], "top_logprobs": 3,
        "response_format": { "type": "text" }, "logit_bias": { "5": -100, "7": 1.5 }, "parallel_tool_calls": true,
        "frequency_penalty": -0.25, "repetition_penalty": 1.2
    }))
    .expect("valid");
    assert_eq!(request.model.as_deref(), Some("m"));
    assert_eq!(request.sampling.temperature, Some(0.5));
    assert_eq!(request.sampling.top_p, Some(0.9));
    assert_eq!(request.sampling.top_k, Some(7));
    assert_eq!(request.sampling.min_p, Some(0.1));
    assert_eq!(request.sampling.seed, Some(u64::MAX));
    assert_eq!((request.n, request.max_tokens), (3, Some(5)));
    assert_eq!(request.stop, ["x"]);
    assert_eq!(request.stop_token_ids, [3]);
    assert!(request.ignore_eos && request.logprobs);
    assert_eq!(request.top_logprobs, 3);
    assert_eq!(request.sampling.presence_penalty, Some(0.5));
    assert_eq!(request.sampling.frequency_penalty, Some(-0.25));
    assert_eq!(request.sampling.repetition_penalty, Some(1.2));
    assert_eq!(request.sampling.logit_bias, [(5, -100.0), (7, 1.5)]);
}

#[test]
fn absent_and_null_take_the_defaults() {
    for extra in [
        json!({}),
        json!({ "temperature": null, "max_tokens": null, "stop": null, "stream": null, "n": null }),
    ] {
        let request = parse_chat(extra).expect("valid");
        assert_eq!(request.sampling.temperature, Some(1.0), "OpenAI's default");
        assert_eq!((request.n, request.max_tokens), (1, None));
        assert!(request.stop.is_empty() && !request.logprobs && !request.ignore_eos);
    }
}

#[test]
fn what_cannot_be_served_is_named() {
    for (extra, code, param) in [
        (json!({ "n": 1.5 }), "INVALID_FIELD", "n"),
        (json!({ "n": 2, "best_of": 3 }), "NOT_BUILT", "best_of"),
        (json!({ "tools": [{}] }), "NOT_BUILT", "tools"),
        (json!({ "tool_choice": "auto" }), "NOT_BUILT", "tool_choice"),
        (
            json!({ "response_format": { "type": "json_object" } }),
            "NOT_BUILT",
            "response_format",
        ),
        (json!({ "logit_bias": [1] }), "INVALID_FIELD", "logit_bias"),
        (json!({ "logit_bias": { "x": 1 } }), "INVALID_FIELD", "logit_bias"),
        (json!({ "logit_bias": { "-1": 1 } }), "INVALID_FIELD", "logit_bias"),
        (json!({ "logit_bias": { "5": "1" } }), "INVALID_FIELD", "logit_bias"),
        (json!({ "presence_penalty": "0" }), "INVALID_FIELD", "presence_penalty"),
        (json!({ "top_logprobs": -1 }), "INVALID_FIELD", "top_logprobs"),
        (json!({ "reasoning_effort": "low" }), "NOT_BUILT", "reasoning_effort"),
        (json!({ "frobnicate": 1 }), "UNKNOWN_FIELD", "frobnicate"),
        (json!({ "temperature": "hot" }), "INVALID_FIELD", "temperature"),
        (json!({ "max_tokens": -1 }), "INVALID_FIELD", "max_tokens"),
        (json!({ "max_tokens": 1.5 }), "INVALID_FIELD", "max_tokens"),
        (
            json!({ "max_tokens": 4, "max_completion_tokens": 5 }),
            "INVALID_FIELD",
            "max_tokens",
        ),
        (json!({ "stop": [1] }), "INVALID_FIELD", "stop"),
        (json!({ "seed": 1.5 }), "INVALID_FIELD", "seed"),
        (json!({ "stream": 1 }), "INVALID_FIELD", "stream"),
        (
            json!({ "stream_options": { "include_usage": true } }),
            "INVALID_FIELD",
            "stream_options",
        ),
        (
            json!({ "stream": true, "stream_options": { "x": 1 } }),
            "UNKNOWN_FIELD",
            "x",
        ),
        (json!({ "messages": "hi" }), "INVALID_FIELD", "messages"),
        (json!({ "messages": null }), "INVALID_FIELD", "messages"),
        (json!({ "messages": [1] }), "INVALID_FIELD", "messages[0]"),
        (
            json!({ "messages": [{ "role": "user" }] }),
            "INVALID_FIELD",
            "messages[0].content",
        ),
        (
            json!({ "messages": [{ "content": "x" }] }),
            "INVALID_FIELD",
            "messages[0].role",
        ),
        (
            json!({ "messages": [{ "role": "king", "content": "x" }] }),
            "INVALID_FIELD",
            "messages[0].role",
        ),
        (
            json!({ "messages": [{ "role": "tool", "content": "x" }] }),
            "NOT_BUILT",
            "messages[0].role (tool)",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
            "NOT_BUILT",
            "messages[0].content (part of type image_url)",
        ),
        (
            json!({ "messages": [{ "role": "assistant", "content": "x", "tool_calls": [] }] }),
            "NOT_BUILT",
            "messages[0].tool_calls",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "text", "text": "a", "cache_control": 1 }] }] }),
            "UNKNOWN_FIELD",
            "cache_control",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": "a" }], "x".repeat(1_000): 1 }),
            "UNKNOWN_FIELD",
            &"x".repeat(64),
        ),
    ] {
        let error = parse_chat(extra.clone()).expect_err(&extra.to_string());
        assert_eq!(refused(error), (code.to_owned(), Some(param.to_owned())), "{extra}");
    }
}

#[test]
fn text_parts_are_joined_and_developer_is_system() {
    let extra = json!({ "messages": [
        { "role": "developer", "content": "d" },
        { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
    ] });
    let Input::Chat(messages) = parse_chat(extra).expect("valid").input else {
        panic!("a chat")
    };
    let pairs: Vec<_> = messages
        .iter()
        .map(|message| (message.role.as_str(), message.content.as_str()))
        .collect();
    assert_eq!(pairs, [("system", "d"), ("user", "ab")]);
}

#[test]
fn completion_prompts() {
    let parse = |value| completions::parse(fields(value)).map(|(request, _)| request);
    for (prompt, expected) in [
        (json!("hi"), Input::Text("hi".to_owned())),
        (json!(["hi"]), Input::Text("hi".to_owned())),
        (json!([1, 2]), Input::Tokens(vec![1, 2])),
        (json!([[1, 2]]), Input::Tokens(vec![1, 2])),
        (json!([]), Input::Tokens(Vec::new())),
    ] {
        let request = parse(json!({ "prompt": prompt })).expect("valid");
        assert_eq!(request.input, expected);
        assert_eq!(request.max_tokens, Some(16), "OpenAI's default");
    }
    for (body, code, param) in [
        (json!({}), "INVALID_FIELD", "prompt"),
        (json!({ "prompt": 5 }), "INVALID_FIELD", "prompt"),
        (json!({ "prompt": [-1] }), "INVALID_FIELD", "prompt"),
        (
            json!({ "prompt": ["a", "b"] }),
            "NOT_BUILT",
            "prompt with several prompts",
        ),
        (json!({ "prompt": "a", "echo": true }), "NOT_BUILT", "echo"),
        (json!({ "prompt": "a", "suffix": "b" }), "NOT_BUILT", "suffix"),
        (json!({ "prompt": "a", "best_of": 2 }), "NOT_BUILT", "best_of"),
        (json!({ "prompt": "a", "logprobs": 6 }), "INVALID_FIELD", "logprobs"),
        (json!({ "prompt": "a", "messages": [] }), "UNKNOWN_FIELD", "messages"),
    ] {
        let error = parse(body.clone()).expect_err(&body.to_string());
        assert_eq!(refused(error), (code.to_owned(), Some(param.to_owned())), "{body}");
    }
}
