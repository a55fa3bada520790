use std::{
    fs::{OpenOptions, Permissions},
    os::unix::fs::{FileExt, PermissionsExt},
    sync::Mutex,
    time::Duration,
};

use tempfile::TempDir;

use super::*;
use crate::progress::{LoadProgress, LoadStage};

/// More than two chunks, the last not whole.
const BYTES: usize = 2 * panels::CHUNK + 12_345;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn key(number: u8) -> blake3::Hash {
    blake3::hash(&[number])
}

fn memory(seed: u8) -> Vec<u8> {
    (0..BYTES)
        .map(|i| (i * 31 + i / 257) as u8 ^ seed.wrapping_mul(17))
        .collect()
}

fn store(cache: &PanelCache, number: u8) {
    cache.store(&key(number), &memory(number), 2, &|_| {});
}

fn loaded(cache: &PanelCache, number: u8) -> Option<Vec<u8>> {
    let mut read = vec![0; BYTES];
    cache.load(&key(number), &mut read, 2, &|_| {}).then_some(read)
}

fn names(folder: &TempDir) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn panels_come_back_as_they_were() {
    let folder = folder();
    let cache = PanelCache::new(&folder.path().join("not/there/yet"));
    assert_eq!(loaded(&cache, 1), None);
    let seen = Mutex::new(Vec::new());
    let report = |progress: LoadProgress| seen.lock().unwrap().push(progress);
    for threads in [1, 3] {
        cache.store(&key(threads), &memory(threads), threads.into(), &report);
        let mut read = vec![0; BYTES];
        assert!(cache.load(&key(threads), &mut read, threads.into(), &report));
        assert!(read == memory(threads));
    }
    let seen = seen.into_inner().unwrap();
    for stage in [LoadStage::WritingCache, LoadStage::ReadingCache] {
        let done: Vec<u64> = seen.iter().filter(|p| p.stage == stage).map(|p| p.done).collect();
        assert_eq!(done.len(), 2 * 4, "{stage:?}: {done:?}");
        assert!(
            done[..4].is_sorted() && done[0] == 0 && done[3] == BYTES as u64,
            "{done:?}"
        );
    }
    assert_eq!(loaded(&cache, 2), None, "another key");
    let mut shorter = vec![0; BYTES - 1];
    assert!(
        !cache.load(&key(1), &mut shorter, 1, &|_| {}),
        "a key that promises other panels"
    );
}

#[test]
fn files_are_their_owner_s_alone() {
    let folder = folder();
    let path = folder.path().join("panels");
    let cache = PanelCache::new(&path);
    store(&cache, 1);
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    let file = cache.path(&key(1), PANELS);
    assert_eq!((mode(&path), mode(&file)), (0o700, 0o600));
    for open in [0o620, 0o602, 0o666] {
        fs::set_permissions(&file, Permissions::from_mode(open)).unwrap();
        assert_eq!(loaded(&cache, 1), None, "others may have written it");
    }
    fs::set_permissions(&file, Permissions::from_mode(0o400)).unwrap();
    assert!(loaded(&cache, 1).is_some());
    // Only root can give files away.
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&file, Some(12_345), None).unwrap();
        assert_eq!(loaded(&cache, 1), None, "another's");
        assert!(file.exists(), "and theirs to delete");
    }
}

#[test]
fn damage_anywhere_is_found_and_the_file_deleted() {
    let folder = folder();
    let cache = PanelCache::new(folder.path());
    let path = cache.path(&key(1), PANELS);
    store(&cache, 1);
    let length = fs::metadata(&path).unwrap().len();
    let start = length - BYTES as u64;
    let damage = |what: &str, damage: &dyn Fn(&File)| {
        if !path.exists() {
            store(&cache, 1);
        }
        assert!(loaded(&cache, 1).is_some(), "before: {what}");
        damage(&OpenOptions::new().read(true).write(true).open(&path).unwrap());
        assert_eq!(loaded(&cache, 1), None, "{what}");
        assert!(!path.exists(), "{what}");
    };
    // Magic, key, length, a chunk's sum, the header's own; first, middle and last panels.
    for at in [
        0,
        16,
        47,
        48,
        56,
        start - 1,
        start,
        start + BYTES as u64 / 2,
        length - 1,
    ] {
        for bit in [0, 7] {
            damage(&format!("bit {bit} of byte {at}"), &|file| {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
            });
        }
    }
    for shorter in [0, 1, start - 1, start, length - 4096, length - 1, length + 1] {
        damage(&format!("{shorter} bytes"), &|file| file.set_len(shorter).unwrap());
    }
    damage("another version", &|file| {
        file.write_all_at(b"baton panels v0\n", 0).unwrap()
    });
}

#[test]
fn a_directory_that_cannot_be_written_changes_nothing() {
    let folder = folder();
    let file = folder.path().join("file");
    fs::write(&file, "not a directory").unwrap();
    for cache in [PanelCache::new(&file), PanelCache::new(&file.join("below"))] {
        store(&cache, 1);
        assert_eq!(loaded(&cache, 1), None);
    }
    assert_eq!(names(&folder), ["file"]);
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let mut full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let error = panels::write(&mut full, &key(1), &memory(1), 2, &|_| {}).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    let folder = folder();
    let cache = PanelCache::new(folder.path());
    let path = cache.path(&key(1), PANELS);
    let error = cache.try_kept(&path, |file| {
        file.write_all(b"some")?;
        Err(io::ErrorKind::StorageFull.into())
    });
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!(names(&folder), [""; 0]);
}

#[test]
fn starts_at_the_same_time_do_not_disturb_each_other() {
    let folder = folder();
    let cache = PanelCache::new(folder.path());
    let wanted = memory(1);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..4 {
                    if let Some(read) = loaded(&cache, 1) {
                        assert!(read == wanted, "whole or not at all");
                    }
                    store(&cache, 1);
                }
            });
        }
    });
    assert!(loaded(&cache, 1).is_some());
    assert_eq!(names(&folder).len(), 1, "{:?}", names(&folder));
}

#[test]
fn one_process_writes_and_cleans_up_after_the_dead() {
    let folder = folder();
    let cache = PanelCache::new(folder.path());
    fs::write(folder.path().join("1.unfinished"), "of a dead process").unwrap();
    let other = File::open(folder.path()).unwrap();
    other.lock().unwrap();
    store(&cache, 1);
    assert_eq!(names(&folder), ["1.unfinished"]);
    other.unlock().unwrap();
    store(&cache, 1);
    assert_eq!(names(&folder), [format!("{}.panels", key(1))]);
}

#[test]
fn the_models_used_last_are_kept() {
    let folder = folder();
    let cache = PanelCache::new(folder.path());
    let foreign = folder.path().join("note.txt");
    fs::write(&foreign, "not ours").unwrap();
    let used = |number: u8, seconds: u64| {
        let file = File::open(cache.path(&key(number), PANELS)).unwrap();
        let then = SystemTime::now() - Duration::from_secs(1_000 - seconds);
        file.set_modified(then).unwrap();
    };
    for number in 0..KEPT_PANELS as u8 {
        store(&cache, number);
        used(number, number.into());
    }
    // The oldest is used once more, so that the second goes.
    assert!(loaded(&cache, 0).is_some());
    store(&cache, 100);
    assert!(foreign.exists());
    let kept = |number| cache.path(&key(number), PANELS).exists();
    assert!(kept(0) && !kept(1) && kept(2) && kept(100));
    assert_eq!(names(&folder).len(), KEPT_PANELS + 1);
}

#[test]
fn a_digest_is_remembered_until_its_file_changes() {
    let folder = folder();
    let cache = PanelCache::new(&folder.path().join("cache"));
    let model = folder.path().join("model");
    fs::write(&model, "weights").unwrap();
    let later = SystemTime::now() + Duration::from_secs(60);
    let facts = |outline: u8| Facts::at(&[&model], &key(outline), later).unwrap();
    let before = facts(1);
    assert_eq!(cache.digest(&before), None);
    cache.remember(&before, &key(1));
    assert_eq!(cache.digest(&before), Some(key(1)));
    assert_eq!(
        cache.digest(&facts(2)),
        None,
        "of other tensors, or made in another way"
    );

    let moved = folder.path().join("link");
    std::os::unix::fs::symlink(&model, &moved).unwrap();
    assert!(
        before.same_files(&Facts::at(&[&moved], &key(1), later).unwrap()),
        "by any path"
    );

    // In place, as long, and dated back: the time of change moves with the clock's next tick.
    let modified = fs::metadata(&model).unwrap().modified().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while facts(1).same_files(&before) {
        assert!(std::time::Instant::now() < deadline, "the clock stands");
        let file = OpenOptions::new().write(true).open(&model).unwrap();
        file.write_all_at(b"w", 0).unwrap();
        file.set_modified(modified).unwrap();
    }
    assert_eq!(fs::metadata(&model).unwrap().modified().unwrap(), modified);
    assert_eq!(cache.digest(&facts(1)), None);
}

#[test]
fn a_young_file_s_digest_is_not_remembered() {
    let folder = folder();
    let cache = PanelCache::new(&folder.path().join("cache"));
    let model = folder.path().join("model");
    fs::write(&model, "weights").unwrap();
    let now = fs::metadata(&model).unwrap().modified().unwrap();
    for (age, remembered) in [(0, false), (1, false), (3, true)] {
        let facts = Facts::at(&[&model], &key(1), now + Duration::from_secs(age)).unwrap();
        cache.remember(&facts, &key(1));
        assert_eq!(cache.digest(&facts).is_some(), remembered, "{age} s");
    }
}

#[test]
fn a_damaged_digest_is_not_taken() {
    let folder = folder();
    let cache = PanelCache::new(&folder.path().join("cache"));
    let model = folder.path().join("model");
    fs::write(&model, "weights").unwrap();
    let facts = Facts::at(&[&model], &key(1), SystemTime::now() + Duration::from_secs(60)).unwrap();
    let path = cache.path(facts.name(), DIGEST);
    for damage in [0, 31, 32, 39] {
        cache.remember(&facts, &key(1));
        let mut bytes = fs::read(&path).unwrap();
        bytes[damage] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(cache.digest(&facts), None, "byte {damage}");
        assert!(!path.exists());
    }
    for length in [0, 39, 41] {
        cache.remember(&facts, &key(1));
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(length)
            .unwrap();
        assert_eq!(cache.digest(&facts), None, "{length} bytes");
    }
}
