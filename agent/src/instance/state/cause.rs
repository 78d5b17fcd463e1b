//! PURE: why a server that never served has ended: what may pass, and what every further start would meet again.
//!
//! llama-server exits with 1 whatever has gone wrong while it loads; only its log tells one thing from another. The words
//! are those of llama.cpp build 11669, seen for each case of the table but for the GPU's, which are those of its sources
//! (ggml-cuda.cu, ggml-backend.cpp, llama-model.cpp):
//!
//! | what was wrong | exit | its log says | cause |
//! |---|---|---|---|
//! | model cut off, absent, no GGUF, of a later version | 1 | `failed to load model` … `exiting due to model loading error` | refused |
//! | unknown architecture, a tensor or key missing | 1 | the same | refused |
//! | adapter or context that does not fit the model | 1 | `failed to create_context …`, `exiting due to model loading error` | refused |
//! | unknown argument | 1 | `error: invalid argument: …` | refused |
//! | bad value of an argument | 1 | `error while handling argument "…": …` | refused |
//! | host memory short | 1 | `insufficient memory`, `failed to allocate …`, then as for a bad model | passing |
//! | GPU memory short | 1 | `cudaMalloc failed: out of memory`, `unable to allocate CUDA0 buffer`, then as for a bad model | passing |
//! | GPU in trouble | 134, signal 6 | `CUDA error: …` | passing |
//! | `std::bad_alloc` | 134, signal 6 | `terminate called after throwing …` | passing |
//! | socket taken or its folder away | 1 | `couldn't bind HTTP server socket`, `exiting due to HTTP server error` | passing |
//! | reading failed, as from a network's file system that is away | 1 | `Input/output error`, `Stale file handle`, `Transport endpoint is not connected`, … and then as for a bad model | passing |
//! | a library is missing | 127 | `error while loading shared libraries` | passing: it may be about to be installed |
//! | killed (the kernel for want of memory, an operator) | signal 9, 15 | nothing | passing |
//! | exits with 1 and does not say why | 1 | anything else | passing |
//!
//! What passes is tried again with backoff, and counts towards the crash loop: that bounds it where it does not pass.

/// Why a server ended that never served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cause {
    /// It may go better the next time; also when nothing is known.
    #[default]
    Passing,
    /// It has looked at its model and its arguments and can't serve them: the same start would end the same way.
    Refused,
}

/// Lack of something that others may give back. In small letters, as the log is compared.
const PASSING: [&str; 16] = [
    "out of memory",
    "outofdevicememory",
    "outofhostmemory",
    "insufficient memory",
    "cannot allocate memory",
    "failed to allocate",
    "unable to allocate",
    "bad_alloc",
    "cuda error",
    "couldn't bind",
    "too many open files",
    "input/output error",
    "stale file handle",
    "transport endpoint is not connected",
    "connection timed out",
    "no space left on device",
];

/// What only its model or its arguments can be blamed for.
const REFUSED: [&str; 5] = [
    "exiting due to model loading error",
    "error loading model",
    "failed to load model",
    "error: invalid argument:",
    "error while handling argument",
];

/// Judges by the exit code and the end of the log.
#[must_use]
pub fn of(code: Option<i32>, log: &str) -> Cause {
    if code != Some(1) {
        return Cause::Passing;
    }
    let log = log.to_lowercase();
    let says = |words: &[&str]| words.iter().any(|words| log.contains(words));
    // Want of memory is told first and ends in the same words as a bad model.
    if !says(&PASSING) && says(&REFUSED) { Cause::Refused } else { Cause::Passing }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As llama-server of build 11669 has printed them, but for the paths.
    const SEEN: [(&str, Cause); 15] = [
        (
            "E llama_model_load: error loading model: tensor 'blk.0.ffn_down.weight' data is not within the file bounds, model is corrupted or incomplete\n\
             E llama_model_load_from_file_impl: failed to load model\nE srv  llama_server: exiting due to model loading error",
            Cause::Refused,
        ),
        (
            "E gguf_init_from_file: failed to open GGUF file 'absent.gguf' (No such file or directory)\n\
             E llama_model_load: error loading model: llama_model_loader: failed to load model from absent.gguf",
            Cause::Refused,
        ),
        (
            "E gguf_init_from_reader: invalid magic characters: 'this', expected 'GGUF'\n\
             E srv  llama_server: exiting due to model loading error",
            Cause::Refused,
        ),
        (
            "E llama_model_load: error loading model: unknown model architecture: 'lxama'\n\
             E srv  llama_server: exiting due to model loading error",
            Cause::Refused,
        ),
        (
            "E llama_adapter_lora_init_from_file_ptr: failed to apply lora adapter: failed to load lora adapter from file\n\
             E srv  llama_server: exiting due to model loading error",
            Cause::Refused,
        ),
        ("error: invalid argument: --no-such-flag", Cause::Refused),
        ("error while handling argument \"--cache-type-k\": Unsupported cache type: nonsense", Cause::Refused),
        (
            "E ggml_aligned_malloc: insufficient memory (attempted to allocate 976.56 MB)\n\
             E llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache\n\
             E srv  llama_server: exiting due to model loading error",
            Cause::Passing,
        ),
        (
            "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 5000.00 MiB on device 0: cudaMalloc failed: out of memory\n\
             llama_model_load: error loading model: unable to allocate CUDA0 buffer",
            Cause::Passing,
        ),
        (
            "E srv         start: couldn't bind HTTP server socket, hostname: run/dirsock.sock, port: 9931\n\
             E srv  llama_server: exiting due to HTTP server error",
            Cause::Passing,
        ),
        (
            "E llama_model_load: error loading model: read error: Input/output error\n\
             E srv  llama_server: exiting due to model loading error",
            Cause::Passing,
        ),
        (
            "E gguf_init_from_file: failed to open GGUF file 'm.gguf' (Transport endpoint is not connected)\n\
             E srv  llama_server: exiting due to model loading error",
            Cause::Passing,
        ),
        ("W something: mmap failed: Invalid argument", Cause::Passing),
        ("the last line", Cause::Passing),
        ("", Cause::Passing),
    ];

    #[test]
    fn a_bad_model_or_argument_is_told_from_what_may_pass() {
        for (log, cause) in SEEN {
            assert_eq!(of(Some(1), log), cause, "{log}");
        }
    }

    #[test]
    fn no_other_end_says_anything_of_the_next_start() {
        for code in [None, Some(0), Some(2), Some(127), Some(134), Some(137), Some(139)] {
            assert_eq!(of(code, SEEN[0].0), Cause::Passing, "{code:?}");
        }
    }
}
