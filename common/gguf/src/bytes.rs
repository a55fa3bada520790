//! The file's bytes: mapped, or owned (tests and small files made in memory).
#![allow(unsafe_code)]

use std::{
    fs::{self, File},
    io,
    ops::Deref,
    path::Path,
};

use memmap2::Mmap;

/// Opens a file of a model for reading. A pipe, whose opening would wait for its writer, a device or a directory is
/// [`InvalidInput`](io::ErrorKind::InvalidInput).
pub fn open_regular(path: &Path) -> io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    File::open(path)
}

/// Read-only bytes of one file.
pub(crate) enum Bytes {
    Map(Mmap),
    Owned(Vec<u8>),
}

impl Bytes {
    pub(crate) fn map(path: &Path) -> io::Result<Self> {
        let file = open_regular(path)?;
        if file.metadata()?.len() == 0 {
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
