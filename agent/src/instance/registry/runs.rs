//! What runs here, or may run, and the room that claims under way reserve.

use super::{Inner, Kind, Registry};
use drover_proto::v1::{InstanceState, RecordedRun, Token};

/// A run of this node that no claim covers, and that it wants to claim again.
#[derive(Debug, Clone, PartialEq)]
pub struct Unowned {
    /// Id of the instance.
    pub instance: String,
    /// Token under which it is recorded.
    pub token: Token,
    /// Memory that it reserves, in bytes.
    pub memory_bytes: i64,
}

impl Registry {
    /// What runs, or may run, on this node.
    pub async fn recorded_runs(&self) -> Vec<RecordedRun> {
        self.runs(&*self.inner.lock().await)
    }

    /// As [`Registry::recorded_runs`], without waiting: `None` while instances are being looked through.
    #[must_use]
    pub fn recorded_runs_now(&self) -> Option<Vec<RecordedRun>> {
        Some(self.runs(&*self.inner.try_lock().ok()?))
    }

    fn runs(&self, inner: &Inner) -> Vec<RecordedRun> {
        let runs = inner.known.iter().filter_map(|(instance, known)| {
            let entry = self.context.board.get(instance);
            let (alive, memory_bytes) = match &known.kind {
                Kind::Nothing => return None,
                Kind::Dormant(claim, _) => (false, claim.memory_bytes),
                Kind::Unknown(claim) => (true, claim.memory_bytes),
                Kind::Supervised(_) => {
                    entry.map_or((true, 0), |e| (e.pid != 0 || e.state == InstanceState::Starting, e.memory_bytes))
                }
            };
            Some(RecordedRun { instance: instance.clone(), token: Some(known.token), alive, memory_bytes })
        });
        runs.collect()
    }

    /// Reserves room for a claim that is about to be made. `Err` says why there is none; an instance that is here
    /// already, or being claimed, gives `Ok(false)`.
    pub async fn reserve(&self, instance: &str, memory_bytes: i64) -> Result<bool, String> {
        let mut inner = self.inner.lock().await;
        if inner.known.contains_key(instance) || inner.claiming.contains_key(instance) {
            return Ok(false);
        }
        let running: i64 = self.context.board.all().values().map(|entry| entry.memory_bytes).sum();
        let used = inner.claiming.values().fold(running, |sum, bytes| sum.saturating_add(*bytes));
        let capacity = self.context.memory_bytes();
        if used.saturating_add(memory_bytes) > capacity {
            return Err(format!(
                "it needs {} MiB, and {} MiB of this node's {} MiB are reserved",
                memory_bytes >> 20,
                used >> 20,
                capacity >> 20
            ));
        }
        inner.claiming.insert(instance.to_owned(), memory_bytes);
        Ok(true)
    }

    /// Marks a run that is about to be claimed again. False when that is under way already.
    pub async fn reserve_again(&self, instance: &str) -> bool {
        let mut inner = self.inner.lock().await;
        inner.known.contains_key(instance) && inner.claiming.insert(instance.to_owned(), 0).is_none()
    }

    /// A claim was not made, or it is not known whether it was: the next set of claims tells.
    pub async fn release(&self, instance: &str) {
        self.inner.lock().await.claiming.remove(instance);
    }
}
