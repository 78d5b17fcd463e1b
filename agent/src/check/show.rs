//! PURE: a report as text, for people and for programs.

use super::report::{FileReport, FileState, Instance, Life, LockReport, Process, ProcessState, Report};
use std::fmt::Write as _;

/// The report as one JSON object.
pub(super) fn json(report: &Report) -> String {
    // Strings, numbers and lists only: nothing in it can fail to be written.
    let mut text = serde_json::to_string_pretty(report).unwrap_or_default();
    text.push('\n');
    text
}

/// The report for people.
pub(super) fn table(report: &Report) -> String {
    let mut text = String::new();
    let session = match report.session.file.state {
        FileState::Good => format!(
            "{}, store generation {}, cluster {}, halt generation {}",
            report.session.id,
            report.session.store_generation,
            report.session.cluster_id,
            report.session.halt_generation
        ),
        _ => word(&report.session.file).to_owned(),
    };
    let facts = [
        ("State folder", report.state_dir.display().to_string()),
        ("Runtime folder", report.runtime_dir.display().to_string()),
        ("Agent", holder(&report.agent, "runs", "does not run")),
        ("Session", session),
        (
            "Machine id",
            if report.machine.state == FileState::Absent {
                "the system's".to_owned()
            } else {
                word(&report.machine).to_owned()
            },
        ),
        (
            "Proxy",
            format!(
                "{}, address {}",
                holder(&report.proxy.lock, "runs", "does not run"),
                report.proxy.address.as_deref().unwrap_or("unknown")
            ),
        ),
        (
            "Proxy's socket",
            report.proxy.socket_mode.as_ref().map_or("absent".to_owned(), |mode| format!("mode {mode}")),
        ),
        (
            "Join secret",
            report.proxy.secret_file_mode.as_ref().map_or("none".to_owned(), |mode| format!("mode {mode}")),
        ),
    ];
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in facts {
        // Writing to a string does not fail; nor below.
        let _ = writeln!(text, "{name:width$}  {value}");
    }
    let columns = ["INSTANCE", "TOKEN", "STAGE", "PID", "PROCESS", "SHIM", "SPEC", "RECORD", "CLAIM", "EXIT"];
    rows(&mut text, &columns, report.instances.iter().map(instance).collect());
    let columns =
        ["SPANS OF", "STATE", "ISSUED", "ACKNOWLEDGED", "REJECTED", "GIVEN UP", "HELD", "HELD RANGES", "DAMAGED"];
    rows(&mut text, &columns, report.spool.iter().map(life).collect());
    for finding in &report.findings {
        let severity = match finding.severity {
            super::Severity::Note => "note",
            super::Severity::Inconsistent => "inconsistent",
            super::Severity::Damaged => "damaged",
        };
        let _ = write!(
            text,
            "\n{severity}: {}: {}\n  next start: {}\n  way out:    {}\n",
            finding.about, finding.what, finding.next_start, finding.way_out
        );
    }
    let _ = writeln!(text, "\n{}", if report.good { "All is well." } else { "Not all is well: see above." });
    text
}

fn instance(instance: &Instance) -> Vec<String> {
    let process = |process: &Process| match process.state {
        ProcessState::Matching => "matching",
        ProcessState::Other => "other",
        ProcessState::Unknown => "unknown",
        ProcessState::Ended => "ended",
        ProcessState::None => "none",
    };
    let end = match &instance.end {
        Some(end) if end.lease_lost => "lease lost".to_owned(),
        Some(end) => match (end.code, end.signal) {
            (Some(code), _) => format!("code {code}"),
            (None, Some(_)) if end.oom_killed == Some(true) => {
                "killed by the kernel because memory was short".to_owned()
            }
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "unknown".to_owned(),
        },
        None => word(&instance.exit).to_owned(),
    };
    vec![
        instance.id.clone(),
        instance.token.clone(),
        instance.stage.unwrap_or("-").to_owned(),
        instance.process.pid.map_or("-".to_owned(), |pid| pid.to_string()),
        process(&instance.process).to_owned(),
        holder(&instance.shim, "lives", "none"),
        word(&instance.spec).to_owned(),
        word(&instance.record).to_owned(),
        word(&instance.claim).to_owned(),
        end,
    ]
}

fn life(life: &Life) -> Vec<String> {
    let number = |value: Option<u64>| value.map_or("?".to_owned(), |value| value.to_string());
    let held = life.segments.iter().filter(|segment| segment.held > 0);
    let ranges = held.filter_map(|s| Some(format!("{}-{}", s.last?.saturating_sub(s.held - 1), s.last?)));
    let state = match (&life.lock, life.ended) {
        (LockReport::Process(_), Some(false)) => "living",
        (LockReport::Process(_), _) => "being exported",
        (_, Some(true)) => "ended",
        _ => "cut off",
    };
    vec![
        life.epoch.clone(),
        state.to_owned(),
        number(life.issued),
        number(life.acknowledged),
        number(life.rejected),
        number(life.given_up),
        life.held.to_string(),
        Some(ranges.collect::<Vec<_>>().join(" ")).filter(|r| !r.is_empty()).unwrap_or_else(|| "-".to_owned()),
        life.segments.iter().filter(|s| s.damaged).count().to_string(),
    ]
}

fn word(file: &FileReport) -> &'static str {
    match file.state {
        FileState::Good => "good",
        FileState::Absent => "absent",
        FileState::Damaged => "damaged",
        FileState::Unreadable => "unreadable",
        FileState::Newer => "of a newer version",
    }
}

fn holder(lock: &LockReport, held: &str, free: &str) -> String {
    match lock {
        LockReport::Process(pid) => format!("{held} (pid {pid})"),
        LockReport::Nobody => free.to_owned(),
        LockReport::Unknown(_) => "unknown".to_owned(),
    }
}

fn rows(text: &mut String, columns: &[&str], rows: Vec<Vec<String>>) {
    if rows.is_empty() {
        return;
    }
    let width =
        |at: usize| rows.iter().map(|row| row[at].chars().count()).chain([columns[at].len()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut line = |cells: Vec<&str>| {
        let cells = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    };
    line(Vec::new());
    line(columns.to_vec());
    for row in &rows {
        line(row.iter().map(String::as_str).collect());
    }
}
