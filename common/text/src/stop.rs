//! Stop strings in streamed text.

use crate::{
    TextError,
    limits::{MAX_STOP_BYTES, MAX_STOPS},
};

/// Watches streamed text for stop strings. The answer ends before the first stop string to be complete; of several complete at the same
/// character, the longest counts. The outcome does not depend on how the text is cut into pieces.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// The end of the text so far, as much as may yet become a stop string.
    held: String,
    stopped: bool,
}

/// What one piece of text led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text that belongs to the answer, including what was held back.
    pub text: String,
    /// The stop string that ended the answer: its index in the list.
    pub stopped: Option<usize>,
}

impl StopMatcher {
    /// Watches for these; an empty list watches for none.
    pub fn new(stops: Vec<String>) -> Result<Self, TextError> {
        let fits = |stop: &String| (1..=MAX_STOP_BYTES).contains(&stop.len());
        if stops.len() > MAX_STOPS || !stops.iter().all(fits) {
            return Err(TextError::Stop);
        }
        Ok(StopMatcher {
            stops,
            held: String::new(),
            stopped: false,
        })
    }

    /// Takes the next piece. After a stop, all further text is swallowed.
    pub fn push(&mut self, text: &str) -> StopStep {
        if self.stopped {
            return StopStep::default();
        }
        let mut all = std::mem::take(&mut self.held);
        all.push_str(text);
        let found = self
            .stops
            .iter()
            .enumerate()
            .filter_map(|(index, stop)| all.find(stop.as_str()).map(|start| (start + stop.len(), start, index)))
            .min();
        if let Some((_, start, index)) = found {
            self.stopped = true;
            all.truncate(start);
            return StopStep {
                text: all,
                stopped: Some(index),
            };
        }
        self.held = all.split_off(all.len() - self.held_len(&all));
        StopStep {
            text: all,
            stopped: None,
        }
    }

    /// The text held back when the stream ends without a stop.
    pub fn finish(self) -> String {
        self.held
    }

    /// Bytes at the end of `all` that begin a stop string, the most of all stop strings.
    fn held_len(&self, all: &str) -> usize {
        let longest = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0);
        let first = all.len().saturating_sub(longest);
        let start = (first..all.len()).find(|&start| {
            all.is_char_boundary(start) && self.stops.iter().any(|stop| stop.starts_with(&all[start..]))
        });
        start.map_or(0, |start| all.len() - start)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|&stop| stop.into()).collect()).unwrap();
        let mut shown = String::new();
        for piece in pieces {
            let step = matcher.push(piece);
            shown.push_str(&step.text);
            if step.stopped.is_some() {
                assert_eq!(matcher.push("more"), StopStep::default());
                return (shown, step.stopped);
            }
        }
        shown.push_str(&matcher.finish());
        (shown, None)
    }

    #[test]
    fn stops_across_pieces() {
        let check = |stops: &[&str], pieces: &[&str], shown: &str, stopped| {
            assert_eq!(run(stops, pieces), (shown.to_owned(), stopped), "{stops:?} {pieces:?}");
        };
        check(&[], &["a", "b"], "ab", None);
        check(&["END"], &["one E", "N", "D two"], "one ", Some(0));
        check(&["END"], &["one E", "N", "d two"], "one ENd two", None);
        check(&["END"], &["EEN", "END"], "EEN", Some(0));
        check(&["aab"], &["a", "a", "a", "b"], "a", Some(0));
        check(&["abc", "b"], &["abc"], "a", Some(1));
        check(&["b", "ab"], &["a", "b"], "", Some(1));
        check(&["abcd", "bce"], &["ab", "c", "e"], "a", Some(1));
        check(&["\n\n"], &["x\n", "y\n", "\nz"], "x\ny", Some(0));
        check(&["é😀"], &["caf", "é", "😀"], "caf", Some(0));
        check(&["END"], &["to the EN"], "to the EN", None);
    }

    #[test]
    fn holds_back_no_more_than_it_must() {
        let mut matcher = StopMatcher::new(vec!["abab".into()]).unwrap();
        assert_eq!(matcher.push("xxaba").text, "xx");
        assert_eq!(matcher.push("c").text, "abac");
        assert_eq!(matcher.push("aba").text, "");
        assert_eq!(matcher.push("a").text, "aba");
    }

    #[test]
    fn unusable_stops_are_refused() {
        for stops in [
            vec![String::new()],
            vec!["x".repeat(MAX_STOP_BYTES + 1)],
            vec!["x".into(); MAX_STOPS + 1],
        ] {
            assert!(matches!(StopMatcher::new(stops), Err(TextError::Stop)));
        }
    }

    /// The definition, over the whole text: the smallest end, then the smallest start.
    fn naive(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let ending = stops
                .iter()
                .enumerate()
                .filter(|(_, stop)| text[..end].ends_with(stop.as_str()));
            if let Some((index, stop)) = ending.max_by_key(|&(index, stop)| (stop.len(), usize::MAX - index)) {
                return (text[..end - stop.len()].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn equals_a_search_of_the_whole_text(
            stops in prop::collection::vec("[abé]{1,5}", 0..5),
            pieces in prop::collection::vec("[abcé]{0,6}", 0..12),
        ) {
            let stop_refs: Vec<&str> = stops.iter().map(String::as_str).collect();
            let piece_refs: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stop_refs, &piece_refs), naive(&stops, &pieces.concat()));
        }
    }
}
