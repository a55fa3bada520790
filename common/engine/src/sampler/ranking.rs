//! Tokens by rank, sorted no further than is asked for.

/// Ranks by logit, highest first, then by id, lowest first.
pub(super) struct Ranking<'a> {
    logits: &'a [f32],
    /// One key per token that was taken in, ascending = by rank; the first `sorted` are in their final places.
    keys: &'a mut Vec<u64>,
    sorted: usize,
    complete: bool,
}

/// How many ranks are sorted at first; each further piece is four times as long as what is sorted already.
const FIRST: usize = 64;

impl<'a> Ranking<'a> {
    /// Of these logits (no NaN). Those below `likely` are not looked at unless all others are asked for: a matter of time only.
    pub(super) fn new(logits: &'a [f32], likely: f32, keys: &'a mut Vec<u64>) -> Self {
        keys.clear();
        keys.extend(
            logits
                .iter()
                .zip(0..)
                .filter(|(logit, _)| **logit >= likely)
                .map(|(&logit, id)| key(logit, id)),
        );
        Self {
            logits,
            keys,
            sorted: 0,
            complete: false,
        }
    }

    /// The token at `rank` (0 is the best).
    pub(super) fn token(&mut self, rank: usize) -> usize {
        if rank >= self.keys.len() && !self.complete {
            self.keys.clear();
            self.keys
                .extend(self.logits.iter().zip(0..).map(|(&logit, id)| key(logit, id)));
            (self.sorted, self.complete) = (0, true);
        }
        while rank >= self.sorted {
            let rest = &mut self.keys[self.sorted..];
            let piece = (self.sorted * 4).max(FIRST);
            if piece < rest.len() {
                rest.select_nth_unstable(piece);
                rest[..piece].sort_unstable();
                self.sorted += piece;
            } else {
                rest.sort_unstable();
                self.sorted = self.keys.len();
            }
        }
        self.keys[rank] as u32 as usize
    }
}

/// Smaller for a higher logit; among equals (0 and −0 are equal), for a lower id.
fn key(logit: f32, id: u32) -> u64 {
    let bits = (logit + 0.0).to_bits();
    // Ascending in the float's order: negatives have all bits flipped, the others only the sign.
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 };
    (u64::from(!ascending) << 32) | u64::from(id)
}
