//! Where a request runs. Simple for now: the least loaded node of each side; the interface (scored candidates, best first) stays.

use std::cmp::Ordering;

use baton_kv::{BlockName, KvIdentity};

use super::{
    member::{Member, MemberId, Role},
    members::Members,
    prefix_index::PrefixIndex,
};

/// Prompt tokens that a node may have queued before nothing more is sent: a second's work, so that it never idles between two dispatches, while the queue
/// (which can be cancelled, and placed anew) stands at the router.
const CREDIT_S: f64 = 1.0;

/// The least of it, and what holds while a node's rate is not known: a few chunks.
const MIN_CREDIT_TOKENS: u64 = 2_048;

/// Sequences that may wait on a decode node: enough to fill every slot that a step frees.
const DECODE_WAITING: u64 = 8;

/// Nodes of each side that are paired.
const PRUNE_TO: usize = 3;

/// What a request needs of nodes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Needs {
    /// Tokens of its prompt, at least 1.
    pub prompt_tokens: usize,
    /// Names of its full blocks, in order.
    pub names: Vec<BlockName>,
    /// What its KV must mean.
    pub identity: KvIdentity,
    /// Where another choice of the same request decodes. All full blocks of the prompt lie there, whether reported yet or not, and are in use.
    pub beside: Option<MemberId>,
}

/// Which legs it runs on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Path {
    /// The decode node runs the prompt itself.
    Local {
        /// That node.
        decode: MemberId,
    },
    /// A prefill node runs the prompt and hands the KV over.
    Handoff {
        /// First leg.
        prefill: MemberId,
        /// Second leg.
        decode: MemberId,
    },
}

/// A path and what speaks for it. Less is better, `prefill_tokens` first.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Candidate {
    /// The path.
    pub path: Path,
    /// Prompt tokens to be computed before the first token: those queued there, and this prompt's that are not held.
    pub prefill_tokens: u64,
    /// Share of the decode node's blocks that would be in use, 0 to 1.
    pub pressure: f64,
    /// Prompt tokens that the computing node holds.
    pub held_tokens: usize,
    /// Prompt tokens that it must compute.
    pub uncached_tokens: usize,
    /// Blocks that the decode node must find.
    pub decode_blocks: u64,
}

/// Which requests a decode node runs itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlacementConfig {
    /// A prompt of which at most this many tokens are not held by the decode node is run there. 0: hand over whenever there is a prefill node. Worth
    /// raising to where a chunk in the decode batch costs its neighbours less than the handoff costs this request.
    pub local_prefill_tokens: usize,
}

/// Whether a request could ever be placed on the members there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Possible {
    /// Yes, now or later.
    Yes,
    /// No decode node is ready.
    NoNodes,
    /// It is larger than every decode node.
    TooLarge {
        /// Blocks it needs.
        needed: u64,
        /// Blocks of the largest.
        largest: u64,
    },
}

/// Whether `needs` could be met by an idle cluster of these members.
pub fn possible(needs: &Needs, members: &Members) -> Possible {
    let fitting = members
        .ready(Role::Decode)
        .filter(|member| member.hello().identity == needs.identity);
    let Some((member, largest)) = fitting
        .map(|member| (member, member.hello().blocks))
        .max_by_key(|(_, b)| *b)
    else {
        return Possible::NoNodes;
    };
    let needed = blocks_for(member, needs.prompt_tokens);
    if needed > largest {
        return Possible::TooLarge { needed, largest };
    }
    Possible::Yes
}

/// Every path with room now, best first; empty when the request must wait.
pub fn candidates(needs: &Needs, members: &Members, index: &PrefixIndex, config: &PlacementConfig) -> Vec<Candidate> {
    let mut decodes: Vec<Side<'_>> = members
        .ready(Role::Decode)
        .filter_map(|member| Side::decode(member, needs, index))
        .collect();
    decodes.sort_by(|a, b| a.pressure.total_cmp(&b.pressure).then_with(|| a.tie(b)));

    let mut local: Vec<Candidate> = decodes
        .iter()
        .filter(|side| side.beside || side.uncached <= config.local_prefill_tokens)
        .filter_map(Side::local)
        .collect();
    // Node and prompt may be large enough for each other, though busy now: such a node is waited for.
    let hands_over = |member: &&Member| {
        let known = member.hello().identity == needs.identity;
        let paired = || {
            members
                .ready(Role::Decode)
                .any(|decode| member.hello().pairs_with(decode.hello()))
        };
        known && blocks_for(member, needs.prompt_tokens) <= member.hello().blocks && paired()
    };
    let prefill_nodes: Vec<&Member> = members.ready(Role::Prefill).filter(hands_over).collect();
    if local.is_empty() && prefill_nodes.is_empty() {
        local = decodes.iter().filter_map(Side::local).collect();
    }
    let elsewhere = |candidate: &Candidate| needs.beside.map(|decode| Path::Local { decode }) != Some(candidate.path);
    local.sort_by(|a, b| elsewhere(a).cmp(&elsewhere(b)).then_with(|| better(a, b)));

    let mut prefills: Vec<Side<'_>> = prefill_nodes
        .into_iter()
        .filter_map(|member| Side::prefill(member, needs, index))
        .collect();
    prefills.sort_by(|a, b| a.prefill_tokens.cmp(&b.prefill_tokens).then_with(|| a.tie(b)));

    let mut pairs = Vec::new();
    for prefill in prefills.iter().take(PRUNE_TO) {
        for decode in decodes
            .iter()
            .take(PRUNE_TO)
            .filter(|decode| prefill.pairs_with(decode))
        {
            pairs.push(prefill.hand_over_to(decode));
        }
    }
    // Stable: among equals the order of the sides, which is by their last dispatch, stays.
    pairs.sort_by(better);
    local.extend(pairs);
    local
}

fn better(a: &Candidate, b: &Candidate) -> Ordering {
    let by_pressure = || a.pressure.total_cmp(&b.pressure);
    a.prefill_tokens.cmp(&b.prefill_tokens).then_with(by_pressure)
}

/// One node as a leg of this request.
struct Side<'a> {
    member: &'a Member,
    held: usize,
    uncached: usize,
    prefill_tokens: u64,
    pressure: f64,
    decode_blocks: u64,
    /// [`Needs::beside`] is this one.
    beside: bool,
}

impl<'a> Side<'a> {
    fn new(member: &'a Member, needs: &Needs, index: &PrefixIndex) -> Option<Self> {
        if member.saturated() || member.hello().identity != needs.identity {
            return None;
        }
        let block_tokens = member.hello().layout.block_tokens;
        let beside = needs.beside == Some(member.id());
        let held_blocks = if beside {
            needs.names.len()
        } else {
            index.held(member.id(), &needs.names)
        };
        // A hit covers at most all tokens but the last.
        let held = (held_blocks * block_tokens).min(needs.prompt_tokens - 1);
        let uncached = needs.prompt_tokens - held;
        let needed = blocks_for(member, needs.prompt_tokens);
        let decode_blocks = needed - (held_blocks as u64).min(needed);
        Some(Self {
            member,
            held,
            uncached,
            prefill_tokens: member.queued_tokens().saturating_add(uncached as u64),
            pressure: 1.0 - (member.available_blocks() as f64 - decode_blocks as f64) / member.hello().blocks as f64,
            decode_blocks,
            beside,
        })
    }

    /// With a decode credit: its blocks can be had. The blocks that are held count, too: to hold them takes them from the available ones, unless they are in use.
    fn decode(member: &'a Member, needs: &Needs, index: &PrefixIndex) -> Option<Self> {
        let side = Self::new(member, needs, index)?;
        let wanted = if side.beside {
            side.decode_blocks
        } else {
            blocks_for(member, needs.prompt_tokens)
        };
        let room = member.available_blocks() >= wanted;
        (room && member.waiting() < DECODE_WAITING).then_some(side)
    }

    /// With a prefill credit.
    fn prefill(member: &'a Member, needs: &Needs, index: &PrefixIndex) -> Option<Self> {
        let side = Self::new(member, needs, index)?;
        side.prefill_credit().then_some(side)
    }

    fn prefill_credit(&self) -> bool {
        let rate = self.member.load().map_or(0.0, |load| load.prefill_tokens_per_s);
        let credit = ((rate * CREDIT_S) as u64).max(MIN_CREDIT_TOKENS);
        self.member.queued_tokens() == 0 || self.prefill_tokens <= credit
    }

    /// This decode node alone, if it has a prefill credit, too.
    fn local(&self) -> Option<Candidate> {
        let path = Path::Local {
            decode: self.member.id(),
        };
        self.prefill_credit().then(|| self.candidate(path, self))
    }

    fn hand_over_to(&self, decode: &Side<'_>) -> Candidate {
        let path = Path::Handoff {
            prefill: self.member.id(),
            decode: decode.member.id(),
        };
        self.candidate(path, decode)
    }

    fn candidate(&self, path: Path, decode: &Side<'_>) -> Candidate {
        Candidate {
            path,
            prefill_tokens: self.prefill_tokens,
            pressure: decode.pressure,
            held_tokens: self.held,
            uncached_tokens: self.uncached,
            decode_blocks: decode.decode_blocks,
        }
    }

    fn pairs_with(&self, decode: &Side<'_>) -> bool {
        self.member.hello().pairs_with(decode.member.hello())
    }

    fn tie(&self, other: &Side<'_>) -> Ordering {
        let by_sequences = self.member.sequences().cmp(&other.member.sequences());
        by_sequences.then_with(|| self.member.last_dispatch().cmp(&other.member.last_dispatch()))
    }
}

/// Blocks for the prompt and the first token after it.
fn blocks_for(member: &Member, prompt_tokens: usize) -> u64 {
    member.hello().layout.blocks_for(prompt_tokens + 1) as u64
}

#[cfg(test)]
mod tests;
