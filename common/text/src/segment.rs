//! Text cut into what may be read as special tokens and what may not.

use baton_kv::TokenId;

use crate::vocabulary::{TokenKind, Vocabulary};

/// A stretch of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Ordinary text: characters that look like a control token are only characters.
    Plain(String),
    /// One special token.
    Special(TokenId),
}

/// Finds special tokens in text: leftmost first, the longest of those that start there.
pub(crate) struct SpecialFinder {
    /// By first byte; the longest first.
    by_first: Vec<Vec<(String, TokenId, TokenKind)>>,
}

impl SpecialFinder {
    pub(crate) fn new(vocabulary: &Vocabulary) -> Self {
        let mut by_first = vec![Vec::new(); 256];
        for (id, text) in vocabulary.specials() {
            if let Some(&first) = text.as_bytes().first() {
                by_first[usize::from(first)].push((text.to_owned(), id, vocabulary.kind(id)));
            }
        }
        for specials in &mut by_first {
            specials.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then(a.1.cmp(&b.1)));
        }
        SpecialFinder { by_first }
    }

    /// Splits `text` at each special token: user-defined ones always, control tokens if `control`. Calls `each` with the plain text before, and the token,
    /// if any.
    pub(crate) fn split<'t>(&self, text: &'t str, control: bool, mut each: impl FnMut(&'t str, Option<TokenId>)) {
        let mut start = 0;
        let mut at = 0;
        while let Some(&first) = text.as_bytes().get(at) {
            let found = self.by_first[usize::from(first)].iter().find(|(special, _, kind)| {
                (control || *kind == TokenKind::UserDefined) && text.as_bytes()[at..].starts_with(special.as_bytes())
            });
            match found {
                // `first` starts a character, since `special` is text: both cuts are between characters.
                Some((special, id, _)) => {
                    each(&text[start..at], Some(*id));
                    at += special.len();
                    start = at;
                }
                None => at += 1,
            }
        }
        each(&text[start..], None);
    }
}

/// Appends plain text to the last segment if that is plain, too, so that merges see one run.
pub(crate) fn push_plain(segments: &mut Vec<Segment>, text: &str) {
    match segments.last_mut() {
        _ if text.is_empty() => {}
        Some(Segment::Plain(last)) => last.push_str(text),
        _ => segments.push(Segment::Plain(text.to_owned())),
    }
}
