//! The two legs of one request, as a router drives them: a test takes the router's place, and stands between any two steps.

use std::net::SocketAddr;
use std::time::Duration;

use baton_kv::{BlockName, KvIdentity, Salt};
use baton_proto::node::v1::{
    self as pb, decode_client::DecodeClient, decode_event, decode_request, prefill_client::PrefillClient, prefill_event,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use tonic_types::StatusExt;

/// No leg is waited for longer.
const LIMIT: Duration = Duration::from_secs(60);

/// What is left of a request's deadline where a test does not say.
const DEADLINE_MS: u64 = 50_000;

/// A request for `tokens` greedy tokens after `prompt`. `number` tells it from others: it is its id and its salt, so that no node holds a block of its prompt.
pub fn work(identity: &KvIdentity, prompt: &[u32], tokens: u32, number: u128) -> pb::Work {
    let mut salt = [0; 32];
    salt[..16].copy_from_slice(&number.to_be_bytes());
    pb::Work {
        request_id: number.to_be_bytes().to_vec(),
        attempt: 1,
        prompt: prompt.to_vec(),
        max_new_tokens: tokens,
        sampling: Some(pb::Sampling {
            top_p: 1.0,
            repetition_penalty: 1.0,
            ..pb::Sampling::default()
        }),
        root: BlockName::root(identity, &Salt(salt)).0.to_vec(),
        kv_identity: identity.0.to_vec(),
        deadline_ms: DEADLINE_MS,
        ..pb::Work::default()
    }
}

/// A connection to a node, in plain text.
pub async fn plain(node: SocketAddr) -> Channel {
    let endpoint = Channel::from_shared(format!("http://{node}")).expect("an address");
    endpoint.connect().await.expect("the node listens")
}

/// The second leg: a reservation on a decode node. Dropping it cancels.
pub struct DecodeLeg {
    /// The right to push.
    pub ticket: pb::Ticket,
    events: Streaming<pb::DecodeEvent>,
    /// Open as long as the leg, as a router's is.
    _requests: mpsc::Sender<pb::DecodeRequest>,
}

/// The first leg: the prompt on a prefill node. Dropping it cancels.
pub struct PrefillLeg {
    events: Streaming<pb::PrefillEvent>,
}

impl DecodeLeg {
    /// Reserves blocks for `work`.
    pub async fn reserve(node: Channel, work: &pb::Work) -> Result<Self, Status> {
        let mut client = DecodeClient::new(node);
        let (requests, outgoing) = mpsc::channel(1);
        let first = decode_request::Request::Reserve(work.clone());
        requests
            .try_send(pb::DecodeRequest { request: Some(first) })
            .expect("room for one");
        let mut events = client.open(ReceiverStream::new(outgoing)).await?.into_inner();
        match soon(events.message()).await?.and_then(|event| event.event) {
            Some(decode_event::Event::Ticket(ticket)) => Ok(Self {
                ticket,
                events,
                _requests: requests,
            }),
            other => panic!("a ticket comes first, not {other:?}"),
        }
    }

    /// Waits for the verdict; the blocks that travelled.
    pub async fn verified(&mut self) -> Result<u32, Status> {
        match soon(self.events.message()).await?.and_then(|event| event.event) {
            Some(decode_event::Event::Verified(verified)) => Ok(verified.kv_blocks),
            other => panic!("the verdict comes before {other:?}"),
        }
    }

    /// Reads to the end: the answer's tokens.
    pub async fn answer(mut self) -> Result<Vec<u32>, Status> {
        self.verified().await?;
        let mut ids = Vec::new();
        loop {
            match soon(self.events.message()).await?.and_then(|event| event.event) {
                Some(decode_event::Event::Tokens(tokens)) => {
                    assert_eq!(tokens.index as usize, ids.len(), "no gap, no repeat");
                    ids.extend(tokens.ids);
                }
                Some(decode_event::Event::Ended(_)) => return Ok(ids),
                other => panic!("tokens, or the end, not {other:?}"),
            }
        }
    }
}

impl PrefillLeg {
    /// Has `work`'s prompt computed, and pushed by the right of `ticket`.
    pub async fn run(node: Channel, work: &pb::Work, ticket: pb::Ticket) -> Result<Self, Status> {
        let mut client = PrefillClient::new(node);
        let request = pb::PrefillRequest {
            work: Some(work.clone()),
            ticket: Some(ticket),
        };
        let events = client.run(request).await?.into_inner();
        Ok(Self { events })
    }

    /// Reads to the end: how it went.
    pub async fn done(mut self) -> Result<pb::PrefillDone, Status> {
        loop {
            match soon(self.events.message()).await? {
                Some(pb::PrefillEvent {
                    event: Some(prefill_event::Event::Done(done)),
                }) => return Ok(done),
                Some(_) => {}
                None => panic!("a leg that ends well says how"),
            }
        }
    }
}

/// The stable code of an error, and the decode node's own where it refused a push.
pub fn reason(status: &Status) -> (String, Option<String>) {
    let info = status.get_error_details().error_info().cloned();
    info.map_or((format!("{:?}", status.code()), None), |info| {
        (info.reason, info.metadata.get("reject").cloned())
    })
}

async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(LIMIT, future)
        .await
        .expect("a leg goes on, or ends")
}
