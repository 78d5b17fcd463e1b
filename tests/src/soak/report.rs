//! PURE: the figures of a soak, for people and for programs, and whether they pass.

use super::{
    clients::Requests,
    fit::Line,
    left::Left,
    series::{Fitted, Row},
};
use drover_tests::measure::Kind;
use serde_json::{Value, json};
use std::{collections::BTreeMap, fmt::Write as _};

/// Growth of descriptors and of threads that is tolerated, each a minute.
const TOLERANCE_EACH: f64 = 0.2;
/// A shorter soak says nothing of growth: caches and pools fill.
const JUDGED_MINUTES_MIN: f64 = 10.0;

/// All figures.
#[derive(Debug)]
pub struct Report {
    /// Seed.
    pub seed: u64,
    /// Length of the churn, in minutes.
    pub minutes: f64,
    /// Growth of memory that is tolerated, in KB a minute.
    pub tolerance_kb: f64,
    /// How often each thing was done.
    pub operations: BTreeMap<&'static str, u64>,
    /// What became of the requests.
    pub requests: Requests,
    /// The programs.
    pub rows: Vec<Row>,
    /// Before the churn.
    pub base: Left,
    /// After it.
    pub end: Left,
    /// How many faults, and the first of them.
    pub faults: (u64, Vec<String>),
}

impl Report {
    /// Whether nothing grew, failed or was left.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.faults.0 == 0 && self.growing().is_empty()
    }

    fn judged(&self) -> bool {
        self.minutes >= JUDGED_MINUTES_MIN
    }

    /// What grows, in words. etcd keeps the history of its keys until it is compacted: it is not ours to judge.
    fn growing(&self) -> Vec<String> {
        let mut growing = Vec::new();
        for row in self.rows.iter().filter(|row| self.judged() && row.kind != Kind::Etcd) {
            let Some(fitted) = &row.fitted else { continue };
            for (what, line, tolerance) in [
                ("resident memory in KB", &fitted.rss, self.tolerance_kb),
                ("private memory in KB", &fitted.private, self.tolerance_kb),
                ("number of descriptors", &fitted.descriptor, TOLERANCE_EACH),
                ("number of threads", &fitted.thread, TOLERANCE_EACH),
            ] {
                if line.grows(tolerance) {
                    growing.push(format!(
                        "{}: its {what} grows by {:.2} a minute (from {:.2} to {:.2} for sure), {tolerance} are tolerated",
                        row.name, line.slope, line.low, line.high
                    ));
                }
            }
        }
        growing
    }

    fn operations_sum(&self) -> u64 {
        self.operations.values().sum()
    }

    /// Growth for 1,000 operations instead of a minute.
    fn by_operations(&self, slope: f64) -> f64 {
        slope * self.minutes * 1000.0 / (self.operations_sum() as f64).max(1.0)
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("soak of {} minutes, seed {}\n\n", self.minutes, self.seed);
        let done: Vec<String> = self.operations.iter().map(|(what, n)| format!("{what} {n}")).collect();
        let _ = writeln!(text, "{} operations: {}", self.operations_sum(), done.join(", "));
        let r = &self.requests;
        let _ = writeln!(
            text,
            "{} requests to the steady deployment and {} to others were answered whole, {} were left by the client, \
             {} refused or broken as they may be, {} failed\n",
            r.steady, r.others, r.left, r.refused, r.failed
        );
        let _ = writeln!(
            text,
            "{:<28} {:>9} {:>9} {:>9} {:>19} {:>10} {:>7} {:>9} {:>9} {:>9} {:>7}",
            "program",
            "warm KB",
            "end KB",
            "KB/min",
            "99 % interval",
            "KB/1000op",
            "noise",
            "priv KB",
            "KB/min",
            "fds",
            "threads"
        );
        for row in &self.rows {
            let name: String = row.name.chars().take(28).collect();
            let Some(f) = &row.fitted else {
                let _ = writeln!(text, "{name:<28} at most {:.0} KB resident", row.peak_kb);
                continue;
            };
            let _ = writeln!(
                text,
                "{name:<28} {:>9.0} {:>9.0} {:>9.2} {:>19} {:>10.1} {:>7.1} {:>9.0} {:>9.2} {:>9} {:>7}",
                f.rss_kb.0,
                f.rss_kb.1,
                f.rss.slope,
                format!("{:.2} … {:.2}", f.rss.low, f.rss.high),
                self.by_operations(f.rss.slope),
                f.rss.noise,
                f.private_kb.1,
                f.private.slope,
                format!("{:.0} → {:.0}", f.descriptors.0, f.descriptors.1),
                format!("{:.0} → {:.0}", f.threads.0, f.threads.1),
            );
        }
        let _ = writeln!(text, "\n{:<28} {:>12} {:>12}", "", "before", "after");
        let _ = writeln!(text, "{:<28} {:>12} {:>12}", "keys in the store", self.base.keys, self.end.keys);
        let _ =
            writeln!(text, "{:<28} {:>12} {:>12}", "etcd's database, bytes", self.base.etcd_bytes, self.end.etcd_bytes);
        for (name, now) in &self.end.folders {
            let before = self.base.folders.get(name).copied().unwrap_or_default();
            let _ = writeln!(text, "{:<28} {:>12} {:>12}", format!("{name}, files"), before.files, now.files);
            let _ = writeln!(text, "{:<28} {:>12} {:>12}", format!("{name}, bytes"), before.bytes, now.bytes);
        }
        text.push('\n');
        let growing = self.growing();
        if !self.judged() {
            let _ = writeln!(text, "shorter than {JUDGED_MINUTES_MIN} minutes: growth is shown, and not judged");
        }
        for what in &growing {
            let _ = writeln!(text, "GROWS: {what}");
        }
        for what in &self.faults.1 {
            let _ = writeln!(text, "FAULT: {what}");
        }
        let _ = match (self.passed(), growing.len(), self.faults.0) {
            (true, ..) => writeln!(
                text,
                "passed: nothing grew by more than {} KB a minute, failed or was left",
                self.tolerance_kb
            ),
            (_, growing, faults) => {
                writeln!(text, "failed: {growing} figures grow, {faults} faults; again with --seed {}", self.seed)
            }
        };
        text
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            json!({
                "program": row.name, "kind": format!("{:?}", row.kind).to_lowercase(), "peak_rss_kb": row.peak_kb,
                "fitted": row.fitted.as_ref().map(|fitted| self.fitted(fitted)),
            })
        });
        let folders = |left: &Left| {
            let folders = left.folders.iter();
            Value::from_iter(
                folders.map(|(name, f)| ((*name).to_owned(), json!({ "files": f.files, "bytes": f.bytes }))),
            )
        };
        let left = |left: &Left| json!({ "keys": left.keys, "etcd_bytes": left.etcd_bytes, "folders": folders(left) });
        json!({
            "passed": self.passed(), "seed": self.seed, "minutes": self.minutes, "tolerance_kb_per_minute": self.tolerance_kb,
            "judged": self.judged(), "operations": self.operations,
            "requests": {
                "steady": self.requests.steady, "others": self.requests.others, "left": self.requests.left,
                "refused": self.requests.refused, "failed": self.requests.failed,
            },
            "programs": rows.collect::<Vec<_>>(), "before": left(&self.base), "after": left(&self.end),
            "growing": self.growing(), "faults": self.faults.0, "first_faults": self.faults.1,
        })
    }

    fn fitted(&self, f: &Fitted) -> Value {
        let line = |ends: (f64, f64), line: &Line| {
            json!({
                "warm": ends.0, "end": ends.1, "per_minute": line.slope, "low": line.low, "high": line.high,
                "per_1000_operations": self.by_operations(line.slope), "noise": line.noise,
            })
        };
        json!({
            "rss_kb": line(f.rss_kb, &f.rss), "private_kb": line(f.private_kb, &f.private),
            "descriptors": line(f.descriptors, &f.descriptor), "threads": line(f.threads, &f.thread),
        })
    }
}
