//! Stopping by hand: an instance, a process, everything of a name, everything of a node.
//!
//! What belongs to an instance goes through the desired state first (see [`super::unwanted`]), so that nothing starts it
//! again, and is ended by its node's own drain and grace; force ends the process besides. What belongs to none is ended only
//! when that was confirmed.

use super::{
    Order, Processes,
    ask::Looked,
    outcome::{bears, ends_on_request, left_alone, process_of, status_of},
    request::{What, what},
    unwanted::Changed,
    why,
};
use crate::{control::commands, plan::snapshot::Snapshot};
use drover_proto::{
    status::{reason, with_reason},
    v1::{
        HostProcess, NodeFailure, NotListed, ProcessAction, ProcessOwner, ProcessResult, Severity, StopProcessRequest,
        StopProcessResponse,
    },
};
use std::collections::BTreeSet;
use tonic::{Code, Status};

/// Instances of one stop that are told one by one in the events; their deployments tell of all.
const TOLD_MAX: usize = 64;
/// Instances that an event of their deployment names.
const NAMED_MAX: usize = 8;

/// What has become of a request.
#[derive(Debug, Default)]
struct Done {
    results: Vec<ProcessResult>,
    unreachable: Vec<NodeFailure>,
    not_listed: Vec<NotListed>,
}

/// PURE. The deployments that a name means: the one that bears it, else all that serve the model of that name.
fn served<'a>(snapshot: &'a Snapshot, name: &str) -> Vec<&'a String> {
    if let Some((own, _)) = snapshot.deployments.get_key_value(name) {
        return vec![own];
    }
    let serves = |spec: &drover_proto::v1::DeploymentSpec| spec.model == name;
    let all = snapshot.deployments.iter();
    all.filter(|(_, d)| d.value.spec.as_ref().is_some_and(serves)).map(|(deployment, _)| deployment).collect()
}

/// PURE. What is said of an instance that is wanted no more.
fn draining(snapshot: &Snapshot, id: &str, changed: &[Changed], order: &Order<'_>) -> ProcessResult {
    let process = process_of(snapshot, id);
    let how = if order.force { "stopped at once" } else { "drained and stopped" };
    let message = match changed.iter().find(|c| c.stopped.iter().any(|stopped| stopped == id)) {
        None => format!("{id} is being stopped already"),
        Some(_) if order.replace => format!("{id} is {how}; its deployment gets another one"),
        Some(Changed { deployment, replicas: Some((from, to)), .. }) => format!(
            "{id} is {how}; {deployment} asks for {to} instead of {from} from now on, until it is scaled or applied anew"
        ),
        Some(Changed { deployment, .. }) => format!("{id} is {how}; {deployment} asks for as many as before"),
    };
    ProcessResult { process: Some(process), action: ProcessAction::Draining.into(), message }
}

/// PURE. The node that owns an instance, if that is another one.
fn owned_elsewhere<'a>(snapshot: &'a Snapshot, process: &HostProcess) -> Option<&'a str> {
    let owner = snapshot.claims.get(&process.instance).map(|claim| claim.value.node.as_str());
    owner.filter(|owner| *owner != process.node)
}

/// What a node still runs of an instance that was claimed elsewhere meanwhile: to stop it is not to stop the instance.
fn superseded(process: HostProcess, owner: &str) -> ProcessResult {
    let id = process.instance.clone();
    let message = format!("{id} is owned by node {owner} now: this process ends by itself once that one is ready");
    left_alone(HostProcess { message, ..process })
}

impl Processes {
    pub(in crate::api) async fn stop(
        &self,
        who: &str,
        request: StopProcessRequest,
    ) -> Result<StopProcessResponse, Status> {
        let (why, what) = (why(&request.reason)?, what(&request)?);
        let (force, replace, confirm) = (request.force, request.replace, request.confirm);
        let order = Order { who, why: &why, force, replace, confirm };
        let Done { results, unreachable, not_listed } = match what {
            What::Instance(id) => {
                self.existing(id).await?;
                self.stop_instances(&order, vec![id.to_owned()], None).await?
            }
            What::Process(node, pid) => self.stop_process(&order, node, pid).await?,
            What::Name(name) => self.stop_name(&order, name).await?,
            What::Node(node) => self.stop_node(&order, node).await?,
        };
        let result = if let [one] = results.as_slice() { Some(one.clone()) } else { None };
        Ok(StopProcessResponse { result, results, unreachable, not_listed })
    }

    async fn stop_process(&self, order: &Order<'_>, node: &str, pid: i64) -> Result<Done, Status> {
        let looked = self.look(node, pid).await?;
        // An older agent tells of all.
        let Some(process) = looked.all.values().find(|process| process.pid == pid).cloned() else {
            let what = format!("node {node} has no llama-server with pid {pid}: `drover processes list` shows them");
            return Err(with_reason(Code::NotFound, reason::NOT_FOUND, what));
        };
        let snapshot = self.fresh().await?;
        let result = match process.owner() {
            ProcessOwner::Owned => match owned_elsewhere(&snapshot, &process) {
                Some(owner) => superseded(process, owner),
                None => return self.stop_instances(order, vec![process.instance], Some(looked)).await,
            },
            _ if ends_on_request(&process) => {
                let (results, unreachable) = self.end_others(order, vec![process]).await;
                return Ok(Done { results, unreachable, ..Done::default() });
            }
            _ => left_alone(process),
        };
        Ok(Done { results: vec![result], ..Done::default() })
    }

    async fn stop_name(&self, order: &Order<'_>, name: &str) -> Result<Done, Status> {
        let snapshot = self.fresh().await?;
        let deployments = served(&snapshot, name);
        // What is wanted no more does not wait for a node that is silent.
        let settled = async {
            let mut changed = Vec::new();
            for deployment in &deployments {
                changed.push(self.want_none_of(order, &snapshot, deployment).await?);
            }
            Ok::<_, Status>(changed)
        };
        let (looked, changed) = tokio::join!(self.look("", 0), settled);
        let (looked, changed) = (looked?, changed?);
        let others: Vec<HostProcess> =
            looked.all.values().filter(|p| ends_on_request(p) && bears(p, name)).cloned().collect();
        if deployments.is_empty() && others.is_empty() {
            let missing = looked.unreachable.iter().map(|failure| failure.node.as_str()).collect::<Vec<_>>().join(", ");
            let missing = if missing.is_empty() { missing } else { format!(" (not looked at: {missing})") };
            let what = format!(
                "no deployment, model or process has the name {name}{missing}: `drover get deployments` and \
                 `drover processes list` show what there is"
            );
            return Err(with_reason(Code::NotFound, reason::NOT_FOUND, what));
        }
        let all = deployments.iter().flat_map(|name| snapshot.instances_of(name)).map(|(id, _)| id.clone()).collect();
        let (done, (results, failures)) =
            tokio::join!(self.carry_out(order, &snapshot, all, changed, Some(looked)), self.end_others(order, others));
        Ok(done.and(results, failures))
    }

    async fn stop_node(&self, order: &Order<'_>, node: &str) -> Result<Done, Status> {
        if !self.fresh().await?.nodes.contains_key(node) {
            return Err(status_of(commands::Error::NoNode(node.to_owned())));
        }
        // One that is away is no obstacle: its instances are wanted no more when it is back.
        let looked = self.look_at(vec![node.to_owned()]).await;
        let snapshot = self.fresh().await?;
        let mut stop: BTreeSet<String> = snapshot.claims_of(node).map(|(id, _)| id.clone()).collect();
        let (mut others, mut alone) = (Vec::new(), Vec::new());
        for process in looked.all.values() {
            match process.owner() {
                ProcessOwner::Owned => match owned_elsewhere(&snapshot, process) {
                    Some(owner) => alone.push(superseded(process.clone(), owner)),
                    // It runs, though its claim has run out: the node would claim it again.
                    None => drop(stop.insert(process.instance.clone())),
                },
                ProcessOwner::Stale | ProcessOwner::Foreign => others.push(process.clone()),
                // Those of other agents are other nodes'.
                ProcessOwner::OtherAgent => {}
                ProcessOwner::Unknown | ProcessOwner::Unspecified => alone.push(left_alone(process.clone())),
            }
        }
        let (who, why) = (order.who, order.why);
        let asked =
            format!("{who} has all of the node stopped: {} instances, {} others{why}", stop.len(), others.len());
        self.events.record(format!("node/{node}"), "StoppedByHand", Severity::Info, asked);
        let (done, (results, failures)) = tokio::join!(
            self.stop_instances(order, stop.into_iter().collect(), Some(looked)),
            self.end_others(order, others)
        );
        Ok(done?.and(results, failures).and(alone, Vec::new()))
    }

    /// Stops instances for good, or until others take their place. `looked`: what their nodes said, where they were asked.
    async fn stop_instances(
        &self,
        order: &Order<'_>,
        ids: Vec<String>,
        looked: Option<Looked>,
    ) -> Result<Done, Status> {
        let before = self.fresh().await?;
        let changed = self.want_no_more(order, &before, &ids).await?;
        Ok(self.carry_out(order, &before, ids, changed, looked).await)
    }

    /// What follows when instances are wanted no more: with force their processes are ended. From here on nothing fails as a
    /// whole: what is stored is done, and what else went wrong is said of each. `before`: where each ran, which is not known
    /// any more of those that have ended meanwhile.
    async fn carry_out(
        &self,
        order: &Order<'_>,
        before: &Snapshot,
        ids: Vec<String>,
        changed: Vec<Changed>,
        looked: Option<Looked>,
    ) -> Done {
        let mut results: Vec<ProcessResult> = ids.iter().map(|id| draining(before, id, &changed, order)).collect();
        let snapshot = self.view.snapshot();
        let node = |r: &ProcessResult| r.process.as_ref().map(|p| p.node.clone()).filter(|node| !node.is_empty());
        let mut done = Done::default();
        if order.force {
            let looked = match looked {
                Some(looked) => looked,
                None => {
                    let nodes: BTreeSet<String> = results.iter().filter_map(node).collect();
                    self.look_at(nodes.into_iter().collect()).await
                }
            };
            (done.unreachable, done.not_listed) = (looked.unreachable, looked.not_listed);
            let runs = |p: &HostProcess| {
                p.owner() == ProcessOwner::Owned && ids.contains(&p.instance) && owned_elsewhere(&snapshot, p).is_none()
            };
            let (ended, failures) = self.end_all(order, looked.all.into_values().filter(runs).collect(), true).await;
            done.unreachable.extend(failures);
            for ended in ended {
                let instance = |r: &ProcessResult| r.process.as_ref().map(|p| p.instance.clone());
                let open = |r: &ProcessResult| r.action() == ProcessAction::Draining;
                match results.iter_mut().find(|r| open(r) && instance(r) == instance(&ended)) {
                    Some(result) => *result = ended,
                    None => results.push(ended),
                }
            }
        } else if let Some(looked) = looked {
            (done.unreachable, done.not_listed) = (looked.unreachable, looked.not_listed);
        }
        for result in results.iter_mut().filter(|r| r.action() == ProcessAction::Draining) {
            let Some(node) = node(result) else { continue };
            if !snapshot.sessions.contains_key(&node) || done.unreachable.iter().any(|failure| failure.node == node) {
                result.message.push_str(&format!("; node {node} is away: it ends when that is back"));
            }
        }
        done.results = results;
        done
    }

    /// Who had what stopped: with each instance, and with its deployment, which outlives it.
    pub(super) fn tell(&self, snapshot: &Snapshot, order: &Order<'_>, changed: &Changed) {
        let Order { who, why, .. } = order;
        let how = if order.force { "at once" } else { "after draining" };
        let Changed { deployment, stopped, replicas } = changed;
        for id in stopped.iter().take(TOLD_MAX) {
            let node = snapshot.claims.get(id).map(|claim| claim.value.node.as_str());
            let asked = format!("{who} has {id} stopped {how}{why}");
            self.events.record_on_node(node, id, "StoppedByHand", Severity::Info, asked);
        }
        if stopped.is_empty() && replicas.is_none() {
            return;
        }
        let named = stopped.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = stopped.len().saturating_sub(NAMED_MAX);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let fewer = replicas.map(|(from, to)| format!(", from {from} to {to} replicas")).unwrap_or_default();
        let what = format!("{who} has {named}{more} stopped {how}{fewer}{why}");
        self.events.record(format!("deployment/{deployment}"), "StoppedByHand", Severity::Info, what);
    }
}

impl Done {
    fn and(mut self, results: Vec<ProcessResult>, unreachable: Vec<NodeFailure>) -> Self {
        self.results.extend(results);
        self.unreachable.extend(unreachable);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::snapshot::Stored;
    use drover_proto::{store::v1 as record, v1::DeploymentSpec};
    use std::sync::Arc;

    fn stored<T>(value: T) -> Arc<Stored<T>> {
        Arc::new(Stored { value, create_revision: 1, mod_revision: 1 })
    }

    #[test]
    fn a_name_is_a_deployments_and_else_that_of_a_model() {
        let mut snapshot = Snapshot::default();
        for (name, model) in [("tiny", ""), ("tiny-b", "tiny"), ("x", "chat"), ("y", "chat")] {
            let spec =
                Some(DeploymentSpec { name: name.to_owned(), model: model.to_owned(), ..DeploymentSpec::default() });
            snapshot
                .deployments
                .insert(name.to_owned(), stored(record::Deployment { spec, ..record::Deployment::default() }));
        }
        assert_eq!(served(&snapshot, "tiny"), ["tiny"], "tiny-b serves that model too, but was not named");
        assert_eq!(served(&snapshot, "chat"), ["x", "y"]);
        assert_eq!(served(&snapshot, "none"), Vec::<&String>::new());
    }

    #[test]
    fn a_process_whose_instance_went_elsewhere_does_not_stand_for_it() {
        let mut snapshot = Snapshot::default();
        let claim = record::Claim { node: "b".to_owned(), ..record::Claim::default() };
        snapshot.claims.insert("tiny-222222".to_owned(), stored(claim));
        let process = |node: &str| HostProcess {
            node: node.to_owned(),
            instance: "tiny-222222".to_owned(),
            ..HostProcess::default()
        };
        assert_eq!(owned_elsewhere(&snapshot, &process("a")), Some("b"));
        assert_eq!(owned_elsewhere(&snapshot, &process("b")), None);
        assert_eq!(owned_elsewhere(&Snapshot::default(), &process("a")), None, "nobody owns it");
        let told = superseded(process("a"), "b");
        assert!(told.action() == ProcessAction::LeftAlone && told.message.contains("owned by node b"), "{told:?}");
    }
}
