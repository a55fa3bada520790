//! A keyed mix of words: not cryptographic, but every bit of every word changes the result.

/// A state that words are mixed into, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mix(u64);

impl Mix {
    /// The start for this key.
    pub(super) fn new(key: u64) -> Self {
        Self(finish(key ^ 0x0BA7_0E5E_ED5E_ED00))
    }

    /// With one more word. For a given state, different words give different states.
    pub(super) fn and(self, word: u64) -> Self {
        Self(finish(
            self.0.rotate_left(23).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ word,
        ))
    }

    /// With more bytes, eight at a time; the last word is filled with zeros.
    pub(super) fn and_bytes(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<8>();
        let mut mix = self;
        for word in words {
            mix = mix.and(u64::from_le_bytes(*word));
        }
        if !rest.is_empty() {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            mix = mix.and(u64::from_le_bytes(word));
        }
        mix
    }

    /// Endless words that follow from the state.
    pub(super) fn stream(self) -> impl Iterator<Item = u64> {
        (0..).map(move |index| self.and(index).0)
    }
}

/// splitmix64's finisher: a bijection.
fn finish(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
