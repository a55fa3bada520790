//! Panels of earlier starts in a directory, so that a start reads them instead of hashing and repacking a model. Safe to delete at any time.
//!
//! `<key>.panels` is the weights' memory as it lies ([`panels`]), named by what it was made from; `<facts>.digest` remembers the digest of a model
//! file that has not changed since ([`digest`]).
//!
//! **Invariants**
//! - Nothing is used unverified: every chunk of panels has a checksum, taken where the bytes finally lie. A file that fails is said in the log, deleted, and
//!   made anew.
//! - Nothing is used that another user could have written.
//! - A file appears whole or not at all (a temporary one, renamed), and one process writes at a time; who finds the directory taken goes without.
//! - No failure here fails a start.
//! - At most [`KEPT_PANELS`] models are kept, those used last.

mod digest;
mod panels;

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

pub(crate) use digest::Facts;

use crate::progress::Report;

/// Files of panels that stay. So the directory holds at most this many times the largest model in use.
const KEPT_PANELS: usize = 4;
/// Digests that stay; they are small.
const KEPT_DIGESTS: usize = 64;
const PANELS: &str = "panels";
const DIGEST: &str = "digest";
/// Unfinished files.
const UNFINISHED: &str = "unfinished";

/// A directory of panels, which need not exist yet.
#[derive(Clone, Debug)]
pub(crate) struct PanelCache {
    directory: PathBuf,
}

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it belongs to another user, or others may write it")]
    Foreign,
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
}

impl PanelCache {
    pub(crate) fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    /// Fills `memory` with the panels called `key`. `false`, with anything in `memory`, when there are none to be used.
    pub(crate) fn load(&self, key: &blake3::Hash, memory: &mut [u8], threads: usize, report: Report<'_>) -> bool {
        let path = self.path(key, PANELS);
        self.used(&path, |file| panels::read(file, key, memory, threads, report))
            .is_some()
    }

    /// Keeps `memory` as the panels called `key`.
    pub(crate) fn store(&self, key: &blake3::Hash, memory: &[u8], threads: usize, report: Report<'_>) {
        self.kept(&self.path(key, PANELS), |file| {
            panels::write(file, key, memory, threads, report)
        });
    }

    /// The digest of the weights in files of these facts, if it is known.
    pub(crate) fn digest(&self, facts: &Facts) -> Option<blake3::Hash> {
        self.used(&self.path(facts.name(), DIGEST), |file| digest::read(file, facts))
    }

    /// Remembers a digest, unless the files are too young for it.
    pub(crate) fn remember(&self, facts: &Facts, digest: &blake3::Hash) {
        if facts.settled() {
            self.kept(&self.path(facts.name(), DIGEST), |file| {
                file.write_all(&digest::bytes(facts, digest))
            });
        }
    }

    fn path(&self, name: &blake3::Hash, extension: &str) -> PathBuf {
        self.directory.join(format!("{}.{extension}", name.to_hex()))
    }

    /// Reads a file, marks it as used, and deletes it if it is damaged.
    fn used<T>(&self, path: &Path, read: impl FnOnce(&mut File) -> Result<T, ReadError>) -> Option<T> {
        let opened = open_own(path).and_then(|mut file| {
            let value = read(&mut file)?;
            // Only the order of deletion hangs on it.
            let _ = file.set_modified(SystemTime::now());
            Ok(value)
        });
        match opened {
            Ok(value) => Some(value),
            Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a file of the panel cache is not used");
                if matches!(error, ReadError::Damaged(_) | ReadError::Io(_)) {
                    // One that cannot be deleted is found so again.
                    let _ = fs::remove_file(path);
                }
                None
            }
        }
    }

    /// Writes a file, whole or not at all, and deletes what has been kept for too long.
    fn kept(&self, path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) {
        if let Err(error) = self.try_kept(path, write) {
            tracing::warn!(path = %path.display(), %error, "the panel cache cannot be written: the next start will not be faster");
        }
    }

    fn try_kept(&self, path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        let directory = File::open(&self.directory)?;
        match directory.try_lock() {
            Ok(()) => {}
            // It may be writing this very file.
            Err(TryLockError::WouldBlock) => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // Who wrote these is dead: it would hold the lock.
        for (path, _) in self.files(UNFINISHED)? {
            fs::remove_file(path)?;
        }
        // Another process has written it meanwhile. One that cannot be used is replaced.
        if open_own(path).is_ok() {
            return Ok(());
        }
        // Mode 0600; deleted when dropped.
        let mut file = tempfile::Builder::new()
            .suffix(&format!(".{UNFINISHED}"))
            .tempfile_in(&self.directory)?;
        write(file.as_file_mut())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        directory.sync_all()?;
        self.delete_beyond(PANELS, KEPT_PANELS)?;
        self.delete_beyond(DIGEST, KEPT_DIGESTS)
    }

    /// Own files of a kind, with when they were last used.
    fn files(&self, extension: &str) -> io::Result<Vec<(PathBuf, SystemTime)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let path = entry.path();
            // One that vanishes meanwhile is gone.
            if path.extension().is_some_and(|own| own == extension)
                && let Ok(metadata) = entry.metadata()
                && metadata.is_file()
            {
                files.push((path, metadata.modified()?));
            }
        }
        Ok(files)
    }

    fn delete_beyond(&self, extension: &str, kept: usize) -> io::Result<()> {
        let mut files = self.files(extension)?;
        files.sort_unstable_by_key(|(_, used)| std::cmp::Reverse(*used));
        files.iter().skip(kept).try_for_each(|(path, _)| fs::remove_file(path))
    }
}

/// Opens a regular file that only this process's user can have written. Neither follows a link nor waits for a pipe's other end.
fn open_own(path: &Path) -> Result<File, ReadError> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)?;
    let metadata = file.metadata()?;
    let own = metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o022 == 0;
    if own && metadata.is_file() {
        Ok(file)
    } else {
        Err(ReadError::Foreign)
    }
}

/// As much as `N` bytes of a file, which has no more.
fn read_all<const N: usize>(file: &mut File) -> Result<[u8; N], ReadError> {
    let mut bytes = Vec::with_capacity(N + 1);
    file.take(N as u64 + 1).read_to_end(&mut bytes)?;
    bytes.try_into().map_err(|_| ReadError::Damaged("its length"))
}

/// Catches accidents; against others there is the owner's check.
fn checksum(parts: &[&[u8]]) -> u64 {
    let mut state = baton_kv::ChecksumState::default();
    parts.iter().for_each(|part| state.update(part));
    state.finish().0
}

#[cfg(test)]
mod tests;
