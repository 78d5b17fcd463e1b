//! `claims`: claims over `NodeService.Claim`, beside bare transactions of etcd of the same shape: the same compares, puts
//! and reads, of records of the same size, each caller one after the other on a connection of its own, in the same etcd in
//! turn. etcd syncs each of its entries, as always.
//!
//! A claim is the way of one caller from its request to its answer. Two kinds of row: several nodes which each claim one
//! instance a call, and one node alone which claims 32 a call (`NodeService.ClaimMany`), beside as large transactions.

use anyhow::{Context as _, ensure};
use drover_proto::{
    limits,
    v1::{ApplyDeploymentRequest, ClaimItem, DeleteDeploymentRequest, DeploymentSpec, ListInstancesRequest, Token},
};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    node::Node,
    programs::eventually,
};
use etcd_client::{Client, Compare, CompareOp, DeleteOptions, GetOptions, PutOptions, Txn, TxnOp};
use futures::future::{join_all, try_join_all};
use std::time::Duration;
use tokio::time::Instant;

/// Claims of a round, spread over its callers.
const CLAIMS: usize = 512;

/// Who claims in a round.
#[derive(Debug, Clone, Copy)]
struct Callers {
    count: usize,
    /// Claims of one call.
    batch: usize,
}

impl Callers {
    /// Calls of each.
    fn calls(self) -> usize {
        // One caller alone takes its time for each: fewer do.
        let claims = if self.count == 1 && self.batch == 1 { CLAIMS / 2 } else { CLAIMS };
        claims / self.count / self.batch
    }

    fn claims(self) -> usize {
        self.calls() * self.count * self.batch
    }
}

/// What the rounds of one kind have taken.
#[derive(Debug, Default)]
struct Taken {
    /// Claims a second, of each round.
    rates: Vec<f64>,
    /// Of each call, in milliseconds.
    latencies: Vec<f64>,
}

impl Taken {
    fn add(&mut self, callers: Callers, took: Duration, latencies: Vec<Vec<Duration>>) {
        self.rates.push(callers.claims() as f64 / took.as_secs_f64());
        self.latencies.extend(latencies.into_iter().flatten().map(|one| one.as_secs_f64() * 1000.0));
    }

    fn rate(&self) -> f64 {
        quantile(&self.rates, 0.5)
    }

    fn json(&self) -> serde_json::Value {
        let of = |q| quantile(&self.latencies, q);
        serde_json::json!({ "claims_per_s": self.rate(), "p50_ms": of(0.5), "p99_ms": of(0.99) })
    }
}

fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * q).round() as usize).copied().unwrap_or_default()
}

/// The records that a claim reads and writes, as they were found in the store.
#[derive(Debug, Default)]
struct Shape {
    session: Vec<u8>,
    claim: Vec<u8>,
    taken: Vec<u8>,
    instance: Vec<u8>,
}

/// Runs the benchmark and prints its figures.
pub async fn run(claimers: Vec<usize>, runs: usize, json: bool) -> anyhow::Result<()> {
    let nodes = claimers.iter().copied().max().unwrap_or(1);
    let plan = Plan {
        agents: 0,
        coordinator_toml: format!("offer_candidates = {nodes}\noffer_deadline_ms = 600000\nsession_ttl_ms = 60000\n"),
        ..Plan::default()
    };
    let cluster = Cluster::start(plan).await?;
    let mut members = try_join_all((0..nodes).map(|n| Node::join(&cluster, n))).await?;
    let etcd = Etcd { endpoint: cluster.etcd.endpoints().remove(0) };
    let alone = Callers { count: 1, batch: limits::CLAIMS_PER_CALL_MAX };
    let rows = claimers.into_iter().map(|count| Callers { count, batch: 1 }).chain([alone]);
    let mut figures = Vec::new();
    for (row, callers) in rows.enumerate() {
        let (mut bare, mut through) = (Taken::default(), Taken::default());
        // The first round of each kind opens connections and is not counted.
        for round in 0..=runs {
            eprintln!(
                "{} callers, {} claims a call: run {round} of {runs}{}",
                callers.count,
                callers.batch,
                if round == 0 { " (not counted)" } else { "" }
            );
            let name = format!("bench{row}x{round}");
            let (took, latencies, shape) = through_drover(&cluster, &etcd, &mut members, &name, callers).await?;
            let (bare_took, bare_latencies) = etcd.transactions(&name, callers, &shape).await?;
            if round > 0 {
                through.add(callers, took, latencies);
                bare.add(callers, bare_took, bare_latencies);
            }
        }
        eprintln!("{}", line(callers, &bare, &through));
        figures.push((callers, bare, through));
    }
    drop(members);
    cluster.end().await?;
    if json {
        let rows = figures.iter().map(|(callers, bare, through)| {
            let (bare, through) = (bare.json(), through.json());
            serde_json::json!({ "callers": callers.count, "claims_a_call": callers.batch, "bare": bare, "drover": through })
        });
        println!("{}", serde_json::Value::from_iter(rows));
        return Ok(());
    }
    println!("medians of {runs} runs                 bare etcd           through drover         ratio");
    println!("callers x claims a call   claims/s  p50 ms p99 ms   claims/s  p50 ms p99 ms    rate   p99");
    for (callers, bare, through) in figures {
        println!("{}", line(callers, &bare, &through));
    }
    Ok(())
}

/// A row of the table.
fn line(callers: Callers, bare: &Taken, through: &Taken) -> String {
    let of = |taken: &Taken, q| quantile(&taken.latencies, q);
    format!(
        "{:>10} x {:<11} {:>10.0} {:>7.1} {:>6.1} {:>10.0} {:>7.1} {:>6.1} {:>7.2} {:>5.2}",
        callers.count,
        callers.batch,
        bare.rate(),
        of(bare, 0.5),
        of(bare, 0.99),
        through.rate(),
        of(through, 0.5),
        of(through, 0.99),
        through.rate() / bare.rate(),
        of(through, 0.99) / of(bare, 0.99),
    )
}

/// One round of claims by nodes. All is offered to all of them before the first claim.
async fn through_drover(
    cluster: &Cluster,
    etcd: &Etcd,
    members: &mut [Node],
    name: &str,
    callers: Callers,
) -> anyhow::Result<(Duration, Vec<Vec<Duration>>, Shape)> {
    let mut operator = cluster.client(0).await?;
    let spec = DeploymentSpec { memory_bytes: Some(1), ..cluster.spec(name, i32::try_from(callers.claims())?) };
    operator.apply_deployment(ApplyDeploymentRequest { spec: Some(spec), generation: 0 }).await?;
    let mut shares: Vec<Vec<Vec<ClaimItem>>> = Vec::new();
    let share = callers.calls() * callers.batch;
    for (n, node) in members.iter_mut().enumerate() {
        let mut offers = Vec::new();
        while offers.len() < callers.claims() {
            offers.push(node.offer(name).await?);
        }
        if n < callers.count {
            offers.sort();
            let mine = offers.get(n * share..(n + 1) * share).context("too few offers")?;
            shares
                .push(mine.chunks(callers.batch).map(|some| some.iter().map(|one| node.item(one)).collect()).collect());
        }
    }
    // What the offers have set off is over when the store stands still.
    eventually("the fleet is quiet", SOON * 4, async || etcd.stands_still().await).await?;
    let begun = Instant::now();
    let claimed = join_all(members.iter_mut().zip(shares).map(|(node, calls)| claim(node, calls))).await;
    let took = begun.elapsed();
    let claimed = claimed.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let (mut latencies, mut tokens) = (Vec::new(), Vec::new());
    for (mine, theirs) in claimed {
        latencies.push(mine);
        tokens.push(theirs);
    }
    let shape = etcd.shape(members.first().map_or("", |node| node.name.as_str())).await?;
    operator
        .delete_deployment(DeleteDeploymentRequest { name: name.to_owned(), ..DeleteDeploymentRequest::default() })
        .await?;
    for (node, tokens) in members.iter().zip(tokens) {
        for (instance, token) in tokens {
            node.stopped(&instance, token).await?;
        }
    }
    eventually("nothing of it is left", SOON * 4, async || {
        let request = ListInstancesRequest { deployment: name.to_owned(), ..ListInstancesRequest::default() };
        let left = cluster.client(0).await?.list_instances(request).await?.into_inner().instances;
        ensure!(left.is_empty(), "{} instances", left.len());
        Ok(())
    })
    .await?;
    Ok((took, latencies, shape))
}

/// What a node has claimed: how long each call took, and the claims with their tokens.
type Claimed = (Vec<Duration>, Vec<(String, Token)>);

async fn claim(node: &mut Node, calls: Vec<Vec<ClaimItem>>) -> anyhow::Result<Claimed> {
    let (mut latencies, mut tokens) = (Vec::new(), Vec::new());
    for mut items in calls {
        let begun = Instant::now();
        if items.len() == 1 {
            let item = items.remove(0);
            let instance = item.instance.clone();
            tokens.push((instance, node.claim_one(item).await?));
            latencies.push(begun.elapsed());
            continue;
        }
        let answer = node.claim_many(items).await?;
        latencies.push(begun.elapsed());
        for result in answer.results {
            let token = result.token.with_context(|| format!("{}: {}", result.instance, result.message))?;
            tokens.push((result.instance, token));
        }
    }
    Ok((latencies, tokens))
}

/// The etcd of the fleet, as a bare client sees it.
struct Etcd {
    endpoint: String,
}

impl Etcd {
    async fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::connect([&self.endpoint], None).await?)
    }

    /// An error while anything is still written.
    async fn stands_still(&self) -> anyhow::Result<()> {
        let mut client = self.client().await?;
        let revision = async |client: &mut Client| {
            let answer = client.get("/drover/schema", None).await?;
            anyhow::Ok(answer.header().map_or(0, etcd_client::ResponseHeader::revision))
        };
        let before = revision(&mut client).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let after = revision(&mut client).await?;
        ensure!(before == after, "{} writes in half a second", after - before);
        Ok(())
    }

    /// The records of a claim as they stand, of the largest claim.
    async fn shape(&self, node: &str) -> anyhow::Result<Shape> {
        let mut client = self.client().await?;
        let mut largest = async |prefix: &str| {
            let found = client.get(prefix, Some(GetOptions::new().with_prefix())).await?;
            let largest = found.kvs().iter().map(|kv| kv.value().to_vec()).max_by_key(Vec::len);
            largest.with_context(|| format!("nothing is at {prefix}"))
        };
        Ok(Shape {
            session: largest(&format!("/drover/sessions/{node}")).await?,
            claim: largest("/drover/claims/").await?,
            taken: largest("/drover/taken/").await?,
            instance: largest("/drover/instances/").await?,
        })
    }

    /// One round of transactions by hand.
    async fn transactions(
        &self,
        name: &str,
        callers: Callers,
        shape: &Shape,
    ) -> anyhow::Result<(Duration, Vec<Vec<Duration>>)> {
        let prefix = format!("/bare/{name}/");
        let mut all =
            try_join_all((0..callers.count).map(|n| Caller::prepare(self, &prefix, n, callers, shape))).await?;
        let begun = Instant::now();
        let latencies = join_all(all.iter_mut().map(|caller| caller.work(callers, shape))).await;
        let took = begun.elapsed();
        let latencies = latencies.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
        let mut client = self.client().await?;
        client.delete(prefix, Some(DeleteOptions::new().with_prefix())).await?;
        for caller in all {
            client.lease_revoke(caller.lease).await?;
        }
        Ok((took, latencies))
    }
}

/// One that makes transactions one after the other.
struct Caller {
    client: Client,
    prefix: String,
    lease: i64,
    /// Revision of its session's key.
    session: i64,
    /// Revision of the last of its instances' keys, and of the schema's.
    offered: i64,
    schema: i64,
}

impl Caller {
    async fn prepare(etcd: &Etcd, prefix: &str, n: usize, callers: Callers, shape: &Shape) -> anyhow::Result<Self> {
        let mut client = etcd.client().await?;
        let lease = client.lease_grant(600, None).await?.id();
        let prefix = format!("{prefix}{n}/");
        let mut instances = Vec::new();
        for call in 0..callers.calls() {
            // One transaction for the instances of a call, so that they share a revision.
            let puts = (0..callers.batch)
                .map(|k| TxnOp::put(format!("{prefix}instance/{call}-{k}"), shape.instance.clone(), None));
            client.txn(Txn::new().and_then(puts.collect::<Vec<_>>())).await?;
            instances.push(call);
        }
        let put = PutOptions::new().with_lease(lease);
        client.put(format!("{prefix}session"), shape.session.clone(), Some(put)).await?;
        let mut caller = Self { client, prefix, lease, session: 0, offered: 0, schema: 0 };
        caller.session = caller.revision_of("session").await?;
        let schema = caller.client.get("/drover/schema", None).await?;
        caller.schema = schema.kvs().first().context("no schema")?.mod_revision();
        caller.offered = caller.session;
        Ok(caller)
    }

    async fn revision_of(&mut self, key: &str) -> anyhow::Result<i64> {
        let answer = self.client.get(format!("{}{key}", self.prefix), None).await?;
        Ok(answer.kvs().first().context("no such key")?.mod_revision())
    }

    async fn work(&mut self, callers: Callers, shape: &Shape) -> anyhow::Result<Vec<Duration>> {
        let mut revisions = Vec::new();
        for call in 0..callers.calls() {
            revisions.push(self.revision_of(&format!("instance/{call}-0")).await?);
        }
        let mut latencies = Vec::new();
        for (call, instance) in revisions.into_iter().enumerate() {
            let begun = Instant::now();
            let txn = self.transaction(call, callers.batch, instance, shape);
            let answer = self.client.txn(txn).await?;
            latencies.push(begun.elapsed());
            ensure!(answer.succeeded(), "a bare transaction was refused");
            self.session = answer.header().context("no header")?.revision();
        }
        Ok(latencies)
    }

    fn transaction(&self, call: usize, batch: usize, instance: i64, shape: &Shape) -> Txn {
        let session = format!("{}session", self.prefix);
        let leased = || Some(PutOptions::new().with_lease(self.lease));
        let mut when = vec![
            Compare::mod_revision(session.clone(), CompareOp::Equal, self.session),
            Compare::mod_revision("/drover/schema", CompareOp::Equal, self.schema),
            Compare::mod_revision("/drover/halt", CompareOp::Equal, 0),
        ];
        let mut then = vec![TxnOp::put(session.clone(), shape.session.clone(), leased())];
        let mut otherwise = vec![TxnOp::get(session, None)];
        for k in 0..batch {
            let key = |kind: &str| format!("{}{kind}/{call}-{k}", self.prefix);
            when.push(Compare::mod_revision(key("instance"), CompareOp::Equal, instance));
            when.push(Compare::create_revision(key("claim"), CompareOp::Equal, 0));
            when.push(Compare::mod_revision(key("taken"), CompareOp::Less, self.offered));
            then.push(TxnOp::put(key("claim"), shape.claim.clone(), leased()));
            then.push(TxnOp::put(key("taken"), shape.taken.clone(), None));
            otherwise.extend(["claim", "instance", "taken"].map(|kind| TxnOp::get(key(kind), None)));
        }
        Txn::new().when(when).and_then(then).or_else(otherwise)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_callers_of_a_row_share_its_claims() {
        for callers in [1, 8, 64].map(|count| Callers { count, batch: 1 }) {
            assert!(callers.claims() >= CLAIMS / 2 && callers.calls() * callers.count == callers.claims());
        }
        let alone = Callers { count: 1, batch: 32 };
        assert_eq!((alone.calls(), alone.claims()), (16, 512));
    }

    #[test]
    fn quantiles_are_values_that_were_measured() {
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.99), 3.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }
}
