//! The file's bytes: mapped, or owned (tests and small files made in memory).
#![allow(unsafe_code)]

use std::{fs::File, io, ops::Deref, path::Path};

use memmap2::Mmap;

/// Read-only bytes of one file.
pub(crate) enum Bytes {
    Map(Mmap),
    Owned(Vec<u8>),
}

impl Bytes {
    pub(crate) fn map(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        if metadata.len() == 0 {
            return Ok(Bytes::Owned(Vec::new()));
        }
        // SAFETY: the map is private and read-only, and every use of it goes through `&[u8]`. Rust additionally asks that nobody changes
        // the file meanwhile. Model files are replaced by rename, never written in place; a process that truncates one under us gets us
        // killed (SIGBUS), it cannot make us read outside the map.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Bytes::Map(map))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Map(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}
