//! The `drover` command: what operators type. Built on the generated client alone; it knows no etcd and no agent.
//!
//! Owns: the command line ([`arguments`]), what is printed ([`output`], [`progress`]), calls and their deadlines
//! ([`client`], [`gateway`]), the commands ([`commands`]), the fleet on one machine ([`dev`]) and the generated model
//! that it and the tests serve ([`tiny_model`]). Must never: decide placement, or reach past the API.

pub mod arguments;
pub mod client;
pub mod clock;
pub mod commands;
pub mod dev;
pub mod failure;
pub mod gateway;
pub mod output;
pub mod progress;
pub mod sse;
pub mod tiny_model;
pub mod trace;
pub mod wait;

use clap::Parser as _;
use std::process::ExitCode;

/// Reads the command line, runs the command, tells what went wrong, and gives the exit code.
pub async fn main() -> ExitCode {
    let arguments = match arguments::Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way too. Where they can't be printed, nobody reads them.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let output = output::Output::new(arguments.global.output, arguments.global.verbose);
    let context = commands::Context { global: arguments.global, output };
    match commands::run(context, arguments.command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(message) = failure.message() {
                output.notice(&format!("drover: {message}"));
            }
            ExitCode::from(failure.exit_code())
        }
    }
}
