use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use super::*;

const LIMIT: Duration = Duration::from_secs(10);

/// A client and a server, joined by a proxy.
fn joined(proxy: &FaultProxy) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    proxy.forward(listener.local_addr().expect("an address"));
    let client = TcpStream::connect(proxy.address()).expect("the proxy listens");
    let (server, _) = listener.accept().expect("the proxy connects");
    for end in [&client, &server] {
        end.set_read_timeout(Some(LIMIT)).expect("a socket");
    }
    (client, server)
}

fn read(stream: &mut TcpStream, bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    stream.read_exact(&mut buffer).expect("bytes in time");
    buffer
}

#[test]
fn bytes_pass_and_ends_pass() {
    let proxy = FaultProxy::start();
    let (mut client, mut server) = joined(&proxy);
    client.write_all(b"there").expect("sent");
    assert_eq!(read(&mut server, 5), b"there");
    server.write_all(b"and back").expect("sent");
    assert_eq!(read(&mut client, 8), b"and back");
    assert_eq!((proxy.up().passed(), proxy.down().passed()), (5, 8));
    client.shutdown(std::net::Shutdown::Write).expect("a socket");
    assert_eq!(server.read(&mut [0]).expect("an end"), 0);
    server.write_all(b"!").expect("half-closed only");
    assert_eq!(read(&mut client, 1), b"!");
}

#[test]
fn what_is_held_back_comes_once_healed() {
    let proxy = FaultProxy::start();
    let (mut client, mut server) = joined(&proxy);
    proxy.up().hold();
    client.write_all(b"held").expect("sent");
    // The other way is open: the answer to a question that never arrived.
    server.write_all(b"open").expect("sent");
    assert_eq!(read(&mut client, 4), b"open");
    assert_eq!(proxy.up().passed(), 0);
    server.set_nonblocking(true).expect("a socket");
    let nothing = server.read(&mut [0]).expect_err("nothing has come");
    assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    server.set_nonblocking(false).expect("a socket");
    proxy.heal();
    assert_eq!(read(&mut server, 4), b"held");
}

#[test]
fn a_limit_that_is_lifted_counts_for_what_waits() {
    let proxy = FaultProxy::start();
    let (mut client, mut server) = joined(&proxy);
    // A byte in a thousand seconds.
    proxy.up().limit(1);
    proxy.down().delay(1_000 * LIMIT);
    client.write_all(&[7; 5_000]).expect("sent");
    server.write_all(b"late").expect("sent");
    proxy.heal();
    assert_eq!(read(&mut server, 5_000), [7; 5_000]);
    assert_eq!(read(&mut client, 4), b"late");
}

#[test]
fn bits_flip_where_they_are_told_to() {
    let proxy = FaultProxy::start();
    let (mut client, mut server) = joined(&proxy);
    proxy.up().corrupt_every(10_000);
    client.write_all(&[0; 40_000]).expect("sent");
    let bytes = read(&mut server, 40_000);
    let flipped: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
    assert_eq!(flipped, [10_000, 20_000, 30_000]);
    proxy.up().corrupt_at(5);
    client.write_all(&[0; 20_000]).expect("sent");
    let bytes = read(&mut server, 20_000);
    assert_eq!(bytes.iter().position(|byte| *byte != 0), Some(5));
    assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 1);
}

#[test]
fn connections_are_closed_reset_and_refused() {
    let proxy = FaultProxy::start();
    let (mut client, mut server) = joined(&proxy);
    proxy.close();
    assert_eq!(client.read(&mut [0]).expect("an end"), 0);
    assert_eq!(server.read(&mut [0]).expect("an end"), 0);
    let (mut client, mut server) = joined(&proxy);
    proxy.reset();
    for end in [&mut client, &mut server] {
        let error = end.read(&mut [0]).expect_err("a reset");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
    proxy.refuse();
    let mut client = TcpStream::connect(proxy.address()).expect("the proxy listens");
    client.set_read_timeout(Some(LIMIT)).expect("a socket");
    assert!(client.read(&mut [0]).is_err(), "refused");
}

/// One frame.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![
        0,
        (payload.len() >> 8) as u8,
        payload.len() as u8,
        kind,
        flags,
        0,
        0,
        0,
        stream,
    ];
    frame.extend_from_slice(payload);
    frame
}

/// One gRPC message.
fn message(text: &str) -> Vec<u8> {
    let mut message = vec![0, 0, 0, 0, text.len() as u8];
    message.extend_from_slice(text.as_bytes());
    message
}

#[test]
fn messages_are_dropped_repeated_and_swapped_whole() {
    let mut kept = None;
    let (seen, calls) = sync_channel(16);
    let proxy = FaultProxy::mangling(Box::new(move |message: Message| {
        let text = String::from_utf8(message.bytes.clone()).expect("text");
        seen.send((message.stream, message.index, text.clone())).expect("room");
        match text.as_str() {
            "drop" => Vec::new(),
            "twice" => vec![message.bytes.clone(), message.bytes],
            "second" => {
                kept = Some(message.bytes);
                Vec::new()
            }
            "first" => [Some(message.bytes), kept.take()].into_iter().flatten().collect(),
            _ => vec![message.bytes],
        }
    }));
    let (mut client, mut server) = joined(&proxy);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let headers = frame(1, 4, 3, b"whatever");
    let one: Vec<u8> = ["drop", "twice", "second", "first"]
        .into_iter()
        .flat_map(message)
        .collect();
    // Messages do not begin and end with frames, and frames of two calls alternate.
    let sent = [
        preface.clone(),
        headers.clone(),
        frame(0, 0, 1, &one[..12]),
        frame(0, 0, 3, &message("other")[..3]),
        frame(0, 0, 1, &one[12..]),
        frame(0, 1, 3, &message("other")[3..]),
        frame(0, 1, 1, &[]),
    ];
    for bytes in sent.concat().chunks(7) {
        client.write_all(bytes).expect("sent");
    }
    let whole = |stream, text| frame(0, 0, stream, &message(text));
    let expected = [
        preface,
        headers,
        whole(1, "twice"),
        whole(1, "twice"),
        whole(1, "first"),
        whole(1, "second"),
        whole(3, "other"),
        frame(0, 1, 3, &[]),
        frame(0, 1, 1, &[]),
    ]
    .concat();
    assert_eq!(read(&mut server, expected.len()), expected);
    let calls: Vec<_> = calls.try_iter().collect();
    let call = |stream, index, text: &str| (stream, index, text.to_owned());
    assert_eq!(
        calls,
        [
            call(1, 0, "drop"),
            call(1, 1, "twice"),
            call(1, 2, "second"),
            call(1, 3, "first"),
            call(3, 0, "other")
        ]
    );
}
