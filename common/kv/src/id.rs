//! Identifiers. All are plain values; random ones are drawn by the drivers.

use std::fmt;

/// A token of the model's vocabulary.
pub type TokenId = u32;

/// Index of a block in one node's pool.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BlockId(pub u32);

/// One life of one process: random, compared for equality only.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Epoch(pub u128);

/// How often a slot has been granted; a frame for an older generation changes nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Generation(pub u64);

/// A client's request, drawn by the router (random 128 bits).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u128);

/// Counts dispatches of one request, from 1; only the current attempt's tokens pass.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Attempt(pub u32);

/// One reservation on one decode node (unique within that node's epoch).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct HandoffId(pub u64);

/// A node's name in the registry, fit for logs and metrics, e.g. `prefill-0`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NodeId(pub String);

impl NodeId {
    /// Bytes at most: it is a metric label.
    pub const MAX_BYTES: usize = 128;

    /// Whether it is a name: 1 to [`NodeId::MAX_BYTES`] of a-z, A-Z, 0-9, '-', '_' and '.'.
    pub fn is_valid(&self) -> bool {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        (1..=Self::MAX_BYTES).contains(&self.0.len()) && self.0.bytes().all(plain)
    }
}

macro_rules! hex_u128 {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:032x})"), self.0)
            }
        }
        impl $name {
            /// Big-endian bytes, as on the wire.
            pub fn to_bytes(self) -> [u8; 16] {
                self.0.to_be_bytes()
            }
            /// From the wire; `None` when not exactly 16 bytes.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                Some(Self(u128::from_be_bytes(bytes.try_into().ok()?)))
            }
        }
    };
}
hex_u128!(Epoch);
hex_u128!(RequestId);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
