//! Why a model of a hub is not there.

use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use hf_hub::api::sync::ApiError;

/// Why a model of a hub is not there. What was downloaded in part is taken up by the next attempt, and never taken for whole.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HubError {
    #[error("neither HF_HOME nor HOME says where models of the hub are kept")]
    NoHome,
    #[error("{endpoint} has no {what}, and no such file or directory is here: check the name")]
    NotFound { endpoint: String, what: String },
    #[error(
        "{endpoint} does not give {what} to {}: the name may be wrong, the model private, or its terms not accepted at {endpoint}; set HF_TOKEN to a token \
         that may read it",
        if *.with_token { "this HF_TOKEN" } else { "anybody without a token" }
    )]
    Unauthorised {
        endpoint: String,
        what: String,
        with_token: bool,
    },
    #[error(
        "{endpoint} cannot be reached ({reason}): check the network, or HF_ENDPOINT; what has arrived is kept, so try again"
    )]
    Unreachable { endpoint: String, reason: String },
    #[error("{endpoint} sent nothing for {seconds} s: check the network; what has arrived is kept, so try again")]
    Stalled { endpoint: String, seconds: u64 },
    #[error("{endpoint} answered with status {status} when asked for {what}: try again later")]
    Status {
        endpoint: String,
        what: String,
        status: u16,
    },
    #[error("{endpoint} answered in a way that is not understood ({reason}): is HF_ENDPOINT a hub?")]
    Protocol { endpoint: String, reason: String },
    #[error("HF_HUB_OFFLINE is set, and {what} is not whole in {}: {missing}", cache.display())]
    Offline {
        what: String,
        cache: PathBuf,
        missing: String,
    },
    #[error("{what} is no model that can be served: it has no {missing}{}", among(.files))]
    NotAModel {
        what: String,
        missing: String,
        /// GGUF files that it has instead.
        files: Vec<String>,
    },
    #[error("what arrived as {file} is not what the hub lists ({reason}); it was removed: try again")]
    Broken { file: String, reason: String },
    #[error("no space is left in {}: make some, or set HF_HOME to a directory elsewhere", path.display())]
    DiskFull { path: PathBuf },
    #[error("cannot write to {}: {source}; HF_HOME sets another place", path.display())]
    Cache { path: PathBuf, source: io::Error },
    #[error("another process has been downloading {file} for too long: see to it, and try again")]
    Busy { file: String },
    #[error("the download failed: {0}")]
    Panicked(String),
}

fn among(files: &[String]) -> String {
    match files.first() {
        Some(first) => format!(
            "; it has {} GGUF file{}: name one, as in ORG/NAME/{first}",
            files.len(),
            if files.len() == 1 { "" } else { "s" }
        ),
        None => String::new(),
    }
}

/// Whom and what a request was for.
pub(super) struct Asked<'a> {
    pub(super) endpoint: &'a str,
    pub(super) what: String,
    pub(super) with_token: bool,
    pub(super) cache: &'a Path,
}

impl Asked<'_> {
    pub(super) fn error(self, error: ApiError) -> HubError {
        match error {
            ApiError::TooManyRetries(last) => self.error(*last),
            ApiError::RequestError(error) => self.request_error(*error),
            ApiError::IoError(error) => self.io_error(error),
            ApiError::LockAcquisition(_) => HubError::Busy { file: self.what },
            ApiError::InvalidResume => HubError::Broken {
                file: self.what,
                reason: "a part is longer than the whole".to_owned(),
            },
            other => self.protocol(other.to_string()),
        }
    }

    pub(super) fn request_error(self, error: ureq::Error) -> HubError {
        let endpoint = self.endpoint.to_owned();
        match error {
            ureq::Error::StatusCode(401 | 403) => HubError::Unauthorised {
                endpoint,
                what: self.what,
                with_token: self.with_token,
            },
            ureq::Error::StatusCode(404) => HubError::NotFound {
                endpoint,
                what: self.what,
            },
            ureq::Error::StatusCode(status) => HubError::Status {
                endpoint,
                what: self.what,
                status,
            },
            ureq::Error::Http(_) | ureq::Error::BadUri(_) | ureq::Error::Json(_) | ureq::Error::BodyExceedsLimit(_) => {
                self.protocol(error.to_string())
            }
            other => HubError::Unreachable {
                endpoint,
                reason: other.to_string(),
            },
        }
    }

    /// Of the network or of the disk: the crate does not say which.
    pub(super) fn io_error(self, source: io::Error) -> HubError {
        let path = self.cache.to_owned();
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => HubError::DiskFull { path },
            ErrorKind::PermissionDenied
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::NotADirectory
            | ErrorKind::AlreadyExists
            | ErrorKind::NotFound => HubError::Cache { path, source },
            _ => HubError::Unreachable {
                endpoint: self.endpoint.to_owned(),
                reason: source.to_string(),
            },
        }
    }

    pub(super) fn protocol(self, reason: String) -> HubError {
        HubError::Protocol {
            endpoint: self.endpoint.to_owned(),
            reason,
        }
    }
}
