//! Random bits from the operating system.
//!
//! All functions panic when it has none to give: nothing may go on with bits that can be guessed.

use baton_kv::{Epoch, RequestId};

fn bytes<const N: usize>() -> [u8; N] {
    let mut out = [0; N];
    getrandom::fill(&mut out).expect("the operating system gives random bytes");
    out
}

/// One life of one process.
pub fn epoch() -> Epoch {
    Epoch(u128::from_ne_bytes(bytes()))
}

/// A new request's id.
pub fn request_id() -> RequestId {
    RequestId(u128::from_ne_bytes(bytes()))
}

/// A sampling seed for a request that brought none.
pub fn seed() -> u64 {
    u64::from_ne_bytes(bytes())
}

/// The right to push into one handoff's slots.
pub fn capability() -> [u8; 32] {
    bytes()
}

/// A router's key of tenants' salts, when it was given none.
pub fn secret() -> [u8; 32] {
    bytes()
}

/// Four hex digits that set processes of one role apart when they were given no name.
pub fn suffix() -> String {
    format!("{:04x}", u16::from_ne_bytes(bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_differ() {
        assert_ne!(epoch(), epoch());
        assert_ne!(request_id(), request_id());
        assert_ne!(seed(), seed());
        assert_ne!(capability(), capability());
        assert_eq!(suffix().len(), 4);
    }
}
