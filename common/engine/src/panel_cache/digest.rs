//! The digest of a model's weights, remembered by what the file system says of the files.
//!
//! Trusted as far as the file system is: any write through it moves the time of change, which nobody can set back. A file that is too young is not
//! remembered, since a second write within the clock's grain would go unseen; nor is one that was changed while it was hashed.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime},
};

use super::{ReadError, checksum, read_all};

/// Grain of the coarsest file system's clock, and of the kernel's own.
const GRAIN: Duration = Duration::from_secs(2);

/// What tells files from all others, and from themselves once they have changed: device, inode, size, and the times of modification and change.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    name: blake3::Hash,
    settled: bool,
}

impl Facts {
    /// Of the files of one model, in order. `outline`: what the digest depends on beside their bytes.
    pub(crate) fn of<P: AsRef<Path>>(files: &[P], outline: &blake3::Hash) -> io::Result<Self> {
        Self::at(files, outline, SystemTime::now())
    }

    pub(super) fn at<P: AsRef<Path>>(files: &[P], outline: &blake3::Hash, now: SystemTime) -> io::Result<Self> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(outline.as_bytes());
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut settled = true;
        for file in files {
            let metadata = fs::metadata(file)?;
            for number in [metadata.dev(), metadata.ino(), metadata.size()] {
                hasher.update(&number.to_le_bytes());
            }
            for number in [
                metadata.mtime(),
                metadata.mtime_nsec(),
                metadata.ctime(),
                metadata.ctime_nsec(),
            ] {
                hasher.update(&number.to_le_bytes());
            }
            let nanoseconds = metadata.ctime_nsec().try_into().unwrap_or(0);
            let changed = Duration::new(metadata.ctime().try_into().unwrap_or(0), nanoseconds);
            settled &= changed.saturating_add(GRAIN) < now;
        }
        Ok(Self {
            name: hasher.finalize(),
            settled,
        })
    }

    /// Whether nothing has changed in between.
    pub(crate) fn same_files(&self, other: &Self) -> bool {
        self.name == other.name
    }

    pub(super) fn name(&self) -> &blake3::Hash {
        &self.name
    }

    /// Whether a change from now on would show.
    pub(super) fn settled(&self) -> bool {
        self.settled
    }
}

/// The digest, and a checksum of name and digest.
pub(super) fn bytes(facts: &Facts, digest: &blake3::Hash) -> [u8; 40] {
    let sum = checksum(&[facts.name.as_bytes(), digest.as_bytes()]).to_le_bytes();
    let mut bytes = [0; 40];
    bytes[..32].copy_from_slice(digest.as_bytes());
    bytes[32..].copy_from_slice(&sum);
    bytes
}

pub(super) fn read(file: &mut File, facts: &Facts) -> Result<blake3::Hash, ReadError> {
    let read: [u8; 40] = read_all(file)?;
    let mut digest = [0; 32];
    digest.copy_from_slice(&read[..32]);
    let digest = blake3::Hash::from_bytes(digest);
    if read == bytes(facts, &digest) {
        Ok(digest)
    } else {
        Err(ReadError::Damaged("its checksum"))
    }
}
