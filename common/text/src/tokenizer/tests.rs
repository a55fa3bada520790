use std::{path::PathBuf, sync::LazyLock};

use baton_gguf::{Array, Gguf, GgufWriter, Value};
use proptest::prelude::*;
use serde::Deserialize;

use super::*;
use crate::{
    Detokenizer, ModelText,
    limits::{CHUNK_BYTES, MAX_CHUNK_BYTES},
};

pub(crate) static MODEL: LazyLock<ModelText> = LazyLock::new(|| {
    let path = std::env::var_os("BATON_MODEL").map_or_else(
        || {
            PathBuf::from(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../.models/SmolLM2-135M-Instruct.Q4_1.gguf"
            ))
        },
        PathBuf::from,
    );
    ModelText::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
});

const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens");

#[derive(Deserialize)]
struct Goldens {
    cases: Vec<Golden>,
}

#[derive(Deserialize)]
struct Golden {
    group: String,
    text: Option<String>,
    text_file: Option<String>,
    ids: Vec<TokenId>,
    ids_special: Option<Vec<TokenId>>,
}

fn goldens() -> Vec<(Golden, String)> {
    let json = std::fs::read_to_string(format!("{GOLDENS}/tokens.json")).unwrap();
    let goldens: Goldens = serde_json::from_str(&json).unwrap();
    let text = |golden: &Golden| match (&golden.text, &golden.text_file) {
        (Some(text), _) => text.clone(),
        (None, Some(file)) => std::fs::read_to_string(format!("{GOLDENS}/{file}")).unwrap(),
        (None, None) => panic!("a case without text"),
    };
    goldens
        .cases
        .into_iter()
        .map(|golden| (text(&golden), golden))
        .map(|(text, golden)| (golden, text))
        .collect()
}

#[test]
fn ids_are_the_golden_ones() {
    let goldens = goldens();
    assert!(goldens.len() > 600);
    for (golden, text) in goldens {
        assert_eq!(
            MODEL.tokenizer.encode(&text, false).unwrap(),
            golden.ids,
            "{}: {text:?}",
            golden.group
        );
        let special = golden.ids_special.as_ref().unwrap_or(&golden.ids);
        assert_eq!(
            &MODEL.tokenizer.encode(&text, true).unwrap(),
            special,
            "{}, specials: {text:?}",
            golden.group
        );
    }
}

/// The bytes that the default model's vocabulary can spell: the others are left out of ids, and so of texts.
fn spelled(text: &str) -> Vec<u8> {
    let known: Vec<u8> = (0..=255)
        .filter(|&byte| {
            (0..MODEL.tokenizer.vocabulary_len() as TokenId)
                .any(|id| MODEL.tokenizer.vocabulary.bytes(id).unwrap() == [byte])
        })
        .collect();
    text.bytes().filter(|byte| known.contains(byte)).collect()
}

#[test]
fn decoding_gives_the_text_back() {
    let all: String = goldens().iter().map(|(_, text)| text.as_str()).collect();
    let ids = MODEL.tokenizer.encode(&all, false).unwrap();
    assert_eq!(
        MODEL.tokenizer.decode(&ids).unwrap(),
        String::from_utf8_lossy(&spelled(&all))
    );
}

#[test]
fn the_detokenizer_gives_whole_characters() {
    let all: String = goldens().iter().map(|(_, text)| text.as_str()).collect();
    let ids = MODEL.tokenizer.encode(&all, false).unwrap();
    let mut detokenizer = MODEL.detokenizer();
    let mut text = String::new();
    for &id in &ids {
        text.push_str(&detokenizer.push(id).unwrap());
    }
    text.push_str(&detokenizer.finish());
    assert_eq!(text, MODEL.tokenizer.decode(&ids).unwrap());

    // U+1F680 takes more than one token; nothing is shown before the last of them.
    let rocket = MODEL.tokenizer.encode("🚀", false).unwrap();
    let mut detokenizer = MODEL.detokenizer();
    let pieces: Vec<String> = rocket.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
    assert!(rocket.len() > 1);
    assert_eq!(pieces.last().unwrap(), "🚀");
    assert!(pieces[..rocket.len() - 1].iter().all(String::is_empty));

    // Cut short, the character becomes U+FFFD at the end, as in `decode`.
    let mut detokenizer = MODEL.detokenizer();
    assert_eq!(detokenizer.push(rocket[0]).unwrap(), "");
    assert_eq!(detokenizer.finish(), "\u{fffd}");
}

#[test]
fn control_tokens_are_not_shown() {
    let ids = MODEL.tokenizer.encode("a<|im_end|>b", true).unwrap();
    assert_eq!(ids.len(), 3);
    assert!(MODEL.tokenizer.is_control(ids[1]));
    assert_eq!(MODEL.tokenizer.decode(&ids).unwrap(), "ab");
    assert_eq!(MODEL.detokenizer().push(ids[1]).unwrap(), "");
    assert_eq!(MODEL.tokenizer.token_text(ids[1]), "<|im_end|>");
    let plain = MODEL.tokenizer.encode("a<|im_end|>b", false).unwrap();
    assert!(plain.iter().all(|&id| !MODEL.tokenizer.is_control(id)));
    assert_eq!(MODEL.tokenizer.decode(&plain).unwrap(), "a<|im_end|>b");
}

#[test]
fn ids_outside_the_vocabulary_are_errors() {
    let unknown = MODEL.tokenizer.vocabulary_len() as TokenId;
    assert!(matches!(MODEL.tokenizer.decode(&[0, unknown]), Err(TextError::UnknownToken { id, .. }) if id == unknown));
    assert!(matches!(
        MODEL.detokenizer().push(TokenId::MAX),
        Err(TextError::UnknownToken { .. })
    ));
    assert!(!MODEL.tokenizer.is_control(unknown));
}

#[test]
fn the_default_model_is_described() {
    assert_eq!(MODEL.name, "SmolLM2-135M-Instruct");
    assert_eq!(MODEL.context_length, 8192);
    // <|endoftext|> and <|im_end|>
    assert_eq!(MODEL.eos_ids, [0, 2]);
    assert_eq!((MODEL.tokenizer.bos(), MODEL.tokenizer.eos()), (Some(1), Some(2)));
}

#[test]
fn oversize_text_is_refused_early() {
    let refused = |text: &str, max_tokens: usize, most: usize| {
        let error = MODEL.tokenizer.encode_bounded(text, false, max_tokens).unwrap_err();
        let TextError::TooLong { at_least, .. } = error else {
            panic!("{error}")
        };
        assert!((max_tokens + 1..=most).contains(&at_least), "{at_least}");
    };
    // By its bytes alone: no byte of it is tokenised.
    refused(&"a".repeat(64 << 20), 8192, 64 << 20);
    // By the first chunks: the rest, which alone would pass the first check, is not tokenised.
    let words = "Lorem ipsum ".repeat(30_000);
    refused(&words, 8192, 8192 + CHUNK_BYTES);
    assert_eq!(MODEL.tokenizer.encode_bounded("a b", false, 2).unwrap().len(), 2);
    refused("a b c", 2, 3);
    let specials = "<|im_end|>".repeat(10);
    assert_eq!(MODEL.tokenizer.encode_bounded(&specials, true, 10).unwrap(), [2; 10]);
    assert!(matches!(
        MODEL.tokenizer.encode_bounded(&specials, true, 9),
        Err(TextError::TooLong {
            at_least: 10,
            max_tokens: 9
        })
    ));
}

#[test]
fn chunks_do_not_change_ids() {
    let all: String = goldens()
        .iter()
        .map(|(_, text)| text.as_str())
        .collect::<String>()
        .repeat(3);
    assert!(all.len() > 4 * CHUNK_BYTES);
    let whole = MODEL.tokenizer.pipeline.encode(&all, Place::Start).unwrap();
    assert_eq!(MODEL.tokenizer.encode(&all, false).unwrap(), whole);
    assert!(MODEL.tokenizer.pipeline.chunk_len(&all).unwrap() < all.len());

    // Text without spaces is cut at the ends of its lines.
    let lines = "每一步都算数。\n好！\n\n'tis\n12\n".repeat(2_000);
    assert!(lines.len() > 4 * CHUNK_BYTES);
    let whole = MODEL.tokenizer.pipeline.encode(&lines, Place::Start).unwrap();
    assert_eq!(MODEL.tokenizer.encode(&lines, false).unwrap(), whole);
    assert!(MODEL.tokenizer.pipeline.chunk_len(&lines).unwrap() < 2 * CHUNK_BYTES);
}

#[test]
fn text_that_cannot_be_cut_is_refused() {
    let digits = |count: usize| MODEL.tokenizer.encode(&"7".repeat(count), false);
    assert_eq!(digits(2 * CHUNK_BYTES).unwrap().len(), 2 * CHUNK_BYTES);
    assert!(matches!(digits(MAX_CHUNK_BYTES + 1), Err(TextError::Unbroken(_))));
}

#[test]
fn each_family_may_be_cut_at_the_end_of_a_line() {
    for pre in ["smollm", "gpt-2", "llama-bpe", "qwen2"] {
        let tokenizer = small(small_model(pre)).unwrap();
        let ids = |text: &str| tokenizer.pipeline.encode(text, Place::Start).unwrap();
        for before in ["a", "1", "!", "é", "a b", "'s", "\n\nc"] {
            for after in ["b", "2", "?", "é", "'s", "b\n\n", "\u{301}x"] {
                let (head, whole) = (format!("{before}\n"), format!("{before}\n{after}"));
                assert_eq!([ids(&head), ids(after)].concat(), ids(&whole), "{pre}: {whole:?}");
            }
        }
    }
}

/// A vocabulary of all bytes and a few merges.
pub(crate) fn small_model(pre: &str) -> GgufWriter {
    let mut tokens: Vec<String> = (0x21..=0x143u32)
        .filter(|code| !matches!(code, 0x7f..=0xa0 | 0xad))
        .map(|code| char::from_u32(code).unwrap().to_string())
        .collect();
    assert_eq!(tokens.len(), 256);
    tokens.extend(["ab", "<|a|>", "<|b|>", "<tag>", "<|ab|>"].map(String::from));
    let mut types = vec![1; 257];
    types.extend([3, 4, 4, 3]);
    GgufWriter::new()
        .string("general.architecture", "llama")
        .u32("llama.context_length", 64)
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", pre)
        .strings("tokenizer.ggml.tokens", &tokens)
        .value("tokenizer.ggml.token_type", Value::Array(Array::I32(types)))
        .strings("tokenizer.ggml.merges", &["a b"])
        .u32("tokenizer.ggml.bos_token_id", 257)
        .u32("tokenizer.ggml.eos_token_id", 260)
}

fn small(writer: GgufWriter) -> Result<Tokenizer, TextError> {
    Tokenizer::from_gguf(&Gguf::from_bytes(writer.finish()).unwrap())
}

#[test]
fn kinds_of_special_tokens() {
    for pre in ["smollm", "gpt-2", "llama-bpe", "qwen2"] {
        let tokenizer = small(small_model(pre)).unwrap();
        // <|b|> is called user-defined in the file, but looks like a marker: content cannot spell it. <tag> is met anywhere.
        assert_eq!(
            tokenizer.encode("ab<|a|><|b|><tag><|ab|>", true).unwrap(),
            [256, 257, 258, 259, 260]
        );
        let plain = tokenizer.encode("ab<|a|><|b|><tag>", false).unwrap();
        assert_eq!(plain.iter().filter(|&&id| id > 256).collect::<Vec<_>>(), [&259]);
        assert_eq!(tokenizer.decode(&plain).unwrap(), "ab<|a|><|b|><tag>");
        assert_eq!(tokenizer.end_ids(), [260]);
    }
}

#[test]
fn prompts_begin_as_the_file_says() {
    let check = |writer: GgufWriter, expected: &[TokenId]| {
        assert_eq!(small(writer).unwrap().encode_prompt("ab", 10).unwrap(), expected);
    };
    let adds = |adds: bool| small_model("gpt-2").value("tokenizer.ggml.add_bos_token", Value::Bool(adds));
    check(adds(true), &[257, 256]);
    check(adds(false), &[256]);
    check(small_model("gpt-2"), &[256]);
    check(small_model("llama-bpe"), &[257, 256]);
    let spelled = small(adds(true)).unwrap().encode_prompt("<|a|>ab", 10).unwrap();
    assert_eq!(spelled, [257, 256]);
}

#[test]
fn unusable_files_are_refused() {
    let without = |key: &str, value| {
        small(
            GgufWriter::new()
                .string("tokenizer.ggml.model", "gpt2")
                .string(key, value),
        )
        .unwrap_err()
    };
    assert!(
        matches!(without("tokenizer.ggml.pre", "tekken"), TextError::UnsupportedPreTokenizer(name) if name == "tekken")
    );
    assert!(matches!(without("tokenizer.ggml.pre", "smollm"), TextError::Model(_)));
    let kind = small(GgufWriter::new().string("tokenizer.ggml.model", "llama")).unwrap_err();
    assert!(matches!(kind, TextError::UnsupportedTokenizer(name) if name == "llama"));

    let base = |tokens: &[&str], types: Vec<i32>, merges: &[&str]| {
        GgufWriter::new()
            .string("tokenizer.ggml.model", "gpt2")
            .string("tokenizer.ggml.pre", "gpt-2")
            .strings("tokenizer.ggml.tokens", tokens)
            .value("tokenizer.ggml.token_type", Value::Array(Array::I32(types)))
            .strings("tokenizer.ggml.merges", merges)
    };
    assert!(small(base(&["a", "b", "ab"], vec![1; 3], &["a b"])).is_ok());
    for broken in [
        base(&[], vec![], &[]),
        base(&["a", "b", "ab"], vec![1; 2], &["a b"]),
        base(&["a", "b", "ab"], vec![1; 3], &["ab"]),
        base(&["a", "b", "ab"], vec![1; 3], &["a "]),
        base(&["a", "b", "ab"], vec![1; 3], &["a c"]),
        base(&["a", "b", ""], vec![1, 1, 3], &[]),
        base(&["a"], vec![1], &[]).u32("tokenizer.ggml.eos_token_id", 1),
    ] {
        let error = small(broken).unwrap_err();
        assert!(matches!(error, TextError::Vocabulary(_)), "{error}");
    }
}

proptest! {
    #[test]
    fn any_text_survives(text in "\\PC{0,40}", specials in any::<bool>()) {
        let ids = MODEL.tokenizer.encode(&text, specials).unwrap();
        let mut detokenizer = Detokenizer::new(MODEL.tokenizer.clone());
        let mut streamed = String::new();
        for &id in &ids {
            streamed.push_str(&detokenizer.push(id).unwrap());
        }
        streamed.push_str(&detokenizer.finish());
        prop_assert_eq!(&streamed, &MODEL.tokenizer.decode(&ids).unwrap());
    }

    #[test]
    fn any_ids_stream_as_they_decode(ids in prop::collection::vec(0u32..49152, 0..60)) {
        let mut detokenizer = MODEL.detokenizer();
        let mut streamed = String::new();
        for &id in &ids {
            streamed.push_str(&detokenizer.push(id).unwrap());
        }
        streamed.push_str(&detokenizer.finish());
        prop_assert_eq!(streamed, MODEL.tokenizer.decode(&ids).unwrap());
    }
}
