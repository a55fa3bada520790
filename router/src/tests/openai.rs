//! The OpenAI API over real HTTP.

use baton_proto::node::v1 as pb;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::harness::{Router, ids, router, soon, text};

/// The answer's body.
async fn post(router: &Router, path: &str, body: Value) -> Value {
    let body = body.to_string();
    let mut stream = TcpStream::connect(router.http).await.expect("HTTP listens");
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.expect("written");
    let mut answer = String::new();
    let read = soon("an answer", stream.read_to_string(&mut answer)).await;
    read.expect("in order");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    serde_json::from_str(body).expect("JSON")
}

#[tokio::test]
async fn offsets_are_those_of_the_text_that_is_shown() {
    let router = router().await;
    let mut decode = router.decode_node("decode-0").await;
    let (rocket, rest) = (ids("🚀"), ids(" a"));
    assert!(rocket.len() > 1);
    let node = async {
        let open = decode.call().await;
        open.admitted().await;
        open.tokens(0, &rocket).await;
        open.tokens(rocket.len() as u32, &rest).await;
        open.ended(pb::EndReason::Length).await;
    };
    let request = json!({ "prompt": "Go", "logprobs": 0 });
    let (answer, ()) = tokio::join!(post(&router, "/v1/completions", request), node);
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "🚀 a");
    let mut offsets = vec![0; rocket.len()];
    offsets.push(1);
    assert_eq!(choice["logprobs"]["text_offset"], json!(offsets), "{answer}");
}

#[tokio::test]
async fn alternatives_are_written_as_openai_does() {
    let router = router().await;
    let mut decode = router.decode_node("decode-0").await;
    let a = ids(" a")[0];
    let spelled = |id: u32| {
        let bytes = text().tokenizer.token_bytes(id).expect("in the vocabulary").to_vec();
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    };
    let mut node = async || {
        let open = decode.call().await;
        open.admitted().await;
        open.tokens(0, &[a]).await;
        open.ended(pb::EndReason::Length).await;
        let sampling = open.work().0.sampling.clone();
        sampling.expect("sampling").top_logprobs
    };
    let messages = json!([{ "role": "user", "content": "Go" }]);
    let chat = json!({ "messages": messages, "logprobs": true, "top_logprobs": 2 });
    let (answer, asked) = tokio::join!(post(&router, "/v1/chat/completions", chat), node());
    assert_eq!(asked, 2);
    let entry = |id: u32, logprob: f64| {
        let (text, bytes) = spelled(id);
        json!({ "token": text, "logprob": logprob, "bytes": bytes })
    };
    let mut content = entry(a, -0.25);
    content["top_logprobs"] = json!([entry(a, -0.25), entry(a + 1, -1.0)]);
    assert_eq!(
        answer["choices"][0]["logprobs"]["content"],
        json!([content]),
        "{answer}"
    );

    let completion = json!({ "prompt": "Go", "logprobs": 2 });
    let (answer, asked) = tokio::join!(post(&router, "/v1/completions", completion), node());
    assert_eq!(asked, 2);
    let map: serde_json::Map<String, Value> = [(spelled(a).0, json!(-0.25)), (spelled(a + 1).0, json!(-1.0))]
        .into_iter()
        .collect();
    assert_eq!(
        answer["choices"][0]["logprobs"]["top_logprobs"],
        json!([map]),
        "{answer}"
    );

    let refused = json!({ "messages": messages, "top_logprobs": 2 });
    let answer = post(&router, "/v1/chat/completions", refused).await;
    let error = &answer["error"];
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("INVALID_FIELD"), &json!("top_logprobs"))
    );
}
