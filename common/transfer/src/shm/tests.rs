//! Offers, mappings, and what hostile peers can say.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use baton_kv::{BlockId, Epoch, KvMemory, MemoryFile};
use baton_proto::node::v1 as pb;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::*;
use crate::{
    Capability, limits,
    testing::{LAYOUT, TestMemory},
};

const OWNER: Epoch = Epoch(21);
const BLOCKS: usize = 5;
const TOKEN: [u8; 32] = [9; 32];
const SOON: Duration = Duration::from_secs(20);

/// A pool whose every byte depends on its place.
fn shared() -> Arc<TestMemory> {
    let memory = TestMemory::new(LAYOUT, BLOCKS);
    let len = LAYOUT.layer_block_bytes();
    for place in 0..LAYOUT.layers * BLOCKS {
        let piece: Vec<u8> = (place * len..(place + 1) * len).map(byte).collect();
        let block = BlockId((place % BLOCKS) as u32);
        memory
            .write(place / BLOCKS, block, LAYOUT.block_tokens, &piece)
            .unwrap();
    }
    memory
}

fn byte(at: usize) -> u8 {
    (at * 31 % 253) as u8
}

/// What both ends of one host have.
struct Host {
    _base: tempfile::TempDir,
    directory: Directory,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

impl Host {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        Self {
            directory: Directory::open(Some(base.path())).unwrap(),
            _base: base,
            tasks: TaskTracker::new(),
            shutdown: CancellationToken::new(),
        }
    }

    fn offer(&self, owner: Epoch) -> pb::SharedPool {
        let token = Capability::new(TOKEN);
        let (memory, tasks) = (shared(), &self.tasks);
        Offer::open(&self.directory, owner, token, &*memory, tasks, self.shutdown.clone())
            .unwrap()
            .to_proto()
    }

    async fn fetch(&self, offer: &pb::SharedPool) -> Result<Mapping, ShmError> {
        Mapping::fetch(&self.directory, offer, &LAYOUT).await
    }

    async fn code(&self, offer: &pb::SharedPool) -> &'static str {
        self.fetch(offer).await.map(|_| ()).unwrap_err().code()
    }

    fn sockets(&self) -> Vec<PathBuf> {
        let directory = Path::new(self._base.path());
        let user = fs::read_dir(directory).unwrap().next().unwrap().unwrap().path();
        let mut paths: Vec<_> = fs::read_dir(user).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    }

    async fn end(&self) {
        self.shutdown.cancel();
        self.tasks.close();
        timeout(SOON, self.tasks.wait())
            .await
            .expect("every task ends with the token");
    }
}

fn piece(mapping: &Mapping, layer: usize, block: u32) -> Option<Vec<u8>> {
    // SAFETY: copied.
    #[allow(unsafe_code)]
    unsafe { mapping.piece(layer, BlockId(block)) }.map(<[u8]>::to_vec)
}

#[tokio::test]
async fn a_pool_is_offered_mapped_and_taken_back() {
    let host = Host::new();
    let mapping = host.fetch(&host.offer(OWNER)).await.unwrap();
    let len = LAYOUT.layer_block_bytes();
    for (layer, block) in [(0, 0), (2, 4), (1, 3)] {
        let start = (layer * BLOCKS + block) * len;
        let wanted: Vec<u8> = (start..start + len).map(byte).collect();
        assert_eq!(piece(&mapping, layer, block as u32), Some(wanted), "{layer} {block}");
    }
    for (layer, block) in [(3, 0), (0, 5), (usize::MAX, 0), (0, u32::MAX)] {
        assert_eq!(piece(&mapping, layer, block), None, "{layer} {block}");
    }
    assert!(mapping.copy_rate() > 0.0);

    let mappings = Mappings::new(host.directory.clone(), host.tasks.clone(), host.shutdown.clone());
    mappings.insert(OWNER, mapping);
    let kept = mappings.get(OWNER).expect("mapped");
    assert!(mappings.get(Epoch(22)).is_none());
    host.end().await;
    assert_eq!(host.sockets(), [] as [PathBuf; 0]);
    assert_eq!(piece(&kept, 0, 0).unwrap()[1], byte(1), "a copy under way goes on");
}

#[tokio::test]
async fn a_mapping_goes_with_its_owner_and_its_connection_with_the_mapping() {
    let host = Host::new();
    let decode = (TaskTracker::new(), CancellationToken::new());
    let mappings = Mappings::new(host.directory.clone(), decode.0.clone(), decode.1.clone());
    let offer = host.offer(OWNER);
    for _ in 0..3 {
        mappings.insert(OWNER, host.fetch(&offer).await.unwrap());
        assert_eq!(mappings.len(), 1, "the owner's newest");
    }
    let other = Host::new();
    mappings.insert(Epoch(22), other.fetch(&other.offer(Epoch(22))).await.unwrap());
    host.end().await;
    decode.0.close();
    // The owner's watch ends, the other's goes on.
    timeout(SOON, async {
        while mappings.get(OWNER).is_some() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the owner has gone");
    assert!(mappings.get(Epoch(22)).is_some());
    decode.1.cancel();
    timeout(SOON, decode.0.wait()).await.expect("no task is left");
    other.end().await;
}

#[tokio::test]
async fn the_number_of_mappings_is_bounded() {
    let host = Host::new();
    let mappings = Mappings::new(host.directory.clone(), host.tasks.clone(), host.shutdown.clone());
    let offer = host.offer(OWNER);
    let count = limits::MAX_MAPPINGS as u128;
    for owner in 0..count {
        mappings.insert(Epoch(owner), host.fetch(&offer).await.unwrap());
    }
    assert!(mappings.get(Epoch(0)).is_some(), "used just now");
    mappings.insert(Epoch(count), host.fetch(&offer).await.unwrap());
    assert_eq!(mappings.len(), limits::MAX_MAPPINGS);
    let known = [0, 1, 2, count].map(|owner| mappings.get(Epoch(owner)).is_some());
    assert_eq!(known, [true, false, true, true], "the least recently used went");
    host.end().await;
}

#[tokio::test]
async fn false_offers_are_refused() {
    let host = Host::new();
    let offer = host.offer(OWNER);
    let changed = |change: &dyn Fn(&mut pb::SharedPool)| {
        let mut offer = offer.clone();
        change(&mut offer);
        offer
    };
    let directory = Path::new(&offer.socket).parent().unwrap().display().to_string();
    for socket in [
        String::new(),
        "x".repeat(4096),
        "/var/run/docker.sock".into(),
        format!("{directory}/../{}", offer.socket),
        format!("{directory}/{}.sock", "x".repeat(108)),
        format!("{directory}/{OWNER}.sock\0"),
        format!("{directory}/.."),
    ] {
        assert_eq!(
            host.code(&changed(&|offer| offer.socket = socket.clone())).await,
            "SHM_ELSEWHERE",
            "{socket}"
        );
    }
    let gone = format!("{directory}/{}.sock", Epoch(5));
    assert_eq!(
        host.code(&changed(&|offer| offer.socket = gone.clone())).await,
        "SHM_UNREACHABLE"
    );
    for token in [vec![], vec![9; 31], vec![9; 33]] {
        assert_eq!(
            host.code(&changed(&|offer| offer.token = token.clone())).await,
            "SHM_OFFER"
        );
    }
    assert_eq!(host.code(&changed(&|offer| offer.token[31] ^= 1)).await, "SHM_REFUSED");
    assert_eq!(host.code(&changed(&|offer| offer.blocks = 0)).await, "SHM_BLOCKS");
    for blocks in [4, 6, u32::MAX] {
        assert_eq!(
            host.code(&changed(&|offer| offer.blocks = blocks)).await,
            "SHM_SIZE",
            "{blocks}"
        );
    }
    assert!(host.fetch(&offer).await.is_ok());
    host.end().await;
}

/// A peer that answers the token with `files`.
async fn answers(files: Vec<std::os::fd::OwnedFd>, byte: &[u8]) -> &'static str {
    let host = Host::new();
    let (listener, path) = host.directory.listen("peer.sock").unwrap();
    let listener = UnixListener::from_std(listener).unwrap();
    let byte = byte.to_vec();
    host.tasks.spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.read_exact(&mut [0; 32]).await.unwrap();
        if files.is_empty() {
            stream.write_all(&byte).await.unwrap();
            return;
        }
        offer::send(&stream, &files).await.unwrap();
    });
    let offer = pb::SharedPool {
        socket: path.to_str().unwrap().into(),
        token: TOKEN.to_vec(),
        blocks: BLOCKS as u32,
    };
    let code = host.code(&offer).await;
    host.end().await;
    code
}

#[tokio::test]
async fn peers_that_hand_over_something_else_are_refused() {
    let good = || MemoryFile::reader(shared().shared().unwrap().file).unwrap();
    assert_eq!(answers(vec![], b"").await, "SHM_REFUSED");
    assert_eq!(answers(vec![], b"x").await, "SHM_REFUSED");
    assert_eq!(answers(vec![good(), good()], b"").await, "SHM_REFUSED");
    assert_eq!(answers(vec![good(), good(), good()], b"").await, "SHM_REFUSED");
    let (pipe, _end) = io::pipe().unwrap();
    assert_eq!(answers(vec![pipe.into()], b"").await, "SHM_NOT_MEMORY");
    assert_eq!(
        answers(vec![tempfile::tempfile().unwrap().into()], b"").await,
        "SHM_NOT_MEMORY"
    );
    let unsealed = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    assert_eq!(answers(vec![unsealed], b"").await, "SHM_NOT_SEALED");
    let short = MemoryFile::create(LAYOUT.block_bytes()).unwrap();
    assert_eq!(
        answers(vec![MemoryFile::reader(short.file()).unwrap()], b"").await,
        "SHM_SIZE"
    );
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_is_given_up() {
    let host = Host::new();
    let (listener, path) = host.directory.listen("peer.sock").unwrap();
    let offer = pb::SharedPool {
        socket: path.to_str().unwrap().into(),
        token: TOKEN.to_vec(),
        blocks: BLOCKS as u32,
    };
    assert_eq!(host.code(&offer).await, "SHM_TIMEOUT");
    drop(listener);
}

#[tokio::test(start_paused = true)]
async fn who_says_no_token_is_given_up() {
    let host = Host::new();
    let offer = host.offer(OWNER);
    let mut silent = UnixStream::connect(&offer.socket).await.unwrap();
    assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
    host.end().await;
}

#[tokio::test]
async fn what_the_dead_left_is_swept_and_what_lives_stays() {
    let host = Host::new();
    let offer = host.offer(OWNER);
    // Closing a listener leaves its file.
    drop(host.directory.listen("dead.sock").unwrap());
    let directory = Path::new(&offer.socket).parent().unwrap();
    fs::write(directory.join("notes"), "no socket").unwrap();
    let other = host.offer(Epoch(22));
    let names = ["notes", &format!("{OWNER}.sock"), &format!("{}.sock", Epoch(22))].map(|name| directory.join(name));
    let mut wanted = names.to_vec();
    wanted.sort();
    assert_eq!(host.sockets(), wanted);
    assert!(host.fetch(&offer).await.is_ok() && host.fetch(&other).await.is_ok());
    host.end().await;
    assert_eq!(host.sockets(), [directory.join("notes")]);
}

#[test]
fn a_directory_that_others_may_enter_is_refused() {
    let base = tempfile::tempdir().unwrap();
    let open = || {
        Directory::open(Some(base.path()))
            .map(|_| ())
            .map_err(|error| error.kind())
    };
    assert_eq!(open(), Ok(()));
    assert_eq!(open(), Ok(()), "once more");
    let path = fs::read_dir(base.path()).unwrap().next().unwrap().unwrap().path();
    for mode in [0o710, 0o701, 0o777] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(open(), Err(io::ErrorKind::PermissionDenied), "{mode:o}");
    }
    fs::remove_dir(&path).unwrap();
    fs::create_dir(base.path().join("other")).unwrap();
    symlink(base.path().join("other"), &path).unwrap();
    assert_eq!(open(), Err(io::ErrorKind::PermissionDenied), "a link");
    assert!(Directory::open(Some(&base.path().join("missing"))).is_err());
}
