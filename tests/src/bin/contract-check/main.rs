//! Refuses a breaking change of the protobuf contract.
//!
//! The contract is every `.proto` below `proto/drover`: what clients and agents of another version send, and what
//! coordinators of another version read from the store. From the commit that adds `proto/contract-since` on, each
//! state the contract ever had in a commit (first parents) stays served: the working tree is compared with all of
//! them, so a break hidden behind a later commit is found too. Before that file exists the contract may change, and
//! this check only compiles it. Removing the file and adding it again, in two commits, begins anew: that is how a
//! break is made on purpose, and in the open.
//!
//! Nothing may be deleted, `reserved` or not: a field that is no longer wanted is marked `deprecated` and stays.
//! The JSON and TOML forms name fields, so renaming one breaks them, although the wire would not notice.

// This binary is a check that people and CI read, and it asks git for the past.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "its output is for a person or a CI log")]

mod compare;
mod history;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;

use crate::compare::Break;
use crate::history::{Past, Repository};

/// Refuse a breaking change of the protobuf contract.
///
/// Compares the working tree with every state of proto/drover since the commit that added proto/contract-since.
/// Exit codes: 0 no break, 1 a break, 2 it could not be checked.
#[derive(Debug, Parser)]
#[command(version, after_help = "Example: contract-check --against origin/main")]
struct Arguments {
    /// Compare with this commit only, whether the contract is declared stable or not
    #[arg(long, value_name = "REF")]
    against: Option<String>,
    /// The repository; default: the one of the current folder
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    root: PathBuf,
}

fn main() -> ExitCode {
    match check(&Arguments::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The number of breaks found.
fn check(arguments: &Arguments) -> Result<usize> {
    let repository = Repository::open(&arguments.root)?;
    let new = repository.working_tree()?.compile().context("the contract in the working tree does not compile")?;
    let past = match &arguments.against {
        Some(reference) => Past { commits: vec![repository.commit(reference)?], remarks: Vec::new() },
        None => repository.past()?,
    };
    for remark in &past.remarks {
        println!("contract: {remark}");
    }

    let mut breaks: Vec<(Break, String)> = Vec::new();
    for commit in &past.commits {
        let old = match repository.contract_of(commit)?.compile() {
            Ok(old) => old,
            // A state that never compiled never had a client.
            Err(error) => {
                println!("contract: {commit} is left out, it does not compile: {error:#}");
                continue;
            }
        };
        for found in compare::breaks(&old, &new) {
            // Told once, with the oldest commit that had it.
            if !breaks.iter().any(|(known, _)| *known == found) {
                breaks.push((found, commit.to_string()));
            }
        }
    }

    for (found, commit) in &breaks {
        println!("contract: {found} (was otherwise in {commit})");
    }
    if past.commits.is_empty() {
        println!("contract: compiles; nothing was compared");
    } else if breaks.is_empty() {
        println!("contract: compiles, and breaks none of the earlier states compared ({})", past.commits.len());
    } else {
        println!(
            "contract: {} breaking changes. Take them back: add a new field, message or method instead, and mark the \
             old one deprecated.",
            breaks.len()
        );
    }
    Ok(breaks.len())
}

#[cfg(test)]
mod tests;
