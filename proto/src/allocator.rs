//! What the C library's allocator is told at the start of a long-lived program.

/// Heaps that the allocator keeps beside each other. By default there are up to eight for each core, and threads that come and
/// go leave a little unused memory in every one of them: under steady churn that looks like a leak.
#[cfg(target_env = "gnu")]
const ARENAS: std::ffi::c_int = 2;

/// Bounds the memory that allocators of many threads hold back. To be called first in `main`, before there are threads.
/// Elsewhere than with glibc it does nothing. Source: <https://man7.org/linux/man-pages/man3/mallopt.3.html> (M_ARENA_MAX).
pub fn bound_arenas() {
    #[cfg(target_env = "gnu")]
    #[allow(unsafe_code, reason = "a function of the C library without a safe wrapper")]
    // SAFETY: it takes two numbers and touches nothing but the allocator's own settings, under the allocator's lock. What it
    // returns says whether it was heeded; where it was not, the default stays in force, which is no error.
    let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
}
