//! How text is cut before byte-pair encoding, by the name that the model file gives.

use tokenizers::{
    NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    normalizers::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use crate::TextError;

/// Llama 3's pattern with `{digits}` for how many digits make one piece; Qwen 2's is the same with 1.
/// Source: the models' `tokenizer.json`, and llama.cpp's `llama-vocab.cpp`.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What a family does before its merges.
pub(crate) struct PreTokenizer {
    pub(crate) normalizer: Option<NormalizerWrapper>,
    pub(crate) splits: PreTokenizerWrapper,
    /// A piece that is a token is that token, without merging.
    pub(crate) ignore_merges: bool,
}

/// The pre-tokenizer with this name (`tokenizer.ggml.pre`). Every one of them always cuts where a space follows a character that is not whitespace, and
/// decides what follows from there on without looking back: long texts are cut there.
pub(crate) fn by_name(name: &str) -> Result<PreTokenizer, TextError> {
    let gpt2 = ByteLevel::new(false, false, true);
    let plain = |splits| PreTokenizer {
        normalizer: None,
        splits,
        ignore_merges: false,
    };
    Ok(match name {
        "smollm" => plain(sequence(vec![Digits::new(true).into(), gpt2.into()])),
        "gpt-2" => plain(gpt2.into()),
        "llama-bpe" => PreTokenizer {
            ignore_merges: true,
            ..plain(split_by(&LLAMA3.replace("{digits}", "{1,3}"))?)
        },
        "qwen2" => PreTokenizer {
            normalizer: Some(NFC.into()),
            ..plain(split_by(&LLAMA3.replace("{digits}", ""))?)
        },
        other => return Err(TextError::UnsupportedPreTokenizer(other.into())),
    })
}

fn split_by(pattern: &str) -> Result<PreTokenizerWrapper, TextError> {
    let split = Split::new(
        SplitPattern::Regex(pattern.into()),
        SplitDelimiterBehavior::Isolated,
        false,
    )
    .map_err(|error| TextError::Tokenize(error.to_string()))?;
    Ok(sequence(vec![split.into(), ByteLevel::new(false, false, false).into()]))
}

fn sequence(parts: Vec<PreTokenizerWrapper>) -> PreTokenizerWrapper {
    Sequence::new(parts).into()
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;

    fn pieces(name: &str, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        by_name(name).unwrap().splits.pre_tokenize(&mut pieces).unwrap();
        let offsets = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        offsets
            .into_iter()
            .map(|(_, (start, end), _)| text[start..end].to_owned())
            .collect()
    }

    #[test]
    fn each_family_cuts_in_its_way() {
        let text = "It's 12345 o'CLOCK'S\n\n  x!?\n";
        let check = |name, expected: &[&str]| assert_eq!(pieces(name, text), expected, "{name}");
        check(
            "gpt-2",
            &[
                "It", "'s", " 12345", " o", "'", "CLOCK", "'", "S", "\n\n ", " x", "!?", "\n",
            ],
        );
        check(
            "smollm",
            &[
                "It", "'s", " ", "1", "2", "3", "4", "5", " o", "'", "CLOCK", "'", "S", "\n\n ", " x", "!?", "\n",
            ],
        );
        check(
            "llama-bpe",
            &[
                "It", "'s", " ", "123", "45", " o", "'CLOCK", "'S", "\n\n", " ", " x", "!?\n",
            ],
        );
        check(
            "qwen2",
            &[
                "It", "'s", " ", "1", "2", "3", "4", "5", " o", "'CLOCK", "'S", "\n\n", " ", " x", "!?\n",
            ],
        );
    }

    #[test]
    fn others_are_refused_by_name() {
        for name in ["default", "tekken", ""] {
            assert!(matches!(by_name(name), Err(TextError::UnsupportedPreTokenizer(found)) if found == name));
        }
    }
}
