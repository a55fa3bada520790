//! What can go wrong between text and token ids.

use std::{io, path::PathBuf};

use baton_gguf::GgufError;
use baton_kv::TokenId;

/// Why text or a model's text parts cannot be used. No retry helps.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The GGUF file cannot be read.
    #[error(transparent)]
    Model(#[from] GgufError),
    /// A file of a model directory cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file of a model directory is damaged, too large, or contradicts another.
    #[error("{} cannot be used: {reason}", path.display())]
    BrokenFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The model's tokenizer is of a kind that is not built yet.
    #[error("tokenizer '{0}' is not supported (BPE is: in GGUF 'gpt2', in a tokenizer.json 'BPE')")]
    UnsupportedTokenizer(String),
    /// A part of the tokenizer is not built yet.
    #[error("the tokenizer's {part} '{name}' is not supported")]
    UnsupportedPart {
        /// Which: `decoder`, say.
        part: &'static str,
        /// Its name.
        name: String,
    },
    /// The file's pre-tokenizer is not built yet.
    #[error("pre-tokenizer '{0}' is not supported (smollm, gpt-2, llama-bpe and qwen2 are)")]
    UnsupportedPreTokenizer(String),
    /// The vocabulary contradicts itself.
    #[error("the model's vocabulary cannot be used: {0}")]
    Vocabulary(String),
    /// The tokenizer library failed.
    #[error("the text cannot be tokenised: {0}")]
    Tokenize(String),
    /// The text has more tokens than allowed.
    #[error("the text has more than {max_tokens} tokens (at least {at_least})")]
    TooLong {
        /// Tokens that it has at least; counting stopped there.
        at_least: usize,
        /// The limit.
        max_tokens: usize,
    },
    /// Nowhere to cut the text.
    #[error("the text goes on for more than {0} bytes without a space or the end of a line")]
    Unbroken(usize),
    /// A token id that the vocabulary does not have.
    #[error("token id {id} is outside the vocabulary of {vocabulary} tokens")]
    UnknownToken {
        /// The id.
        id: TokenId,
        /// Tokens in the vocabulary.
        vocabulary: usize,
    },
    /// The model has no chat template.
    #[error("the model has no chat template")]
    NoTemplate,
    /// The model's chat template does not parse.
    #[error("the model's chat template is broken: {0}")]
    BrokenTemplate(String),
    /// The chat template refused the messages, or failed on them.
    #[error("the model's chat template refused the messages: {0}")]
    Render(String),
    /// The chat is longer, or its rendering takes more work, than allowed.
    #[error("the chat is too large to render: {0}")]
    RenderTooLarge(&'static str),
    /// A chat without messages.
    #[error("a chat needs at least one message")]
    NoMessages,
    /// A role that is not a plain word.
    #[error("role {0:?} is not a word of lower-case letters, digits and underscores")]
    Role(String),
    /// The template changes content, and the prompt has other special tokens than the template writes by itself.
    #[error("the chat template changes message content, which then spells special tokens of this model")]
    SpecialInContent,
    /// An empty or overlong stop string, or too many of them.
    #[error("stop strings must be at most {max} of 1 to {max_bytes} bytes", max = crate::limits::MAX_STOPS, max_bytes = crate::limits::MAX_STOP_BYTES)]
    Stop,
}

impl TextError {
    /// A stable code for logs and clients.
    pub fn code(&self) -> &'static str {
        match self {
            TextError::Model(error) => error.code(),
            TextError::File { .. } => "model_file_unreadable",
            TextError::BrokenFile { .. } => "model_file_broken",
            TextError::UnsupportedTokenizer(_)
            | TextError::UnsupportedPart { .. }
            | TextError::UnsupportedPreTokenizer(_) => "tokenizer_unsupported",
            TextError::Vocabulary(_) => "vocabulary_unusable",
            TextError::Tokenize(_) => "tokenize_failed",
            TextError::TooLong { .. } => "text_too_long",
            TextError::Unbroken(_) => "text_unbroken",
            TextError::UnknownToken { .. } => "token_out_of_vocabulary",
            TextError::NoTemplate => "no_chat_template",
            TextError::BrokenTemplate(_) => "chat_template_broken",
            TextError::Render(_) => "chat_refused",
            TextError::RenderTooLarge(_) => "chat_too_large",
            TextError::NoMessages => "chat_empty",
            TextError::Role(_) => "role_invalid",
            TextError::SpecialInContent => "special_token_in_content",
            TextError::Stop => "stop_invalid",
        }
    }

    /// Whether the request is at fault, not the model or the program.
    pub fn is_request_fault(&self) -> bool {
        matches!(
            self,
            TextError::TooLong { .. }
                | TextError::Unbroken(_)
                | TextError::UnknownToken { .. }
                | TextError::NoTemplate
                | TextError::Render(_)
                | TextError::RenderTooLarge(_)
                | TextError::NoMessages
                | TextError::Role(_)
                | TextError::SpecialInContent
                | TextError::Stop
        )
    }
}
