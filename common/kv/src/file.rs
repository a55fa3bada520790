//! The file of memory that a shared pool lies in: made and written by its owner alone, mapped for reading by other processes of the host.
#![allow(unsafe_code)]

use std::{
    ffi::c_void,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr,
};

use rustix::{
    fs::{self, FileType, MemfdFlags, Mode, OFlags, SealFlags},
    mm::{self, Advice, MapFlags, ProtFlags},
};

/// Where a map begins, so that huge pages can serve it: the kernel itself places a map of a file at any small page.
const HUGE: usize = 2 << 20;

/// What file systems in memory are called (`TMPFS_MAGIC`); a file on huge pages set aside (`hugetlbfs`) is another, whose holes may kill their reader.
const TMPFS: i64 = 0x0102_1994;

/// Nobody can make the file shorter or longer, punch holes in it, or get another writable map of it: its owner's map is the only one, and bytes
/// that a reader has mapped stay there.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::FUTURE_WRITE);

/// A zeroed, sealed file of memory and its only writable map, both gone on drop. Pages are taken from the system when first touched: huge ones where
/// `/sys/kernel/mm/transparent_hugepage/shmem_enabled` says `advise` (or more), else small ones.
pub struct MemoryFile {
    file: OwnedFd,
    map: Map,
}

impl MemoryFile {
    /// Of `bytes` bytes, at least one.
    pub fn create(bytes: usize) -> io::Result<Self> {
        let file = fs::memfd_create("baton-kv", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        fs::ftruncate(&file, bytes as u64)?;
        let map = Map::new(file.as_fd(), bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        fs::fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
        Ok(Self { file, map })
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.start.cast()
    }

    /// Takes the pages of `bytes` bytes from `offset` on from the system now; their content stays. A system that cannot gives them later.
    pub fn populate(&self, offset: usize, bytes: usize) {
        let first = offset - offset % rustix::param::page_size();
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.map.bytes);
        if inside {
            // SAFETY: within the map; no byte changes.
            let _ = unsafe {
                let start = self.map.start.byte_add(first);
                mm::madvise(start, bytes + (offset - first), Advice::LinuxPopulateWrite)
            };
        }
    }

    /// The file, as [`crate::SharedPool`] lends it.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// `file` (of memory) opened once more, for reading only: what others get.
    pub fn reader(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }
}

/// Where the system says which shared memory it gives huge pages.
pub const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Whether a [`MemoryFile`] may get huge pages on this system.
pub fn shared_huge_pages() -> bool {
    std::fs::read_to_string(SHMEM_ENABLED).is_ok_and(|modes| gives_huge(&modes))
}

/// The mode in brackets is the one that holds.
fn gives_huge(modes: &str) -> bool {
    let chosen = modes.split_whitespace().find(|mode| mode.starts_with('['));
    chosen.is_some_and(|mode| ["[advise]", "[always]", "[within_size]", "[force]"].contains(&mode))
}

/// Why a file that came from another process was not mapped.
#[derive(Debug, thiserror::Error)]
pub enum ForeignMemoryError {
    /// A pipe, a socket, a file on a disk or on huge pages set aside.
    #[error("it is not a file of memory")]
    NotMemory,
    /// Its owner could make it shorter, which would kill its readers.
    #[error("it is not sealed")]
    NotSealed,
    /// It holds something else than was said.
    #[error("it has {got} bytes, not {expected}")]
    Size {
        /// What was said.
        expected: usize,
        /// What the file has.
        got: i64,
    },
    /// The system refused.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Another process's file of memory, mapped for reading. Stays readable after its owner has died.
pub struct ForeignMemory {
    map: Map,
}

impl ForeignMemory {
    /// Checks everything that reading it depends on: memory, sealed, of exactly `bytes` bytes.
    pub fn open(file: OwnedFd, bytes: usize) -> Result<Self, ForeignMemoryError> {
        let stat = fs::fstat(&file).map_err(io::Error::from)?;
        let system = fs::fstatfs(&file).map_err(io::Error::from)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || system.f_type != TMPFS {
            return Err(ForeignMemoryError::NotMemory);
        }
        let seals = fs::fcntl_get_seals(&file).map_err(io::Error::from)?;
        if !seals.contains(SEALS) {
            return Err(ForeignMemoryError::NotSealed);
        }
        // Sealed: it stays so.
        if bytes == 0 || usize::try_from(stat.st_size) != Ok(bytes) {
            return Err(ForeignMemoryError::Size {
                expected: bytes,
                got: stat.st_size,
            });
        }
        let map = Map::new(file.as_fd(), bytes, ProtFlags::READ)?;
        Ok(Self { map })
    }

    /// `len` bytes from `offset` on; `None` outside of the file.
    ///
    /// # Safety
    /// The owner may write them at any time: they may only be copied, and whatever depends on them is decided by the copy.
    pub unsafe fn bytes(&self, offset: usize, len: usize) -> Option<&[u8]> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.map.bytes);
        // SAFETY: within the map, which lives as long as `self`; any byte is valid, and the caller only copies.
        inside.then(|| unsafe { std::slice::from_raw_parts(self.map.start.cast::<u8>().add(offset), len) })
    }

    /// Bytes of the file.
    pub fn len(&self) -> usize {
        self.map.bytes
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.map.bytes == 0
    }
}

/// A shared map whose start is a multiple of a huge page.
struct Map {
    start: *mut c_void,
    bytes: usize,
    /// The address range that was reserved around it.
    reserved: *mut c_void,
    reserved_bytes: usize,
}

// SAFETY: a range of addresses, which any thread may use and unmap; access to what lies there is its users' affair.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn new(file: BorrowedFd<'_>, bytes: usize, prot: ProtFlags) -> io::Result<Self> {
        let reserved_bytes = bytes.checked_add(HUGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new range of addresses that nothing lies in.
        let reserved = unsafe { mm::mmap_anonymous(ptr::null_mut(), reserved_bytes, ProtFlags::empty(), flags)? };
        let mut map = Self {
            start: reserved,
            bytes,
            reserved,
            reserved_bytes,
        };
        let start = reserved.map_addr(|address| address.next_multiple_of(HUGE));
        // SAFETY: within the range that was reserved just now, which nobody else knows.
        unsafe {
            map.start = mm::mmap(start, bytes, prot, MapFlags::SHARED | MapFlags::FIXED, file, 0)?;
            if bytes >= HUGE {
                // Advice only: small pages do as well, more slowly.
                let _ = mm::madvise(map.start, bytes, Advice::LinuxHugepage);
            }
        }
        Ok(map)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own, and what borrowed from it is gone.
        let _ = unsafe { mm::munmap(self.reserved, self.reserved_bytes) };
    }
}

#[cfg(test)]
mod tests;
