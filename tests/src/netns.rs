//! A network namespace, joined to the test's own network by one link that the test can cut. Needs root and `ip` (iproute2).
//!
//! A cut link is what a proxy cannot play: nothing answers any more, no SYN, no RST, no FIN.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Of every namespace that tests make; the process id of the test follows.
const PREFIX: &str = "baton-test-";

/// Namespaces that one test process may make.
const PER_PROCESS: u32 = 64;

/// The end of the link inside.
const INSIDE: &str = "link0";

/// One namespace and its link; both go when it is dropped. Those that killed tests left behind go when the next one is made.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    /// Of the /30 network that is the link.
    network: u32,
}

impl Namespace {
    /// Makes one. Panics, saying what is missing, where that is not allowed.
    pub fn new() -> Arc<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(
            rustix::process::geteuid().is_root(),
            "this test makes network namespaces: run it as root"
        );
        remove_leftovers();
        let index = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(
            index < PER_PROCESS,
            "a test process makes at most {PER_PROCESS} namespaces"
        );
        let process = std::process::id();
        // 100.64.0.0/10 is nobody's: its 2^20 networks of four addresses go round by process and namespace.
        let network = (0x6440_0000 | ((process * PER_PROCESS + index) % (1 << 20)) << 2) & !3;
        let namespace = Self {
            name: format!("{PREFIX}{process}-{index}"),
            network,
        };
        let (name, outside) = (namespace.name.clone(), format!("bt{process}.{index}"));
        let (near, far) = (namespace.outside(), namespace.inside());
        ip(&format!("netns add {name}"));
        ip(&format!("link add {outside} type veth peer name {INSIDE} netns {name}"));
        ip(&format!("addr add {near}/30 dev {outside}"));
        ip(&format!("-n {name} addr add {far}/30 dev {INSIDE}"));
        ip(&format!("link set {outside} up"));
        ip(&format!("-n {name} link set lo up"));
        ip(&format!("-n {name} link set {INSIDE} up"));
        Arc::new(namespace)
    }

    /// The test's own address on the link.
    pub fn outside(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.network + 1)
    }

    /// The namespace's address on it.
    pub fn inside(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.network + 2)
    }

    /// Nothing passes any more, and nobody is told.
    pub fn cut(&self) {
        ip(&format!("-n {} link set {INSIDE} down", self.name));
    }

    /// The link is whole again.
    pub fn heal(&self) {
        ip(&format!("-n {} link set {INSIDE} up", self.name));
    }

    /// Runs `act` on a thread that lives in the namespace: it reaches what listens on its loopback address, cut off or not.
    pub fn enter<R: Send>(&self, act: impl FnOnce() -> R + Send) -> R {
        let namespace = File::open(self.file()).expect("the namespace exists");
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("setns");
                act()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that runs `program` inside, as the same process.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.file().display())).arg(program);
        command
    }

    fn file(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The link goes with its end inside.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Ends what runs in the namespaces of test processes that are no more, and removes them.
fn remove_leftovers() {
    for name in ip("netns list")
        .split_whitespace()
        .filter(|name| name.starts_with(PREFIX))
    {
        let owner = name[PREFIX.len()..].split('-').next().unwrap_or_default();
        if Path::new("/proc").join(owner).exists() {
            continue;
        }
        // Another test may do the same at the same time: what is gone already is as good.
        let pids = Command::new("ip").args(["netns", "pids", name]).output();
        let pids = pids.map(|output| output.stdout).unwrap_or_default();
        for pid in String::from_utf8_lossy(&pids).split_whitespace() {
            let _ = Command::new("kill").args(["-KILL", pid]).status();
        }
        let _ = Command::new("ip").args(["netns", "del", name]).status();
    }
}

/// Runs `ip` and returns what it says. Panics when it fails.
fn ip(args: &str) -> String {
    let output = Command::new("ip")
        .args(args.split_whitespace())
        .output()
        .expect("ip (iproute2) is installed");
    assert!(
        output.status.success(),
        "ip {args}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_cut_link_says_nothing_and_heals() {
        let namespace = Namespace::new();
        let listener = namespace.enter(|| TcpListener::bind((namespace.inside(), 0)).expect("its own address"));
        let address = listener.local_addr().expect("an address");
        let mut outside = TcpStream::connect(address).expect("the link is whole");
        let (mut inside, _) = listener.accept().expect("a connection");
        namespace.cut();
        outside.write_all(b"later").expect("the kernel takes it");
        inside.set_nonblocking(true).expect("a socket");
        let nothing = inside.read(&mut [0]).expect_err("nothing passes");
        assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
        namespace.heal();
        inside.set_nonblocking(false).expect("a socket");
        inside
            .set_read_timeout(Some(Duration::from_secs(30)))
            .expect("a socket");
        let mut bytes = [0; 5];
        inside.read_exact(&mut bytes).expect("bytes in time");
        assert_eq!(&bytes, b"later");
    }

    #[test]
    fn what_a_killed_test_left_behind_goes() {
        // No process has this id: the kernel's own limit is below it.
        let name = format!("{PREFIX}4194999-0");
        if !Path::new("/run/netns").join(&name).exists() {
            ip(&format!("netns add {name}"));
        }
        let namespace = Namespace::new();
        assert!(!Path::new("/run/netns").join(&name).exists());
        assert!(namespace.file().exists());
        let file = namespace.file();
        drop(namespace);
        assert!(!file.exists());
    }
}
