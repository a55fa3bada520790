//! The vocabulary of a model file: each token's bytes, and which tokens are special.

use baton_gguf::Gguf;
use baton_kv::TokenId;

use crate::{TextError, limits::MAX_TOKEN_BYTES};

/// The file's token types that matter here.
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

/// Tokens by id. Cheap to share, never changed.
pub(crate) struct Vocabulary {
    /// All tokens' bytes, end to end.
    bytes: Vec<u8>,
    /// Where token `i` ends in `bytes`.
    ends: Vec<usize>,
    kinds: Vec<TokenKind>,
    longest_bytes: usize,
    end_ids: Vec<TokenId>,
    bos: Option<TokenId>,
    eos: Option<TokenId>,
}

impl Vocabulary {
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Self, TextError> {
        let tokens = gguf.array_string("tokenizer.ggml.tokens")?;
        let types = match gguf.metadata("tokenizer.ggml.token_type") {
            Some(_) => gguf.array_u32("tokenizer.ggml.token_type")?,
            None => vec![1; tokens.len()],
        };
        if tokens.is_empty() || types.len() != tokens.len() {
            let reason = format!("{} tokens and {} token types", tokens.len(), types.len());
            return Err(TextError::Vocabulary(reason));
        }
        let mut vocabulary = Vocabulary {
            bytes: Vec::new(),
            ends: Vec::with_capacity(tokens.len()),
            kinds: Vec::with_capacity(tokens.len()),
            longest_bytes: 1,
            end_ids: Vec::new(),
            bos: special_id(gguf, "bos", tokens.len())?,
            eos: special_id(gguf, "eos", tokens.len())?,
        };
        for (token, &kind) in tokens.iter().zip(&types) {
            vocabulary.push(token, kind)?;
        }
        vocabulary.find_ends(gguf)?;
        Ok(vocabulary)
    }

    fn push(&mut self, token: &str, kind: u32) -> Result<(), TextError> {
        let start = self.bytes.len();
        let kind = match kind {
            // A marker is a control token, whatever a converter called it: content must not be able to spell it.
            USER_DEFINED if token.starts_with("<|") && token.ends_with("|>") => TokenKind::Control,
            USER_DEFINED => TokenKind::UserDefined,
            CONTROL => TokenKind::Control,
            _ => TokenKind::Normal,
        };
        match byte_level_bytes(token) {
            Some(bytes) if kind == TokenKind::Normal => self.bytes.extend(bytes),
            _ => self.bytes.extend(token.as_bytes()),
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

    fn find_ends(&mut self, gguf: &Gguf) -> Result<(), TextError> {
        let mut ends: Vec<TokenId> = self.eos.into_iter().collect();
        for name in ["eot", "eom"] {
            ends.extend(special_id(gguf, name, self.len())?);
        }
        ends.extend(
            self.specials()
                .filter(|&(id, text)| self.kind(id) == TokenKind::Control && END_TEXTS.contains(&text))
                .map(|(id, _)| id),
        );
        ends.sort_unstable();
        ends.dedup();
        self.end_ids = ends;
        Ok(())
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

    /// Ids that end an answer, ascending.
    pub(crate) fn end_ids(&self) -> &[TokenId] {
        &self.end_ids
    }

    pub(crate) fn bos(&self) -> Option<TokenId> {
        self.bos
    }

    pub(crate) fn eos(&self) -> Option<TokenId> {
        self.eos
    }
}

fn special_id(gguf: &Gguf, name: &str, vocabulary: usize) -> Result<Option<TokenId>, TextError> {
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
