//! Processor time of the parts of a fleet, from each process's own clock: exact to the nanosecond, ended threads included.

use drover_tests::{
    cluster::Cluster,
    programs::{Found, processes_with},
};
use nix::{time::ClockId, unistd::Pid};
use std::{collections::BTreeMap, time::Duration};

/// What is told apart, in the order in which it is shown.
pub const PARTS: [&str; 7] = ["servers", "etcd", "coordinators", "agents", "proxies", "shims", "bench"];

/// Processor time used so far, by part. Of processes that have ended it knows nothing: read before they do.
pub type Usage = BTreeMap<&'static str, Duration>;

/// Processor time of every part of a fleet, the bench itself included.
pub fn of(cluster: &Cluster) -> Usage {
    let mut usage = Usage::new();
    for Found { pid, command } in processes_with(&cluster.mark()) {
        let mut words = command.split(' ');
        let program = words.next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        let part = match (program, words.next()) {
            ("llama-server", _) => "servers",
            ("drover-shim", _) => "shims",
            ("drover-coordinator", _) => "coordinators",
            ("drover-agent", Some("proxy")) => "proxies",
            ("drover-agent", _) => "agents",
            _ => continue,
        };
        *usage.entry(part).or_default() += of_process(pid);
    }
    let etcd = cluster.etcd.pid().and_then(|pid| i32::try_from(pid).ok());
    usage.insert("etcd", etcd.map(of_process).unwrap_or_default());
    usage.insert("bench", of_process(Pid::this().as_raw()));
    usage
}

/// What was used between two looks.
pub fn between(before: &Usage, after: &Usage) -> Usage {
    let used = |part: &str, now: &Duration| now.saturating_sub(before.get(part).copied().unwrap_or_default());
    after.iter().map(|(part, now)| (*part, used(part, now))).collect()
}

/// Processor time of a process; none when it has ended.
pub fn of_process(pid: i32) -> Duration {
    let now = ClockId::pid_cpu_clock_id(Pid::from_raw(pid)).and_then(ClockId::now);
    now.map(Duration::from).unwrap_or_default()
}
