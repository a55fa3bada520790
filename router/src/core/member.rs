//! One node as the router knows it: its hello, its last load, and the dispatches that the load does not show yet (credits).

use std::ops::RangeInclusive;

use baton_kv::{Epoch, KvIdentity, KvLayout, NodeId};

/// One announcement of one node: a node that comes back is another member. Never reused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct MemberId(pub u64);

/// What a node does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    /// Runs prompts and hands their KV over.
    Prefill,
    /// Takes KV over, or runs prompts itself, and decodes.
    Decode,
}

/// Where a node is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    /// Not yet.
    Starting,
    /// Takes requests.
    Ready,
    /// Finishes what it has.
    Draining,
    /// Gone.
    Stopped,
}

/// What a node says of itself, once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Its name.
    pub node: NodeId,
    /// What it does.
    pub role: Role,
    /// This life of its process.
    pub epoch: Epoch,
    /// `host:port` of its gRPC services.
    pub address: String,
    /// The model's name.
    pub model: String,
    /// What its KV bytes mean.
    pub identity: KvIdentity,
    /// How they lie.
    pub layout: KvLayout,
    /// Blocks of its pool.
    pub blocks: u64,
    /// Prompt and answer at most, tokens.
    pub context_length: usize,
    /// Ids are below it.
    pub vocabulary: usize,
    /// Lowest protocol version spoken.
    pub protocol_min: u32,
    /// Highest protocol version spoken.
    pub protocol_max: u32,
}

impl Hello {
    /// Whether it speaks any of these versions of the handoff.
    pub fn versions_meet(&self, versions: &RangeInclusive<u32>) -> bool {
        self.protocol_min.max(*versions.start()) <= self.protocol_max.min(*versions.end())
    }

    /// Whether KV can be handed over between the two.
    pub fn pairs_with(&self, other: &Self) -> bool {
        let versions = other.protocol_min..=other.protocol_max;
        self.identity == other.identity && self.layout == other.layout && self.versions_meet(&versions)
    }
}

/// What a node reports at least every second.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Load {
    /// Where it is in its life.
    pub phase: Phase,
    /// Sequences waiting.
    pub waiting: u64,
    /// Sequences running.
    pub running: u64,
    /// Prompt tokens not computed yet.
    pub queued_prefill_tokens: u64,
    /// Blocks that can be had: free and cached.
    pub available_blocks: u64,
    /// Measured; 0 when not known yet.
    pub prefill_tokens_per_s: f64,
}

/// What a dispatch will cost a node, until the node's own report shows it.
///
/// A report that left the node before the dispatch arrived may be read after its acknowledgement; the credit is then dropped up to one report too
/// early. The node refuses what does not fit, and the request waits again, so this costs a round trip, never correctness.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Credit {
    /// On which node.
    pub member: MemberId,
    /// Decode blocks.
    pub blocks: u64,
    /// Prefill tokens.
    pub tokens: u64,
    /// The report that was the last when the node acknowledged the dispatch.
    acknowledged: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Amount {
    blocks: u64,
    tokens: u64,
    dispatches: u64,
}

impl Amount {
    fn add(&mut self, credit: &Credit) {
        self.blocks += credit.blocks;
        self.tokens += credit.tokens;
        self.dispatches += 1;
    }

    fn sub(&mut self, credit: &Credit) {
        self.blocks -= credit.blocks;
        self.tokens -= credit.tokens;
        self.dispatches -= 1;
    }
}

/// A node that has announced itself.
#[derive(Clone, Debug)]
pub struct Member {
    id: MemberId,
    hello: Hello,
    load: Option<Load>,
    /// Reports so far.
    reports: u64,
    /// Dispatched, not acknowledged.
    sent: Amount,
    /// Acknowledged since the last report.
    acknowledged: Amount,
    /// It refused a dispatch since its last report.
    saturated: bool,
    /// Number of the router's last dispatch to it: among equals the one that waited longest is taken.
    last_dispatch: u64,
}

impl Member {
    /// Without a load report it takes no requests.
    pub fn new(id: MemberId, hello: Hello) -> Self {
        Self {
            id,
            hello,
            load: None,
            reports: 0,
            sent: Amount::default(),
            acknowledged: Amount::default(),
            saturated: false,
            last_dispatch: 0,
        }
    }

    /// Its id.
    pub fn id(&self) -> MemberId {
        self.id
    }

    /// What it said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Its last report.
    pub fn load(&self) -> Option<&Load> {
        self.load.as_ref()
    }

    /// Takes in a report: it shows everything acknowledged before it.
    pub fn report(&mut self, load: Load) {
        self.load = Some(load);
        self.reports += 1;
        self.acknowledged = Amount::default();
        self.saturated = false;
    }

    /// Whether it takes requests at all.
    pub fn ready(&self) -> bool {
        self.load.is_some_and(|load| load.phase == Phase::Ready)
    }

    /// It refused a dispatch: nothing more goes there until its next report.
    pub fn refused(&mut self) {
        self.saturated = true;
    }

    /// Whether it refused a dispatch since its last report.
    pub fn saturated(&self) -> bool {
        self.saturated
    }

    /// Number of the last dispatch to it.
    pub fn last_dispatch(&self) -> u64 {
        self.last_dispatch
    }

    /// Blocks that can be had, less those promised.
    pub fn available_blocks(&self) -> u64 {
        let reported = self.load.map_or(0, |load| load.available_blocks);
        reported.saturating_sub(self.sent.blocks + self.acknowledged.blocks)
    }

    /// Prompt tokens before a new one's, those promised included.
    pub fn queued_tokens(&self) -> u64 {
        let reported = self.load.map_or(0, |load| load.queued_prefill_tokens);
        reported.saturating_add(self.sent.tokens + self.acknowledged.tokens)
    }

    /// Sequences there, those promised included.
    pub fn sequences(&self) -> u64 {
        self.load.map_or(0, |load| load.waiting + load.running) + self.sent.dispatches + self.acknowledged.dispatches
    }

    /// Sequences waiting there, those on their way included.
    pub fn waiting(&self) -> u64 {
        self.load.map_or(0, |load| load.waiting) + self.sent.dispatches
    }

    /// Takes a credit: `number` counts the router's dispatches.
    pub fn take(&mut self, blocks: u64, tokens: u64, number: u64) -> Credit {
        let credit = Credit {
            member: self.id,
            blocks,
            tokens,
            acknowledged: None,
        };
        self.sent.add(&credit);
        self.last_dispatch = number;
        credit
    }

    /// The node has the dispatch: its next report shows it.
    pub fn acknowledge(&mut self, credit: &mut Credit) {
        if credit.acknowledged.is_none() {
            self.sent.sub(credit);
            self.acknowledged.add(credit);
            credit.acknowledged = Some(self.reports);
        }
    }

    /// The dispatch is over.
    pub fn give_back(&mut self, credit: Credit) {
        match credit.acknowledged {
            None => self.sent.sub(&credit),
            Some(report) if report == self.reports => self.acknowledged.sub(&credit),
            Some(_) => {}
        }
    }

    /// Whether no credit is out that a report does not show.
    pub fn settled(&self) -> bool {
        self.sent == Amount::default() && self.acknowledged == Amount::default()
    }
}
