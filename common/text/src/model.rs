//! All that the router needs of a model.

use std::{path::Path, sync::Arc};

use baton_gguf::{Gguf, model_name};
use baton_kv::TokenId;

use crate::{ChatMessage, ChatTemplate, Detokenizer, RenderedChat, TextError, Tokenizer, huggingface};

/// A model's text side: tokenizer, chat template, ends, context, name. Keeps nothing of the file's weights.
#[derive(Clone, Debug)]
pub struct ModelText {
    /// The tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Ids that end an answer, ascending.
    pub eos_ids: Vec<TokenId>,
    /// Tokens that prompt and answer may have together, as the model was trained.
    pub context_length: usize,
    /// What clients call the model, e.g. `SmolLM2-135M-Instruct`.
    pub name: String,
    template: Arc<Result<ChatTemplate, TemplateFault>>,
}

/// Why there is no template. A model without one still completes text.
#[derive(Clone, Debug)]
enum TemplateFault {
    Absent,
    Broken(String),
}

impl ModelText {
    /// Loads the text side of a model: a GGUF file, or a directory as Hugging Face lays it out. A missing or broken chat template is reported by the calls
    /// that need it.
    pub fn open(path: &Path) -> Result<Self, TextError> {
        if path.is_dir() {
            huggingface::open(path)
        } else {
            Self::from_gguf(&Gguf::open(path)?, path)
        }
    }

    /// The same from an open GGUF file; `path` is for its name.
    pub fn from_gguf(gguf: &Gguf, path: &Path) -> Result<Self, TextError> {
        let architecture = gguf.string("general.architecture")?;
        let context_length = gguf.u32(&format!("{architecture}.context_length"))? as usize;
        let template = match gguf.metadata("tokenizer.chat_template") {
            None => None,
            Some(_) => Some(gguf.string("tokenizer.chat_template")?),
        };
        let tokenizer = Tokenizer::from_gguf(gguf)?;
        Self::new(tokenizer, template, context_length, model_name(gguf, path))
    }

    pub(crate) fn new(
        tokenizer: Tokenizer,
        template: Option<&str>,
        context_length: usize,
        name: String,
    ) -> Result<Self, TextError> {
        let template = match template.map(ChatTemplate::new) {
            None => Err(TemplateFault::Absent),
            Some(Err(TextError::BrokenTemplate(reason))) => Err(TemplateFault::Broken(reason)),
            Some(template) => Ok(template?),
        };
        Ok(ModelText {
            eos_ids: tokenizer.end_ids().to_vec(),
            tokenizer: Arc::new(tokenizer),
            template: Arc::new(template),
            context_length,
            name,
        })
    }

    /// The chat template, or why there is none.
    pub fn template(&self) -> Result<&ChatTemplate, TextError> {
        self.template.as_ref().as_ref().map_err(|fault| match fault {
            TemplateFault::Absent => TextError::NoTemplate,
            TemplateFault::Broken(reason) => TextError::BrokenTemplate(reason.clone()),
        })
    }

    /// A fresh detokenizer for one answer.
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(self.tokenizer.clone())
    }

    /// A chat through the template, up to where the answer starts.
    pub fn render_chat(&self, messages: &[ChatMessage]) -> Result<RenderedChat, TextError> {
        self.template()?.render(&self.tokenizer, messages, true)
    }

    /// The token ids of a chat through the template; [`TextError::TooLong`] beyond `max_tokens`.
    pub fn encode_chat(&self, messages: &[ChatMessage], max_tokens: usize) -> Result<Vec<TokenId>, TextError> {
        self.tokenizer
            .encode_segments(&self.render_chat(messages)?.segments, max_tokens)
    }
}
