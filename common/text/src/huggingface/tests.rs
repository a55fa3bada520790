use std::{fs, path::PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::{ChatMessage, Segment, limits::CHUNK_BYTES, pipeline::Place};

const MODELS: [&str; 4] = ["llama3", "qwen", "mistral", "llama2"];

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/text"))
}

fn model(name: &str) -> ModelText {
    ModelText::open(&fixtures().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
    chats: Vec<Chat>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<TokenId>,
    special: Option<Vec<TokenId>>,
    decoded: Option<String>,
    prompt: Option<Vec<TokenId>>,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Message>,
    text: Option<String>,
    ids: Option<Vec<TokenId>>,
    refused: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
}

fn golden(name: &str) -> Golden {
    let json = fs::read_to_string(fixtures().join("goldens.json")).unwrap();
    let mut all: Value = serde_json::from_str(&json).unwrap();
    serde_json::from_value(all["models"][name].take()).unwrap()
}

fn messages(chat: &[(&str, &str)]) -> Vec<ChatMessage> {
    let message = |&(role, content): &(&str, &str)| ChatMessage {
        role: role.into(),
        content: content.into(),
    };
    chat.iter().map(message).collect()
}

#[test]
fn texts_have_transformers_ids() {
    for name in MODELS {
        let (model, golden) = (model(name), golden(name));
        assert!(golden.cases.len() > 150);
        for case in golden.cases {
            let text = case.text.as_str();
            let tokenizer = &model.tokenizer;
            assert_eq!(tokenizer.encode(text, false).unwrap(), case.ids, "{name}: {text:?}");
            let special = case.special.unwrap_or(case.ids);
            assert_eq!(
                tokenizer.encode(text, true).unwrap(),
                special,
                "{name}, specials: {text:?}"
            );
            if let Some(prompt) = case.prompt {
                assert_eq!(
                    tokenizer.encode_prompt(text, 1000).unwrap(),
                    prompt,
                    "{name}, prompt: {text:?}"
                );
            }
            let decoded = case.decoded.unwrap_or(case.text.clone());
            assert_eq!(
                tokenizer.decode(&special).unwrap(),
                decoded,
                "{name}, decoded: {text:?}"
            );
        }
    }
}

#[test]
fn chats_have_transformers_ids() {
    for name in MODELS {
        let model = model(name);
        for chat in golden(name).chats {
            let chat_messages: Vec<(&str, &str)> = chat
                .messages
                .iter()
                .map(|message| (message.role.as_str(), message.content.as_str()))
                .collect();
            let messages = messages(&chat_messages);
            match chat.refused {
                Some(reason) => {
                    let error = model.render_chat(&messages).unwrap_err();
                    assert!(error.to_string().contains(&reason), "{name}: {error}");
                }
                None => {
                    assert_eq!(model.render_chat(&messages).unwrap().text, chat.text.unwrap(), "{name}");
                    assert_eq!(model.encode_chat(&messages, 1000).unwrap(), chat.ids.unwrap(), "{name}");
                }
            }
        }
    }
}

/// An answer's text is what the text of prompt and answer has more than the prompt's.
#[test]
fn answers_go_on_after_prompts() {
    for name in MODELS {
        let model = model(name);
        for case in golden(name).cases {
            let all = case.ids.len();
            for prompt in [1, all / 2, all.saturating_sub(1)].map(|at| at.min(all)) {
                let (prompt, answer) = case.ids.split_at(prompt);
                let mut detokenizer = model.detokenizer();
                let mut text: String = answer.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
                text.push_str(&detokenizer.finish());
                let before = model.tokenizer.decode(prompt).unwrap();
                // Where the prompt ends within a character, neither half is that character.
                if !before.is_empty() && !before.ends_with('\u{fffd}') && !text.contains('\u{fffd}') {
                    assert_eq!(before + &text, model.tokenizer.decode(&case.ids).unwrap(), "{name}");
                }
            }
        }
    }
    // Bytes make characters, one token each.
    let mistral = model("mistral");
    let ids = mistral.tokenizer.encode("x🚀", false).unwrap();
    let mut detokenizer = mistral.detokenizer();
    let pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
    assert_eq!(pieces, [" ", "x", "", "", "", "🚀"]);
}

#[test]
fn long_texts_have_the_ids_of_short_ones() {
    let text = |name: &str| fs::read_to_string(fixtures().join("../texts").join(name)).unwrap();
    let long = (text("prose.txt") + &text("licence.txt")).repeat(3);
    assert!(long.len() > 2 * CHUNK_BYTES);
    for name in MODELS {
        let tokenizer = model(name).tokenizer;
        assert!(tokenizer.pipeline.chunk_len(&long).unwrap() < 2 * CHUNK_BYTES, "{name}");
        let whole = tokenizer.pipeline.encode(&long, Place::Start).unwrap();
        assert_eq!(tokenizer.encode(&long, false).unwrap(), whole, "{name}");
    }
}

#[test]
fn names_and_limits_come_from_their_files() {
    let check = |name: &str, bos: Option<&str>, ends: &[&str], context: usize| {
        let model = model(name);
        let text = |id: TokenId| model.tokenizer.token_text(id);
        assert_eq!(model.tokenizer.bos().map(text), bos, "{name}");
        let found: Vec<&str> = model.eos_ids.iter().map(|&id| text(id)).collect();
        assert_eq!(
            (found.as_slice(), model.context_length, model.name.as_str()),
            (ends, context, name)
        );
        // The embedding's rows without a token are ids without text.
        let last = model.tokenizer.vocabulary_len() as TokenId - 1;
        assert_eq!(model.tokenizer.decode(&[last]).unwrap(), "");
        assert!(model.tokenizer.decode(&[last + 1]).is_err());
    };
    check(
        "llama3",
        Some("<|begin_of_text|>"),
        &["<|end_of_text|>", "<|eot_id|>"],
        4096,
    );
    check("qwen", None, &["<|endoftext|>", "<|im_end|>"], 4096);
    check("mistral", Some("<s>"), &["</s>"], 4096);
    check("llama2", Some("<s>"), &["</s>"], 4096);
}

#[test]
fn prompts_begin_once() {
    for name in ["llama3", "mistral", "llama2"] {
        let tokenizer = model(name).tokenizer;
        let bos = tokenizer.bos().unwrap();
        for prompt in ["a", &format!("{}a", tokenizer.token_text(bos))] {
            let ids = tokenizer.encode_prompt(prompt, 10).unwrap();
            assert_eq!(ids.iter().filter(|&&id| id == bos).count(), 1, "{name}: {prompt}");
            assert_eq!(ids[0], bos);
        }
        assert!(matches!(
            tokenizer.encode_prompt("a", 1),
            Err(TextError::TooLong { max_tokens: 1, .. })
        ));
    }
    assert!(model("qwen").tokenizer.encode_prompt("", 10).unwrap().is_empty());
}

#[test]
fn without_a_template_there_is_text_but_no_chat() {
    let model = model("llama2");
    assert!(matches!(
        model.encode_chat(&messages(&[("user", "Hi")]), 100),
        Err(TextError::NoTemplate)
    ));
    assert!(!model.tokenizer.encode_prompt("Hi", 100).unwrap().is_empty());
}

/// A fixture's copy, to be damaged.
fn copy(name: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for file in fs::read_dir(fixtures().join(name)).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), directory.path().join(file.file_name())).unwrap();
    }
    directory
}

/// A fixture with one file's JSON changed.
fn changed(name: &str, file: &str, change: impl FnOnce(&mut Value)) -> Result<ModelText, TextError> {
    let directory = copy(name);
    let path = directory.path().join(file);
    let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(&path, json.to_string()).unwrap();
    ModelText::open(directory.path())
}

#[test]
fn missing_and_damaged_files_are_named() {
    for file in ["config.json", "tokenizer.json"] {
        let directory = copy("llama3");
        fs::remove_file(directory.path().join(file)).unwrap();
        let error = ModelText::open(directory.path()).unwrap_err();
        assert!(
            matches!(&error, TextError::File { path, .. } if path.ends_with(file)),
            "{error}"
        );
    }
    for file in ["tokenizer_config.json", "generation_config.json"] {
        let directory = copy("llama3");
        fs::remove_file(directory.path().join(file)).unwrap();
        assert_eq!(
            ModelText::open(directory.path()).unwrap().eos_ids,
            model("llama3").eos_ids
        );
    }
    for file in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        for damage in [
            "",
            "{",
            "[]",
            "{\"model\": 7, \"eos_token\": 7, \"eos_token_id\": \"x\"}",
        ] {
            let directory = copy("llama3");
            fs::write(directory.path().join(file), damage).unwrap();
            let error = ModelText::open(directory.path()).unwrap_err();
            assert!(
                matches!(&error, TextError::BrokenFile { path, .. } if path.ends_with(file)),
                "{file} {damage:?}: {error}"
            );
        }
    }
    let directory = copy("qwen");
    fs::write(directory.path().join("chat_template.jinja"), b"\xff").unwrap();
    assert!(matches!(
        ModelText::open(directory.path()),
        Err(TextError::BrokenFile { .. })
    ));
    fs::write(
        directory.path().join("chat_template.jinja"),
        vec![b' '; MAX_TEMPLATE_BYTES as usize + 1],
    )
    .unwrap();
    let error = ModelText::open(directory.path()).unwrap_err();
    assert!(error.to_string().contains("more than"), "{error}");
}

#[test]
fn contradictions_are_named() {
    let check = |file: &str, change: &dyn Fn(&mut Value), expected: &str| {
        let error = changed("llama3", file, change).unwrap_err();
        assert!(
            matches!(&error, TextError::BrokenFile { path, .. } if path.ends_with(file))
                && error.to_string().contains(expected),
            "{expected}: {error}"
        );
    };
    check("config.json", &|json| json["vocab_size"] = 0.into(), "vocab_size");
    check(
        "config.json",
        &|json| json["vocab_size"] = (1u64 << 40).into(),
        "vocab_size",
    );
    check(
        "config.json",
        &|json| json["max_position_embeddings"] = 0.into(),
        "max_position",
    );
    check("config.json", &|json| json["eos_token_id"] = 5000.into(), "5000");
    check(
        "generation_config.json",
        &|json| json["eos_token_id"] = json!([1, 5000]),
        "5000",
    );
    check("tokenizer_config.json", &|json| json["bos_token"] = "<s>".into(), "<s>");
    let tokenizer = |change: &dyn Fn(&mut Value), expected: &str| check("tokenizer.json", change, expected);
    tokenizer(&|json| json["model"]["vocab"]["new"] = 5000.into(), "5000");
    tokenizer(&|json| json["model"]["vocab"]["new"] = 1.into(), "both token 1");
    tokenizer(&|json| json["added_tokens"][0]["content"] = "".into(), "empty");
    tokenizer(&|json| json["added_tokens"][0]["id"] = 1.into(), "both token 1");
    tokenizer(&|json| json["added_tokens"][0]["content"] = "a".into(), "and another");
    tokenizer(&|json| json["model"]["merges"][0] = "ab".into(), "not two pieces");
    tokenizer(&|json| json["model"]["merges"][0] = json!(["a", "\u{3a9}"]), "\u{3a9}");
    tokenizer(
        &|json| json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(".into(),
        "pre-tokenizer",
    );
}

#[test]
fn special_tokens_beyond_the_vocabulary_are_never_met() {
    let directory = copy("llama3");
    fs::remove_file(directory.path().join("generation_config.json")).unwrap();
    fs::remove_file(directory.path().join("tokenizer_config.json")).unwrap();
    let config = json!({"vocab_size": 522, "max_position_embeddings": 64, "bos_token_id": 520});
    fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    let model = ModelText::open(directory.path()).unwrap();
    assert_eq!(
        (model.tokenizer.bos(), model.eos_ids.as_slice()),
        (Some(520), &[521][..])
    );
    let ids = model.tokenizer.encode_prompt("<|end_of_text|><|eot_id|>", 100).unwrap();
    assert_eq!(ids[..2], [520, 521]);
    assert_eq!(model.tokenizer.decode(&ids).unwrap(), "<|eot_id|>");
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    let check = |change: &dyn Fn(&mut Value), expected: &str| {
        let error = changed("mistral", "tokenizer.json", change).unwrap_err();
        assert_eq!(error.code(), "tokenizer_unsupported", "{error}");
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    };
    check(
        &|json| json["model"] = json!({"type": "Unigram", "vocab": [["a", 0.0]]}),
        "Unigram",
    );
    check(&|json| json["model"]["dropout"] = 0.1.into(), "dropout");
    check(&|json| json["added_tokens"][0]["single_word"] = true.into(), "<unk>");
    check(&|json| json["decoder"] = Value::Null, "null");
    check(
        &|json| json["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        "WordPiece",
    );
    check(&|json| json["decoder"]["decoders"][3]["stop"] = 1.into(), "Strip");
    check(
        &|json| json["normalizer"] = json!({"type": "BertNormalizer"}),
        "BertNormalizer",
    );
    check(
        &|json| json["normalizer"] = json!({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}),
        "Replace",
    );
    check(
        &|json| json["pre_tokenizer"] = json!({"type": "WhitespaceSplit"}),
        "WhitespaceSplit",
    );
}

/// Older files: a decoder that is a Metaspace, one that puts a space before everything, and merges that are texts.
#[test]
fn older_files_mean_the_same() {
    let mistral = model("mistral");
    let older = changed("mistral", "tokenizer.json", |json| {
        json["decoder"] = json!({"type": "Sequence", "decoders": [
            {"type": "ByteFallback"}, {"type": "Metaspace", "replacement": "▁", "add_prefix_space": true}, {"type": "Fuse"},
        ]});
        json["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁", "add_prefix_space": true});
        for merge in json["model"]["merges"].as_array_mut().unwrap() {
            *merge = format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap()).into();
        }
        json["model"].as_object_mut().unwrap().remove("type");
    })
    .unwrap();
    for text in ["Hello, world!", " two  spaces", "né\n\nline"] {
        let ids = older.tokenizer.encode(text, false).unwrap();
        assert_eq!(ids, mistral.tokenizer.encode(text, false).unwrap(), "{text:?}");
        assert_eq!(older.tokenizer.decode(&ids).unwrap(), text.trim_start_matches(' '));
    }
    let ids = |model: &ModelText| model.tokenizer.encode("[INST]a", true).unwrap();
    assert_eq!(mistral.tokenizer.decode(&ids(&mistral)).unwrap(), "a");
    // `first` leaves what follows a special token alone, `always` does not.
    let shown = |model: &ModelText| -> Vec<u8> {
        ids(model)[1..]
            .iter()
            .flat_map(|&id| model.tokenizer.token_bytes(id).unwrap().to_vec())
            .collect()
    };
    assert_eq!((shown(&mistral), shown(&older)), (b"a".to_vec(), b" a".to_vec()));
}

/// Merges that spell a control token do not yield it; an unknown character without bytes to fall back on is the unknown token.
#[test]
fn merges_yield_no_control_token() {
    let spelled = changed("llama3", "tokenizer.json", |json| {
        let (model, id) = (&mut json["model"], 1);
        model["vocab"].as_object_mut().unwrap().retain(|_, known| *known != id);
        model["vocab"]["<a"] = id.into();
        model["vocab"]["<a>"] = 525.into();
        model["merges"]
            .as_array_mut()
            .unwrap()
            .retain(|merge| merge[0] != "\"" && merge[1] != "\"");
        let merges = model["merges"].as_array_mut().unwrap();
        merges.extend([json!(["<", "a"]), json!(["<a", ">"])]);
        let added = json["added_tokens"].as_array_mut().unwrap();
        added.push(json!({"id": 525, "content": "<a>", "special": true}));
    })
    .unwrap();
    assert_eq!(spelled.tokenizer.encode("<a>", true).unwrap(), [525]);
    let plain = spelled.tokenizer.encode("<a>", false).unwrap();
    assert!(!plain.is_empty() && plain.iter().all(|&id| !spelled.tokenizer.is_control(id)));
    assert_eq!(spelled.tokenizer.decode(&plain).unwrap(), "<a>");

    let unknown = changed("mistral", "tokenizer.json", |json| {
        json["model"]["byte_fallback"] = false.into()
    })
    .unwrap();
    let ids = unknown.tokenizer.encode("a\u{3a9}b", false).unwrap();
    assert!(ids.contains(&unknown.tokenizer.vocabulary.special("<unk>").unwrap()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever clients write, the special tokens are those of a harmless chat.
    #[test]
    fn contents_never_add_special_tokens(
        pieces in prop::collection::vec(prop::sample::select(vec![
            "<|eot_id|>", "<|start_header_id|>", "<|im_end|>", "<|im_start|>", "<|begin_of_text|>", "<s>", "</s>", "[INST]", "[/INST]", "<|pad|>",
            "<0x0A>", "<", "|", " ", "\n", "a", "é", "▁",
        ]), 0..8),
    ) {
        let hostile = pieces.concat();
        for name in ["llama3", "qwen", "mistral"] {
            static TEXTS: std::sync::OnceLock<std::collections::HashMap<&str, ModelText>> = std::sync::OnceLock::new();
            let model = &TEXTS.get_or_init(|| MODELS.into_iter().map(|name| (name, model(name))).collect())[name];
            let controls = |content: &str| -> Vec<TokenId> {
                let ids = model.encode_chat(&messages(&[("user", content)]), 10_000).unwrap();
                ids.into_iter().filter(|&id| model.tokenizer.is_control(id)).collect()
            };
            prop_assert_eq!(controls(&hostile), controls("x"), "{}", name);
            let segments = model.render_chat(&messages(&[("user", &hostile)])).unwrap().segments;
            let shown: String = segments.iter().map(|segment| match segment {
                Segment::Plain(text) => text.clone(),
                Segment::Special(id) => model.tokenizer.token_text(*id).to_owned(),
            }).collect();
            prop_assert_eq!(shown, model.render_chat(&messages(&[("user", &hostile)])).unwrap().text);
        }
    }
}
