//! The desired state behind a stop by hand: instances that are wanted no more, and deployments that ask for fewer.
//!
//! The reconciler makes and drops instances as their deployments ask; a stop by hand changes what is asked. It lowers the
//! deployment's number, and where it is about certain instances it also takes their `wanted` back in the same transaction,
//! since the number alone would leave the choice to the reconciler. That write to `instances/<id>`, which is the
//! reconciler's record otherwise, is safe: it compares the revision that it read, so no plan and no claim that saw another
//! state comes between; it only ever goes from wanted to not wanted, which no plan takes back; and a reconciler that
//! planned before it loses its own compare and plans again. Nothing else of the record is decided here.

use super::{Order, Processes};
use crate::{
    api::convert,
    control::{clock, store_status, view::Behind},
    plan::snapshot::Snapshot,
    store::{Compare, Error, Txn, keys, records},
};
use drover_proto::{
    status::{reason, with_reason},
    store::v1 as record,
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tonic::{Code, Status};

/// How often records that others change meanwhile are read again.
const ATTEMPTS: usize = 5;
/// Longest wait for the view to show what is in the store.
const CATCH_UP: Duration = Duration::from_secs(2);
/// Instances of one transaction, which has room for 128 compares and as many operations.
const PER_TRANSACTION: usize = 50;

/// What a stop has changed of a deployment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Changed {
    /// Its name.
    pub(super) deployment: String,
    /// Instances that were wanted and are no more.
    pub(super) stopped: Vec<String>,
    /// The number that it asked for, and asks for now; `None` when that is as before.
    pub(super) replicas: Option<(i32, i32)>,
}

/// PURE. What a deployment asks for when some of its instances are stopped by hand: one less for each, but no fewer than are
/// still wanted, so that while a new revision is rolled out no other instance has to go.
fn fewer(replicas: i32, wanted: usize, stopped: usize) -> i32 {
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let left = count(wanted.saturating_sub(stopped));
    replicas.saturating_sub(count(stopped)).max(left).clamp(0, replicas.max(0))
}

impl Processes {
    /// The store as it is now. What a view that lags does not show would be left out, and said to be stopped already.
    pub(super) async fn fresh(&self) -> Result<Arc<Snapshot>, Status> {
        let now = self.store.list(keys::SCHEMA).await.map_err(store_status)?.revision;
        let behind = |behind: Behind| with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, behind.to_string());
        self.view.at_least(now, CATCH_UP).await.map_err(behind)
    }

    /// These instances are wanted no more, which is told; unless they are to be replaced, their deployments ask for fewer. An
    /// instance that is gone or stopping already is left as it is. `before`: where each runs.
    pub(super) async fn want_no_more(
        &self,
        order: &Order<'_>,
        before: &Snapshot,
        ids: &[String],
    ) -> Result<Vec<Changed>, Status> {
        let mut by_deployment: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for id in ids {
            let Some(instance) = before.instances.get(id) else { continue };
            by_deployment.entry(&instance.value.deployment).or_default().push(id.clone());
        }
        let mut all = Vec::new();
        for (deployment, ids) in by_deployment {
            let mut whole = Changed { deployment: deployment.to_owned(), ..Changed::default() };
            let mut failed = None;
            for ids in ids.chunks(PER_TRANSACTION) {
                let stop = |snapshot: &Snapshot| some(snapshot, deployment, ids, order.replace);
                let changed = match self.settle(deployment, stop).await {
                    Ok(changed) => changed,
                    Err(status) => {
                        failed = Some(status);
                        break;
                    }
                };
                whole.stopped.extend(changed.stopped);
                whole.replicas = match (whole.replicas, changed.replicas) {
                    (Some((from, _)), Some((_, to))) => Some((from, to)),
                    (before, now) => now.or(before),
                };
            }
            // What is written is done, whatever becomes of the rest.
            self.tell(before, order, &whole);
            if let Some(status) = failed {
                return Err(status);
            }
            all.push(whole);
        }
        Ok(all)
    }

    /// Nothing of a deployment is wanted any more, which is told; the reconciler stops what there is.
    pub(super) async fn want_none_of(
        &self,
        order: &Order<'_>,
        before: &Snapshot,
        deployment: &str,
    ) -> Result<Changed, Status> {
        let changed = self.settle(deployment, |snapshot| none_of(snapshot, deployment)).await?;
        self.tell(before, order, &changed);
        Ok(changed)
    }

    /// Writes a change, made anew from the store for as long as others are quicker.
    async fn settle(
        &self,
        deployment: &str,
        change: impl Fn(&Snapshot) -> Option<(Changed, Txn)> + Send + Sync,
    ) -> Result<Changed, Status> {
        let mut unsure = Changed { deployment: deployment.to_owned(), ..Changed::default() };
        for _ in 0..ATTEMPTS {
            let snapshot = self.fresh().await?;
            // Nothing is left to change: an attempt of unknown outcome was made, if there was one.
            let Some((changed, txn)) = change(&snapshot) else { return Ok(unsure) };
            match self.store.txn(txn).await {
                Ok(outcome) if outcome.succeeded => {
                    // Written is written; a view that lags only shows it later.
                    let _ = self.view.at_least(outcome.revision, CATCH_UP).await;
                    return Ok(changed);
                }
                Ok(_) => {}
                // Whichever of the two attempts commits, the other one's compares fail.
                Err(Error::OutcomeUnknown(_)) => unsure = changed,
                Err(error) => return Err(store_status(error)),
            }
        }
        let what = format!("deployment {deployment} was changed by others {ATTEMPTS} times in a row: try again");
        Err(with_reason(Code::Aborted, reason::GENERATION_MISMATCH, what))
    }

    /// An instance that is stopped by its id has to exist.
    pub(super) async fn existing(&self, id: &str) -> Result<(), Status> {
        let stored = self.store.get(&keys::instance(id)).await.map_err(store_status)?;
        stored.map(drop).ok_or_else(|| convert::no_instance(id))
    }
}

/// PURE. The change that stops some instances of a deployment; `None` when there is nothing to change.
fn some(snapshot: &Snapshot, deployment: &str, ids: &[String], replace: bool) -> Option<(Changed, Txn)> {
    let wanted = |id: &&String| snapshot.instances.get(*id).is_some_and(|i| i.value.wanted);
    let stopped: Vec<String> = ids.iter().filter(wanted).cloned().collect();
    if stopped.is_empty() {
        return None;
    }
    let traceparent = drover_telemetry::context::current_traceparent();
    let mut txn = Txn::default();
    for id in &stopped {
        let stored = snapshot.instances.get(id)?;
        let next =
            record::Instance { wanted: false, offer: None, traceparent: traceparent.clone(), ..stored.value.clone() };
        txn.compare.push(Compare::ModRevision(keys::instance(id), stored.mod_revision));
        txn.then.push(records::put(keys::instance(id), &next, 0));
    }
    let count = snapshot.instances_of(deployment).filter(|(_, i)| i.value.wanted).count();
    let asked = snapshot.deployments.get(deployment).filter(|_| !replace);
    let replicas = asked.and_then(|stored| {
        let to = fewer(stored.value.replicas, count, stopped.len());
        lower(snapshot, deployment, to, &mut txn).then_some((stored.value.replicas, to))
    });
    Some((Changed { deployment: deployment.to_owned(), stopped, replicas }, txn))
}

/// PURE. The change that has a deployment ask for nothing; `None` when it does already.
fn none_of(snapshot: &Snapshot, deployment: &str) -> Option<(Changed, Txn)> {
    let from = snapshot.deployments.get(deployment)?.value.replicas;
    let mut txn = Txn::default();
    if !lower(snapshot, deployment, 0, &mut txn) {
        return None;
    }
    let wanted = snapshot.instances_of(deployment).filter(|(_, i)| i.value.wanted);
    let stopped = wanted.map(|(id, _)| id.clone()).collect();
    Some((Changed { deployment: deployment.to_owned(), stopped, replicas: Some((from, 0)) }, txn))
}

/// Adds to a transaction that a deployment asks for this many. False when it does already, or is being deleted.
fn lower(snapshot: &Snapshot, deployment: &str, replicas: i32, txn: &mut Txn) -> bool {
    let Some(stored) = snapshot.deployments.get(deployment) else { return false };
    if stored.value.deleting || stored.value.replicas == replicas {
        return false;
    }
    let next = record::Deployment {
        replicas,
        generation: stored.value.generation + 1,
        updated_at: Some(clock::now()),
        traceparent: drover_telemetry::context::current_traceparent(),
        ..stored.value.clone()
    };
    txn.compare.push(Compare::ModRevision(keys::deployment(deployment), stored.mod_revision));
    txn.then.push(records::put(keys::deployment(deployment), &next, 0));
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{plan::snapshot::Stored, store::OPERATIONS_MAX};

    fn stored<T>(value: T, mod_revision: i64) -> Arc<Stored<T>> {
        Arc::new(Stored { value, create_revision: 1, mod_revision })
    }

    fn snapshot(replicas: i32, instances: i32) -> Snapshot {
        let mut snapshot = Snapshot::default();
        let deployment = record::Deployment { replicas, generation: 4, ..record::Deployment::default() };
        snapshot.deployments.insert("m".to_owned(), stored(deployment, 9));
        for n in 0..instances {
            let value = record::Instance { deployment: "m".to_owned(), wanted: true, ..record::Instance::default() };
            snapshot.instances.insert(format!("m-{n:06}"), stored(value, 100 + i64::from(n)));
        }
        snapshot
    }

    fn ids(count: i32) -> Vec<String> {
        (0..count).map(|n| format!("m-{n:06}")).collect()
    }

    #[test]
    fn a_deployment_asks_for_one_less_for_each_but_never_for_fewer_than_go_on() {
        assert_eq!((fewer(2, 2, 1), fewer(2, 2, 2), fewer(3, 2, 1)), (1, 0, 2));
        // Two old ones and two new ones, of which three are stopped: the fourth goes on.
        assert_eq!((fewer(2, 4, 3), fewer(2, 4, 1)), (1, 2));
        assert_eq!((fewer(0, 1, 1), fewer(1, 0, 1)), (0, 0));
    }

    #[test]
    fn instance_and_deployment_change_together_and_compare_what_was_read() {
        let (changed, txn) = some(&snapshot(2, 2), "m", &ids(1), false).unwrap();
        assert_eq!((changed.stopped, changed.replicas), (ids(1), Some((2, 1))));
        let compared =
            [Compare::ModRevision(keys::instance("m-000000"), 100), Compare::ModRevision(keys::deployment("m"), 9)];
        assert_eq!((txn.compare.as_slice(), txn.then.len()), (compared.as_slice(), 2));
        let (changed, txn) = some(&snapshot(2, 2), "m", &ids(1), true).unwrap();
        assert_eq!((changed.replicas, txn.then.len()), (None, 1), "replaced: the deployment asks for as many");
    }

    #[test]
    fn what_is_stopping_or_gone_changes_nothing_again() {
        let mut snapshot = snapshot(2, 2);
        assert_eq!(some(&snapshot, "m", &["m-zzzzzz".to_owned()], false), None);
        let value = record::Instance { deployment: "m".to_owned(), ..record::Instance::default() };
        snapshot.instances.insert("m-000000".to_owned(), stored(value, 101));
        assert_eq!(some(&snapshot, "m", &ids(1), false), None);
        let deployment = record::Deployment { replicas: 2, deleting: true, ..record::Deployment::default() };
        snapshot.deployments.insert("m".to_owned(), stored(deployment, 9));
        assert_eq!(some(&snapshot, "m", &ids(2), false).unwrap().0.replicas, None, "it is being deleted anyway");
        assert_eq!(none_of(&snapshot, "m"), None);
        assert_eq!(none_of(&snapshot, "other"), None);
    }

    #[test]
    fn a_stop_of_everything_fits_into_transactions() {
        let snapshot = snapshot(1000, 1000);
        let (changed, txn) = none_of(&snapshot, "m").unwrap();
        assert_eq!((changed.stopped.len(), changed.replicas, txn.then.len()), (1000, Some((1000, 0)), 1));
        let all = ids(1000);
        let (_, txn) = some(&snapshot, "m", &all[..PER_TRANSACTION], false).unwrap();
        assert!(txn.compare.len() <= OPERATIONS_MAX && txn.then.len() <= OPERATIONS_MAX);
    }
}
