//! The OpenAI API over real HTTP.

use baton_proto::node::v1 as pb;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::harness::{Router, ids, router, soon};

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
