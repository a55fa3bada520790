use std::time::Duration;

use baton_proto::v1::TokenDelta;

use super::*;

fn delta(sequence: u64, index: u32, ids: &[u32], text: &str) -> GenerateEvent {
    let delta = TokenDelta {
        index,
        ids: ids.to_vec(),
        text: text.into(),
        ..TokenDelta::default()
    };
    GenerateEvent {
        sequence,
        event: Some(Event::Delta(delta)),
    }
}

#[test]
fn a_stream_in_order_is_taken() {
    let mut order = Order::default();
    let started = GenerateEvent {
        sequence: 0,
        event: Some(Event::Started(Started::default())),
    };
    assert_eq!(
        order.take(started).expect("in order"),
        Part::Started(Started::default())
    );
    assert_eq!(
        order.take(delta(1, 0, &[5, 6], "a")).expect("in order"),
        Part::Text("a".into())
    );
    // Held-back text alone: no ids, any index.
    assert_eq!(
        order.take(delta(2, 0, &[], "b")).expect("in order"),
        Part::Text("b".into())
    );
    assert_eq!(
        order.take(delta(3, 2, &[7], "c")).expect("in order"),
        Part::Text("c".into())
    );
    assert_eq!(order.ids, [5, 6, 7]);
    let finished = GenerateEvent {
        sequence: 4,
        event: Some(Event::Finished(Finished::default())),
    };
    assert_eq!(order.take(finished).expect("in order"), Part::Finished(Box::default()));
}

#[test]
fn gaps_and_repeats_are_errors() {
    for (first, second) in [
        (delta(0, 0, &[1], ""), delta(2, 1, &[2], "")),
        (delta(0, 0, &[1], ""), delta(0, 1, &[2], "")),
        (delta(0, 0, &[1], ""), delta(1, 0, &[1], "")),
        (delta(0, 0, &[1], ""), delta(1, 2, &[2], "")),
        (
            delta(0, 0, &[1], ""),
            GenerateEvent {
                sequence: 1,
                event: None,
            },
        ),
    ] {
        let mut order = Order::default();
        order.take(first).expect("in order");
        let error = order.take(second.clone()).expect_err("out of order");
        assert!(matches!(error, ClientError::Protocol(_)), "{second:?}: {error}");
    }
}

#[test]
fn statuses_read_as_one_line() {
    for (status, expected) in [
        (
            status::invalid_field("sampling.top_p", "top_p must be over 0"),
            "top_p must be over 0 (INVALID_FIELD, field sampling.top_p)",
        ),
        (
            status::shed("256 requests wait already", Duration::from_millis(1_500)),
            "256 requests wait already (OVERLOADED); try again in 1.5 s",
        ),
        (Status::new(Code::Internal, ""), "Internal error (Internal)"),
    ] {
        assert_eq!(ClientError::from(status).to_string(), expected);
    }
}

#[tokio::test]
async fn nobody_there_says_how_to_start_one() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let error = Client::connect(&format!("http://{address}"), None)
        .await
        .expect_err("nobody listens");
    assert!(
        error.to_string().contains("baton up") && error.to_string().contains(&address.to_string()),
        "{error}"
    );
    let error = Client::connect("https://127.0.0.1:1", None)
        .await
        .expect_err("no authority");
    assert!(matches!(error, ClientError::Address(_)), "{error}");
}

#[test]
fn a_broken_connection_is_told_from_a_refusal() {
    let broken = ClientError::of_stream(Status::unknown(
        "h2 protocol error: error reading a body from connection",
    ));
    assert!(matches!(broken, ClientError::Broken(_)), "{broken}");
    let refused = ClientError::of_stream(status::unavailable(
        "NODE_LOST",
        "decode-0 is gone",
        Duration::from_secs(1),
    ));
    assert!(matches!(refused, ClientError::Refused(_)), "{refused}");
}
