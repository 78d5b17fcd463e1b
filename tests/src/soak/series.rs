//! Samples of every process of the fleet, from the first minute to the last, and what they say of each.

use super::{
    churn::Counts,
    clients::{Clients, Requests},
    fit::{self, Line},
};
use drover_tests::{
    cluster::Cluster,
    measure::{Kind, Program, Usage, programs_of},
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

/// Samples taken in all, unless they would come closer together or further apart than this.
const SAMPLES: u32 = 360;
const INTERVAL_MIN: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = Duration::from_secs(5);
/// Part of the time that warms up.
const WARM_UP: f64 = 1.0 / 3.0;
/// Part of the rest that a program must have lived through to be judged.
const COVERED: f64 = 0.9;
/// How often progress is shown.
const PROGRESS: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy)]
struct Sample {
    /// Minutes since the churn began.
    at: f64,
    usage: Usage,
}

/// All samples.
#[derive(Debug)]
pub struct Series {
    folder: PathBuf,
    etcd: Option<u32>,
    length: Duration,
    requests: Arc<Mutex<Requests>>,
    /// By program and start time: whoever bears a pid again is another.
    samples: BTreeMap<(Program, u64), Vec<Sample>>,
}

/// One program that lived through everything after the warm-up, or all those of a kind that did not.
#[derive(Debug, Clone)]
pub struct Row {
    /// What it is.
    pub kind: Kind,
    /// Its name, or how many there were.
    pub name: String,
    /// Most resident memory at any time, in KiB.
    pub peak_kb: f64,
    /// What was fitted; absent where no process lived long enough.
    pub fitted: Option<Fitted>,
}

/// Figures of one program after the warm-up: KiB, descriptors, threads, each a minute.
#[derive(Debug, Clone, Copy)]
pub struct Fitted {
    /// Resident memory when the warm-up ended, and at the end.
    pub rss_kb: (f64, f64),
    /// Its line.
    pub rss: Line,
    /// Private memory.
    pub private_kb: (f64, f64),
    /// Its line.
    pub private: Line,
    /// Descriptors.
    pub descriptors: (f64, f64),
    /// Their line.
    pub descriptor: Line,
    /// Threads.
    pub threads: (f64, f64),
    /// Their line.
    pub thread: Line,
}

impl Series {
    /// None yet.
    pub fn new(cluster: &Cluster, length: Duration, clients: &Clients) -> Self {
        Self {
            folder: cluster.folder().to_owned(),
            etcd: cluster.etcd.pid(),
            length,
            requests: clients.done(),
            samples: BTreeMap::new(),
        }
    }

    /// Samples until then, and shows how far it is.
    pub async fn sample(&mut self, until: Instant, counts: &Counts) {
        let begun = Instant::now();
        let mut ticks = interval((self.length / SAMPLES).clamp(INTERVAL_MIN, INTERVAL_MAX));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut shown = begun;
        loop {
            tokio::select! {
                () = sleep_until(until) => return,
                _ = ticks.tick() => {}
            }
            let (folder, etcd) = (self.folder.clone(), self.etcd);
            // The whole of /proc: not in the way of the clients.
            let found = tokio::task::spawn_blocking(move || {
                let all = programs_of(&folder, etcd).into_iter().filter(|p| p.kind != Kind::Server);
                // One that ends while it is looked at is none.
                all.filter_map(|program| Some((Usage::of(program.pid).ok()?, program))).collect::<Vec<_>>()
            });
            let at = begun.elapsed().as_secs_f64() / 60.0;
            for (usage, program) in found.await.unwrap_or_default() {
                self.samples.entry((program, usage.start_ticks)).or_default().push(Sample { at, usage });
            }
            if shown.elapsed() >= PROGRESS {
                shown = Instant::now();
                self.show(at, counts);
            }
        }
    }

    fn show(&self, at: f64, counts: &Counts) {
        let requests = *self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let now =
            self.samples.iter().filter(|((program, _), _)| program.kind != Kind::Shim && program.kind != Kind::Etcd);
        let memory = now.filter_map(|((program, _), samples)| {
            let last = samples.last().filter(|last| last.at == at)?;
            Some(format!("{program} {:.1}", last.usage.rss_kb as f64 / 1024.0))
        });
        eprintln!(
            "minute {at:.1} of {:.1}: {} operations, {} requests answered, {} refused, {} failed; MiB: {}",
            self.length.as_secs_f64() / 60.0,
            counts.sum(),
            requests.steady + requests.others,
            requests.refused,
            requests.failed,
            memory.collect::<Vec<_>>().join(", ")
        );
    }

    /// What the samples say: the programs that lived through it all, then the others by their kinds.
    pub fn rows(&self) -> Vec<Row> {
        let length = self.length.as_secs_f64() / 60.0;
        let begin = length * WARM_UP;
        let mut rows = Vec::new();
        let mut others: BTreeMap<Kind, (usize, f64)> = BTreeMap::new();
        for ((program, _), samples) in &self.samples {
            let peak_kb = samples.iter().map(|s| s.usage.rss_kb as f64).fold(0.0, f64::max);
            let judged: Vec<Sample> = samples.iter().filter(|s| s.at >= begin).copied().collect();
            let covered = match (judged.first(), judged.last()) {
                (Some(first), Some(last)) => last.at - first.at,
                _ => 0.0,
            };
            let fitted = if covered >= (length - begin) * COVERED { Fitted::of(&judged) } else { None };
            if fitted.is_some() {
                rows.push(Row { kind: program.kind, name: program.to_string(), peak_kb, fitted });
            } else {
                let other = others.entry(program.kind).or_default();
                *other = (other.0 + 1, other.1.max(peak_kb));
            }
        }
        rows.extend(others.into_iter().map(|(kind, (number, peak_kb))| {
            let name = format!("{number} shorter {kind:?}s").to_lowercase();
            Row { kind, name, peak_kb, fitted: None }
        }));
        rows
    }
}

impl Fitted {
    fn of(samples: &[Sample]) -> Option<Self> {
        let one = |value: fn(&Usage) -> u64| {
            let points: Vec<(f64, f64)> = samples.iter().map(|s| (s.at, value(&s.usage) as f64)).collect();
            // A tenth at each end, so that no single moment counts.
            let tenth = points.len().div_ceil(10);
            let median = |part: &[(f64, f64)]| fit::median(part.iter().map(|p| p.1));
            let ends = (median(&points[..tenth]), median(&points[points.len() - tenth..]));
            Some((ends, fit::line(&points)?))
        };
        let (rss_kb, rss) = one(|usage| usage.rss_kb)?;
        let (private_kb, private) = one(|usage| usage.private_kb)?;
        let (descriptors, descriptor) = one(|usage| usage.descriptors)?;
        let (threads, thread) = one(|usage| usage.threads)?;
        Some(Self { rss_kb, rss, private_kb, private, descriptors, descriptor, threads, thread })
    }
}
