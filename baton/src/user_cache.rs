//! Where this user's files lie that can be made again.

use std::{ffi::OsString, path::PathBuf};

/// `$XDG_CACHE_HOME/baton`, else `~/.cache/baton`; `None` without either. `var` reads the environment.
pub(crate) fn directory(var: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let var = |name| var(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")));
    cache.map(|cache| cache.join("baton"))
}
