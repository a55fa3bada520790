use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use tempfile::TempDir;

use super::*;

/// An authority, and files that it has signed.
struct Files {
    directory: TempDir,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Files {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let files = Self {
            directory: tempfile::tempdir().expect("a directory"),
            authority: CertifiedIssuer::self_signed(params, key).expect("signed"),
        };
        files.write("ca.pem", &files.authority.pem());
        files
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).expect("written");
        path
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A certificate for `localhost` and 127.0.0.1, and its key.
    fn sign(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).expect("names");
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.authority).expect("signed");
        self.write(&format!("{name}.pem"), &certificate.pem());
        self.write(&format!("{name}.key"), &key.serialize_pem());
    }

    fn args(&self, cert: &str, key: &str, ca: &str) -> TlsArgs {
        let path = |name: &str| (!name.is_empty()).then(|| self.path(name));
        TlsArgs {
            tls_cert: path(cert),
            tls_key: path(key),
            tls_ca: path(ca),
        }
    }
}

#[test]
fn files_are_checked_and_each_fault_is_named() {
    let files = Files::new();
    files.sign("good", |_| {});
    files.sign("other", |_| {});
    files.sign("old", |params| {
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
    });
    files.sign("early", |params| params.not_before = date_time_ymd(4000, 1, 1));
    files.write("text.pem", "no PEM at all");
    fs::copy(Files::new().path("ca.pem"), files.path("foreign.pem")).expect("copied");

    let loaded = files.args("good.pem", "good.key", "ca.pem").load();
    let tls = loaded.expect("usable").expect("given");
    for (host, covered) in [
        ("localhost", true),
        ("127.0.0.1", true),
        ("127.0.0.2", false),
        ("", false),
    ] {
        assert_eq!(tls.covers(host), covered, "{host}");
    }
    assert!(files.args("", "", "").load().expect("nothing to check").is_none());

    for (cert, key, ca, expected) in [
        ("good.pem", "good.key", "", "--tls-ca is missing"),
        ("good.pem", "", "ca.pem", "--tls-key is missing"),
        ("", "", "ca.pem", "--tls-cert is missing"),
        ("none.pem", "good.key", "ca.pem", "cannot be read"),
        ("text.pem", "good.key", "ca.pem", "holds no certificate"),
        ("good.pem", "text.pem", "ca.pem", "holds no private key"),
        (
            "good.pem",
            "other.key",
            "ca.pem",
            "--tls-key is not the key of --tls-cert",
        ),
        ("good.pem", "good.key", "text.pem", "holds no certificate"),
        ("good.pem", "good.key", "foreign.pem", "has not signed it"),
        ("old.pem", "old.key", "ca.pem", "it has expired"),
        ("early.pem", "early.key", "ca.pem", "it is not valid yet"),
    ] {
        let error = files.args(cert, key, ca).load().expect_err("refused").to_string();
        assert!(error.contains(expected), "{cert} {key} {ca}: {error}");
    }
    client_of(&files.path("ca.pem")).expect("usable");
    client_of(&files.path("text.pem")).expect_err("refused");
}
