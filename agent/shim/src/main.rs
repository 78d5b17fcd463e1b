//! `drover-shim <instance-dir>`: starts what the directory's `spec` says and keeps it until it ends.
//!
//! Prints "held <pid>" and "released <pid>", then lets go of its output; or "refused <code> <why>" and exits with the
//! code of the refusal.

use drover_shim::{keep, record::Directory, start};
use std::{io::Write as _, process::ExitCode};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(path), None) = (arguments.next(), arguments.next()) else {
        return refuse(64, "usage: drover-shim <instance-dir>");
    };
    let path = match std::fs::canonicalize(&path) {
        Ok(path) => path,
        Err(error) => return refuse(64, &format!("{}: {error}", path.to_string_lossy())),
    };
    if let Err(error) = keep::detach() {
        return refuse(70, &format!("this process could not be detached: {error}"));
    }
    let directory = Directory::new(path);
    let started = match start::start(&directory, &mut say) {
        Ok(started) => started,
        Err(refusal) => return refuse(refusal.code(), &refusal.to_string()),
    };
    if let Some(error) = &started.exec_error {
        say(&format!("failed {error}"));
    }
    // Whoever reads our output sees its end here. Without /dev/null we go on: the server must be kept.
    let _ = keep::let_go_of_output();
    match keep::keep(&directory, started) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(71),
    }
}

fn refuse(code: u8, why: &str) -> ExitCode {
    say(&format!("refused {code} {why}"));
    ExitCode::from(code)
}

/// The agent may be gone: nobody needs to hear it then.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}
