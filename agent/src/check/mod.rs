//! `drover-agent check`: tells the state of a node's files, and of the processes that they name.
//!
//! Changes nothing: opens for reading only, takes no lock, makes nothing, signals nobody; so it works while an agent runs
//! and on a file system that is mounted read-only. What adoption would make of a file is told by adoption's own code
//! ([`crate::instance::traces`], [`crate::host::processes`]).

mod files;
mod instances;
mod node;
mod report;
mod show;
mod spool;

use crate::config::{Flags, View};
use report::Report;
use std::{io::Write as _, process::ExitCode};

pub use report::{Finding, Severity};

/// Exit code when something is damaged or does not fit together.
const FAULTY: u8 = 1;
/// Exit code when it could not be looked, since it was asked wrongly.
const WRONG_USE: u8 = 2;

/// Arguments of `drover-agent check`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    flags: Flags,
    /// How the state is shown.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// How the state is shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// Looks, tells, and returns the exit code: 0 when all is well, 1 when something is damaged or does not fit together, 2 when
/// the state folder was not named or is not there.
pub async fn run(args: Args) -> ExitCode {
    let view = match args.flags.view() {
        Ok(view) => view,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "drover-agent check: {error:#}");
            return ExitCode::from(WRONG_USE);
        }
    };
    let report = look(&view);
    let text = match args.output {
        Output::Table => show::table(&report),
        Output::Json => show::json(&report),
    };
    // Whoever reads it may have seen enough.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    if report.good { ExitCode::SUCCESS } else { ExitCode::from(FAULTY) }
}

fn look(view: &View) -> Report {
    let mut findings = Vec::new();
    let agent = node::agent(view, &mut findings);
    let session = node::session(view, &mut findings);
    let machine = node::machine(view, &mut findings);
    let instances = instances::look(view, &mut findings);
    let sockets = node::sockets(view, &instances, &mut findings);
    let set_aside = node::set_aside(view, &mut findings);
    let leftovers = node::leftovers(view, &instances, &mut findings);
    let proxy = node::proxy(view, &agent, &mut findings);
    let spool = spool::look(view, &mut findings);
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    Report {
        version: drover_proto::VERSION,
        state_dir: view.state_dir.clone(),
        runtime_dir: view.runtime_dir.clone(),
        good: findings.iter().all(|finding| finding.severity == Severity::Note),
        agent,
        session,
        machine,
        instances,
        sockets,
        set_aside,
        leftovers,
        proxy,
        spool,
        findings,
    }
}
