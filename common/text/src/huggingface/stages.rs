//! The stages of a `tokenizer.json` around its merges.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::{
    TextError,
    pipeline::{Place, Stages},
    vocabulary::Spelling,
};

/// Normalizer and pre-tokenizer as the file describes them; null is none.
#[derive(PartialEq)]
pub(super) struct Described {
    normalizer: Value,
    splits: Value,
}

impl Described {
    pub(super) fn build(&self) -> Result<Stages, TextError> {
        Ok(Stages {
            normalizer: build("normalizer", &self.normalizer)?,
            splits: build("pre-tokenizer", &self.splits)?,
        })
    }
}

fn build<T: DeserializeOwned>(part: &str, value: &Value) -> Result<Option<T>, TextError> {
    serde_json::from_value(value.clone()).map_err(|error| TextError::Vocabulary(format!("its {part}: {error}")))
}

/// What happens before merges to plain text at `place`: what is put before a text is only put there.
pub(super) fn before_merges(normalizer: &Value, pre_tokenizer: &Value, place: Place) -> Result<Described, TextError> {
    let mut first = true;
    Ok(Described {
        normalizer: normalizer_at(normalizer, place)?,
        splits: splits_at(pre_tokenizer, place, &mut first)?,
    })
}

fn unsupported(part: &'static str, name: &str) -> TextError {
    TextError::UnsupportedPart {
        part,
        name: name.to_owned(),
    }
}

fn name(value: &Value) -> &str {
    value.get("type").and_then(Value::as_str).unwrap_or("without a type")
}

/// The members of a sequence.
fn members<'v>(value: &'v Value, key: &str) -> &'v [Value] {
    value.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Only normalizers for which a text may be cut before a space or after a line feed.
fn normalizer_at(value: &Value, place: Place) -> Result<Value, TextError> {
    if value.is_null() {
        return Ok(Value::Null);
    }
    match name(value) {
        "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" => Ok(value.clone()),
        "Replace" if pattern(value).is_some_and(|text| text.chars().count() == 1) => Ok(value.clone()),
        "Replace" => Err(unsupported("normalizer", "Replace, of more than a character")),
        "Prepend" if place == Place::Continued => Ok(Value::Null),
        "Prepend" => Ok(value.clone()),
        "Sequence" => {
            let all: Vec<Value> = members(value, "normalizers")
                .iter()
                .map(|member| normalizer_at(member, place))
                .collect::<Result<_, _>>()?;
            let all: Vec<Value> = all.into_iter().filter(|member| !member.is_null()).collect();
            Ok(json!({"type": "Sequence", "normalizers": all}))
        }
        other => Err(unsupported("normalizer", other)),
    }
}

/// `first` says that no stage has cut the text yet.
fn splits_at(value: &Value, place: Place, first: &mut bool) -> Result<Value, TextError> {
    if value.is_null() {
        return Ok(Value::Null);
    }
    let mut value = value.clone();
    match name(&value) {
        "Sequence" => {
            let all: Vec<Value> = members(&value, "pretokenizers")
                .iter()
                .map(|member| splits_at(member, place, first))
                .collect::<Result<_, _>>()?;
            return Ok(json!({"type": "Sequence", "pretokenizers": all}));
        }
        "Split" | "Digits" | "Punctuation" => {}
        "ByteLevel" => {
            if *first && place == Place::Continued {
                value["add_prefix_space"] = false.into();
            }
        }
        "Metaspace" => {
            let always = prepends(&value) == "always";
            let keeps = match place {
                Place::Start => true,
                Place::AfterSpecial => always,
                Place::Continued => always && !*first,
            };
            if !keeps && let Some(metaspace) = value.as_object_mut() {
                metaspace.remove("add_prefix_space");
                metaspace.insert("prepend_scheme".into(), "never".into());
            }
        }
        other => return Err(unsupported("pre-tokenizer", other)),
    }
    *first = false;
    Ok(value)
}

/// When a Metaspace puts a space before: `always`, `first` or `never`.
fn prepends(metaspace: &Value) -> &str {
    match metaspace.get("add_prefix_space").and_then(Value::as_bool) {
        Some(false) => "never",
        _ => metaspace
            .get("prepend_scheme")
            .and_then(Value::as_str)
            .unwrap_or("always"),
    }
}

/// The text that a Replace looks for, unless it is a regular expression.
fn pattern(replace: &Value) -> Option<&str> {
    replace.get("pattern")?.get("String")?.as_str()
}

/// How ids become text.
pub(super) struct Decoder {
    pub(super) spelling: Spelling,
    pub(super) lead_spaces: usize,
}

pub(super) fn decoder(value: &Value) -> Result<Decoder, TextError> {
    let parts = match name(value) {
        _ if value.is_null() => return Err(unsupported("decoder", "null")),
        "Sequence" => members(value, "decoders"),
        "ByteLevel" => {
            return Ok(Decoder {
                spelling: Spelling::ByteLevel,
                lead_spaces: 0,
            });
        }
        _ => std::slice::from_ref(value),
    };
    let (mut replacements, mut byte_fallback, mut lead_spaces) = (Vec::new(), false, 0);
    for part in parts {
        let text = |key: &str| part.get(key).and_then(Value::as_str);
        match name(part) {
            "Fuse" => {}
            "ByteFallback" => byte_fallback = true,
            "Replace" => match (pattern(part), text("content")) {
                (Some(from), Some(to)) if !from.is_empty() => replacements.push((from.to_owned(), to.to_owned())),
                _ => return Err(unsupported("decoder", "Replace of a regular expression")),
            },
            "Strip" => match (text("content"), part.get("start"), part.get("stop")) {
                (Some(" "), Some(start), Some(stop)) if stop.as_u64() == Some(0) => {
                    lead_spaces = start.as_u64().unwrap_or(0) as usize;
                }
                _ => return Err(unsupported("decoder", "Strip of more than leading spaces")),
            },
            "Metaspace" => {
                replacements.push((text("replacement").unwrap_or("▁").to_owned(), " ".to_owned()));
                if prepends(part) != "never" {
                    lead_spaces = usize::MAX;
                }
            }
            other => return Err(unsupported("decoder", other)),
        }
    }
    Ok(Decoder {
        spelling: Spelling::Pieces {
            replacements,
            byte_fallback,
        },
        lead_spaces,
    })
}

/// The special token that a post-processor puts before a text.
pub(super) fn begins_with(post_processor: &Value) -> Option<&str> {
    match name(post_processor) {
        "Sequence" => members(post_processor, "processors").iter().find_map(begins_with),
        "TemplateProcessing" => {
            let first: &Map<String, Value> = members(post_processor, "single").first()?.as_object()?;
            first.get("SpecialToken")?.get("id")?.as_str()
        }
        _ => None,
    }
}
