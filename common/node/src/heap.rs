//! The heap of a process whose buffers of many KiB come and go thousands of times a second.
#![allow(unsafe_code)]

/// Tells the system's allocator to keep what is freed, up to 256 MiB, rather than to give it back and take it again page by page: what KV is received into would cost
/// more in page faults than in copying. First thing in `main`; does nothing where the allocator is not glibc's.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (option, bytes) in [
        (libc::M_MMAP_THRESHOLD, KEPT_BYTES),
        (libc::M_TRIM_THRESHOLD, KEPT_BYTES),
        (libc::M_TOP_PAD, PAD_BYTES),
    ] {
        // SAFETY: sets a number of the allocator, under its own lock.
        unsafe { libc::mallopt(option, bytes) };
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BYTES: libc::c_int = 256 << 20;

/// Taken beyond what is asked for whenever the heap grows: addresses, until somebody writes there.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const PAD_BYTES: libc::c_int = 32 << 20;
