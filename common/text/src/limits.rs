//! The most that text may ask for.

/// Bytes that are tokenised in one piece, where the text can be cut: bounds the tokenizer's working memory, some hundred bytes per byte of text.
pub const CHUNK_BYTES: usize = 16 << 10;
/// Bytes of a piece that cannot be cut, some 80 MB of working memory: text of any language has a space or the end of a line long before.
pub const MAX_CHUNK_BYTES: usize = 128 << 10;
/// Bytes of one token: vocabularies have some of some hundred spaces.
pub const MAX_TOKEN_BYTES: usize = 4096;
/// Tokens of a vocabulary: the largest have some hundred thousand.
pub const MAX_VOCABULARY: usize = 4 << 20;
/// Bytes of a tokenizer.json: the largest have some tens of millions.
pub const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Bytes of any other JSON file of a model directory: a tokenizer_config.json may list thousands of added tokens.
pub const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Bytes of a chat template in a file of its own.
pub const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
/// Instructions of one chat template's rendering, and its memory, about 64 bytes each. A template takes a few dozen per message.
pub const TEMPLATE_FUEL: u64 = 2_000_000;
/// Bytes of a rendered chat: longer than any context's worth of text.
pub const MAX_RENDERED_BYTES: usize = 32 << 20;
/// Messages of one chat.
pub const MAX_MESSAGES: usize = 4096;
/// Characters of a role.
pub const MAX_ROLE_CHARS: usize = 32;
/// Stop strings of one request.
pub const MAX_STOPS: usize = 64;
/// Bytes of one stop string: bounds what a [`crate::StopMatcher`] holds back.
pub const MAX_STOP_BYTES: usize = 4096;
