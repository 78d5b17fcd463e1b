//! The coordinator's life: configuration, logging, build, log the addresses, serve, signal, drain with a deadline.

use clap::Parser as _;
use drover_coordinator::{config, serve};

/// Threads that serve connections.
const CONNECTION_THREADS: usize = 2;

fn main() -> std::process::ExitCode {
    drover_proto::allocator::bound_arenas();
    let args = config::Args::parse();
    let result = config::Config::from_args(args).and_then(|config| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        // Of its own, so that no other work delays a heartbeat. Few threads: it only reads, writes and renews.
        let connections = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(CONNECTION_THREADS)
            .thread_name("connections")
            .enable_all()
            .build()?;
        let result = runtime.block_on(serve::run(config, connections.handle().clone()));
        connections.shutdown_background();
        result
    });
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            #[allow(clippy::print_stderr)] // the last word of a program that could not start, or did not end well
            {
                eprintln!("drover-coordinator: {error:#}");
            }
            std::process::ExitCode::FAILURE
        }
    }
}
