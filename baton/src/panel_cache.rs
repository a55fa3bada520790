//! The option that says where repacked weights are kept.

use std::{env, ffi::OsString, path::PathBuf};

use clap::Args;

use crate::user_cache;

const FLAG: &str = "--panel-cache";
/// In a directory's place: nothing is kept.
const OFF: &str = "off";

#[derive(Clone, Debug, Args)]
pub(crate) struct PanelCacheArgs {
    /// Directory that keeps the repacked weights of the models used last, about as large as they are, so that the next start is faster; safe to delete. `off` keeps
    /// nothing [default: baton/panels in $XDG_CACHE_HOME or ~/.cache; off where there is neither]
    #[arg(long, env = "BATON_PANEL_CACHE", value_name = "DIR|off")]
    panel_cache: Option<PathBuf>,
}

impl PanelCacheArgs {
    /// Where to keep panels, if anywhere.
    pub(crate) fn directory(&self) -> Option<PathBuf> {
        self.directory_from(|name| env::var_os(name))
    }

    fn directory_from(&self, var: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
        match self.given() {
            Some(given) if given.as_os_str() == OFF => None,
            Some(given) => Some(given.clone()),
            None => user_cache::directory(var).map(|cache| cache.join("panels")),
        }
    }

    /// An empty variable says nothing.
    fn given(&self) -> Option<&PathBuf> {
        self.panel_cache.as_ref().filter(|given| !given.as_os_str().is_empty())
    }

    /// The same option for a child process.
    pub(crate) fn words(&self) -> Vec<OsString> {
        self.given()
            .map(|given| vec![FLAG.into(), given.into()])
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_lie_in_the_cache_unless_told_otherwise() {
        let check = |given: Option<&str>, home: Option<&str>, expected: Option<&str>| {
            let args = PanelCacheArgs {
                panel_cache: given.map(PathBuf::from),
            };
            let var = |name: &str| home.filter(|_| name == "HOME").map(OsString::from);
            assert_eq!(
                args.directory_from(var),
                expected.map(PathBuf::from),
                "{given:?} {home:?}"
            );
        };
        check(None, Some("/home/a"), Some("/home/a/.cache/baton/panels"));
        check(Some(""), Some("/home/a"), Some("/home/a/.cache/baton/panels"));
        check(None, None, None);
        check(Some("off"), Some("/home/a"), None);
        check(Some("./off"), Some("/home/a"), Some("./off"));
        check(Some("/panels"), None, Some("/panels"));
    }
}
