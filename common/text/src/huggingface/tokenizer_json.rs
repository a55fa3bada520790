//! `tokenizer.json`: a vocabulary, and what turns text into its ids.

use std::collections::{HashMap, HashSet};

use baton_kv::TokenId;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};

use super::stages;
use crate::{
    TextError,
    pipeline::{Pipeline, Place},
    vocabulary::{Swallows, TokenKind, Vocabulary},
};

/// What a file holds.
pub(super) struct Parts {
    pub(super) vocabulary: Vocabulary,
    pub(super) pipeline: Pipeline,
    /// Spaces that begin the first token of a text and do not belong to it, at most.
    pub(super) lead_spaces: usize,
    /// The special token that is put before texts.
    pub(super) begins_with: Option<String>,
}

/// Only the kind of model: others have fields of other types.
#[derive(Deserialize)]
struct Head {
    model: Kind,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type")]
    name: Option<String>,
}

#[derive(Deserialize)]
struct Contents {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: TokenId,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    vocab: HashMap<String, TokenId>,
    merges: Vec<Merge>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
}

/// Two pieces; in older files with a space between them.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair(String, String),
}

/// Reads the file's bytes. `len` is the model's vocabulary: special tokens beyond it, which some files list, are never met.
pub(super) fn read(json: &[u8], len: usize) -> Result<Parts, TextError> {
    let broken = |error: serde_json::Error| TextError::Vocabulary(error.to_string());
    let Head { model } = serde_json::from_slice(json).map_err(broken)?;
    // Files from before there were other kinds name none.
    if let Some(name) = model.name.filter(|name| name != "BPE") {
        return Err(TextError::UnsupportedTokenizer(name));
    }
    let contents: Contents = serde_json::from_slice(json).map_err(broken)?;
    let decoder = stages::decoder(&contents.decoder)?;
    let mut vocabulary = Vocabulary::new(tokens(&contents, len)?.into_iter(), &decoder.spelling)?;
    let controls: HashSet<&str> = vocabulary
        .specials()
        .filter(|&(id, _)| vocabulary.kind(id) == TokenKind::Control)
        .map(|(_, text)| text)
        .collect();
    let bpe = contents.model.build(&controls)?;
    let at = |place| stages::before_merges(&contents.normalizer, &contents.pre_tokenizer, place);
    let start = at(Place::Start)?;
    let differs = |place| -> Result<_, TextError> { at(place).map(|stages| Some(stages).filter(|s| *s != start)) };
    let (after_special, continued) = (differs(Place::AfterSpecial)?, differs(Place::Continued)?);
    let build = |stages: Option<stages::Described>| stages.as_ref().map(stages::Described::build).transpose();
    let pipeline = Pipeline::new(
        bpe,
        start.build()?,
        build(after_special)?,
        build(continued)?,
        &vocabulary,
    )?;
    for token in contents.added_tokens.iter().filter(|token| (token.id as usize) < len) {
        let swallows = Swallows {
            before: token.lstrip,
            after: token.rstrip,
        };
        vocabulary.set_swallows(token.id, swallows);
    }
    Ok(Parts {
        vocabulary,
        pipeline,
        lead_spaces: decoder.lead_spaces,
        begins_with: stages::begins_with(&contents.post_processor).map(str::to_owned),
    })
}

/// All tokens by id. Ids that the file leaves out have no text.
fn tokens(contents: &Contents, len: usize) -> Result<Vec<(&str, TokenKind)>, TextError> {
    let mut tokens: Vec<Option<(&str, TokenKind)>> = vec![None; len];
    for (text, &id) in &contents.model.vocab {
        let special = || contents.added_tokens.iter().any(|token| token.id == id);
        match tokens.get_mut(id as usize) {
            Some(slot @ None) => *slot = Some((text, TokenKind::Normal)),
            Some(Some((other, _))) => {
                return Err(TextError::Vocabulary(format!(
                    "{other:?} and {text:?} are both token {id}"
                )));
            }
            None if special() => {}
            None => {
                return Err(TextError::Vocabulary(format!(
                    "token {id} is outside the model's vocabulary of {len} tokens"
                )));
            }
        }
    }
    for token in &contents.added_tokens {
        let (id, text) = (token.id, token.content.as_str());
        if token.single_word {
            return Err(TextError::UnsupportedPart {
                part: "whole word",
                name: text.to_owned(),
            });
        }
        let other_id = contents.model.vocab.get(text).filter(|&&known| known != id);
        let Some(slot) = tokens.get_mut(id as usize) else {
            continue;
        };
        match slot {
            _ if text.is_empty() => return Err(TextError::Vocabulary(format!("added token {id} is empty"))),
            _ if other_id.is_some() => {
                return Err(TextError::Vocabulary(format!("{text:?} is token {id} and another")));
            }
            Some((other, _)) if *other != text => {
                return Err(TextError::Vocabulary(format!(
                    "{other:?} and {text:?} are both token {id}"
                )));
            }
            _ => *slot = Some((text, TokenKind::of_special(text, token.special))),
        }
    }
    Ok(tokens
        .into_iter()
        .map(|token| token.unwrap_or(("", TokenKind::Normal)))
        .collect())
}

impl Model {
    /// Byte-pair encoding that cannot yield a control token, but for the one that stands for unknown characters.
    fn build(self, controls: &HashSet<&str>) -> Result<BPE, TextError> {
        if self.dropout.is_some_and(|dropout| dropout > 0.0) {
            return Err(TextError::UnsupportedPart {
                part: "model",
                name: "BPE with dropout".into(),
            });
        }
        let unknown = self.unk_token.as_deref();
        let yields = |token: &str| !controls.contains(token) || unknown == Some(token);
        let prefix = self.continuing_subword_prefix.as_deref().unwrap_or_default();
        let mut merges = Vec::with_capacity(self.merges.len());
        for merge in self.merges {
            let (left, right) = merge.pieces()?;
            let merged = format!("{left}{}", right.strip_prefix(prefix).unwrap_or(&right));
            if [&left, &right, &merged]
                .iter()
                .all(|token| !controls.contains(token.as_str()))
            {
                merges.push((left, right));
            }
        }
        let tokens: Vocab = self.vocab.into_iter().filter(|(token, _)| yields(token)).collect();
        let mut bpe = BPE::builder()
            .vocab_and_merges(tokens, merges)
            .fuse_unk(self.fuse_unk.unwrap_or(false))
            .byte_fallback(self.byte_fallback.unwrap_or(false))
            .ignore_merges(self.ignore_merges.unwrap_or(false));
        if let Some(unknown) = self.unk_token {
            bpe = bpe.unk_token(unknown);
        }
        if let Some(prefix) = self.continuing_subword_prefix {
            bpe = bpe.continuing_subword_prefix(prefix);
        }
        if let Some(suffix) = self.end_of_word_suffix {
            bpe = bpe.end_of_word_suffix(suffix);
        }
        bpe.build().map_err(|error| TextError::Vocabulary(error.to_string()))
    }
}

impl Merge {
    fn pieces(self) -> Result<(String, String), TextError> {
        match self {
            Merge::Pair(left, right) => Ok((left, right)),
            Merge::Text(text) => match text.split_once(' ') {
                Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
                None => Err(TextError::Vocabulary(format!("merge {text:?} is not two pieces"))),
            },
        }
    }
}
