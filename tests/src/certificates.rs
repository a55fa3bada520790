//! An authority of a test's own, and what it has signed.

use std::fs;
use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tonic::transport::{Certificate, ClientTlsConfig};

/// `ca.pem`, `node.pem` and `node.key` (for 127.0.0.1) in a directory that goes with it.
pub struct Certificates {
    directory: TempDir,
    authority: String,
}

impl Certificates {
    /// Signs them.
    pub fn sign() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("signed");
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("a name");
        let certificate = params.signed_by(&key, &authority).expect("signed");
        let files = Self {
            directory: tempfile::tempdir().expect("a directory"),
            authority: authority.pem(),
        };
        for (name, text) in [
            ("ca.pem", files.authority.clone()),
            ("node.pem", certificate.pem()),
            ("node.key", key.serialize_pem()),
        ] {
            fs::write(files.path(name), text).expect("written");
        }
        files
    }

    /// Of a file.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The flags of a node or router.
    pub fn flags(&self) -> Vec<String> {
        [
            ("--tls-cert", "node.pem"),
            ("--tls-key", "node.key"),
            ("--tls-ca", "ca.pem"),
        ]
        .into_iter()
        .flat_map(|(flag, name)| [flag.to_owned(), self.path(name).display().to_string()])
        .collect()
    }

    /// Of a client that shows no certificate.
    pub fn client(&self) -> ClientTlsConfig {
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.authority))
    }
}
