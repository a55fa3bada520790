//! Takes a request's fields one by one; what is left at the end is unknown, and refused.
//! `null` means absent, as with OpenAI.

use serde_json::{Map, Value};

use super::error::ApiError;
use crate::request::{GenerateRequest, SamplingRequest};

/// The fields of one object that have not been taken yet.
pub(super) struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    pub(super) fn new(map: Map<String, Value>) -> Self {
        Self { map }
    }

    /// The value, unless absent or null.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a number that an `f32` can hold.
    pub(super) fn number(&mut self, name: &str) -> Result<Option<f32>, ApiError> {
        let taken = self.take(name);
        taken
            .map(|value| {
                value
                    .as_f64()
                    .map(|number| number as f32)
                    .ok_or_else(|| wrong(name, "a number"))
            })
            .transpose()
    }

    /// Takes a non-negative whole number.
    pub(super) fn count(&mut self, name: &str) -> Result<Option<u32>, ApiError> {
        let taken = self.take(name);
        let number = |value: Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
        taken
            .map(|value| number(value).ok_or_else(|| wrong(name, "a whole number from 0 to 4294967295")))
            .transpose()
    }

    /// Takes a whole number of 64 bits; a negative one counts as its two's complement.
    pub(super) fn seed(&mut self, name: &str) -> Result<Option<u64>, ApiError> {
        let taken = self.take(name);
        let number = |value: Value| value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
        taken
            .map(|value| number(value).ok_or_else(|| wrong(name, "a whole number of 64 bits")))
            .transpose()
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.take(name)
            .map(|value| value.as_bool().ok_or_else(|| wrong(name, "true or false")))
            .transpose()
    }

    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong(name, "a string")),
        }
    }

    pub(super) fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(_) => Err(wrong(name, "a list")),
        }
    }

    /// Refuses a known field that is not built yet, unless it is absent or has the value that changes nothing.
    pub(super) fn not_built(&mut self, name: &str, neutral: impl Fn(&Value) -> bool) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !neutral(&value) => Err(ApiError::not_built(name)),
            _ => Ok(()),
        }
    }

    /// Whatever has not been taken is unknown.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        self.map
            .keys()
            .next()
            .map_or(Ok(()), |name| Err(ApiError::unknown_field(name)))
    }
}

fn wrong(name: &str, expected: &str) -> ApiError {
    ApiError::invalid_field(name, &format!("must be {expected}"))
}

/// How an answer is to be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Delivery {
    /// In chunks, as they come.
    pub(super) stream: bool,
    /// A last chunk with the usage.
    pub(super) include_usage: bool,
}

/// Fields that both endpoints share. OpenAI's default temperature is 1.
pub(super) fn shared(fields: &mut Fields, request: &mut GenerateRequest) -> Result<Delivery, ApiError> {
    request.model = fields.string("model")?;
    request.sampling = SamplingRequest {
        temperature: Some(fields.number("temperature")?.unwrap_or(1.0)),
        top_k: fields.count("top_k")?,
        top_p: fields.number("top_p")?,
        min_p: fields.number("min_p")?,
        seed: fields.seed("seed")?,
        repetition_penalty: fields.number("repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?,
        frequency_penalty: fields.number("frequency_penalty")?,
        logit_bias: logit_bias(fields)?,
    };
    request.stop = stop_strings(fields)?;
    request.stop_token_ids = match fields.array("stop_token_ids")? {
        None => Vec::new(),
        Some(items) => token_ids("stop_token_ids", &items)?,
    };
    request.ignore_eos = fields.flag("ignore_eos")?.unwrap_or(false);
    // A label of the client's own.
    let _ = fields.string("user")?;

    request.n = fields.count("n")?.unwrap_or(1);
    // More would be drawn than are shown, and the best chosen.
    fields.not_built("best_of", |value| value.as_u64() == Some(request.n.into()))?;

    let stream = fields.flag("stream")?.unwrap_or(false);
    let include_usage = match fields.take("stream_options") {
        None => false,
        Some(_) if !stream => return Err(ApiError::invalid_field("stream_options", "needs stream = true")),
        Some(Value::Object(options)) => {
            let mut options = Fields::new(options);
            let include = options.flag("include_usage")?.unwrap_or(false);
            // Padding against traffic analysis: leaving it out changes no content.
            options.not_built("include_obfuscation", |value| value == &Value::Bool(false))?;
            options.finish()?;
            include
        }
        Some(_) => return Err(wrong("stream_options", "an object")),
    };
    Ok(Delivery { stream, include_usage })
}

/// Token ids, as strings, to numbers.
fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let entry = |(id, bias): (String, Value)| Some((id.parse().ok()?, bias.as_f64()? as f32));
    let entries = match fields.take("logit_bias") {
        None => Some(Vec::new()),
        Some(Value::Object(map)) => map.into_iter().map(entry).collect(),
        Some(_) => None,
    };
    entries.ok_or_else(|| wrong("logit_bias", "an object from token ids to numbers"))
}

fn stop_strings(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let strings = |items: Vec<Value>| {
        let text = |item| {
            if let Value::String(text) = item {
                Some(text)
            } else {
                None
            }
        };
        items.into_iter().map(text).collect::<Option<Vec<String>>>()
    };
    match fields.take("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![text]),
        Some(Value::Array(items)) => strings(items).ok_or_else(|| wrong("stop", "a string or a list of strings")),
        Some(_) => Err(wrong("stop", "a string or a list of strings")),
    }
}

/// A list of token ids.
pub(super) fn token_ids(name: &str, items: &[Value]) -> Result<Vec<u32>, ApiError> {
    let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
    items
        .iter()
        .map(id)
        .collect::<Option<_>>()
        .ok_or_else(|| wrong(name, "a list of token ids"))
}
