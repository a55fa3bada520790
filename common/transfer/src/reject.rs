//! Why a decode node refuses a frame or a whole push.

/// A refusal. A rejected frame changed nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Reject {
    /// The ticket is from another life of this process. A new attempt helps.
    #[error("the ticket is from another epoch of the decode node")]
    StaleEpoch,
    /// The slot has been granted anew since. A new attempt helps.
    #[error("the slot has another generation")]
    StaleGeneration,
    /// No such handoff, or it has ended. A new attempt helps.
    #[error("the handoff is unknown or has ended")]
    UnknownHandoff,
    /// The lease or the request's deadline has passed. A new attempt helps while the deadline lasts.
    #[error("the lease has ended")]
    LeaseEnded,
    /// The secret is wrong. No retry helps.
    #[error("the capability is wrong")]
    BadCapability,
    /// The peers' KV does not mean the same. No retry helps between these two.
    #[error("the KV identities differ")]
    IdentityMismatch,
    /// The peers' KV has different shapes. No retry helps between these two.
    #[error("the KV layouts differ")]
    LayoutMismatch,
    /// The peers share no protocol version. No retry helps between these two.
    #[error("the protocol versions differ")]
    ProtocolMismatch,
    /// A block arrived corrupt twice. A new attempt helps.
    #[error("a block's checksum did not match twice")]
    ChecksumMismatch,
    /// FINAL does not describe the reserved prompt. No retry helps.
    #[error("the manifest does not match the reserved prompt")]
    ManifestMismatch,
    /// A field is missing, or out of its range. No retry helps.
    #[error("the frame is malformed")]
    Malformed,
    /// The handoff was aborted by the router or by the node. A new attempt helps.
    #[error("the handoff was aborted")]
    Aborted,
    /// Another stream fills this handoff already. No retry helps.
    #[error("another stream fills this handoff")]
    StreamActive,
    /// The sender's pool is not mapped here, or not any more. A new attempt helps, once it was offered again.
    #[error("the sender's pool is not mapped")]
    PoolNotMapped,
}

impl Reject {
    const ALL: [Self; 14] = [
        Self::StaleEpoch,
        Self::StaleGeneration,
        Self::UnknownHandoff,
        Self::LeaseEnded,
        Self::BadCapability,
        Self::IdentityMismatch,
        Self::LayoutMismatch,
        Self::ProtocolMismatch,
        Self::ChecksumMismatch,
        Self::ManifestMismatch,
        Self::Malformed,
        Self::Aborted,
        Self::StreamActive,
        Self::PoolNotMapped,
    ];

    /// The stable code on the wire.
    pub fn code(self) -> &'static str {
        match self {
            Self::StaleEpoch => "STALE_EPOCH",
            Self::StaleGeneration => "STALE_GENERATION",
            Self::UnknownHandoff => "UNKNOWN_HANDOFF",
            Self::LeaseEnded => "LEASE_ENDED",
            Self::BadCapability => "BAD_CAPABILITY",
            Self::IdentityMismatch => "IDENTITY_MISMATCH",
            Self::LayoutMismatch => "LAYOUT_MISMATCH",
            Self::ProtocolMismatch => "PROTOCOL_MISMATCH",
            Self::ChecksumMismatch => "CHECKSUM_MISMATCH",
            Self::ManifestMismatch => "MANIFEST_MISMATCH",
            Self::Malformed => "MALFORMED",
            Self::Aborted => "ABORTED",
            Self::StreamActive => "STREAM_ACTIVE",
            Self::PoolNotMapped => "POOL_NOT_MAPPED",
        }
    }

    /// From the wire; `None` for a code that this version does not know.
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reject| reject.code() == code)
    }

    /// Whether a new attempt (a new reservation) may succeed.
    pub fn retry_helps(self) -> bool {
        matches!(
            self,
            Self::StaleEpoch
                | Self::StaleGeneration
                | Self::UnknownHandoff
                | Self::LeaseEnded
                | Self::ChecksumMismatch
                | Self::Aborted
                | Self::PoolNotMapped
        )
    }
}
