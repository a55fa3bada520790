//! The text side of a model directory as Hugging Face lays it out: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, and of `config.json` and
//! `generation_config.json` what bounds prompts and ends answers.

mod stages;
mod tokenizer_json;

use std::{
    io::{self, Read},
    path::Path,
};

use baton_gguf::directory_name;
use baton_kv::TokenId;
use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    ModelText, TextError, Tokenizer,
    limits::{MAX_CONFIG_BYTES, MAX_TEMPLATE_BYTES, MAX_TOKENIZER_BYTES, MAX_VOCABULARY},
    vocabulary::{Named, Vocabulary},
};

/// `config.json`.
#[derive(Deserialize)]
struct Config {
    vocab_size: usize,
    max_position_embeddings: usize,
    bos_token_id: Option<Ids>,
    eos_token_id: Option<Ids>,
}

/// `generation_config.json`.
#[derive(Default, Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<Ids>,
}

/// `tokenizer_config.json`. Where it names no token, though it could, there is none.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    bos_token: Option<Name>,
    eos_token: Option<Name>,
    pad_token: Option<Name>,
    add_bos_token: Option<bool>,
    chat_template: Option<Templates>,
}

/// One id or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(TokenId),
    Several(Vec<TokenId>),
}

impl Ids {
    fn all(&self) -> &[TokenId] {
        match self {
            Ids::One(id) => std::slice::from_ref(id),
            Ids::Several(ids) => ids,
        }
    }
}

/// A token's text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Name {
    Text(String),
    Object { content: String },
}

impl Name {
    fn text(&self) -> &str {
        let (Name::Text(text) | Name::Object { content: text }) = self;
        text
    }
}

/// One chat template, or several by name.
#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Templates {
    fn default_one(self) -> Option<String> {
        match self {
            Templates::One(template) => Some(template),
            Templates::Named(all) => all
                .into_iter()
                .find(|named| named.name == "default")
                .map(|named| named.template),
        }
    }
}

/// Loads a directory.
pub(crate) fn open(directory: &Path) -> Result<ModelText, TextError> {
    let config_path = directory.join("config.json");
    let config: Config = required(&config_path)?;
    if !(1..=MAX_VOCABULARY).contains(&config.vocab_size) {
        return Err(broken(
            &config_path,
            format!("'vocab_size' is {}, not 1 to {MAX_VOCABULARY}", config.vocab_size),
        ));
    }
    if config.max_position_embeddings == 0 {
        return Err(broken(&config_path, "'max_position_embeddings' is 0"));
    }
    let tokenizer_config_path = directory.join("tokenizer_config.json");
    let tokenizer_config: Option<TokenizerConfig> = optional(&tokenizer_config_path)?;
    let generation_path = directory.join("generation_config.json");
    let generation: GenerationConfig = optional(&generation_path)?.unwrap_or_default();

    let tokenizer_path = directory.join("tokenizer.json");
    let json = read(&tokenizer_path, MAX_TOKENIZER_BYTES)?.ok_or_else(|| missing(&tokenizer_path))?;
    let parts = tokenizer_json::read(&json, config.vocab_size).map_err(|error| match error {
        TextError::Vocabulary(reason) => broken(&tokenizer_path, reason),
        other => other,
    })?;
    drop(json);

    let ids = IdsOf {
        vocabulary: &parts.vocabulary,
    };
    let mut ends = ids.checked(&config_path, config.eos_token_id.as_ref())?;
    ends.extend(ids.checked(&generation_path, generation.eos_token_id.as_ref())?);
    let mut named = Named {
        ends,
        ..Named::default()
    };
    match &tokenizer_config {
        Some(config) => {
            named.bos = ids.named(&tokenizer_config_path, "bos_token", config.bos_token.as_ref())?;
            named.eos = ids.named(&tokenizer_config_path, "eos_token", config.eos_token.as_ref())?;
            // A model that was never trained with one may name a token that it does not have.
            let pad = config.pad_token.as_ref();
            named.pad = pad.and_then(|name| parts.vocabulary.special(name.text()));
        }
        None => {
            named.bos = ids
                .checked(&config_path, config.bos_token_id.as_ref())?
                .first()
                .copied()
        }
    }
    let bos_text = named.bos.map(|id| parts.vocabulary.text(id));
    named.adds_bos = tokenizer_config
        .as_ref()
        .and_then(|config| config.add_bos_token)
        .unwrap_or(bos_text.is_some() && bos_text == parts.begins_with.as_deref());

    let template_path = directory.join("chat_template.jinja");
    let template = match read(&template_path, MAX_TEMPLATE_BYTES)? {
        Some(bytes) => Some(String::from_utf8(bytes).map_err(|error| broken(&template_path, error.to_string()))?),
        None => tokenizer_config
            .and_then(|config| config.chat_template)
            .and_then(Templates::default_one),
    };
    let tokenizer = Tokenizer::new(parts.pipeline, parts.vocabulary.named(named), parts.lead_spaces);
    ModelText::new(
        tokenizer,
        template.as_deref(),
        config.max_position_embeddings,
        directory_name(directory),
    )
}

/// Ids that a file speaks of.
struct IdsOf<'a> {
    vocabulary: &'a Vocabulary,
}

impl IdsOf<'_> {
    fn checked(&self, path: &Path, ids: Option<&Ids>) -> Result<Vec<TokenId>, TextError> {
        let ids = ids.map(Ids::all).unwrap_or_default();
        match ids.iter().find(|&&id| id as usize >= self.vocabulary.len()) {
            Some(id) => Err(broken(
                path,
                format!(
                    "token id {id} is outside the vocabulary of {} tokens",
                    self.vocabulary.len()
                ),
            )),
            None => Ok(ids.to_vec()),
        }
    }

    fn named(&self, path: &Path, key: &str, name: Option<&Name>) -> Result<Option<TokenId>, TextError> {
        let id = |name: &Name| {
            self.vocabulary.special(name.text()).ok_or_else(|| {
                broken(
                    path,
                    format!("its {key} {:?} is no special token of the model", name.text()),
                )
            })
        };
        name.map(id).transpose()
    }
}

/// A JSON file that must be there.
fn required<T: DeserializeOwned>(path: &Path) -> Result<T, TextError> {
    optional(path)?.ok_or_else(|| missing(path))
}

fn optional<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, TextError> {
    let parse = |bytes: Vec<u8>| serde_json::from_slice(&bytes).map_err(|error| broken(path, error.to_string()));
    read(path, MAX_CONFIG_BYTES)?.map(parse).transpose()
}

/// A file of at most `max_bytes`, if it is there.
fn read(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, TextError> {
    let unreadable = |source| TextError::File {
        path: path.to_owned(),
        source,
    };
    let file = match baton_gguf::open_regular(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(unreadable)?,
    };
    let mut bytes = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > max_bytes {
        return Err(broken(path, format!("it has more than {max_bytes} bytes")));
    }
    Ok(Some(bytes))
}

fn missing(path: &Path) -> TextError {
    TextError::File {
        path: path.to_owned(),
        source: io::ErrorKind::NotFound.into(),
    }
}

fn broken(path: &Path, reason: impl Into<String>) -> TextError {
    TextError::BrokenFile {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests;
