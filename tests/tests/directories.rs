//! Model directories as Hugging Face lays them out, served by whole clusters: tiny random models, one of them in shards and with a sliding window.

use std::{fs, path::PathBuf, time::Duration};

use baton_engine::naive::NaiveModel;
use baton_proto::v1::{Chat, GenerateRequest, ListModelsRequest, Message, generate_request::Input};
use baton_tests::{Cluster, ClusterOptions, client, workspace};
use baton_text::{ChatMessage, ModelText};

const IDLE: Duration = Duration::from_secs(15);

/// A copy of a directory of `tests/goldens/tiny`, with the tokenizer of that which has one.
fn directory(folder: &tempfile::TempDir, name: &str) -> PathBuf {
    let tiny = workspace().join("tests/goldens/tiny");
    let copy = folder.path().join(name);
    fs::create_dir(&copy).expect("a folder");
    for source in ["llama", name] {
        for entry in fs::read_dir(tiny.join(source)).expect("a tiny model") {
            let entry = entry.expect("an entry");
            let own = entry.file_name().to_string_lossy().starts_with("tokenizer");
            if own || source == name {
                fs::copy(entry.path(), copy.join(entry.file_name())).expect("a copy");
            }
        }
    }
    copy
}

/// What the oracle says, greedily.
fn expected(model: &NaiveModel, prompt: &[u32], tokens: u32) -> Vec<u32> {
    let mut all = prompt.to_vec();
    for _ in 0..tokens {
        let logits = model.logits(&all);
        let largest = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        all.push(largest.expect("a vocabulary") as u32);
    }
    all.split_off(prompt.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_answers_as_the_oracle_does() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["llama", "mistral"] {
        let path = directory(&folder, name);
        let (oracle, text) = (
            NaiveModel::open(&path).expect("weights"),
            ModelText::open(&path).expect("a tokenizer"),
        );
        let mut cluster = Cluster::start(ClusterOptions {
            model: path,
            kv_bytes: "1MiB".to_owned(),
            ..ClusterOptions::default()
        });
        let mut api = client::connect(&cluster).await;
        let models = api
            .list_models(ListModelsRequest {})
            .await
            .expect("models")
            .into_inner();
        assert_eq!(models.models[0].id, name);

        // Handed over within a block and beyond several, the window's end among them.
        for length in [5, 31, 70] {
            let prompt: Vec<u32> = (0..length).map(|i| (i * 41 + 3) % 256).collect();
            let answer = client::run(&mut api, client::greedy(&prompt, 40))
                .await
                .expect("an answer");
            assert_eq!(answer.ids, expected(&oracle, &prompt, 40), "{name}, {length} tokens");
            assert!(
                answer.finished.served.expect("served").kv_bytes > 0,
                "{name}: it was handed over"
            );
        }

        // The directory's chat template, and text out of its tokenizer.
        let messages = [
            ("system", "Be brief."),
            ("user", "Name the river."),
            ("assistant", "It ran"),
            ("user", "on?"),
        ];
        let chat = Chat {
            messages: messages
                .map(|(role, content)| Message {
                    role: role.into(),
                    content: content.into(),
                })
                .into(),
        };
        let request = GenerateRequest {
            input: Some(Input::Chat(chat)),
            ..client::greedy(&[], 20)
        };
        let prompt = text
            .encode_chat(
                &messages.map(|(role, content)| ChatMessage {
                    role: role.into(),
                    content: content.into(),
                }),
                512,
            )
            .expect("ids");
        let answer = client::run(&mut api, request).await.expect("an answer");
        assert_eq!(answer.ids, expected(&oracle, &prompt, 20), "{name}, a chat");
        assert_eq!(
            answer.finished.usage.expect("usage").prompt_tokens as usize,
            prompt.len()
        );
        assert_eq!(
            answer.text,
            text.tokenizer.decode(&answer.ids).expect("text"),
            "{name}, a chat"
        );
        cluster.assert_idle(IDLE);
    }
}
