//! What every Baton process shares: limits, lifecycle, ops endpoints, telemetry, and how errors travel.
//!
//! **Architecture invariants**
//! - Every limit that crates share has its value and its reason in [`limits`].
//! - One [`Phase`] drives probes, the registry and metrics; nothing else says whether a process is ready.
//! - Random bits and the clock are drawn here and passed into the pure crates.
//!
//! Deliberately absent: anything that only one role needs, and, so far, authentication of clients: processes listen on the loopback interface unless told otherwise.

pub mod announce;
pub mod byte_size;
pub mod clock;
pub mod files;
pub mod grpc;
pub mod heap;
pub mod http;
pub mod lifecycle;
pub mod limits;
pub mod listen;
pub mod metrics;
pub mod ops;
pub mod random;
pub mod signal;
pub mod status;
pub mod telemetry;
pub mod tls;

pub use byte_size::ByteSize;
pub use lifecycle::{Drained, Lifecycle, Phase};
pub use listen::{ListenAddress, ListenError};
pub use tls::{Tls, TlsArgs, TlsError};
