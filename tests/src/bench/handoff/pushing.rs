//! A prefill node's end: a pool that holds the payload, and a pusher.

use std::{sync::Arc, time::Instant};

use baton_engine::cpu::CpuKvMemory;
use baton_kv::{BlockId, NodeId};
use baton_node::Tls;
use baton_proto::node::v1 as pb;
use baton_transfer::{
    Capability, FirstToken, Ticket, Transport,
    grpc::{PathConfig, PushJob, Pusher, PusherConfig, push_feed},
    path::Preference,
    shm::{Directory, Offer},
};
use prost::Message;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::metadata::MetadataMap;

use super::{
    end,
    ours::{Setup, Way},
    payload::{IDENTITY, Payload, SENDER_EPOCH},
    receiving::ROOT,
};

const DEADLINE_MS: u64 = 60_000;

/// Pushes of requests `first..`, one after the other.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Asked {
    pub(super) first: u64,
    pub(super) tickets: Vec<Vec<u8>>,
}

/// What a push took.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Pushed {
    pub(super) seconds: f64,
    pub(super) cpu_s: f64,
}

struct Source {
    payload: Payload,
    places: Vec<BlockId>,
    pusher: Pusher,
}

pub(super) fn play(setup: Setup) -> anyhow::Result<()> {
    let tls = setup.tls()?.as_ref().map(Tls::client);
    let Setup {
        payload,
        way,
        directory,
    } = setup;
    let runtime = end::runtime()?;
    let memory = Arc::new(CpuKvMemory::new(
        payload.layout(),
        payload.all_blocks(),
        way == Way::Shm,
    )?);
    let places = payload.places();
    payload.fill(&*memory, &places)?;
    let offer = match way {
        Way::Grpc | Way::Tls => None,
        Way::Shm => {
            let _entered = runtime.enter();
            let offer = Offer::open(
                &Directory::open(Some(&directory))?,
                SENDER_EPOCH,
                Capability::new([9; 32]),
                &*memory,
                &TaskTracker::new(),
                CancellationToken::new(),
            )?;
            Some(offer.to_proto())
        }
    };
    // The pool is mapped in the run to warm up, when the two ends meet.
    let paths = PathConfig {
        preference: Preference::Only(match way {
            Way::Grpc | Way::Tls => Transport::Grpc,
            Way::Shm => Transport::Shm,
        }),
        tls,
        shared: offer,
        ..PathConfig::plain()
    };
    let config = PusherConfig {
        node: NodeId("prefill-0".to_owned()),
        epoch: SENDER_EPOCH,
        identity: IDENTITY,
        protocol_max: baton_proto::PROTOCOL_MAX,
        paths,
    };
    let pusher = Pusher::new(config, memory.clone());
    let source = Source {
        payload,
        places,
        pusher,
    };
    end::serve((), |asked: Asked| source.push(&runtime, asked))
}

impl Source {
    fn push(&self, runtime: &tokio::runtime::Runtime, asked: Asked) -> anyhow::Result<Pushed> {
        let Asked { first, tickets } = asked;
        let prompts: Vec<_> = (first..)
            .map(|request| self.payload.prompt(request))
            .take(tickets.len())
            .collect();
        let tickets: Vec<Ticket> = tickets
            .iter()
            .map(|ticket| Ok(Ticket::from_proto(&pb::Ticket::decode(ticket.as_slice())?)?))
            .collect::<anyhow::Result<_>>()?;
        let (cpu_s, started) = (end::cpu_s(), Instant::now());
        runtime.block_on(async {
            for ((ticket, prompt), table) in tickets
                .into_iter()
                .zip(prompts)
                .zip(self.places.chunks(self.payload.blocks))
            {
                let (feed, input) = push_feed();
                feed.computed(prompt.len(), table, Arc::new(()));
                feed.first_token(FirstToken {
                    token: 1,
                    logprob: -1.0,
                    alternatives: Vec::new(),
                });
                let job = PushJob {
                    ticket,
                    root: ROOT,
                    prompt,
                    deadline_ms: DEADLINE_MS,
                    metadata: MetadataMap::new(),
                    input,
                };
                self.pusher.push(job).await?;
            }
            anyhow::Ok(())
        })?;
        Ok(Pushed {
            seconds: started.elapsed().as_secs_f64(),
            cpu_s: end::cpu_s() - cpu_s,
        })
    }
}
