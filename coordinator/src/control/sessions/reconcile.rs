//! PURE. What a node has against what the store says: at the beginning of a session's stream, from time to time, and when
//! asked. Each difference is told with both sides, and heals by what the table says; this module changes nothing itself.
//!
//! | kind | the node | the store | heals by | told |
//! |---|---|---|---|---|
//! | `ClaimWithoutRun` | has nothing of it | it owns it, wanted | the agent begins it with the next set of claims | when it stays |
//! | `RunWithoutClaim` | runs it | wanted, owned by nobody | the agent claims it again | when it stays |
//! | `RunUnwanted` | runs it | wanted no more, or gone | the order to end it, in the set of claims | at once |
//! | `RunSuperseded` | runs it | another node owns it, higher token | the same, once that one is ready | at once |
//! | `ForeignRun` | runs it under a token that this store can't have made | unknown | nothing: an operator | at once |
//! | `TokenBehind` | runs it under a lower token than its claim's | it owns it | the agent raises it with the next set | when it stays |
//! | `TokenAhead` | runs it under a higher token than its claim's | it owns it | nothing: an operator | at once |
//! | `Status` | reported and acknowledged one state | has another, or none | the report is recorded again | at once |
//! | `RunRecord` | does not run it | has the record of such a run there | the record is removed | at once |
//!
//! "When it stays": seen in two inventories in a row; the second is asked for soon after the first. What has changed in the
//! store since the node applied its claims is not compared: its next inventory knows of it.

#[cfg(test)]
mod tests;

use crate::plan::snapshot::Snapshot;
use drover_proto::v1::{InstanceState, RecordedRun, RunSet, Severity, StatusReport, Token};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    time::Duration,
};
use tokio::time::Instant;

/// Records of one's own runs that are removed after one look; the others come with the next.
pub(super) const RECORDS_MAX: usize = 64;

/// What differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the module's table says what each one means")]
pub(super) enum Kind {
    ClaimWithoutRun,
    RunWithoutClaim,
    RunUnwanted,
    RunSuperseded,
    ForeignRun,
    TokenBehind,
    TokenAhead,
    Status,
    RunRecord,
}

impl Kind {
    pub(super) fn severity(self) -> Severity {
        match self {
            Self::RunUnwanted | Self::RunSuperseded | Self::RunRecord => Severity::Info,
            Self::ClaimWithoutRun | Self::RunWithoutClaim | Self::TokenBehind | Self::Status => Severity::Warning,
            Self::ForeignRun | Self::TokenAhead => Severity::Error,
        }
    }

    /// Whether what heals it may be under way already when it is seen first.
    fn passes(self) -> bool {
        matches!(self, Self::ClaimWithoutRun | Self::RunWithoutClaim | Self::TokenBehind)
    }
}

/// Both sides, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Difference {
    node: String,
    store: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the node: {}; the store: {}", self.node, self.store)
    }
}

type Differences = BTreeMap<(String, Kind), Difference>;

/// What a node's inventory shows against a snapshot.
pub(super) fn differences(snapshot: &Snapshot, node: &str, set: &RunSet) -> Differences {
    let moved = |id: &str| {
        let claim = snapshot.claims.get(id).map_or(0, |claim| claim.mod_revision);
        let instance = snapshot.instances.get(id).map_or(0, |instance| instance.mod_revision);
        claim.max(instance) > set.claims_revision
    };
    let runs: HashMap<&str, &RecordedRun> = set.runs.iter().map(|run| (run.instance.as_str(), run)).collect();
    let reported: HashMap<&str, &StatusReport> = set.statuses.iter().map(|s| (s.instance.as_str(), s)).collect();
    let mut found = Differences::new();
    let mut add = |id: &str, kind: Kind, node: String, store: String| {
        found.insert((id.to_owned(), kind), Difference { node, store });
    };
    for run in set.runs.iter().filter(|run| run.alive && !moved(&run.instance)) {
        if let Some((kind, store)) = of_run(snapshot, node, run) {
            add(&run.instance, kind, shown_run(run), store);
        }
    }
    for (id, claim) in snapshot.claims_of(node) {
        let wanted = snapshot.instances.get(id).is_some_and(|instance| instance.value.wanted);
        let here = runs.contains_key(id.as_str()) || reported.contains_key(id.as_str());
        if wanted && !here && !moved(id) {
            let token = Token { generation: snapshot.generation(), revision: claim.mod_revision };
            add(id, Kind::ClaimWithoutRun, "nothing".to_owned(), format!("claim {token} of {node}"));
        }
    }
    for report in set.statuses.iter().filter(|report| !moved(&report.instance)) {
        let owned = snapshot.claims.get(&report.instance).is_some_and(|claim| claim.value.node == node);
        if owned
            && snapshot.token(&report.instance) == report.token
            && let Some(store) = of_status(snapshot, report)
        {
            add(&report.instance, Kind::Status, shown_status(report.state(), report.pid, report.token), store);
        }
    }
    for (id, token) in run_records(snapshot, node, set) {
        add(&id, Kind::RunRecord, "runs nothing under it".to_owned(), format!("the record of a run under {token}"));
    }
    found
}

/// Records of runs of the node that it does not have, and that are not of its standing claims: to be removed.
pub(super) fn run_records(snapshot: &Snapshot, node: &str, set: &RunSet) -> Vec<(String, Token)> {
    let runs: HashMap<&str, &RecordedRun> = set.runs.iter().map(|run| (run.instance.as_str(), run)).collect();
    let records = snapshot.runs.iter().filter(|(_, record)| record.value.node == node);
    let left = records.filter_map(|(key, record)| {
        let (id, _) = key.split_once('/')?;
        let token = record.value.token?;
        let standing = snapshot.token(id) == Some(token);
        // Whatever token a run is under by now: as long as it may live its record stays.
        let may_live = runs.get(id).is_some_and(|run| run.alive || run.owned);
        let newer = record.mod_revision > set.claims_revision;
        (!standing && !may_live && !newer).then(|| (id.to_owned(), token))
    });
    left.take(RECORDS_MAX).collect()
}

fn of_run(snapshot: &Snapshot, node: &str, run: &RecordedRun) -> Option<(Kind, String)> {
    let id = run.instance.as_str();
    let (Some(claim), Some(token)) = (snapshot.claims.get(id), snapshot.token(id)) else {
        return Some(match snapshot.instances.get(id) {
            Some(instance) if instance.value.wanted => (Kind::RunWithoutClaim, "nobody owns it".to_owned()),
            Some(_) => (Kind::RunUnwanted, "it is wanted no more".to_owned()),
            None if is_ours(snapshot, run.token) => (Kind::RunUnwanted, "it is gone".to_owned()),
            None => (
                Kind::ForeignRun,
                "it is unknown, and no claim of this store can have had this token: it is left alone; if nobody needs \
                 it, end it with drover processes stop"
                    .to_owned(),
            ),
        });
    };
    let owner = &claim.value.node;
    let claimed = format!("claim {token} of {owner}, {}", word(snapshot.state(id)));
    let recorded = run.token.unwrap_or_default();
    match (owner == node, recorded.cmp(&token)) {
        (true, std::cmp::Ordering::Equal) => None,
        (true, std::cmp::Ordering::Less) => Some((Kind::TokenBehind, claimed)),
        (true, std::cmp::Ordering::Greater) => Some((
            Kind::TokenAhead,
            format!(
                "{claimed}: no claim had the run's token, so its files are damaged; end it with drover processes stop"
            ),
        )),
        (false, _) => Some((Kind::RunSuperseded, claimed)),
    }
}

/// Whether a claim of this store can have had this token.
fn is_ours(snapshot: &Snapshot, token: Option<Token>) -> bool {
    let made = snapshot.schema.as_ref().map_or(0, |schema| schema.create_revision);
    token.is_some_and(|token| {
        token.generation == snapshot.generation() && token.revision > made && token.revision <= snapshot.revision
    })
}

fn of_status(snapshot: &Snapshot, report: &StatusReport) -> Option<String> {
    let Some(stored) = snapshot.statuses.get(&report.instance).map(|status| &status.value) else {
        return Some("no state".to_owned());
    };
    let same = stored.token == report.token && stored.state() == report.state() && stored.pid == report.pid;
    (!same).then(|| shown_status(stored.state(), stored.pid, stored.token))
}

fn shown_run(run: &RecordedRun) -> String {
    format!("runs it, {}", shown_status(run.state(), run.pid, run.token))
}

fn shown_status(state: InstanceState, pid: i64, token: Option<Token>) -> String {
    let pid = if pid == 0 { String::new() } else { format!(", pid {pid}") };
    let token = token.map_or_else(|| "no token".to_owned(), |token| format!("token {token}"));
    format!("{}{pid}, {token}", word(state))
}

fn word(state: InstanceState) -> String {
    state.as_str_name().trim_start_matches("INSTANCE_STATE_").to_ascii_lowercase()
}

/// What is to be told of a look.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    /// Differences that are new, or that have stayed.
    pub(super) found: Vec<(String, Kind, Difference)>,
    /// Those that were told and are no more, with how long they were seen.
    pub(super) over: Vec<(String, Kind, Duration)>,
    /// Whether another inventory is to be asked for soon.
    pub(super) look_again: bool,
}

#[derive(Debug)]
struct Standing {
    since: Instant,
    told: bool,
}

/// The differences of one stream; bounded by what its node has and owns.
#[derive(Debug, Default)]
pub(super) struct Reconcile {
    standing: BTreeMap<(String, Kind), Standing>,
}

impl Reconcile {
    /// Takes what a look has shown.
    pub(super) fn take(&mut self, differences: Differences, now: Instant) -> News {
        let mut news = News::default();
        let before = std::mem::take(&mut self.standing);
        for ((id, kind), standing) in before {
            if differences.contains_key(&(id.clone(), kind)) {
                self.standing.insert((id, kind), standing);
            } else if standing.told {
                news.over.push((id, kind, now.duration_since(standing.since)));
            }
        }
        for ((id, kind), difference) in differences {
            let key = (id.clone(), kind);
            let first = !self.standing.contains_key(&key);
            let standing = self.standing.entry(key).or_insert(Standing { since: now, told: false });
            if !standing.told && (!first || !kind.passes()) {
                standing.told = true;
                news.found.push((id, kind, difference));
            }
            news.look_again |= first;
        }
        news
    }
}
