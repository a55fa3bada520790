//! The nodes that have announced themselves to this router: one model, one identity, one layout.

use std::{collections::BTreeMap, ops::RangeInclusive};

use baton_kv::{KvIdentity, KvLayout, NodeId};

use super::{
    member::{Credit, Hello, Member, MemberId, Role},
    pairs::{Pairs, Travelled},
};

/// Members at most: one more is refused.
pub const MAX_MEMBERS: usize = 4_096;

/// What every member shares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// What KV bytes mean.
    pub identity: KvIdentity,
    /// How they lie.
    pub layout: KvLayout,
    /// The shortest context of any member, tokens.
    pub context_length: usize,
}

/// What the router serves; a node must fit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Expected {
    /// The model's name.
    pub model: String,
    /// Its vocabulary.
    pub vocabulary: usize,
    /// Versions of the handoff whose nodes it takes.
    pub versions: RangeInclusive<u32>,
}

/// Why a hello was not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum JoinError {
    /// A field is missing or out of range.
    #[error("malformed hello: {0}")]
    Malformed(&'static str),
    /// No version in common.
    #[error("the node speaks versions {min} to {max} of the handoff, this router takes {} to {}", ours.start(), ours.end())]
    ProtocolMismatch {
        /// The node's lowest.
        min: u32,
        /// The node's highest.
        max: u32,
        /// The router's.
        ours: RangeInclusive<u32>,
    },
    /// Another model.
    #[error(
        "the node serves {node_model:?} (vocabulary {node_vocabulary}), this router {model:?} (vocabulary {vocabulary})"
    )]
    ModelMismatch {
        /// The node's.
        node_model: String,
        /// The node's.
        node_vocabulary: usize,
        /// The router's.
        model: String,
        /// The router's.
        vocabulary: usize,
    },
    /// Other weights, or other numerics.
    #[error("the node's KV identity is {node}, the members' {ours}")]
    IdentityMismatch {
        /// The node's.
        node: KvIdentity,
        /// The members'.
        ours: KvIdentity,
    },
    /// Another block size or head split.
    #[error("the node's KV layout is not the members'")]
    LayoutMismatch,
    /// [`MAX_MEMBERS`].
    #[error("this router has {MAX_MEMBERS} nodes already")]
    TooMany,
}

impl JoinError {
    /// Stable, UPPER_SNAKE_CASE.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "MALFORMED",
            Self::ProtocolMismatch { .. } => "PROTOCOL_MISMATCH",
            Self::ModelMismatch { .. } => "MODEL_MISMATCH",
            Self::IdentityMismatch { .. } => "IDENTITY_MISMATCH",
            Self::LayoutMismatch => "LAYOUT_MISMATCH",
            Self::TooMany => "TOO_MANY_NODES",
        }
    }
}

/// A hello that was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Joined {
    /// The new member.
    pub member: MemberId,
    /// The older announcement of the same node, which is a member no more.
    pub replaced: Option<MemberId>,
}

/// The members.
#[derive(Debug)]
pub struct Members {
    expected: Expected,
    members: BTreeMap<MemberId, Member>,
    pairs: Pairs,
    next: u64,
    dispatches: u64,
}

impl Members {
    /// None.
    pub fn new(expected: Expected) -> Self {
        Self {
            expected,
            members: BTreeMap::new(),
            pairs: Pairs::default(),
            next: 1,
            dispatches: 0,
        }
    }

    /// Takes a node in. The first one sets identity and layout, until the last has left. A node that announces itself again replaces its older
    /// announcement, whichever epoch that had: the newer stream is the one that lives.
    pub fn join(&mut self, hello: Hello) -> Result<Joined, JoinError> {
        self.check(&hello)?;
        let replaced = self.find(&hello.node);
        if replaced.is_none() && self.members.len() >= MAX_MEMBERS {
            return Err(JoinError::TooMany);
        }
        let others = self.members.values().find(|member| Some(member.id()) != replaced);
        if let Some(other) = others.map(Member::hello) {
            if other.identity != hello.identity {
                return Err(JoinError::IdentityMismatch {
                    node: hello.identity,
                    ours: other.identity,
                });
            }
            if other.layout != hello.layout {
                return Err(JoinError::LayoutMismatch);
            }
        }
        if let Some(replaced) = replaced {
            self.leave(replaced);
        }
        let member = MemberId(self.next);
        self.next += 1;
        self.members.insert(member, Member::new(member, hello));
        Ok(Joined { member, replaced })
    }

    fn check(&self, hello: &Hello) -> Result<(), JoinError> {
        if !hello.node.is_valid() {
            return Err(JoinError::Malformed(
                "node_id must be 1 to 128 of a-z, A-Z, 0-9, '-', '_' and '.'",
            ));
        }
        if hello.address.is_empty() {
            return Err(JoinError::Malformed("address is missing"));
        }
        let layout = &hello.layout;
        if layout.layers == 0 || layout.heads == 0 || layout.head_dim == 0 || layout.block_tokens == 0 {
            return Err(JoinError::Malformed("layout has a zero"));
        }
        if hello.blocks == 0 || hello.context_length == 0 {
            return Err(JoinError::Malformed("blocks and context_length must not be 0"));
        }
        let ours = &self.expected.versions;
        if !hello.versions_meet(ours) {
            return Err(JoinError::ProtocolMismatch {
                min: hello.protocol_min,
                max: hello.protocol_max,
                ours: ours.clone(),
            });
        }
        if hello.model != self.expected.model || hello.vocabulary != self.expected.vocabulary {
            return Err(JoinError::ModelMismatch {
                node_model: hello.model.clone(),
                node_vocabulary: hello.vocabulary,
                model: self.expected.model.clone(),
                vocabulary: self.expected.vocabulary,
            });
        }
        Ok(())
    }

    fn find(&self, node: &NodeId) -> Option<MemberId> {
        let member = self.members.values().find(|member| member.hello().node == *node)?;
        Some(member.id())
    }

    /// Forgets a member; false if it was none any more.
    pub fn leave(&mut self, member: MemberId) -> bool {
        self.pairs.forget(member);
        self.members.remove(&member).is_some()
    }

    /// One member.
    pub fn get(&self, member: MemberId) -> Option<&Member> {
        self.members.get(&member)
    }

    /// One member, to be changed.
    pub fn get_mut(&mut self, member: MemberId) -> Option<&mut Member> {
        self.members.get_mut(&member)
    }

    /// All.
    pub fn iter(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// Those of a role that take requests.
    pub fn ready(&self, role: Role) -> impl Iterator<Item = &Member> {
        self.iter()
            .filter(move |member| member.hello().role == role && member.ready())
    }

    /// KV of a request has travelled from `prefill` to `decode`; forgotten when either has left.
    pub fn travelled(&mut self, prefill: MemberId, decode: MemberId, travelled: Travelled) {
        if self.members.contains_key(&prefill) && self.members.contains_key(&decode) {
            self.pairs.travelled(prefill, decode, travelled);
        }
    }

    /// How fast KV travels between members.
    pub fn pairs(&self) -> &Pairs {
        &self.pairs
    }

    /// Nodes of the other role with which `member` cannot hand over: their versions of the handoff do not meet.
    pub fn apart(&self, member: MemberId) -> Vec<NodeId> {
        let Some(hello) = self.get(member).map(Member::hello) else {
            return Vec::new();
        };
        self.iter()
            .map(Member::hello)
            .filter(|other| other.role != hello.role && !other.pairs_with(hello))
            .map(|other| other.node.clone())
            .collect()
    }

    /// What they share; `None` without members.
    pub fn shape(&self) -> Option<Shape> {
        let first = self.iter().next()?.hello();
        let context_length = self.iter().map(|member| member.hello().context_length).min()?;
        Some(Shape {
            identity: first.identity,
            layout: first.layout,
            context_length,
        })
    }

    /// Takes a credit on a member.
    pub fn take(&mut self, member: MemberId, blocks: u64, tokens: u64) -> Option<Credit> {
        self.dispatches += 1;
        let number = self.dispatches;
        Some(self.members.get_mut(&member)?.take(blocks, tokens, number))
    }

    /// The node has the dispatch.
    pub fn acknowledge(&mut self, credit: &mut Credit) {
        if let Some(member) = self.members.get_mut(&credit.member) {
            member.acknowledge(credit);
        }
    }

    /// Gives a credit back; that of a member that left is forgotten.
    pub fn give_back(&mut self, credit: Credit) {
        if let Some(member) = self.members.get_mut(&credit.member) {
            member.give_back(credit);
        }
    }
}
