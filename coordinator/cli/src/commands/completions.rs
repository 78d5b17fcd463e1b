//! `drover completions`: scripts that make a shell complete the command line.

use super::Context;
use crate::{
    arguments::{Arguments, Completions},
    failure::Failure,
};
use clap::CommandFactory as _;

/// Writes the script. By way of memory: clap_complete panics when its writer fails.
pub fn run(context: &Context, options: &Completions) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut Arguments::command(), "drover", &mut script);
    context.output.raw(&String::from_utf8_lossy(&script))
}
