//! The simulation: the real control and agent code of a whole fleet on one thread, with a simulated store, network, hosts
//! and clock, and everything that can go wrong; what happens is judged by `drover_coordinator::invariants`.
//!
//! A seed and a commit reproduce a run: all time and all chance come from the seed. See `tests/run simulation --help`.

#[cfg(not(debug_assertions))]
compile_error!(
    "the simulation stands in for time and chance through debug assertions: build it by tests/run simulation"
);

mod agent;
mod asked;
mod chance;
mod coordinator;
mod host;
mod mutants;
mod network;
mod plan;
mod run;
mod store;
mod trace;
mod world;

use clap::{Parser, Subcommand};
use plan::{Plan, Towards};
use run::{Options, Outcome, run};
use std::{
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

/// Simulates fleets, seed by seed, and judges them.
#[derive(Debug, Parser)]
#[command(name = "simulation")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Runs seeds; ends with 1 when a rule was broken.
    Simulation {
        /// Seeds, as in 0..100: the last one is not run.
        #[arg(long, default_value = "0..1000")]
        seeds: String,
        /// Threads.
        #[arg(long, default_value_t = 2)]
        jobs: usize,
        /// Without faults.
        #[arg(long)]
        calm: bool,
        /// Runs each seed twice, and compares.
        #[arg(long)]
        twice: bool,
        /// Prints everything that happens.
        #[arg(long)]
        trace: bool,
        /// Breaks a rule of the programs on purpose; most need a plan towards something, see there.
        #[arg(long)]
        mutant: Option<String>,
        /// With much more of one thing than a random plan has.
        #[arg(long)]
        towards: Option<Towards>,
        /// Stops at so many seeds that break a rule.
        #[arg(long, default_value_t = 5)]
        most: usize,
    },
    /// Breaks each rule of the programs on purpose: each must be caught, and named by the right rule.
    Mutants {
        /// Only this one.
        name: Option<String>,
        /// Most seeds that each is tried with.
        #[arg(long, default_value_t = 1500)]
        seeds: u64,
    },
}

fn main() -> ExitCode {
    if !run::repeats() {
        eprintln!(
            "error: this build can't repeat a run, since tokio's own chance is not seeded: use tests/run simulation"
        );
        return ExitCode::from(2);
    }
    if !cfg!(debug_assertions) {
        eprintln!("error: this build has no seams for a simulation: use tests/run simulation");
        return ExitCode::from(2);
    }
    if std::env::var_os("DROVER_SIMULATION_LOG").is_some() {
        tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).without_time().init();
    }
    match Arguments::parse().what {
        What::Simulation { seeds, jobs, calm, twice, trace, mutant, towards, most } => {
            let Some(range) = range(&seeds) else {
                eprintln!("error: --seeds \"{seeds}\": expected A..B, as in 0..1000");
                return ExitCode::from(2);
            };
            let mutant = match mutant.as_deref().map(mutants::named) {
                Some(None) => {
                    eprintln!("error: --mutant: there is none of that name; see: tests/run mutants --help");
                    return ExitCode::from(2);
                }
                known => known.flatten().map(|mutant| mutant.name),
            };
            let options = Options { keep: 200, print: trace, mutant };
            let plan = move |seed| {
                let plan = Plan::of(seed, calm);
                towards.into_iter().fold(plan, Plan::towards)
            };
            seeds_of(range, jobs, &plan, twice, most, options)
        }
        What::Mutants { name, seeds } => mutants::all(name.as_deref(), seeds),
    }
}

fn range(text: &str) -> Option<std::ops::Range<u64>> {
    let (from, to) = text.split_once("..")?;
    Some(from.parse().ok()?..to.parse().ok()?)
}

fn seeds_of(
    range: std::ops::Range<u64>,
    jobs: usize,
    plan_of: &(dyn Fn(u64) -> Plan + Sync),
    twice: bool,
    most: usize,
    options: Options,
) -> ExitCode {
    let begun = Instant::now();
    let next = AtomicU64::new(range.start);
    let broken: Mutex<Vec<Outcome>> = Mutex::default();
    let (simulated, revisions, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let differing: Mutex<Vec<u64>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= range.end || world::lock(&broken).len() >= most {
                        return;
                    }
                    let plan = plan_of(seed);
                    let outcome = run(&plan, options);
                    simulated.fetch_add(outcome.simulated.as_secs(), Ordering::Relaxed);
                    revisions.fetch_add(outcome.revisions.unsigned_abs(), Ordering::Relaxed);
                    done.fetch_add(1, Ordering::Relaxed);
                    if twice && run(&plan, options).hash != outcome.hash {
                        world::lock(&differing).push(seed);
                    }
                    if !outcome.violations.is_empty() {
                        world::lock(&broken).push(outcome);
                    }
                }
            });
        }
    });
    let broken = world::lock(&broken).clone();
    for outcome in &broken {
        println!("seed {} (hash {:016x}):", outcome.seed, outcome.hash);
        println!("{:#?}", plan_of(outcome.seed));
        outcome.last.iter().for_each(|line| println!("{line}"));
        for violation in outcome.violations.iter().take(10) {
            println!("seed {}: VIOLATION {violation}", outcome.seed);
        }
    }
    let differing = world::lock(&differing).clone();
    for seed in &differing {
        println!("seed {seed}: two runs of it differ");
    }
    let took = begun.elapsed();
    let done = done.into_inner();
    println!(
        "{done} seeds from {}, {} h simulated, {} revisions, in {:.1} s ({:.1} ms a seed): {} with violations",
        range.start,
        simulated.into_inner() / 3600,
        revisions.into_inner(),
        took.as_secs_f64(),
        took.as_secs_f64() * 1000.0 / done.max(1) as f64,
        broken.len()
    );
    if broken.is_empty() && differing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::*;
    use plan::Step;

    #[test]
    fn a_fleet_without_faults_comes_to_what_was_asked_of_it() {
        for seed in 0..3 {
            let outcome = run(&Plan::of(seed, true), Options { keep: 100, ..Options::default() });
            assert_eq!(outcome.violations, [], "seed {seed}\n{}", outcome.last.join("\n"));
            assert!(outcome.revisions > 20, "{outcome:?}");
        }
    }

    /// Whatever ran is claimed again where it runs: nothing is started once more, nothing is signalled, and all is ready.
    #[test]
    #[cfg_attr(not(tokio_unstable), ignore = "hangs on chance that is seeded with --cfg tokio_unstable alone")]
    fn servers_outlive_a_restore_and_are_claimed_again_in_their_place() {
        let mut lived = 0;
        for seed in 0..20 {
            let mut plan = Plan::of(seed, true);
            plan.steps.extend([(10_000, Step::Copy), (11_000, Step::Restore { ms: 1500 })]);
            plan.chaos_ms = 25_000;
            let outcome = run(&plan, Options { keep: 100_000, ..Options::default() });
            assert_eq!(outcome.violations, [], "seed {seed}\n{}", outcome.last.join("\n"));
            let restored = outcome.last.iter().position(|line| line.contains("the store goes on from")).unwrap();
            let (before, after) = outcome.last.split_at(restored);
            let count = |lines: &[String], what: &str| lines.iter().filter(|line| line.contains(what)).count();
            // "host n0: Started { pid: 1, …": host and pid name a process.
            let of = |lines: &[String], what: &str| {
                let found = lines.iter().filter(|line| line.contains(&format!(": {what} {{ pid: ")));
                let mut found: Vec<_> = found
                    .map(|line| {
                        let (host, rest) = line.split_once(&format!(": {what} {{ pid: ")).unwrap();
                        let pid = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().to_owned();
                        (host.rsplit(' ').next().unwrap().to_owned(), pid)
                    })
                    .collect();
                found.sort();
                found
            };
            let ended = of(before, "Ended");
            let mut living = of(before, "Started");
            living.retain(|process| !ended.contains(process));
            lived += living.len();
            let instance = |line: &str| Some(line.split_once("instance: \"")?.1.split('"').next()?.to_owned());
            let started = |lines: &[String]| -> Vec<_> {
                lines.iter().filter(|line| line.contains(": Started")).filter_map(|line| instance(line)).collect()
            };
            let ran = started(before);
            assert!(started(after).iter().all(|id| !ran.contains(id)), "seed {seed}: started once more");
            assert_eq!(of(after, "Raised"), living, "seed {seed}: each once\n{}", outcome.last.join("\n"));
            assert_eq!(count(after, ": Signalled"), 0, "seed {seed}");
        }
        assert!(lived > 0, "nothing ran when the store was set back");
    }

    #[test]
    fn every_mutant_has_a_name_of_its_own() {
        let mut names: Vec<_> = mutants::ALL.iter().map(|mutant| mutant.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), mutants::ALL.len());
        assert!(names.len() >= 16);
    }
}
