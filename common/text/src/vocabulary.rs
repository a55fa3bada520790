//! The vocabulary of a model: each token's bytes, and which tokens are special.

use std::collections::HashMap;

use baton_gguf::Gguf;
use baton_kv::TokenId;

use crate::{TextError, limits::MAX_TOKEN_BYTES};

/// GGUF's token types that matter here.
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;

/// Texts that end an answer wherever they are control tokens: the union of what the supported families use.
const END_TEXTS: [&str; 7] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "</s>",
];

/// How a token's text is met in text that is being encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// Through merges.
    Normal,
    /// As it stands, in any text.
    UserDefined,
    /// As it stands, in the template's text only; not shown in answers.
    Control,
}

impl TokenKind {
    /// Of a token that is met as it stands: a marker is a control token, whatever a converter called it, since content must not be able to spell it.
    pub(crate) fn of_special(text: &str, control: bool) -> Self {
        let marker = ["<|", "<｜"].iter().any(|open| text.starts_with(open))
            && ["|>", "｜>"].iter().any(|close| text.ends_with(close));
        if control || marker {
            TokenKind::Control
        } else {
            TokenKind::UserDefined
        }
    }
}

/// How the characters of a normal token spell bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// One byte a character, by GPT-2's table.
    ByteLevel,
    /// Their own, after replacements; with a byte fallback, `<0x0A>` is one byte.
    Pieces {
        /// What is replaced by what, in order.
        replacements: Vec<(String, String)>,
        byte_fallback: bool,
    },
}

impl Spelling {
    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Spelling::ByteLevel => byte_level_bytes(token).unwrap_or_else(|| token.as_bytes().to_vec()),
            Spelling::Pieces {
                replacements,
                byte_fallback,
            } => match fallback_byte(token) {
                Some(byte) if *byte_fallback => vec![byte],
                _ => replacements
                    .iter()
                    .fold(token.to_owned(), |text, (from, to)| text.replace(from, to))
                    .into_bytes(),
            },
        }
    }
}

/// What a model calls its tokens.
#[derive(Clone, Debug, Default)]
pub(crate) struct Named {
    pub(crate) bos: Option<TokenId>,
    pub(crate) eos: Option<TokenId>,
    pub(crate) pad: Option<TokenId>,
    /// More ids that end an answer.
    pub(crate) ends: Vec<TokenId>,
    /// A prompt begins with `bos`.
    pub(crate) adds_bos: bool,
}

/// White space that a special token swallows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Swallows {
    pub(crate) before: bool,
    pub(crate) after: bool,
}

/// Tokens by id. Cheap to share, never changed.
pub(crate) struct Vocabulary {
    /// All tokens' bytes, end to end.
    bytes: Vec<u8>,
    /// Where token `i` ends in `bytes`.
    ends: Vec<usize>,
    kinds: Vec<TokenKind>,
    /// Of the few special tokens that swallow any.
    swallows: HashMap<TokenId, Swallows>,
    longest_bytes: usize,
    named: Named,
}

impl Vocabulary {
    /// From all tokens, by id; those without text are never met.
    pub(crate) fn new<'t>(
        tokens: impl Iterator<Item = (&'t str, TokenKind)>,
        spelling: &Spelling,
    ) -> Result<Self, TextError> {
        let mut vocabulary = Vocabulary {
            bytes: Vec::new(),
            ends: Vec::new(),
            kinds: Vec::new(),
            swallows: HashMap::new(),
            longest_bytes: 1,
            named: Named::default(),
        };
        for (token, kind) in tokens {
            vocabulary.push(token, kind, spelling)?;
        }
        if vocabulary.len() == 0 {
            return Err(TextError::Vocabulary("no tokens".into()));
        }
        Ok(vocabulary)
    }

    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Self, TextError> {
        let tokens = gguf.array_string("tokenizer.ggml.tokens")?;
        let types = match gguf.metadata("tokenizer.ggml.token_type") {
            Some(_) => gguf.array_u32("tokenizer.ggml.token_type")?,
            None => vec![1; tokens.len()],
        };
        if types.len() != tokens.len() {
            let reason = format!("{} tokens and {} token types", tokens.len(), types.len());
            return Err(TextError::Vocabulary(reason));
        }
        let kind = |text: &str, number| match number {
            USER_DEFINED => TokenKind::of_special(text, false),
            CONTROL => TokenKind::Control,
            _ => TokenKind::Normal,
        };
        let tokens = tokens.iter().zip(&types);
        let vocabulary = Vocabulary::new(
            tokens.map(|(text, &number)| (text.as_str(), kind(text, number))),
            &Spelling::ByteLevel,
        )?;
        let id = |name: &str| gguf_id(gguf, name, vocabulary.len());
        let named = Named {
            bos: id("bos")?,
            eos: id("eos")?,
            pad: id("padding")?,
            ends: [id("eot")?, id("eom")?].into_iter().flatten().collect(),
            adds_bos: match gguf.metadata("tokenizer.ggml.add_bos_token") {
                Some(_) => gguf.bool("tokenizer.ggml.add_bos_token")?,
                // As llama.cpp has it.
                None => gguf.string("tokenizer.ggml.pre").is_ok_and(|pre| pre == "llama-bpe"),
            },
        };
        Ok(vocabulary.named(named))
    }

    fn push(&mut self, token: &str, kind: TokenKind, spelling: &Spelling) -> Result<(), TextError> {
        let start = self.bytes.len();
        match kind {
            TokenKind::Normal => self.bytes.extend(spelling.bytes(token)),
            TokenKind::UserDefined | TokenKind::Control => self.bytes.extend(token.as_bytes()),
        }
        let len = self.bytes.len() - start;
        if len == 0 && kind != TokenKind::Normal || len > MAX_TOKEN_BYTES {
            return Err(TextError::Vocabulary(format!(
                "token {} has {len} bytes",
                self.ends.len()
            )));
        }
        self.longest_bytes = self.longest_bytes.max(len);
        self.ends.push(self.bytes.len());
        self.kinds.push(kind);
        Ok(())
    }

    /// The same with names; their ids are in the vocabulary.
    pub(crate) fn named(mut self, mut named: Named) -> Self {
        named.ends.extend(named.eos);
        named.ends.extend(
            self.specials()
                .filter(|&(id, text)| self.kind(id) == TokenKind::Control && END_TEXTS.contains(&text))
                .map(|(id, _)| id),
        );
        named.ends.sort_unstable();
        named.ends.dedup();
        self.named = named;
        self
    }

    /// Says what a special token swallows.
    pub(crate) fn set_swallows(&mut self, id: TokenId, swallows: Swallows) {
        if swallows != Swallows::default() {
            self.swallows.insert(id, swallows);
        }
    }

    pub(crate) fn swallows(&self, id: TokenId) -> Swallows {
        self.swallows.get(&id).copied().unwrap_or_default()
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The token's bytes: of a special one, its text.
    pub(crate) fn bytes(&self, id: TokenId) -> Result<&[u8], TextError> {
        let index = id as usize;
        let end = *self.ends.get(index).ok_or(TextError::UnknownToken {
            id,
            vocabulary: self.len(),
        })?;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        Ok(&self.bytes[start..end])
    }

    /// Of an id that the vocabulary has.
    pub(crate) fn kind(&self, id: TokenId) -> TokenKind {
        self.kinds[id as usize]
    }

    /// All tokens that are met as they stand, with their texts.
    pub(crate) fn specials(&self) -> impl Iterator<Item = (TokenId, &str)> {
        (0..self.len() as TokenId)
            .filter(|&id| self.kind(id) != TokenKind::Normal)
            .map(|id| (id, self.text(id)))
    }

    /// The text of a special token; of a normal one, empty unless it is whole characters.
    pub(crate) fn text(&self, id: TokenId) -> &str {
        self.bytes(id)
            .ok()
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .unwrap_or_default()
    }

    /// Bytes of the longest token.
    pub(crate) fn longest_bytes(&self) -> usize {
        self.longest_bytes
    }

    /// Whether no token has a byte as `first` right before one as `second`.
    pub(crate) fn parts_between(&self, first: fn(u8) -> bool, second: fn(u8) -> bool) -> bool {
        let ids = 0..self.len() as TokenId;
        !ids.filter(|&id| self.kind(id) == TokenKind::Normal)
            .flat_map(|id| self.bytes(id).unwrap_or_default().windows(2))
            .any(|pair| first(pair[0]) && second(pair[1]))
    }

    /// The id of a special token.
    pub(crate) fn special(&self, text: &str) -> Option<TokenId> {
        self.specials().find(|(_, found)| *found == text).map(|(id, _)| id)
    }

    /// Ids that end an answer, ascending.
    pub(crate) fn end_ids(&self) -> &[TokenId] {
        &self.named.ends
    }

    pub(crate) fn bos(&self) -> Option<TokenId> {
        self.named.bos
    }

    pub(crate) fn eos(&self) -> Option<TokenId> {
        self.named.eos
    }

    pub(crate) fn pad(&self) -> Option<TokenId> {
        self.named.pad
    }

    /// What a prompt begins with, if anything.
    pub(crate) fn prompt_bos(&self) -> Option<TokenId> {
        self.named.bos.filter(|_| self.named.adds_bos)
    }
}

fn gguf_id(gguf: &Gguf, name: &str, vocabulary: usize) -> Result<Option<TokenId>, TextError> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    if gguf.metadata(&key).is_none() {
        return Ok(None);
    }
    let id = gguf.u32(&key)?;
    if id as usize >= vocabulary {
        return Err(TextError::Vocabulary(format!(
            "{key} is {id}, outside the vocabulary of {vocabulary} tokens"
        )));
    }
    Ok(Some(id))
}

/// The bytes that a byte-level token's characters stand for (GPT-2's table); `None` if a character stands for none.
fn byte_level_bytes(token: &str) -> Option<Vec<u8>> {
    token.chars().map(byte_of).collect()
}

/// The byte that `<0x0A>` stands for.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    u8::from_str_radix(digits, 16).ok().filter(|_| hex)
}

/// Printable bytes stand for themselves; the 68 others, in order, for U+0100 and up.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let mut bytes: Vec<u8> = (0x21..=0x143).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_level_bytes("Ġtheċ").unwrap(), b" the\x0b");
        assert_eq!(byte_level_bytes("Ċ").unwrap(), b"\n");
        assert_eq!(byte_level_bytes("a b"), None);
    }
}
