//! Bytes in the parts in which they came: taken apart without being copied.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

/// Neighbours below it are put together, so that many tiny parts do not take many times their size.
const SMALL_BYTES: usize = 4 << 10;

/// A queue of bytes.
#[derive(Default, Debug)]
pub struct Chain {
    parts: VecDeque<Bytes>,
    len: usize,
}

impl Chain {
    /// Adds to the end.
    pub fn push(&mut self, part: Bytes) {
        if part.is_empty() {
            return;
        }
        self.len += part.len();
        match self.parts.back_mut() {
            Some(last) if last.len() < SMALL_BYTES && part.len() < SMALL_BYTES => {
                let mut both = BytesMut::with_capacity(last.len() + part.len());
                both.extend_from_slice(last);
                both.extend_from_slice(&part);
                *last = both.freeze();
            }
            _ => self.parts.push_back(part),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `bytes` of them, which are taken out; `None`, and nothing taken, when there are fewer.
    pub fn split(&mut self, bytes: usize) -> Option<Self> {
        if bytes > self.len {
            return None;
        }
        let mut taken = Self::default();
        while taken.len < bytes {
            let part = self.next(bytes - taken.len);
            taken.len += part.len();
            taken.parts.push_back(part);
        }
        Some(taken)
    }

    /// The first of them, at most `most`, which lie together; they are taken out. Empty only when there are none.
    pub fn next(&mut self, most: usize) -> Bytes {
        let Some(first) = self.parts.front_mut() else {
            return Bytes::new();
        };
        let part = if first.len() <= most {
            self.parts.pop_front().unwrap_or_default()
        } else {
            first.split_to(most)
        };
        self.len -= part.len();
        part
    }

    /// A number of base 128, as protobuf writes it; `None` when it is cut off or too long.
    pub fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.try_get_u8().ok()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
}

impl From<Bytes> for Chain {
    fn from(bytes: Bytes) -> Self {
        let mut chain = Self::default();
        chain.push(bytes);
        chain
    }
}

impl Buf for Chain {
    fn remaining(&self) -> usize {
        self.len
    }

    fn chunk(&self) -> &[u8] {
        self.parts.front().map_or(&[], |part| part)
    }

    fn advance(&mut self, mut bytes: usize) {
        assert!(bytes <= self.len, "not past the end");
        while bytes > 0 {
            bytes -= self.next(bytes).len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_taken_apart_where_one_likes() {
        let bytes: Vec<u8> = (0..40_000_u32).map(|at| (at % 251) as u8).collect();
        for (part, piece) in [(1, 7), (5_000, 4_999), (5_000, 12_345), (40_000, 1), (777, 40_000)] {
            let mut chain = Chain::default();
            bytes
                .chunks(part)
                .for_each(|part| chain.push(Bytes::copy_from_slice(part)));
            // Tiny parts do not stay alone.
            assert!(chain.parts.len() <= 1 + bytes.len() / part.max(SMALL_BYTES) * 2);
            assert_eq!(chain.len(), bytes.len());
            assert!(chain.split(bytes.len() + 1).is_none());
            let mut all = Vec::new();
            while !chain.is_empty() {
                let mut taken = chain.split(piece.min(chain.len())).unwrap();
                assert_eq!(taken.len(), taken.parts.iter().map(Bytes::len).sum::<usize>());
                while taken.has_remaining() {
                    all.extend_from_slice(&taken.next(1_000));
                }
            }
            assert_eq!(all, bytes);
            assert_eq!(chain.next(1), Bytes::new());
        }
    }

    #[test]
    fn numbers_end() {
        let varint = |bytes: &[u8]| Chain::from(Bytes::copy_from_slice(bytes)).varint();
        assert_eq!(varint(&[0x7F]), Some(127));
        assert_eq!(varint(&[0xAC, 0x02]), Some(300));
        assert_eq!(
            varint(&[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01]),
            Some(u64::MAX)
        );
        assert_eq!(varint(&[0x80; 11]), None);
        assert_eq!(varint(&[0x80]), None);
        assert_eq!(varint(&[]), None);
    }
}
