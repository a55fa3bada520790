//! Text to token ids and back: tokenizer, chat template, detokenizer, stop strings. Used by the router and the command line only.
//!
//! **Architecture invariants**
//! - Message content is never read as special tokens: only the chat template's own text can yield `<|im_start|>` and its like ([`Segment`]).
//! - Oversize text is refused before it is tokenised whole ([`Tokenizer::encode_bounded`]).
//! - A [`Detokenizer`] gives whole characters only; a [`StopMatcher`] never gives text that belongs to a stop string. Neither depends on how the text
//!   was cut into tokens.
//!
//! A model is a GGUF file, or a directory as Hugging Face lays it out ([`ModelText::open`]).
//!
//! Deliberately absent: tokenizers other than BPE (SentencePiece's models, Unigram, WordPiece), tools and multimodal content in templates, networking.

mod detokenizer;
mod error;
mod huggingface;
pub mod limits;
mod model;
mod pipeline;
mod pre_tokenizer;
mod segment;
mod stop;
mod strftime;
mod template;
mod tokenizer;
mod vocabulary;

pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use model::ModelText;
pub use segment::Segment;
pub use stop::{StopMatcher, StopStep};
pub use template::{ChatMessage, ChatTemplate, RenderedChat};
pub use tokenizer::Tokenizer;
