//! How many files this process may have open. Sockets are files: a listener that takes more of them than there are starves everything else.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit as far as the system allows this process, and says what it is then.
pub fn raise_limit() -> u64 {
    let old = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: old.maximum,
        ..old
    };
    if old.current != old.maximum {
        // Refused by some systems where there is no maximum: then the old one holds.
        let _ = setrlimit(Resource::Nofile, raised);
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// How many of the `wanted` connections a listener may have at a time where so many files may be open: a quarter at most. A process has two such listeners, and
/// leaves the other half for its connections to others, probes, models and logs.
pub fn connections(wanted: usize, limit: u64) -> usize {
    let quarter = usize::try_from(limit / 4).unwrap_or(usize::MAX);
    wanted.min(quarter).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_to_its_maximum() {
        let maximum = getrlimit(Resource::Nofile).maximum;
        let limit = raise_limit();
        assert_eq!(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX), limit);
        assert!(limit > 0 && maximum.is_none_or(|maximum| limit == maximum));
    }

    #[test]
    fn connections_leave_files_for_others() {
        for (wanted, limit, expected) in [
            (4_096, 1_048_576, 4_096),
            (4_096, 1_024, 256),
            (32, 1_024, 32),
            (32, 3, 1),
            (4_096, u64::MAX, 4_096),
        ] {
            assert_eq!(connections(wanted, limit), expected, "{wanted} of {limit}");
        }
    }
}
