//! Ordinary text to token ids: normalised, cut into pieces, and each piece merged.

use std::{fmt::Display, ops::Range};

use baton_kv::TokenId;
use tokenizers::{
    Model, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer, PreTokenizerWrapper, models::bpe::BPE,
};

use crate::{
    TextError,
    limits::{CHUNK_BYTES, MAX_CHUNK_BYTES},
    vocabulary::Vocabulary,
};

/// Texts and where in them [`Cuts::before_spaces`] and [`Cuts::after_lines`] cut.
const SPACES: [(&str, usize); 5] = [("ab cd", 2), ("1 2", 1), (". x", 1), ("中 x", 3), (") (", 1)];
const LINES: [(&str, usize); 4] = [("a\nb", 2), ("1\n2", 2), (".\nx", 2), ("中\n(", 4)];

/// Where a stretch of plain text stands: some vocabularies put a space before what begins a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// At the start of a text.
    Start,
    /// After a special token.
    AfterSpecial,
    /// After other plain text, which was encoded by itself.
    Continued,
}

/// What comes before merges.
#[derive(Debug, Default)]
pub(crate) struct Stages {
    pub(crate) normalizer: Option<NormalizerWrapper>,
    pub(crate) splits: Option<PreTokenizerWrapper>,
}

/// Byte-pair encoding and the stages before it.
pub(crate) struct Pipeline {
    bpe: BPE,
    start: Stages,
    /// Where they differ from those at the start.
    after_special: Option<Stages>,
    continued: Option<Stages>,
    cuts: Cuts,
}

/// Where a long text may be cut with the ids staying the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cuts {
    /// Before a space after a character that is not white space.
    before_spaces: bool,
    /// After a line feed between two characters that are not white space.
    after_lines: bool,
}

impl Pipeline {
    /// Stages that differ by place are given for each.
    pub(crate) fn new(
        bpe: BPE,
        start: Stages,
        after_special: Option<Stages>,
        continued: Option<Stages>,
        vocabulary: &Vocabulary,
    ) -> Result<Self, TextError> {
        let mut pipeline = Pipeline {
            bpe,
            start,
            after_special,
            continued,
            cuts: Cuts {
                before_spaces: false,
                after_lines: false,
            },
        };
        // A cut is sound where the stages cut in any case, or where no token, and so no merge, reaches across.
        pipeline.cuts = Cuts {
            before_spaces: pipeline.parts_all(&SPACES)?
                || vocabulary.parts_between(|byte| !byte.is_ascii_whitespace(), |byte| byte == b' '),
            after_lines: pipeline.parts_all(&LINES)?
                || vocabulary.parts_between(|byte| byte == b'\n', |byte| !byte.is_ascii_whitespace()),
        };
        Ok(pipeline)
    }

    fn parts_all(&self, texts: &[(&str, usize)]) -> Result<bool, TextError> {
        for &(text, at) in texts {
            if !self.parts(text)?.iter().any(|part| part.start == at) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Where the stages cut a text that goes on after another.
    fn parts(&self, text: &str) -> Result<Vec<Range<usize>>, TextError> {
        let pieces = self.pieces(text, Place::Continued)?;
        let parts = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(parts.into_iter().map(|(_, (start, end), _)| start..end).collect())
    }

    fn pieces(&self, text: &str, place: Place) -> Result<PreTokenizedString, TextError> {
        let stages = match place {
            Place::Start => None,
            Place::AfterSpecial => self.after_special.as_ref(),
            Place::Continued => self.continued.as_ref(),
        };
        let stages = stages.unwrap_or(&self.start);
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = &stages.normalizer {
            normalizer.normalize(&mut normalized).map_err(failed)?;
        }
        let mut pieces = PreTokenizedString::from(normalized);
        if let Some(splits) = &stages.splits {
            splits.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        Ok(pieces)
    }

    /// The ids of a text in one piece: working memory is some hundred bytes per byte of it.
    pub(crate) fn encode(&self, text: &str, place: Place) -> Result<Vec<TokenId>, TextError> {
        let mut pieces = self.pieces(text, place)?;
        pieces
            .tokenize(|piece| self.bpe.tokenize(piece.get()))
            .map_err(failed)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Whether texts grow shorter or longer before they are merged.
    pub(crate) fn normalizes(&self) -> bool {
        self.start.normalizer.is_some()
    }

    /// Bytes of `text` to encode as one piece so that the ids stay the same, about [`CHUNK_BYTES`].
    pub(crate) fn chunk_len(&self, text: &str) -> Result<usize, TextError> {
        let bytes = text.as_bytes();
        // Never looks at more than this, so that a text without a place to cut costs no more than its first piece.
        let end = bytes.len().min(MAX_CHUNK_BYTES);
        for at in CHUNK_BYTES..end {
            // Either is one byte, so that both cuts are between characters.
            let cut = match bytes[at] {
                b' ' if self.cuts.before_spaces => at,
                b'\n' if self.cuts.after_lines && text[at + 1..].starts_with(|next: char| !next.is_whitespace()) => {
                    at + 1
                }
                _ => continue,
            };
            if text[..at].ends_with(|before: char| !before.is_whitespace()) {
                return Ok(cut);
            }
        }
        if end < bytes.len() {
            return Err(TextError::Unbroken(MAX_CHUNK_BYTES));
        }
        Ok(end)
    }
}

fn failed(error: impl Display) -> TextError {
    TextError::Tokenize(error.to_string())
}
