use std::io::Write;

use super::*;

const BYTES: usize = 3 * HUGE + 4096;

fn written() -> MemoryFile {
    let memory = MemoryFile::create(BYTES).unwrap();
    // SAFETY: this test's own map.
    let own = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), BYTES) };
    own.iter_mut()
        .enumerate()
        .for_each(|(at, byte)| *byte = (at % 251) as u8);
    memory
}

fn open(file: impl Into<OwnedFd>, bytes: usize) -> Result<Vec<u8>, String> {
    let foreign = ForeignMemory::open(file.into(), bytes).map_err(|error| error.to_string())?;
    assert_eq!((foreign.len(), foreign.is_empty()), (bytes, false));
    // SAFETY: copied.
    Ok(unsafe { foreign.bytes(0, bytes) }.unwrap().to_vec())
}

#[test]
fn others_read_what_the_owner_wrote_and_nothing_outside() {
    let memory = written();
    assert_eq!(memory.as_ptr() as usize % HUGE, 0);
    let foreign = ForeignMemory::open(MemoryFile::reader(memory.file()).unwrap(), BYTES).unwrap();
    // SAFETY: copied.
    let read = |offset, len| unsafe { foreign.bytes(offset, len) }.map(<[u8]>::to_vec);
    assert_eq!(read(250, 3), Some(vec![250, 0, 1]));
    assert_eq!(read(BYTES, 0), Some(Vec::new()));
    for (offset, len) in [(BYTES, 1), (0, BYTES + 1), (1, usize::MAX), (usize::MAX, 1)] {
        assert_eq!(read(offset, len), None, "{offset} {len}");
    }
    // SAFETY: this test's own map.
    unsafe { *memory.as_ptr().add(250) = 7 };
    assert_eq!(read(250, 1), Some(vec![7]), "one memory");
    drop(memory);
    assert_eq!(read(251, 2), Some(vec![0, 1]), "after its owner");
}

#[test]
fn others_cannot_write_shorten_or_lengthen_it() {
    let memory = written();
    let reader = MemoryFile::reader(memory.file()).unwrap();
    assert!(
        std::fs::File::from(reader.try_clone().unwrap())
            .write_all(b"x")
            .is_err()
    );
    // Neither through what others get, nor through the owner's own.
    for file in [reader.as_fd(), memory.file()] {
        let writable = ProtFlags::READ | ProtFlags::WRITE;
        assert!(Map::new(file, BYTES, writable).is_err());
        assert!(fs::ftruncate(file, 0).is_err());
        assert!(fs::ftruncate(file, 2 * BYTES as u64).is_err());
        let hole = fs::FallocateFlags::PUNCH_HOLE | fs::FallocateFlags::KEEP_SIZE;
        assert!(fs::fallocate(file, hole, 0, HUGE as u64).is_err());
        assert!(fs::fcntl_add_seals(file, SealFlags::WRITE).is_err());
    }
}

#[test]
fn what_is_no_sealed_memory_of_that_size_is_refused() {
    let memory = written();
    let reader = || MemoryFile::reader(memory.file()).unwrap();
    for bytes in [0, 1, BYTES - 1, BYTES + 1, usize::MAX] {
        assert!(open(reader(), bytes).unwrap_err().contains("bytes, not"), "{bytes}");
    }
    let (pipe, _end) = io::pipe().unwrap();
    assert_eq!(
        open(pipe, BYTES).unwrap_err(),
        ForeignMemoryError::NotMemory.to_string()
    );
    let exe = std::fs::File::open("/proc/self/exe").unwrap();
    assert_eq!(open(exe, BYTES).unwrap_err(), ForeignMemoryError::NotMemory.to_string());
    let seals = [SealFlags::SHRINK, SealFlags::GROW, SealFlags::FUTURE_WRITE];
    for missing in seals {
        let file = fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        fs::ftruncate(&file, BYTES as u64).unwrap();
        fs::fcntl_add_seals(&file, SEALS - missing).unwrap();
        assert_eq!(
            open(file, BYTES).unwrap_err(),
            ForeignMemoryError::NotSealed.to_string(),
            "{missing:?}"
        );
    }
    assert!(open(reader(), BYTES).is_ok());
}

#[test]
fn the_mode_in_brackets_decides_on_huge_pages() {
    for (modes, expected) in [
        ("always within_size advise [never] deny force\n", false),
        ("always within_size [advise] never deny force\n", true),
        ("[always] within_size advise never deny force\n", true),
        ("always within_size advise never [deny] force\n", false),
        ("", false),
    ] {
        assert_eq!(gives_huge(modes), expected, "{modes}");
    }
}
