//! How fast KV travels between pairs of members: what prefill nodes say of each transfer, averaged.

use std::collections::BTreeMap;

use super::member::MemberId;

/// Weight of a new transfer in the averages.
const WEIGHT: f64 = 0.2;

/// Pairs that are remembered; the transfers of further ones are not.
const MAX_PAIRS: usize = 65_536;

/// How KV travels, by name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Transport {
    /// In gRPC frames.
    Grpc,
    /// Through memory that both map.
    Shm,
}

impl Transport {
    /// Of a name on the wire; `None` for one that this router does not know.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "grpc" => Some(Self::Grpc),
            "shm" => Some(Self::Shm),
            _ => None,
        }
    }

    /// On the wire, in metrics and in answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Shm => "shm",
        }
    }
}

/// One transfer, as its prefill node saw it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Travelled {
    /// How.
    pub transport: Transport,
    /// Bytes a second while it was being sent.
    pub bytes_per_s: f64,
    /// What was expected; 0 when nothing was known.
    pub predicted_bytes_per_s: f64,
}

/// Averages over the transfers of one pair, by the transport that it takes now.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PairRate {
    /// Of the last transfer.
    pub transport: Transport,
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// What was expected; 0 when nothing is known.
    pub predicted_bytes_per_s: f64,
}

/// All pairs between which KV has travelled.
#[derive(Debug, Default)]
pub struct Pairs {
    rates: BTreeMap<(MemberId, MemberId), PairRate>,
}

impl Pairs {
    /// Takes in a transfer from `prefill` to `decode`. One without a rate says nothing.
    pub(super) fn travelled(&mut self, prefill: MemberId, decode: MemberId, travelled: Travelled) {
        let usable = |rate: f64| rate.is_finite() && rate >= 0.0;
        let Travelled {
            transport,
            bytes_per_s,
            predicted_bytes_per_s,
        } = travelled;
        if !usable(bytes_per_s) || bytes_per_s == 0.0 || !usable(predicted_bytes_per_s) {
            return;
        }
        let fresh = PairRate {
            transport,
            bytes_per_s,
            predicted_bytes_per_s,
        };
        let room = self.rates.len() < MAX_PAIRS;
        match self.rates.get_mut(&(prefill, decode)) {
            Some(rate) if rate.transport == transport => {
                rate.bytes_per_s += WEIGHT * (bytes_per_s - rate.bytes_per_s);
                rate.predicted_bytes_per_s += WEIGHT * (predicted_bytes_per_s - rate.predicted_bytes_per_s);
            }
            Some(rate) => *rate = fresh,
            None if room => {
                self.rates.insert((prefill, decode), fresh);
            }
            None => {}
        }
    }

    /// A member has left.
    pub(super) fn forget(&mut self, member: MemberId) {
        self.rates
            .retain(|(prefill, decode), _| *prefill != member && *decode != member);
    }

    /// Of one pair; `None` before its first transfer.
    pub fn rate(&self, prefill: MemberId, decode: MemberId) -> Option<&PairRate> {
        self.rates.get(&(prefill, decode))
    }

    /// The mean of the pairs that take `transport`; `None` when none does.
    pub fn mean(&self, transport: Transport) -> Option<PairRate> {
        let of = || self.rates.values().filter(|rate| rate.transport == transport);
        let pairs = of().count();
        let mean = |part: fn(&PairRate) -> f64| of().map(part).sum::<f64>() / pairs as f64;
        (pairs > 0).then(|| PairRate {
            transport,
            bytes_per_s: mean(|rate| rate.bytes_per_s),
            predicted_bytes_per_s: mean(|rate| rate.predicted_bytes_per_s),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_averaged_and_go_with_their_members() {
        let mut pairs = Pairs::default();
        let (one, two, three) = (MemberId(1), MemberId(2), MemberId(3));
        let travelled = |transport, bytes_per_s| Travelled {
            transport,
            bytes_per_s,
            predicted_bytes_per_s: 2.0 * bytes_per_s,
        };
        let seen = |pairs: &Pairs, prefill| pairs.rate(prefill, two).map(|rate| rate.bytes_per_s);
        pairs.travelled(one, two, travelled(Transport::Grpc, 10.0));
        pairs.travelled(one, two, travelled(Transport::Grpc, 20.0));
        assert_eq!(seen(&pairs, one), Some(12.0));
        for nothing in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            pairs.travelled(one, two, travelled(Transport::Grpc, nothing));
        }
        assert_eq!(seen(&pairs, one), Some(12.0));
        pairs.travelled(three, two, travelled(Transport::Grpc, 24.0));
        let mean = pairs.mean(Transport::Grpc).expect("two pairs");
        assert_eq!((mean.bytes_per_s, mean.predicted_bytes_per_s), (18.0, 36.0));
        assert_eq!(pairs.mean(Transport::Shm), None);
        // Another transport begins anew.
        pairs.travelled(one, two, travelled(Transport::Shm, 100.0));
        assert_eq!(seen(&pairs, one), Some(100.0));
        pairs.forget(three);
        assert_eq!((seen(&pairs, one), seen(&pairs, three)), (Some(100.0), None));
        pairs.forget(two);
        assert_eq!(seen(&pairs, one), None);
    }
}
