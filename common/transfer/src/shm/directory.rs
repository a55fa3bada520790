//! The private directory in which nodes of one user on one host meet.

use std::{
    env, fs, io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, FileTypeExt, MetadataExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, open},
    process::geteuid,
};

/// Paths of unix sockets end at this length (`sockaddr_un`, without the last zero).
const SOCKET_PATH_BYTES: usize = 107;

/// A directory that its user alone can enter (0700), with the sockets of offered pools.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// `baton-UID` in `base`, made if it is not there; `base` is `$XDG_RUNTIME_DIR`, or else `/tmp`, where none is given. Fails where the directory is
    /// another user's, or open to others.
    pub fn open(base: Option<&Path>) -> io::Result<Self> {
        let runtime = || env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty());
        let base = match base {
            Some(base) => base.to_owned(),
            None => runtime().map_or_else(|| "/tmp".into(), PathBuf::from),
        };
        let user = geteuid().as_raw();
        let path = base.join(format!("baton-{user}"));
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // Not what a link leads to.
        let found = fs::symlink_metadata(&path)?;
        if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("{} is not this user's alone", path.display()),
            ));
        }
        Ok(Self { path })
    }

    /// The socket `name`, if that is a plain name that fits into an address.
    fn socket(&self, name: &str) -> Option<PathBuf> {
        let plain = !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte));
        let path = self.path.join(name);
        (plain && !name.starts_with('.') && path.as_os_str().len() <= SOCKET_PATH_BYTES).then_some(path)
    }

    /// `path`, if it is a socket's in this directory.
    pub(super) fn admits(&self, path: &str) -> Option<PathBuf> {
        let path = Path::new(path);
        let own = self.socket(path.file_name()?.to_str()?)?;
        (own == path).then_some(own)
    }

    /// Listens at `name`, after what dead processes left was removed.
    pub(super) fn listen(&self, name: &str) -> io::Result<(UnixListener, PathBuf)> {
        let path = self.socket(name).ok_or(io::ErrorKind::InvalidFilename)?;
        let _lock = self.lock()?;
        self.sweep()?;
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok((listener, path))
    }

    /// Held while sockets are made and swept, so that none is taken for dead before it listens.
    fn lock(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = open(&self.path, flags, Mode::empty())?;
        flock(&lock, FlockOperation::LockExclusive)?;
        Ok(lock)
    }

    /// Removes sockets at which nobody listens.
    fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let path = entry.path();
            if !entry.file_type()?.is_socket() {
                continue;
            }
            let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
            if UnixStream::connect(&path).is_err_and(refused) {
                let _ = fs::remove_file(&path);
            }
        }
        Ok(())
    }
}
