//! What is known of the ways by which KV may travel to one peer: how fast each was when it was probed, how fast transfers were since, and which to take.
//! Pure: the edge probes and transfers, and says here what came of it.

#[cfg(test)]
mod tests;

use std::{fmt, str::FromStr, time::Duration};

use crate::{Transport, limits};

/// Share of a new rate in the moving average: the last ten transfers count for most of it.
const SMOOTHING: f64 = 0.2;

/// Which transport a node's pushes take.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Preference {
    /// The one that was fastest when probed.
    #[default]
    Auto,
    /// This one, or none.
    Only(Transport),
}

/// Not the name of a transport.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("use auto, grpc or shm")]
pub struct PreferenceError;

impl FromStr for Preference {
    type Err = PreferenceError;

    fn from_str(text: &str) -> Result<Self, PreferenceError> {
        match text {
            "auto" => Ok(Self::Auto),
            "grpc" => Ok(Self::Only(Transport::Grpc)),
            "shm" => Ok(Self::Only(Transport::Shm)),
            _ => Err(PreferenceError),
        }
    }
}

impl fmt::Display for Preference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Only(transport) => transport.name(),
        })
    }
}

/// When a path counts as slow, and what follows.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SlowPath {
    /// Below this share of what its probe gave.
    pub ratio: f64,
    /// Nothing is pushed over a path whose new probe is slow, too.
    pub refuse: bool,
}

/// What a probe gave.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Measured {
    /// Payload a second.
    pub bytes_per_s: f64,
    /// There and back, without payload.
    pub latency: Duration,
}

/// Whether a path is what it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PathState {
    /// As far as is known.
    Good,
    /// A transfer was slow: a probe will say whether the path is, or was only busy.
    Doubtful,
    /// Its last probe was slow, too.
    Bad,
}

/// One way to one peer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Path {
    transport: Transport,
    /// The last probe that was not slow; `None` where none could be made: such a path is never slow.
    probe: Option<Measured>,
    /// Moving average over the probe and the transfers after it, bytes a second.
    rate: f64,
    state: PathState,
}

impl Path {
    /// Just probed.
    pub fn new(transport: Transport, probe: Option<Measured>) -> Self {
        Self {
            transport,
            probe,
            rate: probe.map_or(0.0, |probe| probe.bytes_per_s),
            state: PathState::Good,
        }
    }

    /// Which.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// Whether it is what it was.
    pub fn state(&self) -> PathState {
        self.state
    }

    /// The last probe that was not slow.
    pub fn probe(&self) -> Option<Measured> {
        self.probe
    }

    /// Bytes a second that a transfer of `bytes` will see, its latency included; 0 when nothing is known.
    pub fn predicted(&self, bytes: u64) -> f64 {
        let latency = self.probe.map_or(0.0, |probe| probe.latency.as_secs_f64());
        if self.rate <= 0.0 || bytes == 0 {
            return 0.0;
        }
        bytes as f64 / (latency + bytes as f64 / self.rate)
    }

    /// A transfer has ended, at `bytes_per_s`. True when it was slow. A short one says nothing: it is mostly waiting.
    pub fn transferred(&mut self, bytes: u64, bytes_per_s: f64, slow: &SlowPath) -> bool {
        if bytes < limits::TELLING_BYTES || bytes_per_s <= 0.0 {
            return false;
        }
        let Some(probe) = self.probe else { return false };
        self.rate += SMOOTHING * (bytes_per_s - self.rate);
        let is_slow = bytes_per_s < slow.ratio * probe.bytes_per_s;
        if is_slow && self.state == PathState::Good {
            self.state = PathState::Doubtful;
        }
        is_slow
    }

    /// It was probed again; `None`: that failed, and a path that cannot even be probed is slow.
    pub fn probed(&mut self, again: Option<Measured>, slow: &SlowPath) {
        let Some(before) = self.probe else { return };
        match again {
            Some(again) if again.bytes_per_s >= slow.ratio * before.bytes_per_s => {
                *self = Self::new(self.transport, Some(again))
            }
            _ => self.state = PathState::Bad,
        }
    }
}

/// Why no path can be taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PathError {
    /// The one that is required cannot be had between the two.
    #[error("KV cannot travel to this peer by {}: {why}", transport.name())]
    Unavailable {
        /// Which.
        transport: Transport,
        /// Why not.
        why: String,
    },
    /// Every path that may be taken is far slower than it was.
    #[error("the path to this peer ({}) is far slower than it was when it was first probed", transport.name())]
    Slow {
        /// Which.
        transport: Transport,
    },
}

/// The path to take out of `paths`: a good one before a bad one, then the faster. `missing` says why a transport is not among them.
pub fn choose<'a>(
    paths: &'a [Path],
    preference: Preference,
    slow: &SlowPath,
    missing: impl Fn(Transport) -> String,
) -> Result<&'a Path, PathError> {
    let wanted = |path: &&Path| match preference {
        Preference::Auto => true,
        Preference::Only(transport) => path.transport == transport,
    };
    let good = |path: &Path| path.state != PathState::Bad;
    let best = paths.iter().filter(wanted).max_by(|a, b| {
        let rate = |path: &Path| path.probe.map_or(0.0, |probe| probe.bytes_per_s);
        good(a).cmp(&good(b)).then_with(|| rate(a).total_cmp(&rate(b)))
    });
    let transport = match preference {
        Preference::Only(transport) => transport,
        Preference::Auto => Transport::Grpc,
    };
    match best {
        None => Err(PathError::Unavailable {
            transport,
            why: missing(transport),
        }),
        Some(path) if slow.refuse && !good(path) => Err(PathError::Slow {
            transport: path.transport,
        }),
        Some(path) => Ok(path),
    }
}
