//! TLS between processes: a certificate, its key, and the authority that both ends trust, read and checked once, at the start.
//!
//! Nodes show each other certificates and want to see them (mutual TLS). A router also takes clients that show none; who may join as a node is its registry's to ask.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    CertificateError, CipherSuite, RootCertStore,
    client::verify_server_name,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{ParsedCertificate, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::CertifiedKey,
};
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

use crate::limits;

/// Flags of a process that serves gRPC.
#[derive(Clone, Default, Debug, clap::Args)]
pub struct TlsArgs {
    /// This process's certificate, PEM, and those between it and the authority's: gRPC is then TLS, which takes all three of these files
    #[arg(long, env = "BATON_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key, PEM
    #[arg(long, env = "BATON_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Certificate of the authority that has signed those of all nodes and routers, PEM
    #[arg(long, env = "BATON_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
}

/// Files that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// One or two of the three.
    #[error("--tls-cert, --tls-key and --tls-ca belong together: {0} is missing")]
    Incomplete(&'static str),
    /// Not there, or not ours to read.
    #[error("{flag} {path:?} cannot be read: {error}")]
    Read {
        /// Which.
        flag: &'static str,
        /// As given.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// No PEM of the kind that is needed.
    #[error("{flag} {path:?} holds no {wanted}")]
    Empty {
        /// Which.
        flag: &'static str,
        /// As given.
        path: PathBuf,
        /// "certificate" or "private key".
        wanted: &'static str,
    },
    /// A key for another certificate, or of a kind that nobody knows.
    #[error("--tls-key is not the key of --tls-cert: {0}")]
    Pair(rustls::Error),
    /// It is no authority's certificate.
    #[error("--tls-ca {path:?} cannot be used: {problem}")]
    Authority {
        /// As given.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// Expired, not valid yet, signed by another authority, or for another use.
    #[error("--tls-cert {path:?} cannot be used: {problem}")]
    Certificate {
        /// As given.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}

/// What a process shows, and whom it believes. Everything in it has been checked.
#[derive(Clone, PartialEq, Eq)]
pub struct Tls {
    chain: Arc<[u8]>,
    key: Arc<[u8]>,
    authority: Arc<[u8]>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the key.
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

/// Whether a client must show a certificate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Clients {
    /// Every one.
    MustShow,
    /// Who shows one must show a good one.
    MayShow,
}

impl TlsArgs {
    /// Reads and checks the files; `None` when none is given.
    pub fn load(&self) -> Result<Option<Tls>, TlsError> {
        let (cert, key, ca) = match (&self.tls_cert, &self.tls_key, &self.tls_ca) {
            (None, None, None) => return Ok(None),
            (Some(cert), Some(key), Some(ca)) => (cert, key, ca),
            (None, ..) => return Err(TlsError::Incomplete("--tls-cert")),
            (_, None, _) => return Err(TlsError::Incomplete("--tls-key")),
            (.., None) => return Err(TlsError::Incomplete("--tls-ca")),
        };
        let tls = Tls {
            chain: read("--tls-cert", cert)?.into(),
            key: read("--tls-key", key)?.into(),
            authority: read("--tls-ca", ca)?.into(),
        };
        let provider = provider();
        let chain = certificates("--tls-cert", cert, &tls.chain)?;
        let private = PrivateKeyDer::from_pem_slice(&tls.key).map_err(|_| TlsError::Empty {
            flag: "--tls-key",
            path: key.clone(),
            wanted: "private key",
        })?;
        CertifiedKey::from_der(chain.clone(), private, &provider).map_err(TlsError::Pair)?;
        let verifier = authority(ca, &certificates("--tls-ca", ca, &tls.authority)?, provider)?;
        verifier
            .verify_client_cert(&chain[0], &chain[1..], UnixTime::now())
            .map_err(|error| TlsError::Certificate {
                path: cert.clone(),
                problem: problem(&error),
            })?;
        Ok(Some(tls))
    }
}

impl Tls {
    /// For a server.
    pub fn server(&self, clients: Clients) -> ServerTlsConfig {
        provider();
        ServerTlsConfig::new()
            .identity(self.identity())
            .client_ca_root(Certificate::from_pem(&self.authority))
            .client_auth_optional(clients == Clients::MayShow)
            .timeout(limits::CONNECT_TIMEOUT)
    }

    /// For a connection to another process.
    pub fn client(&self) -> ClientTlsConfig {
        client(&self.authority).identity(self.identity())
    }

    fn identity(&self) -> Identity {
        Identity::from_pem(&self.chain, &self.key)
    }

    /// Whether the certificate is for `host`, a name or an address: those who connect to it there check that.
    pub fn covers(&self, host: &str) -> bool {
        let certificate = CertificateDer::from_pem_slice(&self.chain);
        let (Ok(certificate), Ok(name)) = (certificate, ServerName::try_from(host)) else {
            return false;
        };
        ParsedCertificate::try_from(&certificate)
            .and_then(|parsed| verify_server_name(&parsed, &name))
            .is_ok()
    }
}

/// Reads the authority alone: for clients, which show no certificate.
pub fn client_of(ca: &Path) -> Result<ClientTlsConfig, TlsError> {
    let pem = read("--tls-ca", ca)?;
    authority(ca, &certificates("--tls-ca", ca, &pem)?, provider())?;
    Ok(client(&pem))
}

fn client(authority: &[u8]) -> ClientTlsConfig {
    provider();
    ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(authority))
        .timeout(limits::CONNECT_TIMEOUT)
}

/// Where the arithmetic is done, for every connection of this process. AES-128-GCM comes first: KV is gigabytes a second, and it has 10 rounds where AES-256 has 14.
fn provider() -> Arc<CryptoProvider> {
    if CryptoProvider::get_default().is_none() {
        let mut provider = aws_lc_rs::default_provider();
        provider
            .cipher_suites
            .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
        // Another thread may have done the same.
        let _ = provider.install_default();
    }
    CryptoProvider::get_default().expect("installed just now").clone()
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|error| TlsError::Read {
        flag,
        path: path.to_owned(),
        error,
    })
}

/// At least one.
fn certificates(flag: &'static str, path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(TlsError::Empty {
            flag,
            path: path.to_owned(),
            wanted: "certificate",
        }),
    }
}

/// What tells whether a certificate is signed by it.
fn authority(
    path: &Path,
    certificates: &[CertificateDer<'static>],
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let unusable = |problem: String| TlsError::Authority {
        path: path.to_owned(),
        problem,
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots
            .add(certificate.clone())
            .map_err(|error| unusable(problem(&error)))?;
    }
    WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
        .build()
        .map_err(|error| unusable(error.to_string()))
}

fn problem(error: &rustls::Error) -> String {
    use CertificateError as Bad;
    match error {
        rustls::Error::InvalidCertificate(bad) => match bad {
            Bad::Expired | Bad::ExpiredContext { .. } => "it has expired".to_owned(),
            Bad::NotValidYet | Bad::NotValidYetContext { .. } => "it is not valid yet".to_owned(),
            Bad::UnknownIssuer | Bad::BadSignature => "the authority of --tls-ca has not signed it".to_owned(),
            Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. } => {
                "it is not for clients: nodes and routers connect to each other, too".to_owned()
            }
            bad => bad.to_string(),
        },
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
