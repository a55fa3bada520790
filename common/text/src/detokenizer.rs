//! Token ids to text, one by one.

use std::sync::Arc;

use baton_kv::TokenId;

use crate::{TextError, Tokenizer};

/// Turns a stream of token ids into text that goes on after other text, as an answer does after its prompt. The pieces, put together, are
/// [`Tokenizer::decode`] of all ids, with the space that it takes off the start of a text; none ends within a character.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// The beginning of a character: at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// A fresh stream.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Detokenizer {
            tokenizer,
            pending: Vec::new(),
        }
    }

    /// The characters that this token completes; control tokens give none. Bytes that can be no character become U+FFFD.
    pub fn push(&mut self, id: TokenId) -> Result<String, TextError> {
        self.pending.extend(self.tokenizer.shown_bytes(id)?);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(invalid) = error.error_len() else {
                        rest = after;
                        break;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[invalid..];
                }
            }
        }
        self.pending = rest.to_vec();
        Ok(text)
    }

    /// What is left at the end of the stream: U+FFFD for a character that never became whole, otherwise nothing.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}
