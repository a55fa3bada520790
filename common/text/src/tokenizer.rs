//! Text to token ids.

use baton_gguf::Gguf;
use baton_kv::TokenId;
use tokenizers::models::bpe::{BPE, Vocab};

use crate::{
    Segment, TextError,
    limits::{CHUNK_BYTES, MAX_CHUNK_BYTES},
    pre_tokenizer,
    segment::{SpecialFinder, push_plain},
    vocabulary::{TokenKind, Vocabulary},
};

/// Byte-level BPE over a model file's own vocabulary. Shared by reference; every method may run on many threads.
///
/// A byte for which the vocabulary has no token is left out, as llama.cpp and Hugging Face's tokenizers do.
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    vocabulary: Vocabulary,
    finder: SpecialFinder,
}

impl Tokenizer {
    /// Builds the tokenizer of a model file. Takes some tens of milliseconds per 100,000 tokens.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TextError> {
        let kind = gguf.string("tokenizer.ggml.model")?;
        if kind != "gpt2" {
            return Err(TextError::UnsupportedTokenizer(kind.into()));
        }
        let pre = pre_tokenizer::by_name(gguf.string("tokenizer.ggml.pre")?)?;
        let vocabulary = Vocabulary::from_gguf(gguf)?;
        let tokens: Vocab = gguf
            .array_string("tokenizer.ggml.tokens")?
            .iter()
            .zip(0..)
            // What is met as it stands must not come out of merges.
            .filter(|&(_, id)| vocabulary.kind(id) == TokenKind::Normal)
            .map(|(token, id)| (token.clone(), id))
            .collect();
        let merges = gguf
            .array_string("tokenizer.ggml.merges")?
            .iter()
            .map(|merge| split_merge(merge))
            .collect::<Result<_, _>>()?;
        let bpe = BPE::builder()
            .vocab_and_merges(tokens, merges)
            .ignore_merges(pre.ignore_merges)
            .build()
            .map_err(|error| TextError::Vocabulary(error.to_string()))?;
        let mut bpe = tokenizers::Tokenizer::new(bpe);
        bpe.with_normalizer(pre.normalizer);
        bpe.with_pre_tokenizer(Some(pre.splits));
        let finder = SpecialFinder::new(&vocabulary);
        Ok(Tokenizer {
            bpe,
            vocabulary,
            finder,
        })
    }

    /// Tokens in the vocabulary; ids are below it.
    pub fn vocabulary_len(&self) -> usize {
        self.vocabulary.len()
    }

    /// Ids that end an answer, ascending.
    pub fn end_ids(&self) -> &[TokenId] {
        self.vocabulary.end_ids()
    }

    /// The beginning-of-sequence token, if the file names one. It is never added to a text.
    pub fn bos(&self) -> Option<TokenId> {
        self.vocabulary.bos()
    }

    /// The end-of-sequence token, if the file names one.
    pub fn eos(&self) -> Option<TokenId> {
        self.vocabulary.eos()
    }

    /// The text of a special token; empty for a normal token that is no whole character.
    pub fn token_text(&self, id: TokenId) -> &str {
        self.vocabulary.text(id)
    }

    /// Whether the id is a control token, which answers do not show. False outside the vocabulary.
    pub fn is_control(&self, id: TokenId) -> bool {
        (id as usize) < self.vocabulary.len() && self.vocabulary.kind(id) == TokenKind::Control
    }

    /// Token ids of a text; no token is added. With `specials`, `<|im_start|>` in it is that token: only for text that no client wrote, or that a client may
    /// write as a whole prompt. Without, it is so many characters.
    pub fn encode(&self, text: &str, specials: bool) -> Result<Vec<TokenId>, TextError> {
        self.encode_bounded(text, specials, usize::MAX)
    }

    /// The same, but [`TextError::TooLong`] as soon as more than `max_tokens` are certain: time and memory are bounded by the limit, not by the text.
    pub fn encode_bounded(&self, text: &str, specials: bool, max_tokens: usize) -> Result<Vec<TokenId>, TextError> {
        let mut out = Encoder::new(self, max_tokens);
        out.check_bytes(text.len())?;
        let mut result = Ok(());
        self.finder.split(text, specials, |plain, special| {
            if result.is_ok() {
                result = out
                    .plain(plain)
                    .and_then(|()| special.map_or(Ok(()), |id| out.push(&[id])));
            }
        });
        result?;
        Ok(out.ids)
    }

    /// Token ids of segments, bounded in the same way.
    pub fn encode_segments(&self, segments: &[Segment], max_tokens: usize) -> Result<Vec<TokenId>, TextError> {
        let mut out = Encoder::new(self, max_tokens);
        let bytes = segments
            .iter()
            .map(|segment| {
                if let Segment::Plain(text) = segment {
                    text.len()
                } else {
                    0
                }
            })
            .sum();
        out.check_bytes(bytes)?;
        for segment in segments {
            match segment {
                Segment::Plain(text) => {
                    let ids = self.encode_bounded(text, false, max_tokens)?;
                    out.push(&ids)?;
                }
                Segment::Special(id) => out.push(&[*id])?,
            }
        }
        Ok(out.ids)
    }

    /// Appends `text` to `segments`, control tokens recognised.
    pub(crate) fn push_recognised(&self, text: &str, segments: &mut Vec<Segment>) {
        self.finder.split(text, true, |plain, special| {
            push_plain(segments, plain);
            segments.extend(special.map(Segment::Special));
        });
    }

    /// The text of tokens, control tokens left out; bytes that are no characters become U+FFFD.
    pub fn decode(&self, ids: &[TokenId]) -> Result<String, TextError> {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend(self.shown_bytes(id)?);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The bytes of a token, whatever its kind: those of a control token spell its name. A normal token may be no whole character.
    pub fn token_bytes(&self, id: TokenId) -> Result<&[u8], TextError> {
        self.vocabulary.bytes(id)
    }

    /// The bytes that a token adds to an answer: none for a control token.
    pub(crate) fn shown_bytes(&self, id: TokenId) -> Result<&[u8], TextError> {
        let bytes = self.vocabulary.bytes(id)?;
        Ok(if self.vocabulary.kind(id) == TokenKind::Control {
            &[]
        } else {
            bytes
        })
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocabulary", &self.vocabulary.len())
            .finish_non_exhaustive()
    }
}

/// One merge is two pieces and a space between them; a piece is never empty.
fn split_merge(merge: &str) -> Result<(String, String), TextError> {
    match merge.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() => Ok((left.to_owned(), right.to_owned())),
        _ => Err(TextError::Vocabulary(format!("merge {merge:?} is not two pieces"))),
    }
}

/// Ids so far, and their bound.
struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<TokenId>,
    max_tokens: usize,
}

impl<'a> Encoder<'a> {
    fn new(tokenizer: &'a Tokenizer, max_tokens: usize) -> Self {
        Encoder {
            tokenizer,
            ids: Vec::new(),
            max_tokens,
        }
    }

    /// Every token covers at most the longest token's bytes, so many bytes are certain to be too many tokens.
    fn check_bytes(&self, bytes: usize) -> Result<(), TextError> {
        let at_least = bytes.div_ceil(self.tokenizer.vocabulary.longest_bytes());
        self.check(at_least)
    }

    fn check(&self, at_least: usize) -> Result<(), TextError> {
        let max_tokens = self.max_tokens;
        if at_least > max_tokens {
            Err(TextError::TooLong { at_least, max_tokens })
        } else {
            Ok(())
        }
    }

    fn push(&mut self, ids: &[TokenId]) -> Result<(), TextError> {
        self.check(self.ids.len() + ids.len())?;
        self.ids.extend_from_slice(ids);
        Ok(())
    }

    fn plain(&mut self, mut text: &str) -> Result<(), TextError> {
        while !text.is_empty() {
            let (chunk, rest) = text.split_at(chunk_len(text)?);
            let encoding = self
                .tokenizer
                .bpe
                .encode_fast(chunk, false)
                .map_err(|error| TextError::Tokenize(error.to_string()))?;
            self.push(encoding.get_ids())?;
            text = rest;
        }
        Ok(())
    }
}

/// Where to cut off a chunk of about [`CHUNK_BYTES`] so that the ids stay the same: before a space after a character that is not whitespace, or after a single
/// line feed between two of those.
fn chunk_len(text: &str) -> Result<usize, TextError> {
    let bytes = text.as_bytes();
    // Never looks at more than this, so that a text without a place to cut costs no more than its first piece.
    let end = bytes.len().min(MAX_CHUNK_BYTES);
    for at in CHUNK_BYTES..end {
        // Either is one byte, so that both cuts are between characters.
        let cut = match bytes[at] {
            b' ' => at,
            b'\n' if text[at + 1..].starts_with(|next: char| !next.is_whitespace()) => at + 1,
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

#[cfg(test)]
pub(crate) mod tests;
