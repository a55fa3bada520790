//! What is measured of ours and of peers, and what came out.

use std::collections::BTreeMap;

use super::median;

/// `prefill` tokens of each of `sequences` sequences, one sequence after the other; then `decode` tokens of each, a step a token.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Load {
    /// Tokens of each sequence before decoding.
    pub prefill: usize,
    /// Tokens of each sequence that are decoded.
    pub decode: usize,
    /// Sequences that decode together.
    pub sequences: usize,
}

/// Seconds of a load's phases.
#[derive(Clone, Copy, Debug, serde::Deserialize)]
pub struct Times {
    /// All of the prefill.
    pub prefill_s: f64,
    /// All of the decoding.
    pub decode_s: f64,
}

/// Tokens per second, of all sequences together.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Of prefill.
    pub prefill: f64,
    /// Of decoding.
    pub decode: f64,
}

impl Load {
    /// The rates at which it ran.
    pub fn rates(&self, times: Times) -> Rates {
        Rates {
            prefill: (self.prefill * self.sequences) as f64 / times.prefill_s,
            decode: (self.decode * self.sequences) as f64 / times.decode_s,
        }
    }
}

/// The rates of one load in each round, by who ran it and how.
#[derive(Debug, Default)]
pub struct Series(BTreeMap<String, Vec<Rates>>);

impl Series {
    /// One more round of `who`.
    pub fn add(&mut self, who: &str, rates: Rates) {
        self.0.entry(who.to_owned()).or_default().push(rates);
    }

    /// All rounds of another series as well.
    pub fn merge(&mut self, other: &Series) {
        for (who, rounds) in &other.0 {
            self.0.entry(who.clone()).or_default().extend(rounds);
        }
    }

    /// The median of a phase, of each.
    pub fn medians(&self, phase: fn(&Rates) -> f64) -> impl Iterator<Item = (&str, f64)> {
        self.0
            .iter()
            .map(move |(who, rounds)| (who.as_str(), median(rounds.iter().map(phase).collect())))
    }

    /// The highest median of a phase, and whose it is; nothing where nobody was measured.
    pub fn best(&self, phase: fn(&Rates) -> f64) -> Option<(f64, &str)> {
        self.medians(phase)
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map(|(who, rate)| (rate, who))
    }
}
