//! What runs here, or may run, and the room that claims under way reserve.

use super::{Kind, Registry};
use crate::instance::{board::Entry, handle::Handle};
use drover_proto::v1::{InstanceState, RecordedRun, Token};
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

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

/// What there is of an instance, for those who only count. Sizes are in bytes.
#[derive(Debug, Clone)]
pub(super) enum Holds {
    /// It is supervised: the board says how it is.
    Process(Handle),
    /// It may have a process.
    Unknown(i64),
    /// Its files, and no process.
    Files(i64),
    /// Nothing.
    Nothing,
}

/// What there is of each instance, to be read at any time.
#[derive(Debug, Default)]
pub(super) struct Published(Mutex<BTreeMap<String, (Token, Holds)>>);

impl Published {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, (Token, Holds)>> {
        // Nothing panics while it holds the lock; should it ever, the map is still whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, instance: &str, token: Token, holds: Holds) {
        self.lock().insert(instance.to_owned(), (token, holds));
    }

    pub(super) fn remove(&self, instance: &str) {
        self.lock().remove(instance);
    }
}

/// What is told of a run: `entry` is the board's.
fn recorded(instance: String, token: Token, holds: Holds, entry: Option<&Entry>) -> Option<RecordedRun> {
    let token = entry.map_or(token, |entry| entry.token.max(token));
    let (alive, memory_bytes) = match (holds, entry) {
        (Holds::Nothing, _) => return None,
        (Holds::Files(bytes), _) => (false, bytes),
        (Holds::Unknown(bytes), _) => (true, bytes),
        (Holds::Process(_), None) => (true, 0),
        // One that is claimed is launched in a moment, and what is stopped while it is launched has a process yet to come.
        (Holds::Process(_), Some(e)) => {
            use InstanceState::{Claimed, Draining, Starting};
            (e.pid != 0 || matches!(e.state, Claimed | Starting | Draining), e.memory_bytes)
        }
    };
    Some(RecordedRun { instance, token: Some(token), alive, memory_bytes, ..RecordedRun::default() })
}

impl Registry {
    /// What runs, or may run, on this node. Waits for nothing: while something is launched or looked at, it counts as it
    /// was before, or as a process that may be there.
    #[must_use]
    pub fn recorded_runs(&self) -> Vec<RecordedRun> {
        let published = self.published.lock().clone();
        let entries = self.context.board.all();
        let runs = published.into_iter().filter_map(|(instance, (token, holds))| {
            let entry = entries.get(&instance);
            recorded(instance, token, holds, entry)
        });
        runs.collect()
    }

    /// The same with all that is known of each, for a comparison with what the store says.
    #[must_use]
    pub fn inventory(&self) -> Vec<RecordedRun> {
        let entries = self.context.board.all();
        let with_state = |run: RecordedRun| match entries.get(&run.instance) {
            Some(entry) => {
                RecordedRun { state: entry.state.into(), pid: i64::from(entry.pid), owned: entry.owned, ..run }
            }
            None => run,
        };
        self.recorded_runs().into_iter().map(with_state).collect()
    }

    /// Ends an instance without waiting for what is in flight, and waits for nothing. False when it has no supervisor.
    #[must_use]
    pub fn force(&self, instance: &str) -> bool {
        let handle = match self.published.lock().get(instance) {
            Some((_, Holds::Process(handle))) => handle.clone(),
            _ => return false,
        };
        handle.force()
    }

    /// Reserves room for a claim that is about to be made. `Err` says why there is none; an instance that is here
    /// already, or being claimed, gives `Ok(false)`. `offered` is the revision of the offer that is to be taken: where a
    /// claim stood before it of which nothing is here, that claim is gone, only the set that says so was not applied yet.
    pub async fn reserve(&self, instance: &str, offered: i64, memory_bytes: i64) -> Result<bool, String> {
        let mut inner = self.inner.lock().await;
        let is_here = inner.instances.get(instance).is_some_and(|known| {
            let is_over = matches!(known.kind, Kind::Nothing) && known.token.revision < offered;
            !is_over
        });
        if is_here || inner.claiming.contains_key(instance) {
            return Ok(false);
        }
        // What may run counts as what does: were it to be started beside a claim, both would find too little.
        let runs = self.recorded_runs();
        let bytes = runs.iter().map(|run| run.memory_bytes).chain(inner.claiming.values().copied());
        let used = bytes.fold(0_i64, i64::saturating_add);
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
        inner.instances.contains(instance) && inner.claiming.insert(instance.to_owned(), 0).is_none()
    }

    /// A claim was not made, or it is not known whether it was: the next set of claims tells.
    pub async fn release(&self, instance: &str) {
        self.inner.lock().await.claiming.remove(instance);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(revision: i64) -> Token {
        Token { generation: 1, revision }
    }

    fn told(holds: Holds, state: InstanceState, pid: i32) -> Option<(bool, i64)> {
        let entry = Entry {
            token: token(7),
            owned: true,
            state,
            pid,
            restarts: 0,
            message: String::new(),
            since: prost_types::Timestamp::default(),
            progressed_at: prost_types::Timestamp::default(),
            traceparent: String::new(),
            exit_code: None,
            exit_signal: None,
            memory_bytes: 40,
        };
        let run = recorded("a".to_owned(), token(5), holds, Some(&entry))?;
        assert_eq!(run.token, Some(token(7)), "the higher one: it may have been raised meanwhile");
        Some((run.alive, run.memory_bytes))
    }

    fn process() -> Holds {
        Holds::Process(Handle(tokio::sync::mpsc::channel(1).0))
    }

    #[test]
    fn what_may_have_a_process_counts_as_one_that_has() {
        for state in [InstanceState::Claimed, InstanceState::Starting, InstanceState::Draining] {
            assert_eq!(told(process(), state, 0), Some((true, 40)), "{state:?}");
        }
        for state in [InstanceState::Backoff, InstanceState::Failed, InstanceState::Stopped] {
            assert_eq!(told(process(), state, 0), Some((false, 40)), "{state:?}");
        }
        assert_eq!(told(process(), InstanceState::Ready, 9), Some((true, 40)));
        assert_eq!(told(Holds::Unknown(3), InstanceState::Suspect, 0), Some((true, 3)));
        assert_eq!(told(Holds::Files(3), InstanceState::Backoff, 0), Some((false, 3)));
        assert_eq!(told(Holds::Nothing, InstanceState::Stopped, 0), None);
    }
}
