//! Between wire messages and typed values. Everything that comes in is checked here or by the state machines, never trusted.

use baton_kv::{BlockName, Checksum, ChecksumState, KvDtype, KvLayout, TokenId};
use baton_proto::node::v1 as pb;

use crate::limits;

/// A message lacks a field or holds one that makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("malformed field: {0}")]
pub struct WireError(pub &'static str);

/// Most elements in any dimension of a layout that comes from the wire: far above every model, far below an overflow.
const DIMENSION_MAX: usize = 1 << 16;

/// For the wire.
pub fn layout_to_proto(layout: &KvLayout) -> pb::KvLayout {
    pb::KvLayout {
        layers: layout.layers as u32,
        heads: layout.heads as u32,
        head_dim: layout.head_dim as u32,
        block_tokens: layout.block_tokens as u32,
        dtype: match layout.dtype {
            KvDtype::Bf16 => "bf16".to_owned(),
        },
    }
}

/// From the wire; refuses an unknown dtype and sizes outside of `1..=65536`.
pub fn layout_from_proto(layout: &pb::KvLayout) -> Result<KvLayout, WireError> {
    let size = |value: u32, field| match value as usize {
        size @ 1..=DIMENSION_MAX => Ok(size),
        _ => Err(WireError(field)),
    };
    Ok(KvLayout {
        layers: size(layout.layers, "layout.layers")?,
        heads: size(layout.heads, "layout.heads")?,
        head_dim: size(layout.head_dim, "layout.head_dim")?,
        block_tokens: size(layout.block_tokens, "layout.block_tokens")?,
        dtype: match layout.dtype.as_str() {
            "bf16" => KvDtype::Bf16,
            _ => return Err(WireError("layout.dtype")),
        },
    })
}

/// What FINAL says about one slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ManifestEntry {
    /// Chained name of a full block; none for the tail.
    pub name: Option<BlockName>,
    /// Tokens in it.
    pub valid_tokens: usize,
    /// Of its valid bytes, all layers in order, where they were computed.
    pub checksum: Checksum,
}

/// Output index 0, drawn where the prompt was computed.
#[derive(Clone, PartialEq, Debug)]
pub struct FirstToken {
    /// The token.
    pub token: TokenId,
    /// Its log-probability.
    pub logprob: f32,
    /// The most probable tokens and their log-probabilities, best first, as many as were asked for.
    pub alternatives: Vec<(TokenId, f32)>,
}

/// For the wire.
pub fn alternatives_to_proto(alternatives: &[(TokenId, f32)]) -> Vec<pb::Alternative> {
    let alternative = |&(id, logprob): &(TokenId, f32)| pb::Alternative { id, logprob };
    alternatives.iter().map(alternative).collect()
}

/// Of what FINAL says beside its manifest.
pub(crate) fn first_checksum(message: &pb::Final) -> u64 {
    let mut sum = ChecksumState::default();
    let mut add = |id: u32, logprob: f32| {
        sum.update(&id.to_le_bytes());
        sum.update(&logprob.to_le_bytes());
    };
    add(message.first_token, message.logprob);
    message
        .alternatives
        .iter()
        .for_each(|other| add(other.id, other.logprob));
    sum.finish().0
}

/// FINAL: everything has been sent.
#[derive(Clone, PartialEq, Debug)]
pub struct FinalClaims {
    /// One per slot, in order.
    pub manifest: Vec<ManifestEntry>,
    /// What was drawn from it.
    pub first: FirstToken,
}

impl FinalClaims {
    /// For the wire.
    pub fn to_proto(&self) -> pb::Final {
        let mut message = pb::Final {
            manifest: self
                .manifest
                .iter()
                .map(|entry| pb::ManifestEntry {
                    name: entry.name.map(|name| name.0.to_vec()).unwrap_or_default(),
                    valid_tokens: entry.valid_tokens as u32,
                    checksum: entry.checksum.0,
                })
                .collect(),
            first_token: self.first.token,
            logprob: self.first.logprob,
            alternatives: alternatives_to_proto(&self.first.alternatives),
            first_checksum: 0,
        };
        message.first_checksum = first_checksum(&message);
        message
    }

    /// From the wire, in this version; log-probabilities are finite numbers. The manifest needs no checksum: what is wrong in it does not match the blocks.
    pub fn from_proto(message: &pb::Final, protocol: u32) -> Result<Self, WireError> {
        if protocol >= 2 && message.first_checksum != first_checksum(message) {
            return Err(WireError("final.first_checksum"));
        }
        if !message.logprob.is_finite() {
            return Err(WireError("final.logprob"));
        }
        let alternatives = &message.alternatives;
        if alternatives.len() > limits::ALTERNATIVES || alternatives.iter().any(|other| !other.logprob.is_finite()) {
            return Err(WireError("final.alternatives"));
        }
        let manifest = message
            .manifest
            .iter()
            .map(|entry| {
                Ok(ManifestEntry {
                    name: match entry.name.as_slice() {
                        [] => None,
                        bytes => Some(BlockName::from_slice(bytes).ok_or(WireError("final.manifest.name"))?),
                    },
                    valid_tokens: entry.valid_tokens as usize,
                    checksum: Checksum(entry.checksum),
                })
            })
            .collect::<Result<_, WireError>>()?;
        Ok(Self {
            manifest,
            first: FirstToken {
                token: message.first_token,
                logprob: message.logprob,
                alternatives: alternatives.iter().map(|other| (other.id, other.logprob)).collect(),
            },
        })
    }
}
