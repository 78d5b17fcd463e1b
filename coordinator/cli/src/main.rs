//! The `drover` command; everything is in the library, so that tests reach it.

use std::process::ExitCode;

// One thread is enough for one command, and starts faster than a pool.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    Box::pin(drover::main()).await
}
