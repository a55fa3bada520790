use std::{
    collections::BTreeMap,
    sync::{Mutex, atomic::AtomicUsize},
};

use axum::{
    Router,
    body::Body,
    extract::{Path as UrlPath, State},
    http::{HeaderMap, Response, StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use futures_util::StreamExt;
use serde_json::json;
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::watch};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub on this machine, as far as the crate looks at one.
#[derive(Default)]
struct Mock {
    files: BTreeMap<String, Vec<u8>>,
    /// Who may read; none: anybody.
    token: Option<&'static str>,
    /// Bodies break off after so many bytes, so many times.
    breaks: Mutex<Option<(usize, usize)>>,
    /// Bytes that are sent differ from those that are listed.
    damaged: bool,
    /// Answers to everything.
    status: Option<u16>,
    /// Files asked for, ranges of one byte apart.
    downloads: AtomicUsize,
    /// Ranges of one byte asked for, which tell a file's length.
    probes: watch::Sender<usize>,
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Mock {
    /// A model with everything that is wanted, and more.
    fn model() -> Self {
        let index = json!({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors", "c": "model-1-of-2.safetensors"}});
        let files = [
            (CONFIG, b"{}".to_vec()),
            (TOKENIZER, b"{\"version\": 1}".to_vec()),
            ("tokenizer_config.json", b"{ }".to_vec()),
            ("README.md", b"read me".to_vec()),
            (INDEX, index.to_string().into_bytes()),
            ("model-1-of-2.safetensors", vec![1; 100_000]),
            ("model-2-of-2.safetensors", vec![2; 50_000]),
            ("pytorch_model.bin", vec![3; 50_000]),
            ("small/m.gguf", vec![4; 1_000]),
        ];
        Self {
            files: files.map(|(name, bytes)| (name.to_owned(), bytes)).into(),
            ..Self::default()
        }
    }

    fn allows(&self, headers: &HeaderMap) -> Result<(), StatusCode> {
        if let Some(status) = self.status {
            return Err(StatusCode::from_u16(status).expect("a status"));
        }
        let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        match self.token {
            Some(token) if bearer != Some(format!("Bearer {token}").as_str()) => Err(StatusCode::UNAUTHORIZED),
            _ => Ok(()),
        }
    }

    fn list(&self) -> String {
        let sibling = |(name, bytes): (&String, &Vec<u8>)| match name.ends_with(".json") {
            true => json!({"rfilename": name, "size": bytes.len(), "blobId": "x"}),
            false => {
                json!({"rfilename": name, "size": bytes.len(), "lfs": {"sha256": sha256(bytes), "size": bytes.len()}})
            }
        };
        let siblings: Vec<_> = self.files.iter().map(sibling).collect();
        json!({"sha": COMMIT, "siblings": siblings, "private": false}).to_string()
    }

    fn send(&self, file: &str, headers: &HeaderMap) -> Result<Response<Body>, StatusCode> {
        let listed = self.files.get(file).ok_or(StatusCode::NOT_FOUND)?;
        let mut bytes = listed.clone();
        if self.damaged {
            bytes.iter_mut().for_each(|byte| *byte ^= 1);
        }
        let range = headers[header::RANGE].to_str().expect("a range").to_owned();
        let (start, end) = range
            .strip_prefix("bytes=")
            .and_then(|range| range.split_once('-'))
            .expect("bytes");
        let (start, size): (usize, usize) = (start.parse().expect("a number"), bytes.len());
        if start >= size {
            return Err(StatusCode::RANGE_NOT_SATISFIABLE);
        }
        let end = end.parse().map_or(size, |last: usize| last + 1);
        let mut body = bytes[start..end].to_vec();
        let length = body.len();
        if end == 1 {
            self.probes.send_modify(|probes| *probes += 1);
        } else {
            self.downloads.fetch_add(1, Ordering::Relaxed);
            let mut breaks = self.breaks.lock().expect("unpoisoned");
            if let Some((at, left)) = breaks.as_mut().filter(|(at, left)| *left > 0 && body.len() > *at) {
                body.truncate(*at);
                *left -= 1;
            }
        }
        // A stream, so that a body that is too short is sent as it is.
        let chunk: Result<Vec<u8>, io::Error> = Ok(body.clone());
        let broken: Option<Result<Vec<u8>, io::Error>> =
            (body.len() < length).then(|| Err(io::Error::other("broken off")));
        let stream = futures_util::stream::iter([chunk].into_iter().chain(broken)).then(async |item| {
            // Between two items, what has been given is sent.
            tokio::task::yield_now().await;
            item
        });
        Ok(Response::builder()
            .status(StatusCode::PARTIAL_CONTENT)
            .header("x-repo-commit", COMMIT)
            .header(header::ETAG, format!("\"{}\"", sha256(listed)))
            .header(header::CONTENT_RANGE, format!("bytes {start}-{}/{size}", end - 1))
            .header(header::CONTENT_LENGTH, length)
            .body(Body::from_stream(stream))
            .expect("a response"))
    }
}

async fn info(
    State(mock): State<Arc<Mock>>,
    UrlPath((repository, revision)): UrlPath<(String, String)>,
    headers: HeaderMap,
) -> Result<impl IntoResponse, StatusCode> {
    mock.allows(&headers)?;
    match (repository.as_str(), revision.as_str()) {
        ("name", "main" | "v1") => Ok(([(header::CONTENT_TYPE, "application/json")], mock.list())),
        _ => Err(StatusCode::NOT_FOUND),
    }
}

async fn file(
    State(mock): State<Arc<Mock>>,
    UrlPath((repository, revision, file)): UrlPath<(String, String, String)>,
    headers: HeaderMap,
) -> Result<Response<Body>, StatusCode> {
    mock.allows(&headers)?;
    // Everything is asked for of one commit.
    if repository != "name" || revision != COMMIT {
        return Err(StatusCode::NOT_FOUND);
    }
    mock.send(&file, &headers)
}

/// A mock that listens, and an empty cache.
struct Setup {
    mock: Arc<Mock>,
    hub: Hub,
    home: TempDir,
    /// Stops the mock when it is dropped.
    _serving: tokio::task::JoinSet<()>,
}

impl Setup {
    async fn new(mock: Mock) -> Self {
        let mock = Arc::new(mock);
        let routes = Router::new()
            .route("/api/models/org/{repository}/revision/{revision}", get(info))
            .route("/org/{repository}/resolve/{revision}/{*file}", get(file))
            .with_state(mock.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let mut serving = tokio::task::JoinSet::new();
        serving.spawn(async move { axum::serve(listener, routes).await.expect("serves") });
        let home = tempfile::tempdir().expect("a directory");
        let hub = Hub {
            endpoint,
            cache: home.path().join("hub"),
            token: None,
            offline: false,
            patience: PATIENCE,
        };
        Self {
            mock,
            hub,
            home,
            _serving: serving,
        }
    }

    async fn model(&self, name: &str, parts: Parts) -> Result<PathBuf, HubError> {
        self.hub.model(&HubName::parse(name).expect("a name"), parts).await
    }

    async fn error(&self, name: &str) -> HubError {
        self.model(name, Parts::All).await.expect_err("no model")
    }

    fn downloads(&self) -> usize {
        self.mock.downloads.swap(0, Ordering::Relaxed)
    }

    /// Files of the cache whose names end so.
    fn left(&self, end: &str) -> Vec<PathBuf> {
        let blobs = fs::read_dir(self.hub.cache.join("models--org--name/blobs"));
        let files = blobs.into_iter().flatten().map(|file| file.expect("a file").path());
        files.filter(|path| path.to_string_lossy().ends_with(end)).collect()
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn check_files(setup: &Setup, directory: &Path) {
    for name in names(directory) {
        assert_eq!(
            fs::read(directory.join(&name)).expect(&name),
            setup.mock.files[&name],
            "{name}"
        );
    }
}

const SHARDED: [&str; 6] = [
    CONFIG,
    "model-1-of-2.safetensors",
    "model-2-of-2.safetensors",
    INDEX,
    TOKENIZER,
    "tokenizer_config.json",
];

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_needed_is_downloaded_and_only_once() {
    let setup = Setup::new(Mock::model()).await;
    let directory = setup.model("org/name", Parts::Text).await.expect("text");
    assert_eq!(names(&directory), [CONFIG, TOKENIZER, "tokenizer_config.json"]);
    assert!(directory.ends_with(format!("models--org--name/snapshots/{COMMIT}")));
    assert_eq!(setup.downloads(), 3);

    assert_eq!(setup.model("org/name", Parts::All).await.expect("all"), directory);
    assert_eq!(names(&directory), SHARDED);
    check_files(&setup, &directory);
    assert_eq!(setup.downloads(), 3);
    assert_eq!(setup.model("org/name", Parts::All).await.expect("again"), directory);
    assert_eq!(setup.downloads(), 0);

    let gguf = setup
        .model("org/name@v1/small/m.gguf", Parts::Text)
        .await
        .expect("a file");
    assert_eq!(fs::read(&gguf).expect("reads"), setup.mock.files["small/m.gguf"]);
    assert!(gguf.ends_with("small/m.gguf"));
    assert_eq!(setup.downloads(), 1);

    // As other clients of the cache expect it.
    let reference = setup.hub.cache.join("models--org--name/refs/main");
    assert_eq!(fs::read_to_string(reference).expect("a reference"), COMMIT);
    assert!(setup.left(".part").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_does_without_a_network() {
    let mut setup = Setup::new(Mock::model()).await;
    let text = setup.model("org/name", Parts::Text).await.expect("text");
    setup.hub.offline = true;
    assert_eq!(setup.model("org/name", Parts::Text).await.expect("text"), text);
    // Half a model is none.
    let error = setup.error("org/name").await;
    assert!(
        matches!(&error, HubError::Offline { missing, .. } if missing.contains("model.safetensors")),
        "{error}"
    );
    assert!(matches!(setup.error("org/name@v1").await, HubError::Offline { .. }));
    assert!(matches!(
        setup.error("org/name/small/m.gguf").await,
        HubError::Offline { .. }
    ));

    setup.hub.offline = false;
    let all = setup.model("org/name", Parts::All).await.expect("all");
    setup.hub.offline = true;
    assert_eq!(setup.model("org/name", Parts::All).await.expect("all"), all);
    assert_eq!(
        setup
            .model(&format!("org/name@{COMMIT}"), Parts::All)
            .await
            .expect("by commit"),
        all
    );
    fs::remove_file(all.join("model-2-of-2.safetensors")).expect("removes");
    let error = setup.error("org/name").await;
    assert!(error.to_string().contains("model-2-of-2"), "{error}");

    // A hub that does not answer is no hindrance either, unless something is missing.
    setup.hub.offline = false;
    setup.hub.endpoint = "http://127.0.0.1:1".to_owned();
    assert_eq!(setup.model("org/name", Parts::Text).await.expect("text"), text);
    let error = setup.error("org/name").await;
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_breaks_off_goes_on() {
    // Within one call, as often as it is tried again.
    let setup = Setup::new(Mock {
        breaks: Mutex::new(Some((30_000, 2))),
        ..Mock::model()
    })
    .await;
    let directory = setup.model("org/name", Parts::All).await.expect("all");
    check_files(&setup, &directory);

    // And in the next call, from where the last has stopped.
    let setup = Setup::new(Mock {
        breaks: Mutex::new(Some((15_000, RETRIES + 2))),
        ..Mock::model()
    })
    .await;
    let error = setup.error("org/name").await;
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
    let parts = setup.left(".part");
    assert_eq!(
        fs::metadata(&parts[0]).expect("a part").len() as usize,
        15_000 * (RETRIES + 2)
    );
    assert!(!setup.hub.cache.join("models--org--name/refs/main").exists());
    let mut offline = setup.hub.clone();
    offline.offline = true;
    let name = HubName::parse("org/name").expect("a name");
    assert!(matches!(
        offline.model(&name, Parts::All).await,
        Err(HubError::Offline { .. })
    ));
    let directory = setup.model("org/name", Parts::All).await.expect("the rest");
    check_files(&setup, &directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_an_interrupted_process_does_no_harm() {
    let setup = Setup::new(Mock::model()).await;
    let blobs = setup.hub.cache.join("models--org--name/blobs");
    fs::create_dir_all(&blobs).expect("makes");
    // A part that is as long as the whole, or longer, cannot be gone on with.
    for (name, len) in [
        ("model-1-of-2.safetensors", 100_000),
        ("model-2-of-2.safetensors", 60_000),
    ] {
        fs::write(
            blobs.join(format!("{}.part", sha256(&setup.mock.files[name]))),
            vec![9; len],
        )
        .expect("writes");
    }
    let directory = setup.model("org/name", Parts::All).await.expect("all");
    check_files(&setup, &directory);
    // A file of another length than the hub's is fetched again, with what it points to.
    fs::write(directory.join(TOKENIZER), b"short").expect("writes");
    setup.downloads();
    assert_eq!(setup.model("org/name", Parts::All).await.expect("all"), directory);
    assert_eq!(setup.downloads(), 1);
    check_files(&setup, &directory);
    // So is one whose content is gone.
    let blob = fs::canonicalize(directory.join(INDEX)).expect("a blob");
    fs::remove_file(blob).expect("removes");
    setup.model("org/name", Parts::All).await.expect("all");
    assert_eq!(setup.downloads(), 1);
    check_files(&setup, &directory);
    // One that another revision has is not.
    fs::remove_file(directory.join(CONFIG)).expect("removes");
    setup.model("org/name", Parts::Text).await.expect("text");
    assert_eq!(setup.downloads(), 0);
    check_files(&setup, &directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_waits_for_the_first() {
    let setup = Setup::new(Mock::model()).await;
    let bytes = &setup.mock.files["small/m.gguf"];
    let blobs = setup.hub.cache.join("models--org--name/blobs");
    fs::create_dir_all(&blobs).expect("makes");
    let blob = blobs.join(sha256(bytes));
    let lock = File::create(blob.with_extension("lock")).expect("a lock");
    lock.lock().expect("locks");
    let mut probes = setup.mock.probes.subscribe();
    let first = async {
        // An attempt asks twice: this is the next one.
        probes.wait_for(|probes| *probes > 2).await.expect("asks again");
        fs::write(&blob, bytes).expect("writes");
    };
    let (gguf, ()) = tokio::join!(setup.model("org/name/small/m.gguf", Parts::All), first);
    assert_eq!(&fs::read(gguf.expect("a file")).expect("reads"), bytes);
    assert_eq!(setup.downloads(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_files_are_not_kept() {
    let setup = Setup::new(Mock {
        damaged: true,
        ..Mock::model()
    })
    .await;
    let error = setup.error("org/name/small/m.gguf").await;
    assert!(
        matches!(&error, HubError::Broken { reason, .. } if reason.contains("SHA-256")),
        "{error}"
    );
    assert!(
        setup.left("").iter().all(|path| path.extension().is_some()),
        "no blob is left"
    );
    assert!(!setup.hub.cache.join("models--org--name/refs/main").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_say_what_to_do() {
    let mut setup = Setup::new(Mock {
        token: Some("secret"),
        ..Mock::model()
    })
    .await;
    let error = setup.error("org/name").await;
    assert!(matches!(error, HubError::Unauthorised { with_token: false, .. }));
    assert!(error.to_string().contains("HF_TOKEN"), "{error}");
    setup.hub.token = Some("wrong".to_owned());
    assert!(matches!(
        setup.error("org/name").await,
        HubError::Unauthorised { with_token: true, .. }
    ));
    setup.hub.token = Some("secret".to_owned());
    setup.model("org/name", Parts::Text).await.expect("with the token");

    for (name, missing) in [("org/other", "org/other"), ("org/name@v9", "org/name@v9")] {
        let error = setup.error(name).await;
        assert!(
            matches!(&error, HubError::NotFound { what, .. } if what == missing),
            "{error}"
        );
    }
    let error = setup.error("org/name/none.gguf").await;
    assert!(
        matches!(&error, HubError::NotAModel { missing, .. } if missing == "none.gguf"),
        "{error}"
    );

    let mut only_gguf = Mock::model();
    only_gguf.files.remove(TOKENIZER);
    let error = Setup::new(only_gguf).await.error("org/name").await;
    assert!(
        error.to_string().contains("no tokenizer.json; it has 1 GGUF file"),
        "{error}"
    );
    let mut shard = Mock::model();
    shard.files.remove("model-2-of-2.safetensors");
    let error = Setup::new(shard).await.error("org/name").await;
    assert!(error.to_string().contains("model-2-of-2"), "{error}");
    let mut outside = Mock::model();
    outside.files.insert(
        INDEX.to_owned(),
        json!({"weight_map": {"a": "../../x"}}).to_string().into_bytes(),
    );
    let error = Setup::new(outside).await.error("org/name").await;
    assert!(
        matches!(&error, HubError::Broken { reason, .. } if reason.contains("../../x")),
        "{error}"
    );

    let down = Mock {
        status: Some(503),
        ..Mock::model()
    };
    assert!(matches!(
        Setup::new(down).await.error("org/name").await,
        HubError::Status { status: 503, .. }
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_written_is_told_apart() {
    let setup = Setup::new(Mock::model()).await;
    fs::write(&setup.hub.cache, b"a file where a directory should be").expect("writes");
    let error = setup.error("org/name").await;
    assert!(matches!(error, HubError::Cache { .. }), "{error}");
    assert!(setup.home.path().exists());

    let asked = || Asked {
        endpoint: "http://hub",
        what: "org/name".to_owned(),
        with_token: false,
        cache: &setup.hub.cache,
    };
    let full = asked().error(hf_hub::api::sync::ApiError::TooManyRetries(Box::new(
        io::Error::from(io::ErrorKind::StorageFull).into(),
    )));
    assert!(matches!(full, HubError::DiskFull { .. }), "{full}");
    let busy = asked().error(hf_hub::api::sync::ApiError::LockAcquisition("x.lock".into()));
    assert!(matches!(busy, HubError::Busy { .. }), "{busy}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_says_nothing_is_given_up() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut setup = Setup::new(Mock::model()).await;
    setup.hub.endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    setup.hub.patience = Duration::from_millis(50);
    assert!(matches!(setup.error("org/name").await, HubError::Stalled { .. }));
    // Lets the thread that waits for it end.
    drop(listener);
}
