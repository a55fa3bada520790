//! The lines on stdout by which a process tells its parent (`baton up`, tests, scripts) where it listens, how far loading is, and when it is ready.
//!
//! One JSON object per line; nothing else goes to stdout. Logs go to stderr.

use std::{
    io::{self, Write},
    net::SocketAddr,
};

use serde::{Deserialize, Serialize};

/// What has happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Event {
    /// The sockets are open.
    Listening,
    /// A model is being loaded, in several stages.
    Loading,
    /// Requests are taken.
    Ready,
}

/// One line: `{"event":"listening","role":"decode","node_id":"decode-0","grpc":"127.0.0.1:40123","http":"127.0.0.1:40124"}`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Line {
    /// What has happened.
    pub event: Event,
    /// `router`, `prefill` or `decode`.
    pub role: String,
    /// The process's name.
    pub node_id: String,
    /// Its gRPC socket, the port as bound.
    pub grpc: SocketAddr,
    /// Its HTTP socket (the OpenAI API of a router, the ops endpoints of a node), the port as bound.
    pub http: SocketAddr,
    /// Of the event `loading`: how far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loading: Option<Loading>,
}

/// How far loading is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Loading {
    /// The stage, in words.
    pub stage: String,
    /// Of the stage.
    pub percent: u8,
}

impl Line {
    /// Reads one line of stdout; `None` when it is no such line.
    pub fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }
}

/// Says where one process listens, and later that it is ready.
#[derive(Clone, Debug)]
pub struct Announcer {
    line: Line,
}

impl Announcer {
    /// Prints the `listening` line.
    pub fn listening(role: &str, node_id: &str, grpc: SocketAddr, http: SocketAddr) -> Self {
        let line = Line {
            event: Event::Listening,
            role: role.to_owned(),
            node_id: node_id.to_owned(),
            grpc,
            http,
            loading: None,
        };
        print(&line);
        Self { line }
    }

    /// Prints a `loading` line.
    pub fn loading(&self, stage: &str, percent: u8) {
        print(&Line {
            event: Event::Loading,
            loading: Some(Loading {
                stage: stage.to_owned(),
                percent,
            }),
            ..self.line.clone()
        });
    }

    /// Prints the `ready` line.
    pub fn ready(&self) {
        print(&Line {
            event: Event::Ready,
            ..self.line.clone()
        });
    }
}

fn print(line: &Line) {
    let mut stdout = io::stdout().lock();
    let text = serde_json::to_string(line).expect("a line of strings serialises");
    // Nobody reads when the parent is gone, and then stdin or a signal ends this process.
    let _ = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_as_written() {
        let text = r#"{"event":"listening","role":"decode","node_id":"decode-0","grpc":"127.0.0.1:40123","http":"127.0.0.1:40124"}"#;
        let line = Line::parse(text).expect("a line");
        assert_eq!(
            (line.event, line.node_id.as_str(), line.grpc.port()),
            (Event::Listening, "decode-0", 40_123)
        );
        assert_eq!(serde_json::to_string(&line).expect("serialises"), text);
        let loading = text
            .replace("listening", "loading")
            .replace('}', r#","loading":{"stage":"packing","percent":40}}"#);
        let line = Line::parse(&loading).expect("a line");
        assert_eq!(line.loading.as_ref().map(|loading| loading.percent), Some(40));
        assert_eq!(serde_json::to_string(&line).expect("serialises"), loading);
        assert_eq!(Line::parse("INFO something else"), None);
        assert_eq!(Line::parse(r#"{"event":"gone","role":"decode"}"#), None);
    }
}
