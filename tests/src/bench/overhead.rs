//! `overhead`: what agent, proxy and shims use while many servers of their host have nothing to do.
//!
//! Memory is private memory (Private_Clean and Private_Dirty), with the resident set beside it; processor time is user and
//! system time over the measured seconds, in percent of one core. The servers, the coordinator and etcd are shown for
//! information.

use super::idle;
use anyhow::ensure;
use drover_tests::{
    cluster::Plan,
    measure::{self, Kind, Program, Usage},
};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::{Instant, sleep};

/// Time for what a start leaves to do: reports, exports, quick probes.
const SETTLE: Duration = Duration::from_secs(15);
const AIM_AGENT_RSS_KB: u64 = 20 << 10;
const AIM_SHIM_PRIVATE_KB: u64 = 1 << 10;
const AIM_CPU_PERCENT: f64 = 2.0;

/// All processes of a kind together.
#[derive(Debug, Default)]
struct Figures {
    number: usize,
    rss_kb: u64,
    rss_max_kb: u64,
    private_kb: u64,
    private_max_kb: u64,
    cpu: Duration,
    threads: u64,
    descriptors: u64,
}

/// Runs the benchmark and prints its figures.
pub async fn run(servers: i32, seconds: u64, json: bool) -> anyhow::Result<()> {
    // As an operator runs it: without the tests' detailed log.
    let plan = Plan { environment: vec![("DROVER_LOG_FILTER".to_owned(), "info".to_owned())], ..Plan::default() };
    let cluster = idle::fleet(servers, plan).await?;
    eprintln!("{} s for things to settle, then {seconds} s are measured", SETTLE.as_secs());
    sleep(SETTLE).await;
    let look = || -> anyhow::Result<BTreeMap<Program, Usage>> {
        measure::programs(&cluster).into_iter().map(|p| Ok((p.clone(), Usage::of(p.pid)?))).collect()
    };
    let (begun, before) = (Instant::now(), look()?);
    sleep(Duration::from_secs(seconds)).await;
    let (took, after) = (begun.elapsed(), look()?);
    idle::end(cluster).await?;

    let mut kinds: BTreeMap<Kind, Figures> = BTreeMap::new();
    for (program, usage) in &after {
        let first = before.get(program).filter(|first| first.start_ticks == usage.start_ticks);
        ensure!(first.is_some(), "{program} was started while nothing was to be done");
        let cpu = first.map_or(Duration::ZERO, |first| usage.cpu.saturating_sub(first.cpu));
        let sum = kinds.entry(program.kind).or_default();
        sum.number += 1;
        sum.rss_kb += usage.rss_kb;
        sum.rss_max_kb = sum.rss_max_kb.max(usage.rss_kb);
        sum.private_kb += usage.private_kb;
        sum.private_max_kb = sum.private_max_kb.max(usage.private_kb);
        sum.cpu += cpu;
        sum.threads += usage.threads;
        sum.descriptors += usage.descriptors;
    }
    let percent = |cpu: Duration| cpu.as_secs_f64() / took.as_secs_f64() * 100.0;
    let of = |kind: Kind| kinds.get(&kind);
    let cpu: f64 = [Kind::Agent, Kind::Proxy, Kind::Shim].into_iter().filter_map(of).map(|f| percent(f.cpu)).sum();
    let agent_rss_kb = of(Kind::Agent).map_or(0, |f| f.rss_max_kb);
    let shim_private_kb = of(Kind::Shim).map_or(0, |f| f.private_max_kb);
    let within = agent_rss_kb <= AIM_AGENT_RSS_KB && shim_private_kb <= AIM_SHIM_PRIVATE_KB && cpu <= AIM_CPU_PERCENT;
    if json {
        let rows = kinds.iter().map(|(kind, f)| {
            serde_json::json!({
                "kind": format!("{kind:?}").to_lowercase(), "number": f.number, "rss_kb": f.rss_kb,
                "rss_max_kb": f.rss_max_kb, "private_kb": f.private_kb, "private_max_kb": f.private_max_kb,
                "cpu_percent": percent(f.cpu), "threads": f.threads, "descriptors": f.descriptors,
            })
        });
        println!(
            "{}",
            serde_json::json!({
                "servers": servers, "seconds": took.as_secs_f64(), "kinds": rows.collect::<Vec<_>>(),
                "agent_rss_kb": agent_rss_kb, "shim_private_kb": shim_private_kb, "cpu_percent": cpu,
                "within_aims": within,
            })
        );
        return Ok(());
    }
    println!("{servers} idle servers, {:.0} s", took.as_secs_f64());
    println!("kind          number   RSS KB each (most)   private KB each (most)   CPU % of a core   threads   fds");
    for (kind, f) in &kinds {
        let number = f.number.max(1) as u64;
        println!(
            "{:<12} {:>7}   {:>8} ({:>7})   {:>12} ({:>7})   {:>15.2}   {:>7}   {:>3}",
            format!("{kind:?}").to_lowercase(),
            f.number,
            f.rss_kb / number,
            f.rss_max_kb,
            f.private_kb / number,
            f.private_max_kb,
            percent(f.cpu),
            f.threads,
            f.descriptors,
        );
    }
    println!("agent: {agent_rss_kb} KB resident, aim {AIM_AGENT_RSS_KB}");
    println!("shim: {shim_private_kb} KB private at most, aim {AIM_SHIM_PRIVATE_KB}");
    println!("agent, proxy and shims: {cpu:.2} % of a core, aim {AIM_CPU_PERCENT}");
    Ok(())
}
