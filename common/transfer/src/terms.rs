//! What two nodes must agree on before KV travels between them: said once, when they first meet. Pure.

use std::ops::RangeInclusive;

use baton_kv::{Epoch, KvIdentity, KvLayout, NodeId};
use baton_proto::node::v1 as pb;

use crate::{
    Reject,
    wire::{layout_from_proto, layout_to_proto},
};

/// The first version in which nodes introduce themselves.
pub const INTRODUCED_SINCE: u32 = 2;

/// One node's side of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Terms {
    /// The node's name.
    pub node: NodeId,
    /// This life of it.
    pub epoch: Epoch,
    /// What its KV means.
    pub identity: KvIdentity,
    /// Its pool's shape.
    pub layout: KvLayout,
    /// Versions of the handoff that it speaks.
    pub versions: RangeInclusive<u32>,
}

impl Terms {
    /// What a prefill node says; `shared` is its pool, where it can be mapped.
    pub fn hello(&self, shared: Option<pb::SharedPool>) -> pb::PeerHello {
        pb::PeerHello {
            node_id: self.node.0.clone(),
            epoch: self.epoch.to_bytes().to_vec(),
            kv_identity: self.identity.0.to_vec(),
            layout: Some(layout_to_proto(&self.layout)),
            protocol_min: *self.versions.start(),
            protocol_max: *self.versions.end(),
            shared,
        }
    }

    /// The newest version that both speak; why there is none, or why the two do not fit.
    pub fn agree(&self, hello: &pb::PeerHello) -> Result<u32, Reject> {
        Epoch::from_slice(&hello.epoch).ok_or(Reject::Malformed)?;
        let identity = KvIdentity::from_slice(&hello.kv_identity).ok_or(Reject::Malformed)?;
        let layout = hello.layout.as_ref().ok_or(Reject::Malformed)?;
        let layout = layout_from_proto(layout).map_err(|_| Reject::Malformed)?;
        let version = hello.protocol_max.min(*self.versions.end());
        if version < hello.protocol_min.max(*self.versions.start()) {
            return Err(Reject::ProtocolMismatch);
        }
        if identity != self.identity {
            return Err(Reject::IdentityMismatch);
        }
        if layout != self.layout {
            return Err(Reject::LayoutMismatch);
        }
        Ok(version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{EPOCH, IDENTITY, LAYOUT};

    fn terms(versions: RangeInclusive<u32>) -> Terms {
        Terms {
            node: NodeId("n".to_owned()),
            epoch: EPOCH,
            identity: IDENTITY,
            layout: LAYOUT,
            versions,
        }
    }

    #[test]
    fn the_newest_common_version_is_taken() {
        for (theirs, ours, expected) in [
            (1..=2, 1..=2, Ok(2)),
            (1..=2, 1..=1, Ok(1)),
            (1..=1, 1..=2, Ok(1)),
            (2..=7, 1..=3, Ok(3)),
            (3..=4, 1..=2, Err(Reject::ProtocolMismatch)),
            (1..=1, 2..=2, Err(Reject::ProtocolMismatch)),
        ] {
            let hello = terms(theirs.clone()).hello(None);
            assert_eq!(terms(ours.clone()).agree(&hello), expected, "{theirs:?} meets {ours:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let check = |change: fn(&mut pb::PeerHello), expected| {
            let mut hello = terms(1..=2).hello(None);
            change(&mut hello);
            assert_eq!(terms(1..=2).agree(&hello), Err(expected));
        };
        check(|hello| hello.kv_identity[0] ^= 1, Reject::IdentityMismatch);
        check(
            |hello| hello.layout.as_mut().expect("set").heads += 1,
            Reject::LayoutMismatch,
        );
        check(|hello| hello.layout.as_mut().expect("set").heads = 0, Reject::Malformed);
        check(|hello| hello.layout = None, Reject::Malformed);
        check(|hello| hello.epoch.clear(), Reject::Malformed);
        check(|hello| hello.kv_identity.clear(), Reject::Malformed);
    }
}
