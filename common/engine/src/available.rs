//! How much memory this process may still take.

use std::{fs, path::Path};

/// Bytes that can still be taken: the least of what the machine has free and what each enclosing cgroup leaves. `None` where
/// the system does not say.
pub(crate) fn memory_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| machine_bytes(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = |controller: &str, root: &str, limit: &str, usage: &str| {
        group_bytes(Path::new(root), &group_path(&groups, controller)?, limit, usage)
    };
    // Version 2, and version 1, which keeps its memory controller in a folder of its own.
    let second = group("", "/sys/fs/cgroup", "memory.max", "memory.current");
    let first = group(
        "memory",
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
    );
    machine.into_iter().chain(second).chain(first).min()
}

/// `MemAvailable` of `/proc/meminfo`.
fn machine_bytes(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// This process's path in the hierarchy of a controller (version 2 has one hierarchy, without a name).
fn group_path(text: &str, controller: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        controllers
            .split(',')
            .any(|name| name == controller)
            .then(|| path.to_owned())
    })
}

/// The least that a group or one above it leaves. In a container the group's own folder may be the root's. File pages that the system
/// would drop first do not count as used: a model file that was read once must not keep itself out.
fn group_bytes(root: &Path, path: &str, limit: &str, usage: &str) -> Option<u64> {
    let number = |folder: &Path, file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
    let left = |folder: &Path| {
        let used = number(folder, usage)?.saturating_sub(droppable_bytes(folder).unwrap_or(0));
        Some(number(folder, limit)?.saturating_sub(used))
    };
    let own = root.join(path.trim_start_matches('/'));
    own.ancestors()
        .take_while(|folder| folder.starts_with(root))
        .filter_map(left)
        .min()
}

/// `inactive_file` of a group.
fn droppable_bytes(folder: &Path) -> Option<u64> {
    let stat = fs::read_to_string(folder.join("memory.stat")).ok()?;
    let value = |name: &str| {
        stat.lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    };
    // Version 1 counts the groups below only in its totals.
    value("total_inactive_file ").or_else(|| value("inactive_file "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_machines_available_memory() {
        assert_eq!(
            machine_bytes("MemTotal:  100 kB\nMemAvailable:      24 kB\n"),
            Some(24 * 1024)
        );
        assert_eq!(machine_bytes("MemTotal:  100 kB\n"), None);
    }

    #[test]
    fn finds_the_group_of_either_version() {
        let text = "5:cpu,memory:/docker/a\n0::/kubepods/b\n";
        assert_eq!(group_path(text, "memory").as_deref(), Some("/docker/a"));
        assert_eq!(group_path(text, "").as_deref(), Some("/kubepods/b"));
        assert_eq!(group_path("5:cpu:/x\n", "memory"), None);
    }

    #[test]
    fn the_tightest_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        for (folder, max, current) in [
            (root.path(), "max", "9"),
            (&root.path().join("a"), "1000", "400"),
            (&inner, "900", "100"),
        ] {
            fs::write(folder.join("memory.max"), max).unwrap();
            fs::write(folder.join("memory.current"), current).unwrap();
        }
        assert_eq!(
            group_bytes(root.path(), "/a/b", "memory.max", "memory.current"),
            Some(600)
        );
        assert_eq!(
            group_bytes(root.path(), "/not/there", "memory.max", "memory.current"),
            None
        );
    }
}
