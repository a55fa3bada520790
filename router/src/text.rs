//! Between text and token ids: prompts on the way in, on threads of their own; answers on the way out.

use std::sync::Arc;

use baton_kv::TokenId;
use baton_text::{ChatMessage, Detokenizer, ModelText, StopMatcher, TextError};
use tokio::{sync::Semaphore, task::spawn_blocking};

use crate::{
    error::{Field, GenerateError},
    limits,
    request::{self, Input},
};

const ROLES: [&str; 3] = ["system", "user", "assistant"];

/// The model's text side, and who may use the processor for it.
#[derive(Clone)]
pub(crate) struct Text {
    model: Arc<ModelText>,
    permits: Arc<Semaphore>,
    /// For small prompts, which so need not wait for large ones.
    small: Arc<Semaphore>,
}

impl Text {
    pub(crate) fn new(model: ModelText) -> Self {
        Self {
            model: Arc::new(model),
            permits: Arc::new(Semaphore::new(limits::TOKENISING)),
            small: Arc::new(Semaphore::new(1)),
        }
    }

    pub(crate) fn model(&self) -> &ModelText {
        &self.model
    }

    /// The ids of a prompt, at least one and at most `max_tokens`, each in the vocabulary. `max_tokens` is what the error calls the limit, less one.
    ///
    /// Dropping the future leaves a tokenisation that has begun to its end, and keeps its permit until then.
    pub(crate) async fn encode(&self, input: Input, max_tokens: usize) -> Result<Vec<TokenId>, GenerateError> {
        let bytes = check_size(&input)?;
        let ids = match input {
            Input::Tokens(ids) => {
                self.check_ids(&ids, Field::Input)?;
                ids
            }
            Input::Text(text) => {
                self.compute(bytes, move |model| model.tokenizer.encode_prompt(&text, max_tokens))
                    .await?
            }
            Input::Chat(messages) => {
                check_roles(&messages)?;
                let messages: Vec<ChatMessage> = messages
                    .into_iter()
                    .map(|message| ChatMessage {
                        role: message.role,
                        content: message.content,
                    })
                    .collect();
                self.compute(bytes, move |model| model.encode_chat(&messages, max_tokens))
                    .await?
            }
        };
        if ids.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if ids.len() > max_tokens {
            return Err(GenerateError::PromptTooLong {
                tokens: ids.len(),
                limit: max_tokens + 1,
            });
        }
        Ok(ids)
    }

    /// The text of ids.
    pub(crate) async fn decode(&self, ids: Vec<TokenId>) -> Result<String, GenerateError> {
        if ids.len() > limits::INPUT_TOKENS {
            return Err(too_large(ids.len(), limits::INPUT_TOKENS, "tokens"));
        }
        self.check_ids(&ids, Field::Ids)?;
        self.compute(ids.len(), move |model| model.tokenizer.decode(&ids)).await
    }

    /// Whether all `ids` are in the vocabulary.
    pub(crate) fn check_ids(&self, ids: &[TokenId], field: Field) -> Result<(), GenerateError> {
        let vocabulary = self.model.tokenizer.vocabulary_len();
        match ids.iter().find(|&&id| id as usize >= vocabulary) {
            Some(&id) => Err(GenerateError::TokenOutOfVocabulary { field, id, vocabulary }),
            None => Ok(()),
        }
    }

    async fn compute<T: Send + 'static>(
        &self,
        size: usize,
        work: impl FnOnce(&ModelText) -> Result<T, TextError> + Send + 'static,
    ) -> Result<T, GenerateError> {
        let permits = if size <= limits::SMALL_PROMPT_BYTES {
            &self.small
        } else {
            &self.permits
        };
        let permit = permits.clone().acquire_owned().await;
        let permit = permit.map_err(|_| GenerateError::Draining)?;
        let model = self.model.clone();
        let done = spawn_blocking(move || {
            let _permit = permit;
            work(&model)
        });
        let done = done.await.map_err(|error| GenerateError::Internal(error.to_string()))?;
        done.map_err(text_error)
    }

    /// The text of one answer.
    pub(crate) fn answer(&self, stops: Vec<String>) -> Result<AnswerText, GenerateError> {
        Ok(AnswerText {
            detokenizer: self.model.detokenizer(),
            matcher: StopMatcher::new(stops.clone()).map_err(text_error)?,
            stops,
        })
    }
}

/// Bytes of its text.
fn check_size(input: &Input) -> Result<usize, GenerateError> {
    let bytes = match input {
        Input::Text(text) => text.len(),
        Input::Chat(messages) if messages.len() > limits::CHAT_MESSAGES => {
            return Err(too_large(messages.len(), limits::CHAT_MESSAGES, "messages"));
        }
        Input::Chat(messages) => messages
            .iter()
            .map(|message| message.role.len() + message.content.len())
            .sum(),
        Input::Tokens(ids) if ids.len() > limits::INPUT_TOKENS => {
            return Err(too_large(ids.len(), limits::INPUT_TOKENS, "tokens"));
        }
        Input::Tokens(_) => 0,
    };
    if bytes > limits::PROMPT_BYTES {
        return Err(too_large(bytes, limits::PROMPT_BYTES, "bytes"));
    }
    Ok(bytes)
}

/// Templates put any word where the role goes, and models were not made for any word.
fn check_roles(messages: &[request::ChatMessage]) -> Result<(), GenerateError> {
    match messages.iter().find(|message| !ROLES.contains(&message.role.as_str())) {
        Some(message) => Err(GenerateError::InvalidField {
            field: Field::Input,
            problem: format!("a message's role is one of {ROLES:?}, not {:?}", excerpt(&message.role)),
        }),
        None => Ok(()),
    }
}

/// As much of a client's text as an error repeats.
fn excerpt(text: &str) -> String {
    text.chars().take(limits::IDENTIFIER_BYTES).collect()
}

fn too_large(size: usize, limit: usize, unit: &'static str) -> GenerateError {
    GenerateError::InputTooLarge { size, limit, unit }
}

fn text_error(error: TextError) -> GenerateError {
    match error {
        TextError::TooLong { at_least, max_tokens } => GenerateError::PromptTooLong {
            tokens: at_least,
            limit: max_tokens + 1,
        },
        TextError::NoTemplate => GenerateError::NoChatTemplate,
        TextError::BrokenTemplate(why) => GenerateError::ChatTemplateBroken(why),
        TextError::Render(why) => GenerateError::ChatRefused(why),
        error @ (TextError::RenderTooLarge(_)
        | TextError::NoMessages
        | TextError::Unbroken(_)
        | TextError::Role(_)
        | TextError::SpecialInContent) => GenerateError::InvalidField {
            field: Field::Input,
            problem: error.to_string(),
        },
        error @ TextError::Stop => GenerateError::InvalidField {
            field: Field::Stop,
            problem: error.to_string(),
        },
        other => GenerateError::Internal(other.to_string()),
    }
}

/// Turns one answer's ids into text, and looks for its stop strings.
pub(crate) struct AnswerText {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    stops: Vec<String>,
}

/// Text that may be shown.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Shown {
    /// Whole characters that cannot belong to a stop string any more.
    pub(crate) text: String,
    /// The stop string that was found: the answer ends before it.
    pub(crate) stop: Option<String>,
}

impl AnswerText {
    /// The next token.
    pub(crate) fn push(&mut self, id: TokenId) -> Result<Shown, GenerateError> {
        let text = self.detokenizer.push(id).map_err(text_error)?;
        Ok(matched(&mut self.matcher, &self.stops, &text))
    }

    /// The end: what was held back.
    pub(crate) fn finish(mut self) -> Shown {
        let rest = self.detokenizer.finish();
        let mut shown = matched(&mut self.matcher, &self.stops, &rest);
        if shown.stop.is_none() {
            shown.text.push_str(&self.matcher.finish());
        }
        shown
    }
}

fn matched(matcher: &mut StopMatcher, stops: &[String], text: &str) -> Shown {
    let step = matcher.push(text);
    Shown {
        text: step.text,
        stop: step.stopped.map(|index| stops[index].clone()),
    }
}
