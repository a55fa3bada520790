//! Text to token ids, and back.

use baton_gguf::Gguf;
use baton_kv::TokenId;
use tokenizers::models::bpe::{BPE, Vocab};

use crate::{
    Segment, TextError,
    pipeline::{Pipeline, Place, Stages},
    pre_tokenizer,
    segment::{SpecialFinder, push_plain},
    vocabulary::{TokenKind, Vocabulary},
};

/// BPE over bytes, or over pieces with bytes to fall back on. Shared by reference; every method may run on many threads.
///
/// A byte for which the vocabulary has no token is left out, as llama.cpp and Hugging Face's tokenizers do.
pub struct Tokenizer {
    pub(crate) pipeline: Pipeline,
    pub(crate) vocabulary: Vocabulary,
    finder: SpecialFinder,
    /// Spaces that belong to no text but begin its first token, at most.
    lead_spaces: usize,
}

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file. Takes some tens of milliseconds per 100,000 tokens.
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
        let stages = Stages {
            normalizer: pre.normalizer,
            splits: Some(pre.splits),
        };
        let pipeline = Pipeline::new(bpe, stages, None, None, &vocabulary)?;
        Ok(Tokenizer::new(pipeline, vocabulary, 0))
    }

    pub(crate) fn new(pipeline: Pipeline, vocabulary: Vocabulary, lead_spaces: usize) -> Self {
        let finder = SpecialFinder::new(&vocabulary);
        Tokenizer {
            pipeline,
            vocabulary,
            finder,
            lead_spaces,
        }
    }

    /// Tokens in the vocabulary; ids are below it.
    pub fn vocabulary_len(&self) -> usize {
        self.vocabulary.len()
    }

    /// Ids that end an answer, ascending.
    pub fn end_ids(&self) -> &[TokenId] {
        self.vocabulary.end_ids()
    }

    /// The beginning-of-sequence token, if the model names one. Only [`Tokenizer::encode_prompt`] adds it.
    pub fn bos(&self) -> Option<TokenId> {
        self.vocabulary.bos()
    }

    /// The end-of-sequence token, if the model names one.
    pub fn eos(&self) -> Option<TokenId> {
        self.vocabulary.eos()
    }

    /// The token that fills rows up, if the model names one: for templates only.
    pub fn pad(&self) -> Option<TokenId> {
        self.vocabulary.pad()
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
        out.text(text, specials)?;
        out.finish()
    }

    /// Ids of a whole prompt that a client wrote: special tokens are met in it, and the beginning-of-sequence token comes first if the model wants one and
    /// the prompt does not spell it.
    pub fn encode_prompt(&self, text: &str, max_tokens: usize) -> Result<Vec<TokenId>, TextError> {
        let mut out = Encoder::new(self, max_tokens);
        out.check_bytes(text.len())?;
        if let Some(bos) = self.vocabulary.prompt_bos()
            && !text.starts_with(self.token_text(bos))
        {
            out.push(&[bos])?;
        }
        out.text(text, true)?;
        out.finish()
    }

    /// Token ids of segments, bounded in the same way.
    pub fn encode_segments(&self, segments: &[Segment], max_tokens: usize) -> Result<Vec<TokenId>, TextError> {
        let mut out = Encoder::new(self, max_tokens);
        let bytes = |segment: &Segment| match segment {
            Segment::Plain(text) => text.len(),
            Segment::Special(_) => 0,
        };
        out.check_bytes(segments.iter().map(bytes).sum())?;
        for segment in segments {
            match segment {
                Segment::Plain(text) => out.text(text, false)?,
                Segment::Special(id) => out.special(*id)?,
            }
        }
        out.finish()
    }

    /// Appends `text` to `segments`, control tokens recognised.
    pub(crate) fn push_recognised(&self, text: &str, segments: &mut Vec<Segment>) {
        self.finder.split(text, true, |plain, special| {
            push_plain(segments, plain);
            segments.extend(special.map(Segment::Special));
        });
    }

    /// The text of tokens as a text of its own, control tokens left out; bytes that are no characters become U+FFFD. The space that some vocabularies put
    /// before a text is taken off again.
    pub fn decode(&self, ids: &[TokenId]) -> Result<String, TextError> {
        let mut bytes = Vec::new();
        let mut lead = None;
        for &id in ids {
            let shown = self.shown_bytes(id)?;
            if lead.is_none() && !shown.is_empty() {
                let spaces = shown.iter().take(self.lead_spaces).take_while(|&&byte| byte == b' ');
                lead = Some(spaces.count());
            }
            bytes.extend(shown);
        }
        bytes.drain(..lead.unwrap_or(0));
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
struct Encoder<'a, 't> {
    tokenizer: &'a Tokenizer,
    ids: Vec<TokenId>,
    max_tokens: usize,
    /// Plain text that is not encoded yet: what comes after it may swallow its end.
    plain: &'t str,
    /// Where it stands.
    place: Place,
}

impl<'a, 't> Encoder<'a, 't> {
    fn new(tokenizer: &'a Tokenizer, max_tokens: usize) -> Self {
        Encoder {
            tokenizer,
            ids: Vec::new(),
            max_tokens,
            plain: "",
            place: Place::Start,
        }
    }

    /// Every token covers at most the longest token's bytes, so many bytes are certain to be too many tokens. Composed characters have up to three times as
    /// many before they are.
    fn check_bytes(&self, bytes: usize) -> Result<(), TextError> {
        let composed = if self.tokenizer.pipeline.normalizes() { 3 } else { 1 };
        let at_least = bytes.div_ceil(composed * self.tokenizer.vocabulary.longest_bytes());
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

    /// Text with special tokens: user-defined ones always, control tokens if `control`.
    fn text(&mut self, text: &'t str, control: bool) -> Result<(), TextError> {
        let tokenizer = self.tokenizer;
        let mut result = Ok(());
        tokenizer.finder.split(text, control, |plain, special| {
            if result.is_ok() {
                result = self
                    .plain(plain)
                    .and_then(|()| special.map_or(Ok(()), |id| self.special(id)));
            }
        });
        result
    }

    fn plain(&mut self, mut text: &'t str) -> Result<(), TextError> {
        if !self.plain.is_empty() {
            self.flush()?;
            self.place = Place::Continued;
        } else if let Some(&last) = self.ids.last()
            && self.place == Place::AfterSpecial
            && self.tokenizer.vocabulary.swallows(last).after
        {
            text = text.trim_start();
        }
        self.plain = text;
        Ok(())
    }

    fn special(&mut self, id: TokenId) -> Result<(), TextError> {
        if self.tokenizer.vocabulary.swallows(id).before {
            self.plain = self.plain.trim_end();
        }
        self.flush()?;
        self.place = Place::AfterSpecial;
        self.push(&[id])
    }

    fn flush(&mut self) -> Result<(), TextError> {
        let mut text = std::mem::take(&mut self.plain);
        let mut place = self.place;
        while !text.is_empty() {
            let (chunk, rest) = text.split_at(self.tokenizer.pipeline.chunk_len(text)?);
            let ids = self.tokenizer.pipeline.encode(chunk, place)?;
            self.push(&ids)?;
            (text, place) = (rest, Place::Continued);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<TokenId>, TextError> {
        self.flush()?;
        Ok(self.ids)
    }
}

#[cfg(test)]
pub(crate) mod tests;
