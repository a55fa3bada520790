//! Models of a Hugging Face hub: downloaded into the hub's own cache, which other programs share.
//!
//! A revision's `refs/` entry is written when all files are there, so that an interrupted download is not taken for whole; each file is checked against the
//! length, and where the hub lists one the SHA-256, before that.

mod error;
mod listing;
mod name;

use std::{
    env,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{Api, ApiBuilder, ApiRepo},
};
use sha2::{Digest, Sha256};
use tokio::task::spawn_blocking;

use self::{
    error::{Asked, HubError},
    listing::{CONFIG, INDEX, Listing, OPTIONAL, Sibling, TOKENIZER, WEIGHTS, weights},
    name::is_part,
};
use crate::{output, progress::Progress};

pub(crate) use self::name::HubName;

const ENDPOINT: &str = "https://huggingface.co";
/// A download that gets no byte for so long is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often one file is tried again where its download stopped; the crate then tries once more, in vain.
const RETRIES: usize = 3;
/// Another process that downloads the same file is waited for so long.
const OTHERS_TIMEOUT: Duration = Duration::from_secs(1_800);
const HASH_CHUNK_BYTES: usize = 1 << 20;

/// What of a directory is needed. A GGUF file is always needed whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Parts {
    /// Configuration and tokenizer.
    Text,
    /// The weights, too.
    All,
}

/// A hub, and where its models are kept.
#[derive(Clone, Debug)]
pub(super) struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    patience: Duration,
}

impl Hub {
    /// As the hub's other clients: HF_ENDPOINT, HF_HOME, HF_TOKEN (or the token that `hf auth login` left) and HF_HUB_OFFLINE.
    pub(super) fn from_env() -> Result<Self, HubError> {
        let var = |name: &str| env::var(name).ok().filter(|value| !value.trim().is_empty());
        let home = match var("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => env::home_dir().ok_or(HubError::NoHome)?.join(".cache/huggingface"),
        };
        // The crate compares paths.
        let cache = std::path::absolute(home.join("hub")).map_err(|_| HubError::NoHome)?;
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let yes = |value: String| ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str());
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: var("HF_TOKEN").or_else(|| Cache::new(cache.clone()).token()),
            cache,
            offline: var("HF_HUB_OFFLINE").is_some_and(yes),
            patience: PATIENCE,
        })
    }

    /// The model's directory, or its GGUF file. Without a network, what an earlier call has left does.
    pub(super) async fn model(&self, name: &HubName, parts: Parts) -> Result<PathBuf, HubError> {
        let beats = Arc::new(AtomicU64::new(0));
        let fetch = Fetch {
            hub: self.clone(),
            name: name.clone(),
            parts,
            beats: beats.clone(),
        };
        let mut work = spawn_blocking(move || fetch.run());
        loop {
            let before = beats.load(Ordering::Relaxed);
            tokio::select! {
                done = &mut work => return done.map_err(|error| HubError::Panicked(error.to_string()))?,
                () = tokio::time::sleep(self.patience) => {
                    if beats.load(Ordering::Relaxed) == before {
                        return Err(HubError::Stalled { endpoint: self.endpoint.clone(), seconds: self.patience.as_secs() });
                    }
                }
            }
        }
    }
}

/// One model on its way.
struct Fetch {
    hub: Hub,
    name: HubName,
    parts: Parts,
    /// Counts signs of life.
    beats: Arc<AtomicU64>,
}

impl Fetch {
    fn run(&self) -> Result<PathBuf, HubError> {
        if self.hub.offline {
            return self.cached().map_err(|missing| HubError::Offline {
                what: self.name.to_string(),
                cache: self.hub.cache.clone(),
                missing,
            });
        }
        let builder = ApiBuilder::from_cache(Cache::new(self.hub.cache.clone()))
            .with_endpoint(self.hub.endpoint.clone())
            .with_token(self.hub.token.clone())
            .with_progress(false)
            .with_retries(RETRIES);
        let api = builder.build().map_err(|error| self.asked("").error(error))?;
        match self.listing(&api) {
            Ok(listing) => self.download(&api, &listing),
            Err(error @ (HubError::Unreachable { .. } | HubError::Status { status: 500.., .. })) => {
                let path = self.cached().map_err(|_| error)?;
                output::note(format_args!(
                    "{} cannot be asked: taking {} as it is in the cache",
                    self.hub.endpoint, self.name
                ));
                Ok(path)
            }
            Err(error) => Err(error),
        }
    }

    fn asked(&self, file: &str) -> Asked<'_> {
        Asked {
            endpoint: &self.hub.endpoint,
            what: match file {
                "" => self.name.to_string(),
                file => format!("{}/{file}", self.name.repository),
            },
            with_token: self.hub.token.is_some(),
            cache: &self.hub.cache,
        }
    }

    fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.name.repository.clone(), RepoType::Model, revision.to_owned())
    }

    /// Where files of a commit lie.
    fn snapshot(&self, commit: &str) -> PathBuf {
        let cache = Cache::new(self.hub.cache.clone());
        cache.repo(self.repo(commit)).pointer_path(commit)
    }

    fn repository(&self) -> PathBuf {
        self.hub.cache.join(self.repo("main").folder_name())
    }

    /// What is in the cache, if it is whole; else what is not.
    fn cached(&self) -> Result<PathBuf, String> {
        let reference = self.repository().join("refs").join(&self.name.revision);
        let commit = match fs::read_to_string(&reference) {
            Ok(commit) => commit.trim().to_owned(),
            // A commit is its own name.
            Err(_) => self.name.revision.clone(),
        };
        let snapshot = self.snapshot(&commit);
        if !is_part(&commit) || !snapshot.is_dir() {
            return Err(format!("revision {} was never downloaded", self.name.revision));
        }
        let files = match &self.name.file {
            Some(file) => vec![file.clone()],
            None => {
                let mut files = vec![CONFIG.to_owned(), TOKENIZER.to_owned()];
                if self.parts == Parts::All {
                    files.extend(weights(&snapshot)?);
                }
                files
            }
        };
        match files.into_iter().find(|file| !snapshot.join(file).is_file()) {
            Some(missing) => Err(format!("{missing} is missing")),
            None => Ok(self.within(snapshot)),
        }
    }

    fn within(&self, snapshot: PathBuf) -> PathBuf {
        match &self.name.file {
            Some(file) => snapshot.join(file),
            None => snapshot,
        }
    }

    fn listing(&self, api: &Api) -> Result<Listing, HubError> {
        let request = api.repo(self.repo(&self.name.revision)).info_request();
        let response = request.query("blobs", "true").call();
        let mut response = response.map_err(|error| self.asked("").request_error(error))?;
        let listing: Result<Listing, _> = response.body_mut().read_json();
        let listing = listing.map_err(|error| self.asked("").request_error(error))?;
        self.beat();
        if !is_part(&listing.sha) {
            return Err(self.asked("").protocol("its commit has no name".to_owned()));
        }
        Ok(listing)
    }

    fn download(&self, api: &Api, listing: &Listing) -> Result<PathBuf, HubError> {
        let snapshot = self.snapshot(&listing.sha);
        let repo = api.repo(self.repo(&listing.sha));
        let get = |files: &[&Sibling]| self.get_all(api, &repo, &snapshot, &listing.sha, files);
        match &self.name.file {
            Some(file) => get(&[self.listed(listing, file)?])?,
            None => {
                let mut files = vec![self.listed(listing, CONFIG)?, self.listed(listing, TOKENIZER)?];
                files.extend(OPTIONAL.iter().filter_map(|file| listing.find(file)));
                if self.parts == Parts::All {
                    if let Some(index) = listing.find(INDEX) {
                        get(&[index])?;
                        let broken = |reason| HubError::Broken {
                            file: INDEX.to_owned(),
                            reason,
                        };
                        for shard in weights(&snapshot).map_err(broken)? {
                            files.push(self.listed(listing, &shard)?);
                        }
                    } else {
                        files.push(self.listed(listing, WEIGHTS)?);
                    }
                }
                get(&files)?;
            }
        }
        let cache = Cache::new(self.hub.cache.clone());
        let reference = cache.repo(self.repo(&self.name.revision)).create_ref(&listing.sha);
        reference.map_err(|error| self.asked("").io_error(error))?;
        Ok(self.within(snapshot))
    }

    fn listed<'l>(&self, listing: &'l Listing, file: &str) -> Result<&'l Sibling, HubError> {
        listing.find(file).ok_or_else(|| HubError::NotAModel {
            what: self.name.to_string(),
            missing: file.to_owned(),
            files: listing.ggufs(),
        })
    }

    /// Downloads those that are not there.
    fn get_all(
        &self,
        api: &Api,
        repo: &ApiRepo,
        snapshot: &Path,
        commit: &str,
        files: &[&Sibling],
    ) -> Result<(), HubError> {
        let mut missing = Vec::new();
        for file in files {
            if !self.is_there(&snapshot.join(&file.rfilename), file)? {
                missing.push(*file);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let total = missing.iter().filter_map(|file| file.size).sum();
        let bar = Progress::bytes(&format!("downloading {}", self.name), total);
        let mut before = 0;
        let got = missing.iter().try_for_each(|file| {
            let deadline = Instant::now() + OTHERS_TIMEOUT;
            let got = loop {
                let arriving = Arriving {
                    bar: bar.clone(),
                    before,
                    done: 0,
                    beats: self.beats.clone(),
                };
                match self.get(api, repo, snapshot, commit, file, arriving) {
                    // The crate has waited some seconds.
                    Err(HubError::Busy { .. }) if Instant::now() < deadline => self.beat(),
                    got => break got,
                }
            };
            before += file.size.unwrap_or(0);
            got
        });
        bar.done();
        got
    }

    /// Whether a file is in the cache; one of another length than the hub lists is removed.
    fn is_there(&self, path: &Path, file: &Sibling) -> Result<bool, HubError> {
        let Ok(meta) = fs::metadata(path) else {
            // What a link pointed to may be gone.
            let dangles = fs::symlink_metadata(path).is_ok();
            let removed = if dangles { fs::remove_file(path) } else { Ok(()) };
            return removed.map(|()| false).map_err(|error| self.asked("").io_error(error));
        };
        if file.size.is_none_or(|size| size == meta.len()) {
            return Ok(true);
        }
        self.remove(path)?;
        Ok(false)
    }

    /// Removes a file of a snapshot and what it points to.
    fn remove(&self, path: &Path) -> Result<(), HubError> {
        let blob = fs::canonicalize(path).and_then(fs::remove_file);
        let pointer = match fs::symlink_metadata(path) {
            Ok(_) => fs::remove_file(path),
            Err(_) => Ok(()),
        };
        blob.and(pointer).map_err(|error| self.asked("").io_error(error))
    }

    fn get(
        &self,
        api: &Api,
        repo: &ApiRepo,
        snapshot: &Path,
        commit: &str,
        file: &Sibling,
        arriving: Arriving,
    ) -> Result<(), HubError> {
        let name = file.rfilename.as_str();
        let asked = || self.asked(name);
        let metadata = api.metadata(&repo.url(name)).map_err(|error| asked().error(error))?;
        self.beat();
        if metadata.commit_hash() != commit || !is_part(metadata.etag()) {
            return Err(asked().protocol(format!("{name} has no usable etag, or is of another commit")));
        }
        let blob = self.repository().join("blobs").join(metadata.etag());
        let size = file.size.unwrap_or(metadata.size() as u64);
        let path = snapshot.join(name);
        let len = |path: &Path| fs::metadata(path).map(|meta| meta.len()).ok();
        if len(&blob) == Some(size) {
            // Another revision has the same file.
            return link(&path, name, metadata.etag()).map_err(|error| asked().io_error(error));
        }
        // Left by a download that broke off: the crate goes on after a true beginning only.
        let part = blob.with_extension("part");
        if len(&part).is_some_and(|len| len >= size) {
            fs::remove_file(&part).map_err(|error| asked().io_error(error))?;
        }
        let got = repo.download_with_progress(name, arriving);
        let got = got.map_err(|error| asked().error(error))?;
        let wrong = match len(&got) {
            Some(len) if len == size => match file.lfs.as_ref().and_then(|lfs| lfs.sha256.as_deref()) {
                Some(listed) if self.sha256(&got).map_err(|error| asked().io_error(error))? != listed => {
                    Some("its SHA-256 differs".to_owned())
                }
                _ => None,
            },
            other => Some(format!("{} of {size} bytes", other.unwrap_or(0))),
        };
        match wrong {
            Some(reason) => {
                self.remove(&got)?;
                Err(HubError::Broken {
                    file: name.to_owned(),
                    reason,
                })
            }
            None => Ok(()),
        }
    }

    fn sha256(&self, path: &Path) -> io::Result<String> {
        let mut file = File::open(path)?;
        let mut digest = Sha256::new();
        let mut chunk = vec![0; HASH_CHUNK_BYTES];
        loop {
            match file.read(&mut chunk)? {
                0 => break,
                read => digest.update(&chunk[..read]),
            }
            self.beat();
        }
        Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Puts a blob into a snapshot.
fn link(path: &Path, name: &str, etag: &str) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let up = "../".repeat(2 + name.matches('/').count());
    std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), path)
}

/// A file's progress, on the model's bar.
struct Arriving {
    bar: Progress,
    /// Bytes of the files before it.
    before: u64,
    done: u64,
    beats: Arc<AtomicU64>,
}

impl hf_hub::api::Progress for Arriving {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.done = 0;
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        self.bar.at(self.before + self.done);
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    fn finish(&mut self) {}
}

#[cfg(test)]
mod tests;
